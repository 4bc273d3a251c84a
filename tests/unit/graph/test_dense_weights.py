"""The stand-in for a dense twin: the same graph, no zeros, the same names."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsify_deploy.graph.dense_weights import fill_zeros_
from sparsify_deploy.graph.layers import weight_layers


def net(weight: np.ndarray, *, quantise: str = "") -> onnx.ModelProto:
    """A Gemm of `weight` `(C, K)`; `quantise` is "DQ" for stored integers, "Q+DQ" for floats behind both, else none."""
    nodes, stored = [], [numpy_helper.from_array(weight, "fc.weight")]
    source = "fc.weight"
    if quantise:
        stored += [
            numpy_helper.from_array(np.array([0.01] * weight.shape[1], np.float32), "scale"),
            numpy_helper.from_array(np.zeros(weight.shape[1], np.int8), "zero"),
        ]
        if quantise == "Q+DQ":
            nodes.append(helper.make_node("QuantizeLinear", [source, "scale", "zero"], ["q"], axis=1))
            source = "q"
        nodes.append(helper.make_node("DequantizeLinear", [source, "scale", "zero"], ["w"], axis=1))
        source = "w"
    nodes.append(helper.make_node("Gemm", ["x", source, "bias"], ["y"], name="fc"))
    stored.append(numpy_helper.from_array(np.zeros(weight.shape[1], np.float32), "bias"))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "net",
        [value("x", TensorProto.FLOAT, ("n", weight.shape[0]))],
        [value("y", TensorProto.FLOAT, ("n", weight.shape[1]))],
        stored,
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


@pytest.mark.parametrize("quantise", ["", "DQ", "Q+DQ"])
def test_zeros_become_values_of_the_layers_range_and_nothing_else_changes(quantise: str) -> None:
    random = np.random.default_rng(1)
    weight = random.uniform(-1, 1, (64, 16)).astype(np.float32)
    if quantise == "DQ":
        weight = np.rint(weight * 100).astype(np.int8)
    weight[::2] = 0
    before = weight.copy()
    model = net(weight, quantise=quantise)
    names = [node.name for node in model.graph.node], [t.name for t in model.graph.initializer]
    assert fill_zeros_(model, seed=3) == int((before == 0).sum())
    assert ([node.name for node in model.graph.node], [t.name for t in model.graph.initializer]) == names
    found = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    after = found["fc.weight"]
    assert after.dtype == before.dtype
    assert np.array_equal(after[before != 0], before[before != 0])
    assert np.abs(after.astype(float)).max() == np.abs(before.astype(float)).max()
    assert not found["bias"].any(), "a bias is no weight"
    (layer,) = weight_layers(model)
    assert (layer.values != 0).all(), "what is multiplied by, behind Q/DQ too"
    onnx.checker.check_model(model)


def test_the_same_seed_gives_the_same_weights() -> None:
    weight = np.zeros((8, 8), np.float32)
    models = [net(weight) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        assert fill_zeros_(model, seed) == 64
    same, also, other = (model.SerializeToString() for model in models)
    assert same == also != other


def test_a_dense_model_is_left_as_it_is() -> None:
    model = net(np.ones((8, 8), np.float32))
    before = model.SerializeToString()
    assert fill_zeros_(model, 0) == 0
    assert model.SerializeToString() == before


def test_integers_so_small_that_a_quarter_rounds_to_zero_are_filled_all_the_same() -> None:
    weight = np.ones((64, 16), np.int8)
    weight[::2] = 0
    model = net(weight, quantise="DQ")
    fill_zeros_(model, seed=0)
    (layer,) = weight_layers(model)
    assert set(np.unique(layer.values)) == {-1, 1}
