"""Export: names, shapes, parity with ONNX Runtime, and one clear line where it cannot be done."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnxruntime = pytest.importorskip("onnxruntime")

from onnx import numpy_helper  # noqa: E402
from torch import nn  # noqa: E402

from sparsify_deploy.errors import ModelError  # noqa: E402
from sparsify_deploy.export import onnx as onnx_export  # noqa: E402
from sparsify_deploy.export.onnx import export  # noqa: E402
from sparsify_deploy.export.parity import compare  # noqa: E402
from sparsify_deploy.graph import file  # noqa: E402
from sparsify_deploy.graph.layers import weight_layers  # noqa: E402
from sparsify_deploy.types import outputs_of  # noqa: E402


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class TwoInputs(nn.Module):
    """Two inputs, named outputs, a Linear on sequences, a dropout."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Dropout(0.9))
        self.token = nn.Linear(8, 6)
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, image, offset):
        tokens = self.token(self.features(image).flatten(2).transpose(1, 2)) * self.scale
        return {"tokens": tokens, "pooled": tokens.mean(1) + offset}


def batch(size):
    generator = torch.Generator().manual_seed(size)
    return {
        "offset": torch.randn(size, 6, generator=generator),
        "image": torch.randn(size, 3, 8, 8, generator=generator),
        "target": torch.zeros(size),
    }


def run(path, fields):
    session = onnxruntime.InferenceSession(str(path))
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {k: v.numpy() for k, v in fields.items()}), strict=True))


def test_names_shapes_values(tmp_path):
    model, path = TwoInputs().train(), tmp_path / "m.onnx"
    export(model, batch(2), ("image", "offset"), path)
    assert model.training
    proto = file.load(path)
    assert [(x.name, x.shape) for x in file.inputs(proto)] == [("image", (None, 3, 8, 8)), ("offset", (None, 6))]
    assert [x.name for x in file.outputs(proto)] == ["tokens", "pooled"]
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(stored[name], parameter.detach().numpy())
    fields = {name: batch(5)[name] for name in ("image", "offset")}
    with torch.no_grad():
        expected = {k: v.numpy() for k, v in outputs_of(model.eval(), fields, ("image", "offset")).items()}
    parity = compare(expected, run(path, fields))
    assert parity.max_relative < 1e-5
    assert parity.examples == 5
    assert [(x.name, x.weight, x.shape) for x in weight_layers(proto)] == [
        ("features.0", "features.0.weight", (8, 3, 3, 3)),
        ("token", "token.weight", (6, 8)),
    ]


def test_a_fixed_batch(tmp_path):
    path = tmp_path / "m.onnx"
    export(TwoInputs(), batch(2), ("image", "offset"), path, dynamic_batch=False)
    assert file.inputs(file.load(path))[0].shape == (2, 3, 8, 8)


def test_opset_is_the_one_asked_for(tmp_path):
    export(TwoInputs(), batch(2), ("image", "offset"), tmp_path / "m.onnx", opset=14)
    assert file.opset(file.load(tmp_path / "m.onnx")) == 14


def test_the_same_model_gives_the_same_bytes(tmp_path):
    model = TwoInputs()
    for name in ("a", "b"):
        export(model, batch(2), ("image", "offset"), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_equal_weights_keep_their_own_names(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].load_state_dict(model[0].state_dict())
    export(model, {"x": torch.randn(2, 4)}, ("x",), tmp_path / "m.onnx")
    assert [layer.weight for layer in weight_layers(file.load(tmp_path / "m.onnx"))] == ["0.weight", "2.weight"]


def test_modes_and_statistics_are_left_as_found(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)).train()
    model[2].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    export(model, {"x": torch.randn(2, 3, 4, 4)}, ("x",), tmp_path / "m.onnx")
    assert [part.training for part in model] == [True, True, False]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x):
        return self.block(x)


def test_attention_is_kept_off_the_fused_kernel(tmp_path):
    model, x = Attention().eval(), torch.randn(3, 5, 8)
    export(model, {"x": x}, ("x",), tmp_path / "m.onnx")
    assert torch.backends.mha.get_fastpath_enabled()
    parity = compare({"output": model(x).detach().numpy()}, run(tmp_path / "m.onnx", {"x": x}))
    assert parity.max_relative < 1e-5


class Unsupported(nn.Module):
    def forward(self, x):
        return torch.special.i0e(x)


class NoTensor(nn.Module):
    def forward(self, x):
        return {"y": x + 1, "count": 3}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Unsupported(), r"Unsupported cannot be exported to ONNX opset 17: .*special_i0e"),
        (NoTensor(), "'count' is a int"),
    ],
)
def test_what_cannot_be_exported_is_one_line(model, message, tmp_path, capfd):
    model.train()
    with pytest.raises(ModelError, match=message) as caught:
        export(model, {"x": torch.randn(2, 3)}, ("x",), tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)
    assert model.training
    assert capfd.readouterr() == ("", "")


def test_too_large_for_one_file(monkeypatch, tmp_path):
    monkeypatch.setattr(onnx_export, "_PROTOBUF_LIMIT_BYTES", 100)
    with pytest.raises(ModelError, match="more than the 2 GiB"):
        export(TwoInputs(), batch(2), ("image", "offset"), tmp_path / "m.onnx")
