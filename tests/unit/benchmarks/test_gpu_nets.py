"""The generated networks: what the package sees in them is what was meant, and they compute what they should."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import rigl_update
from gpu import nets
from gpu.graphs import LAYERS_ALONE, Builder, Placement, two_of_four
from gpu.nets import Spec, build, store_float_weights_, without_qdq

from sparsify_deploy import menu
from sparsify_deploy.graph import file
from sparsify_deploy.graph.eligibility import rule_of_thumb
from sparsify_deploy.graph.layers import weight_layers
from sparsify_deploy.graph.nm import violations
from sparsify_deploy.runtimes import onnxruntime

LAYERS = {"resnet50": 13, "bert": 12, "conv_chain": 3, "linear_chain": 3}
FLOAT_OUT = {
    "resnet50": {"fc"},
    "bert": {f"layer.{i}.{name}" for i in (0, 1) for name in ("attention.output", "output")},  # LayerNorm reads them
    "conv_chain": {"conv2"},
    "linear_chain": {"fc2"},
}
"""Small networks' layers whose output is not quantised as the package places Q/DQ."""


def ran(model: onnx.ModelProto, folder: Path, batch: int = 3) -> np.ndarray[Any, Any]:
    path = folder / "model.onnx"
    file.save(model, path)
    shape = [axis.dim_value for axis in model.graph.input[0].type.tensor_type.shape.dim][1:]
    values = np.random.default_rng(1).standard_normal((batch, *shape)).astype(np.float32)
    with onnxruntime.open(path, onnxruntime.Params()) as session:
        session.bind({"input": values})
        session.execute()
        return session.fetch()["output"]


