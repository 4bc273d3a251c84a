"""Both flavours of Q/DQ from one calibration: they answer alike, and ONNX Runtime has integer kernels for its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sparsify_deploy.errors import ModelError
from sparsify_deploy.export.onnx import export
from sparsify_deploy.graph import file, flavour
from sparsify_deploy.graph.constants import Graph
from sparsify_deploy.graph.int8_weights import store_int8_weights_
from sparsify_deploy.graph.layers import weight_layers
from sparsify_deploy.quantization import int8
from sparsify_deploy.runtimes import openvino
from sparsify_deploy.stages.flavours import measured_ranges, write_onnxruntime

pytest.importorskip("modelopt")
onnxruntime = pytest.importorskip("onnxruntime")


class Residual(nn.Module):
    """Conv-BN-ReLU, max pooling, an identity block and a downsampling one, average pooling, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.pool = nn.MaxPool2d(2)
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.c, self.d = nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.down = nn.Conv2d(16, 32, 1, stride=2)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.norm(self.stem(image))))
        x = torch.relu(self.b(torch.relu(self.a(x))) + x)
        x = torch.relu(self.d(torch.relu(self.c(x))) + self.down(x))
        pooled: Tensor = self.fc(self.average(x).flatten(1))
        return pooled


class Depthwise(nn.Module):
    """Two inverted bottlenecks with ReLU6, the second with a residual add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.wide, self.deep = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.narrow = nn.Conv2d(32, 16, 1)
        self.fc = nn.Linear(16, 10)
        self.relu6 = nn.ReLU6()

    def forward(self, image: Tensor) -> Tensor:
        x = self.relu6(self.stem(image))
        x = x + self.narrow(self.relu6(self.deep(self.relu6(self.wide(x)))))
        pooled: Tensor = self.fc(self.relu6(x).mean((2, 3)))
        return pooled


class Perceptron(nn.Module):
    """The MLP of a transformer encoder, with its residual add and LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(32), nn.LayerNorm(32)
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = image + self.down(torch.relu(self.up(self.norm(image))))
        answers: Tensor = self.head(self.last(x).mean(1))
        return answers


class Joined(nn.Module):
    """Two concatenations, one inside the other, of values with and without a sign."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(3, 16, 1)
        self.c, self.d = nn.Conv2d(32, 16, 3, padding=1), nn.Conv2d(48, 16, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(16 * 8 * 8, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.cat([torch.relu(self.a(image)), self.b(image)], 1)
        x = self.pool(torch.cat([torch.relu(self.c(x)), x], 1))
        answers: Tensor = self.fc(torch.relu(self.d(x)).flatten(1))
        return answers


SHAPES: dict[type[nn.Module], tuple[int, ...]] = {
    Residual: (3, 16, 16),
    Depthwise: (3, 16, 16),
    Perceptron: (6, 32),
    Joined: (3, 16, 16),
}
NETS = list(SHAPES)
Make = Callable[[type[nn.Module]], tuple[nn.Module, Path, Path, flavour.Rewritten]]


def images(kind: type[nn.Module], count: int, seed: int) -> Tensor:
    return torch.randn(count, *SHAPES[kind], generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A calibrated network and its files in the `tensorrt` and the `onnxruntime` flavour, made once."""
    done: dict[type[nn.Module], tuple[nn.Module, Path, Path, flavour.Rewritten]] = {}

    def make(kind: type[nn.Module]) -> tuple[nn.Module, Path, Path, flavour.Rewritten]:
        if kind not in done:
            folder = tmp_path_factory.mktemp(kind.__name__)
            torch.manual_seed(0)
            model = kind().train()
            with torch.no_grad():
                model(images(kind, 32, 1))
            quantized = int8.prepare(model.eval(), int8.Int8Settings())
            calibration = images(kind, 64, 2)
            int8.calibrate_(quantized, [{"image": calibration}], ["image"])
            module = quantized.module.eval()
            source, target = folder / "tensorrt.onnx", folder / "onnxruntime.onnx"
            export(module, {"image": calibration[:1]}, ["image"], source)
            written = file.load(source)
            store_int8_weights_(written)
            file.save(written, source)
            halves = [{"image": half.numpy()} for half in torch.split(calibration, 32)]
            done[kind] = module, source, target, write_onnxruntime(source, target, halves)
        return done[kind]

    return make


