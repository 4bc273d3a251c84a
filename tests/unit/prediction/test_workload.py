"""How operators become layers, and that an ONNX file and the torch network it came from agree layer by layer."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from sparsify_deploy.graph.workload import Tally, Workload

if TYPE_CHECKING:
    from torch import Tensor, nn


def test_an_activation_and_a_residual_add_fuse_into_the_last_layer_and_charge_the_other_side() -> None:
    tally = Tally()
    tally.feed("x", 100)
    tally.layer("a", "Conv", ["x"], [("a", 200)], macs=7, shape=(2, 1), parameter="a.weight")
    tally.pointwise("relu", ["a"], [("r", 200)])
    tally.layer("b", "Conv", ["r", "constant"], [("b", 200)], macs=9, shape=(2, 2), parameter="b.weight")
    tally.pointwise("add", ["b", "r"], [("s", 200)])
    first, second = tally.done(["s"])
    assert (first.read, first.extra, first.written, first.macs) == (100, 0, 200, 7)
    # r is read once: as b's own input, which the add finds at hand.
    assert (second.read, second.extra, second.written, second.weights) == (200, 0, 200, 4)


def test_a_residual_from_further_back_is_read_besides() -> None:
    tally = Tally()
    tally.feed("x", 100)
    tally.layer("a", "Conv", ["x"], [("a", 200)])
    tally.layer("b", "Conv", ["a"], [("b", 300)])
    tally.layer("c", "Conv", ["b"], [("c", 200)])
    tally.pointwise("add", ["a", "c"], [("s", 200)])
    assert [(w.read, w.extra, w.written) for w in tally.done(["s"])] == [(100, 0, 200), (200, 0, 300), (500, 200, 200)]


def test_an_attention_head_is_one_layer_that_neither_writes_nor_reads_its_scores() -> None:
    tally = Tally()
    tally.feed("x", 64)
    for name in "qkv":
        tally.layer(name, "Linear", ["x"], [(name, 64)], macs=1)
    tally.move(["k"], [("kt", 64)])
    tally.layer("qk", "MatMul", ["q", "kt"], [("scores", 1000)], macs=5)
    tally.pointwise("scale", ["scores"], [("scaled", 1000)])
    tally.layer("softmax", "Softmax", ["scaled"], [("p", 1000)])
    tally.layer("pv", "MatMul", ["p", "v"], [("o", 64)], macs=6)
    tally.layer("next", "MatMul", ["o", "x"], [("n", 10)], macs=2)
    found = tally.done(["n"])
    assert [work.op for work in found] == ["Linear", "Linear", "Linear", "Attention", "MatMul"]
    attention = found[3]
    assert (attention.macs, attention.read, attention.written) == (11, 192, 64)


def test_what_depends_on_no_input_is_no_work() -> None:
    tally = Tally()
    tally.feed("x", 1)
    tally.layer("positions", "Embedding", ["indices"], [("p", 50)])
    tally.pointwise("add", ["p", "q"], [("s", 50)])
    tally.move(["s"], [("t", 50)])
    assert tally.done(["t"]) == ()


def test_softmax_alone_is_a_layer_and_decomposed_normalisation_is_one() -> None:
    tally = Tally()
    tally.feed("x", 80)
    tally.layer("mean", "Reduce", ["x"], [("m", 8)])
    tally.pointwise("sub", ["x", "m"], [("d", 80)])
    tally.pointwise("square", ["d"], [("d2", 80)])
    tally.layer("variance", "Reduce", ["d2"], [("v", 8)])
    tally.pointwise("div", ["d", "v"], [("n", 80)])
    tally.layer("softmax", "Softmax", ["n"], [("y", 80)])
    assert [(w.name, w.read, w.written) for w in tally.done(["y"])] == [("mean", 80, 80), ("softmax", 80, 80)]


# -- torch and ONNX ------------------------------------------------------------------------------------------------


def facts(work: Workload) -> tuple[Any, ...]:
    """Everything but the names of what has no weight, which each side has its own for."""
    return (work.parameter, work.op, work.shape, work.groups, work.macs, work.read, work.written, work.extra)


def agree(model: nn.Module, example: Tensor, folder: Path, opset: int = 17) -> tuple[Workload, ...]:
    from sparsify_deploy.export.onnx import export
    from sparsify_deploy.graph import file, shapes
    from sparsify_deploy.stages.workloads import network_workloads
    from sparsify_deploy.training.cost import forward_flops

    batch = {"x": example}
    by_torch = network_workloads(model, batch, ("x",))
    export(model, batch, ("x",), folder / "model.onnx", opset=opset)
    by_onnx = shapes.workloads(file.load(folder / "model.onnx"))
    assert [facts(work) for work in by_torch] == [facts(work) for work in by_onnx]
    assert 2 * sum(work.macs for work in by_torch) == sum(forward_flops(model, batch, ("x",)).values())
    return by_torch


def test_resnet18_layer_by_layer(torchvision: ModuleType, tmp_path: Path) -> None:
    import torch

    found = agree(torchvision.models.resnet18(num_classes=10), torch.zeros(1, 3, 64, 64), tmp_path)
    assert [work.op for work in found].count("Conv") == 20
    by_name = {work.name: work for work in found}
    last = by_name["layer4.1.conv2"]  # 512 x 2 x 2 in and out, and the residual
    assert last == Workload(
        "layer4.1.conv2", "Conv", 512 * 512 * 9 * 4, 4096, 2048, (512, 512, 3, 3), 1, "layer4.1.conv2.weight", 2048
    )
    assert sum(work.extra > 0 for work in found) == 8


def test_mobilenet_v2_layer_by_layer(torchvision: ModuleType, tmp_path: Path) -> None:
    import torch

    found = agree(torchvision.models.mobilenet_v2(num_classes=10), torch.zeros(1, 3, 32, 32), tmp_path)
    grouped = [work for work in found if work.groups > 1]
    assert len(grouped) == 17
    assert all(work.macs == work.written * 9 for work in grouped)


@pytest.mark.parametrize("opset", [16, 17])
def test_a_transformer_encoder_layer_by_layer(opset: int, tmp_path: Path) -> None:
    import torch
    from torch import nn

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu")
            self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(32, 5)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.layers(x).mean(1))
            return out

    model, example = Encoder(), torch.zeros(1, 16, 32)
    if opset == 16:  # without LayerNormalization the file spells it out: as one layer of another kind
        from sparsify_deploy.export.onnx import export
        from sparsify_deploy.graph import file, shapes
        from sparsify_deploy.stages.workloads import network_workloads

        export(model, {"x": example}, ("x",), tmp_path / "model.onnx", opset=16)
        by_onnx = shapes.workloads(file.load(tmp_path / "model.onnx"))
        by_torch = network_workloads(model, {"x": example}, ("x",))
        assert [facts(w)[2:] for w in by_onnx] == [facts(w)[2:] for w in by_torch]
        return
    found = agree(model, example, tmp_path)
    assert [work.op for work in found].count("Attention") == 2
    assert [work.op for work in found].count("LayerNorm") == 4
    packed = next(work for work in found if work.parameter.endswith("in_proj_weight"))
    assert (packed.shape, packed.written) == ((96, 32), 3 * 16 * 32)


def test_the_network_is_left_as_it_was(tmp_path: Path) -> None:
    import torch
    from torch import nn

    from sparsify_deploy.stages.workloads import network_workloads

    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fused = torch.backends.mha.get_fastpath_enabled()
    (conv, linear) = network_workloads(model, {"x": torch.ones(1, 1, 4, 4)}, ("x",))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled() is fused
    assert (conv.macs, conv.read, conv.written) == (4 * 9 * 4, 16, 16)
    assert (linear.name, linear.macs, linear.shape) == ("4", 32, (2, 16))


def test_transposed_convolutions_count_their_products_and_have_no_weight_to_prune(tmp_path: Path) -> None:
    import torch
    from torch import nn

    found = agree(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ConvTranspose2d(4, 2, 2)), torch.zeros(1, 1, 5, 5), tmp_path)
    assert [(work.op, work.macs, work.shape) for work in found] == [
        ("Conv", 4 * 9 * 9, (4, 1, 3, 3)),
        ("ConvTranspose", 4 * 9 * 2 * 4, ()),
    ]


def test_an_open_axis_beside_the_batch_is_a_model_error() -> None:
    from onnx import TensorProto, helper

    from sparsify_deploy.errors import ModelError
    from sparsify_deploy.graph import shapes

    def model(axes: list[int | str]) -> Any:
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, axes)
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        return helper.make_model(helper.make_graph([helper.make_node("Softmax", ["x"], ["y"])], "g", [x], [y]))

    (work,) = shapes.workloads(model(["batch", 8]))
    assert (work.op, work.read, work.written) == ("Softmax", 8, 8)
    with pytest.raises(ModelError, match="'x' leaves axis 1 open"):
        shapes.workloads(model(["batch", "tokens"]))