def cosine(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    one, other = one.ravel().astype(float), other.ravel().astype(float)
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


@pytest.mark.parametrize("net", LAYERS)
def test_the_package_sees_the_layers_that_were_meant(net: str) -> None:
    for sparse in (False, True):
        layers = weight_layers(build(Spec(net, "small", Placement(), sparse)))
        assert len(layers) == LAYERS[net]
        assert all(layer.precision == "INT8" and layer.int8_in for layer in layers)
        float_out = {layer.name for layer in layers if not layer.int8_out}
        assert float_out == FLOAT_OUT[net]
        for layer in layers:
            held = layer.shape[1] % 4 == 0 and violations(layer.values, 2, 4) == 0
            assert held == (sparse and rule_of_thumb(layer.shape, 1, 4).ok), layer.name


@pytest.mark.parametrize("net", LAYERS)
def test_quantised_outputs_reach_every_layer(net: str) -> None:
    layers = weight_layers(build(Spec(net, "small", Placement(outputs=True), sparse=True)))
    assert all(layer.int8_in and layer.int8_out for layer in layers)


def test_layers_alone_leave_adds_attention_and_pooling_in_float() -> None:
    layers = weight_layers(build(Spec("resnet50", "small", LAYERS_ALONE)))
    ends = {layer.name for layer in layers if layer.name.endswith(("conv3", "downsample.0", "fc"))}
    assert {layer.name for layer in layers if not layer.int8_out} == ends
    layers = weight_layers(build(Spec("bert", "small", LAYERS_ALONE)))
    assert {layer.name for layer in layers if layer.int8_out} == {"layer.0.intermediate", "layer.1.intermediate"}


def test_a_quantised_stream_reaches_what_layer_norm_reads() -> None:
    layers = weight_layers(build(Spec("bert", "small", Placement(stream=True))))
    assert all(layer.int8_out for layer in layers)


@pytest.mark.parametrize("net", LAYERS)
@pytest.mark.parametrize("sparse", [False, True])
def test_int8_computes_nearly_the_float_net(net: str, sparse: bool, tmp_path: Path) -> None:
    floats, placed, everywhere = (
        ran(build(Spec(net, "small", placement, sparse)), tmp_path)
        for placement in (None, Placement(), Placement(outputs=True))
    )
    assert 0.3 < floats.std() < 3
    for quantised in (placed, everywhere):
        assert 0.998 < cosine(floats, quantised) < 1 - 1e-9


@pytest.mark.parametrize("net", LAYERS)
def test_weights_stored_as_integers_and_back(net: str, tmp_path: Path) -> None:
    floats = ran(build(Spec(net, "small", Placement(), sparse=True)), tmp_path)
    model = build(Spec(net, "small", Placement(), sparse=True, integers=True))
    stored = {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8 and t.dims}
    assert {f"{layer.name}.weight" for layer in weight_layers(model)} <= stored
    assert np.array_equal(ran(model, tmp_path), floats)
    assert store_float_weights_(model) == LAYERS[net]
    file.check(model, tmp_path)
    assert not any(tensor.dims and tensor.name.endswith(".weight") and tensor.data_type != onnx.TensorProto.FLOAT
                   for tensor in model.graph.initializer)  # fmt: skip
    assert np.array_equal(ran(model, tmp_path), floats)
    assert all(layer.precision == "INT8" for layer in weight_layers(model))
    assert store_float_weights_(model) == 0


@pytest.mark.parametrize("integers", [False, True])
def test_the_float_twin_of_an_int8_file(integers: bool, tmp_path: Path) -> None:
    spec = Spec("resnet50", "small", Placement(), integers=integers)
    model = build(spec)
    twin = without_qdq(model)
    file.check(twin, tmp_path)
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(file.operators(twin))
    assert "QuantizeLinear" in file.operators(model)  # the original is left alone
    original = {layer.name: layer for layer in weight_layers(build(Spec("resnet50", "small")))}
    for layer in weight_layers(twin):
        assert layer.precision == "FP32"
        step = np.abs(original[layer.name].values).reshape(len(layer.values), -1).max(1) / 127
        error = np.abs(layer.values - original[layer.name].values).reshape(len(layer.values), -1).max(1)
        assert (error <= 0.51 * step).all()
    assert cosine(ran(twin, tmp_path), ran(build(Spec("resnet50", "small")), tmp_path)) > 0.999


def test_two_of_four_keeps_the_larger_ones_along_input_channels() -> None:
    values = np.random.default_rng(0).standard_normal((3, 8, 2, 2)).astype(np.float32)
    kept = two_of_four(values)
    for k in range(3):
        for start in (0, 4):
            for r in range(2):
                for s in range(2):
                    group = values[k, start : start + 4, r, s]
                    expected = np.where(np.abs(group) >= np.sort(np.abs(group))[2], group, 0)
                    assert np.array_equal(kept[k, start : start + 4, r, s], expected)


def test_the_batch_is_free_or_fixed_and_files_are_named_apart() -> None:
    free, fixed = build(Spec("bert", "small")), build(Spec("bert", "small", batch=5))
    assert file.inputs(free)[0].shape == (None, 16, 64)
    assert file.inputs(fixed)[0].shape == file.outputs(fixed)[0].shape == (5, 16, 64)
    specs = [
        Spec(net, scale, placement, sparse, integers, batch, seed)
        for net in LAYERS
        for scale in ("full", "small")
        for placement in (None, Placement(), Placement(outputs=True), Placement(stream=True), LAYERS_ALONE)
        for sparse in (False, True)
        for integers in (False, True)
        for batch in (None, 1, 32)
        for seed in (0, 1)
    ]
    assert len({spec.name for spec in specs}) == len(specs)


def test_equal_seeds_make_equal_weights_in_every_placement() -> None:
    first, second = (build(Spec("bert", "small", placement)) for placement in (None, Placement(outputs=True)))
    weights = [{t.name: t.raw_data for t in m.graph.initializer if t.name.endswith(".weight")} for m in (first, second)]
    assert weights[0] == weights[1]
    other = build(Spec("bert", "small", seed=1))
    assert {t.name: t.raw_data for t in other.graph.initializer if t.name.endswith(".weight")} != weights[0]


class Shapes(Builder):
    """Remembers the shapes of weights and makes none."""

    def weight(self, name: str, shape: tuple[int, ...], power: float) -> str:
        self.shapes = [*getattr(self, "shapes", []), shape]
        return name


def test_full_scale_has_the_weights_of_the_real_networks() -> None:
    resnet, bert = Shapes(None, sparse=False), Shapes(None, sparse=False)
    assert nets.resnet50(resnet, "full")[0] == (3, 224, 224)
    assert sorted(resnet.shapes) == sorted(rigl_update.shapes().values())
    assert nets.bert(bert, "full")[0] == (128, 768)
    assert len(bert.shapes) == 72
    assert sum(map(math.prod, bert.shapes)) == 12 * (4 * 768 * 768 + 2 * 768 * 3072)


def test_the_command_writes_a_file_the_package_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "net.onnx"
    options = ["--net", "bert", "--scale", "small", "--precision", "int8", "--sparse", "--integers", "--batch", "2"]
    assert nets.main([*options, "-o", str(path)]) == 0
    assert str(path) in capsys.readouterr().out
    assert all(layer.precision == "INT8" for layer in weight_layers(file.load(path)))


@pytest.mark.parametrize("spec", [
    Spec("resnet50", "small", Placement(), sparse=True, batch=4),
    Spec("resnet50", "small", Placement(outputs=True), sparse=True, integers=True, batch=4),
    Spec("bert", "small", Placement(), sparse=True, batch=4),
    Spec("bert", "small", batch=4),
], ids=lambda spec: spec.name)  # fmt: skip
def test_nvidias_own_parser_and_builder_take_them(spec: Spec, tmp_path: Path) -> None:
    runtime = menu.entry("runtimes", "tensorrt_rtx")
    if (reason := runtime.unavailable_reason()) is not None:
        pytest.skip(reason)
    notes = runtime.build(nets.write(spec, tmp_path), tmp_path / "net.rtx.engine", runtime.Params())
    assert notes.facts["layers_parsed"] > LAYERS[spec.net]