def run(path: Path, image: Tensor, *, optimise: bool = True) -> NDArray[Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found: NDArray[Any] = session.run(None, {"image": image.numpy()})[0]
    return found


def optimised(path: Path) -> Counter[str]:
    """Operators as ONNX Runtime runs them."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path.with_suffix(".optimised.onnx"))
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


@pytest.mark.parametrize("kind", NETS, ids=lambda kind: kind.__name__)
def test_torch_and_both_flavours_answer_alike(made: Make, kind: type[nn.Module]) -> None:
    module, source, target, _ = made(kind)
    fresh = images(kind, 256, 3)
    with torch.no_grad():
        expected = module(fresh).numpy()
    for path in (source, target):
        found = run(path, fresh)
        assert np.abs(found - expected).max() < 0.08 * np.abs(expected).max(), path.name
        assert np.linalg.norm(found - expected) < 0.03 * np.linalg.norm(expected), path.name
        assert (found.argmax(1) == expected.argmax(1)).mean() > 0.97, path.name


@pytest.mark.parametrize("kind", [Residual, Depthwise], ids=lambda kind: kind.__name__)
def test_onnx_runtime_has_integer_kernels_for_all_of_its_flavour(made: Make, kind: type[nn.Module]) -> None:
    _, source, target, rewritten = made(kind)
    convolutions = sum(node.op_type == "Conv" for node in file.load(source).graph.node)
    before, after = optimised(source), optimised(target)
    assert before["QLinearConv"] < convolutions
    assert after["QLinearConv"] == convolutions
    assert after["QGemm"] == 1
    assert after["QLinearAdd"] == (2 if kind is Residual else 1)
    left = {"Conv", "FusedConv", "Add", "Relu", "Clip", "Gemm"}
    assert not left & set(after), after
    assert rewritten.float_layers == {}


def test_linear_layers_multiply_integers(made: Make) -> None:
    _, _, target, _ = made(Perceptron)
    found = optimised(target)
    assert found["MatMulIntegerToFloat"] + found["QLinearMatMul"] + found["QGemm"] == 3, found
    assert not {"MatMul", "Gemm"} & set(found)


@pytest.mark.parametrize("kind", NETS, ids=lambda kind: kind.__name__)
def test_the_weights_and_their_patterns_are_the_same_in_both(made: Make, kind: type[nn.Module]) -> None:
    _, source, target, _ = made(kind)
    before, after = (weight_layers(file.load(path)) for path in (source, target))
    assert [layer.weight for layer in before] == [layer.weight for layer in after]
    for one, other in zip(before, after, strict=True):
        assert other.precision == "INT8"
        np.testing.assert_array_equal(one.values, other.values)


def scales_of(model: onnx.ModelProto) -> dict[str, tuple[float, str, int]]:
    """Scale, type and zero point by the activation that is quantised."""
    graph = Graph(model)
    found = {}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            scale, zero = graph.weight(node.input[1]), graph.weight(node.input[2])
            assert scale is not None
            assert zero is not None
            found[node.input[0]] = (float(scale.values), zero.values.dtype.name, int(zero.values))
    return found


def test_trained_scales_stay_and_what_follows_a_relu_is_unsigned(made: Make) -> None:
    _, source, target, rewritten = made(Residual)
    before, after = scales_of(file.load(source)), scales_of(file.load(target))
    assert before["image"][1:] == ("int8", 0)
    assert after["image"] == (before["image"][0], "uint8", 128)
    shared = set(before) & set(after)
    assert len(shared) >= 5
    for name in shared:
        assert after[name][0] == before[name][0], name
        assert after[name][1:] in (("uint8", 128), ("uint8", 0))
    assert sum(after[name][2] == 0 for name in shared) >= 4
    assert rewritten.measured
    assert set(rewritten.measured).isdisjoint(before)


def test_before_a_clip_the_trained_range_is_spread_over_all_steps(made: Make) -> None:
    _, source, target, _ = made(Depthwise)
    before, after = scales_of(file.load(source)), scales_of(file.load(target))
    clipped = [node.output[0] for node in file.load(source).graph.node if node.op_type == "Clip"]
    both = [name for name in clipped if name in before and name in after]
    assert both
    for name in both:
        assert after[name][0] == pytest.approx(before[name][0] * 127 / 255, rel=1e-5)
        assert np.float32(after[name][0]) * np.float32(255) <= 6.0


def test_ranges_are_measured_over_all_batches_and_with_a_fixed_batch(made: Make, tmp_path: Path) -> None:
    _, source, _, rewritten = made(Residual)
    calibration = images(Residual, 4, 5)
    loud = torch.cat([calibration, 3 * calibration[:1]])
    names = flavour.unranged(file.load(source))
    assert names == rewritten.measured
    scratch = tmp_path / "tapped.onnx"
    whole = measured_ranges(source, names, [{"image": loud.numpy()}], scratch)
    parts = measured_ranges(source, names, [{"image": part.numpy()} for part in torch.split(loud, 1)], scratch)
    assert not scratch.exists()
    quiet = measured_ranges(source, names, [{"image": calibration.numpy()}], scratch)
    for name in names:
        assert whole[name] == pytest.approx(parts[name], rel=1e-4)
    assert any(quiet[name] != pytest.approx(whole[name], rel=1e-3) for name in names)


@pytest.mark.parametrize("kind", NETS, ids=lambda kind: kind.__name__)
def test_unsigned_activations_for_openvino_change_no_value(made: Make, kind: type[nn.Module], tmp_path: Path) -> None:
    _, source, _, _ = made(kind)
    model = file.load(source)
    changed = flavour.unsigned_(model)
    path = tmp_path / "unsigned.onnx"
    file.check(model, path)
    file.save(model, path)
    loud = 4 * images(kind, 64, 6)  # beyond the calibrated range, where INT8 saturates at 127
    before, after = (run(file_, loud, optimise=False) for file_ in (source, path))
    if kind is Residual:
        assert changed >= 4
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-4 * np.abs(before).max())


@pytest.mark.parametrize("kind", NETS, ids=lambda kind: kind.__name__)
def test_openvino_computes_what_the_file_says(made: Make, kind: type[nn.Module], tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    _, source, _, _ = made(kind)
    engine = tmp_path / "model.xml"
    openvino.build(source, engine, openvino.Params())
    loud = 2 * images(kind, 32, 7)
    with openvino.open(engine, openvino.Params(), threads=1, shapes={"image": tuple(loud.shape)}) as session:
        session.bind({"image": loud.numpy()})
        session.execute()
        (found,) = session.fetch().values()
    expected = run(source, loud, optimise=False)
    assert np.linalg.norm(found - expected) < 0.005 * np.linalg.norm(expected)


def test_a_missing_range_and_a_foreign_file_are_refused_by_name(made: Make) -> None:
    _, source, target, rewritten = made(Residual)
    with pytest.raises(ModelError, match="range was not measured"):
        flavour.to_onnxruntime_(file.load(source), {})
    wrong = dict.fromkeys(rewritten.measured, (0.0, float("nan")))
    with pytest.raises(ModelError, match="not finite"):
        flavour.to_onnxruntime_(file.load(source), wrong)
    with pytest.raises(ModelError, match="this one is uint8"):
        flavour.unranged(file.load(target))
