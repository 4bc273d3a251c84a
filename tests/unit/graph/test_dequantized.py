"""The graph without Q/DQ computes what the quantised one does, but for the rounding of activations."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from sparsify_deploy.errors import ModelError
from sparsify_deploy.graph.dequantized import integer_operators, is_quantised, without_quantizers_


def model(nodes: list[Any], constants: dict[str, Any], outputs: tuple[str, ...] = ("y",)) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["a", "b"]) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    onnx.checker.check_model(made)
    return made


def run(made: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    (first, *_) = ReferenceEvaluator(made).run(None, {"x": x})
    return np.asarray(first)


X = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
WEIGHT = np.random.default_rng(1).integers(-127, 128, (4, 3)).astype(np.int8)
CONSTANTS = {
    "s": np.float32(0.03),
    "z": np.int8(0),
    "w": WEIGHT,
    "ws": np.array([0.01, 0.02, 0.03], np.float32),
    "wz": np.array([0, 3, -5], np.int8),
}
NODES = [
    helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "q"),
    helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "d"),
    helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], "wd", axis=1),
    helper.make_node("MatMul", ["d", "wd"], ["y"], "matmul"),
]


def test_integers_become_the_floats_they_stand_for_and_activations_are_not_rounded() -> None:
    made = model(NODES, CONSTANTS)
    assert is_quantised(made)
    assert without_quantizers_(made) == 3
    onnx.checker.check_model(made)
    assert [node.op_type for node in made.graph.node] == ["MatMul"]
    weight = (WEIGHT.astype(np.float64) - CONSTANTS["wz"]) * CONSTANTS["ws"]
    np.testing.assert_allclose(run(made, X), X.astype(np.float64) @ weight, rtol=1e-5, atol=1e-5)
    assert not is_quantised(made)
    assert {tensor.name for tensor in made.graph.initializer} == {"wd"}


def test_it_is_close_to_the_quantised_graph() -> None:
    before = run(model(NODES, CONSTANTS), X)
    made = model(NODES, CONSTANTS)
    without_quantizers_(made)
    after = run(made, X)
    assert 0 < np.abs(after - before).max() < 0.1 * np.abs(before).max()


def test_weights_of_another_type_alone_are_no_quantised_activations() -> None:
    made = model(
        [NODES[2], helper.make_node("MatMul", ["x", "wd"], ["y"])], {k: CONSTANTS[k] for k in ("w", "ws", "wz")}
    )
    assert not is_quantised(made)


@pytest.mark.parametrize("zero", [np.uint8(0), np.int8(-128)])
def test_a_q_that_holds_nothing_negative_leaves_a_relu(zero: Any) -> None:
    nodes = [
        helper.make_node("Add", ["x", "one"], ["sum"], "sum"),
        helper.make_node("QuantizeLinear", ["sum", "s", "z"], ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], "d"),
    ]
    made = model(nodes, {"s": np.float32(0.02), "z": zero, "one": np.float32(1)})
    without_quantizers_(made)
    onnx.checker.check_model(made)
    np.testing.assert_allclose(run(made, X), np.maximum(X + 1, 0), rtol=1e-6)


def test_behind_a_relu_it_leaves_none() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], "relu"),
        helper.make_node("QuantizeLinear", ["r", "s", "z"], ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], "d"),
    ]
    made = model(nodes, {"s": np.float32(0.02), "z": np.uint8(0)})
    without_quantizers_(made)
    assert [node.op_type for node in made.graph.node] == ["Relu", "Identity"]
    np.testing.assert_array_equal(run(made, X), np.maximum(X, 0))


@pytest.mark.parametrize(("least", "kinds"), [(-1.0, ["Clip", "Relu", "Identity"]), (0.0, ["Clip", "Identity"])])
def test_behind_a_clip_it_leaves_one_where_the_clip_lets_negatives_through(least: float, kinds: list[str]) -> None:
    nodes = [
        helper.make_node("Clip", ["x", "least", "most"], ["c"], "clip"),
        helper.make_node("QuantizeLinear", ["c", "s", "z"], ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], "d"),
    ]
    bounds = {"least": np.float32(least), "most": np.float32(6)}
    made = model(nodes, {"s": np.float32(0.03), "z": np.uint8(0), **bounds})
    without_quantizers_(made)
    assert [node.op_type for node in made.graph.node] == kinds
    np.testing.assert_array_equal(run(made, X), np.clip(X, 0, 6))


def test_what_moves_integers_about_moves_floats() -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "q"),
        helper.make_node("Transpose", ["q"], ["t"], "t", perm=[1, 0]),
        helper.make_node("DequantizeLinear", ["t", "s", "z"], ["d"], "d"),
        helper.make_node("Neg", ["d"], ["y"], "neg"),
    ]
    made = model(nodes, {"s": np.float32(0.02), "z": np.int8(0)})
    without_quantizers_(made)
    onnx.checker.check_model(made)
    np.testing.assert_array_equal(run(made, X), -X.T)


def test_operators_on_integers_are_refused_by_name() -> None:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "qs", "qz"], "dynamic"),
        helper.make_node("DequantizeLinear", ["q", "qs", "qz"], ["y"], "d"),
    ]
    made = model(nodes, {})
    assert integer_operators(made) == ("DynamicQuantizeLinear",)
    with pytest.raises(ModelError, match=r"^DynamicQuantizeLinear compute on integers"):
        without_quantizers_(made)


def test_a_scale_that_is_computed_is_refused_with_the_node() -> None:
    nodes = [
        helper.make_node("Abs", ["s"], ["scale"], "abs"),
        helper.make_node("DequantizeLinear", ["w", "scale"], ["wd"], "weight_dq"),
        helper.make_node("MatMul", ["x", "wd"], ["y"]),
    ]
    made = model(nodes, {"s": np.float32(0.1), "w": WEIGHT})
    with pytest.raises(ModelError, match="weight_dq"):
        without_quantizers_(made)
