"""Merging Q and moving them in front of max pooling: not one value changes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from sparsify_deploy.graph import file
from sparsify_deploy.graph.flavour import unsigned_
from sparsify_deploy.graph.quantizers import merge_quantizers_, place_quantizers_

onnxruntime = pytest.importorskip("onnxruntime")


def pooled(second_scale: float = 0.05) -> onnx.ModelProto:
    """Relu, max pooling, and two Q/DQ of its result, whose sum is returned."""
    constants = [
        *(numpy_helper.from_array(np.array(s, np.float32), n) for n, s in (("s", 0.05), ("t", second_scale))),
        numpy_helper.from_array(np.array(0, np.int8), "z"),
    ]
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("QuantizeLinear", ["p", "s", "z"], ["q0"]),
        helper.make_node("DequantizeLinear", ["q0", "s", "z"], ["d0"]),
        helper.make_node("QuantizeLinear", ["p", "t", "z"], ["q1"]),
        helper.make_node("DequantizeLinear", ["q1", "t", "z"], ["d1"]),
        helper.make_node("Add", ["d0", "d1"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, (1, 2, s, s)) for n, s in (("x", 8), ("y", 4))]
    graph = helper.make_graph(nodes, "pooled", ends[:1], ends[1:], constants)
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def run(model: onnx.ModelProto) -> NDArray[Any]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = 4 * np.random.default_rng(0).standard_normal((1, 2, 8, 8)).astype(np.float32)
    found: NDArray[Any] = session.run(None, {"x": x})[0]
    return found


def test_equal_quantizers_become_one_and_go_before_the_pooling() -> None:
    model = pooled()
    before = run(model)
    place_quantizers_(model)
    file.check(model, Path("placed.onnx"))
    assert Counter(node.op_type for node in model.graph.node)["QuantizeLinear"] == 2
    reader = next(node for node in model.graph.node if "r" in node.input)
    assert reader.op_type == "QuantizeLinear"
    np.testing.assert_array_equal(run(model), before)


def test_quantizers_of_two_scales_both_stay_behind_the_pooling() -> None:
    model = pooled(0.06)
    before = run(model)
    place_quantizers_(model)
    assert Counter(node.op_type for node in model.graph.node)["QuantizeLinear"] == 2
    assert next(node for node in model.graph.node if "r" in node.input).op_type == "MaxPool"
    np.testing.assert_array_equal(run(model), before)


@pytest.mark.parametrize("tensor", ["q1", "p"])
def test_an_output_of_the_network_stays(tensor: str) -> None:
    model = pooled()
    kind = TensorProto.INT8 if tensor == "q1" else TensorProto.FLOAT
    model.graph.output.append(helper.make_tensor_value_info(tensor, kind, (1, 2, 4, 4)))
    merge_quantizers_(model)
    place_quantizers_(model)
    file.check(model, Path("placed.onnx"))
    assert tensor in {name for node in model.graph.node for name in node.output}
    if tensor == "p":
        assert next(node for node in model.graph.node if "r" in node.input).op_type == "MaxPool"


MOVED = {
    "nothing": [],
    "a flattening": [("Flatten", {})],
    "max pooling": [("MaxPool", {"kernel_shape": [2, 2]})],
    "both": [("MaxPool", {"kernel_shape": [2, 2]}), ("Flatten", {})],
}


def stopped(moves: list[tuple[str, dict[str, Any]]], *, read_twice: bool) -> onnx.ModelProto:
    """A Relu, then `moves` and one INT8 Q/DQ, whose input others may read as well."""
    constants = [numpy_helper.from_array(np.array(0.01, np.float32), "s")]
    constants.append(numpy_helper.from_array(np.array(0, np.int8), "z"))
    nodes, last = [helper.make_node("Relu", ["x"], ["r"])], "r"
    for i, (kind, attributes) in enumerate(moves):
        nodes.append(helper.make_node(kind, [last], [f"m{i}"], **attributes))
        last = f"m{i}"
    nodes.append(helper.make_node("QuantizeLinear", [last, "s", "z"], ["q"]))
    nodes.append(helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]))
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    if read_twice:
        nodes.append(helper.make_node("Neg", [last], ["n"]))
        outputs.append(helper.make_tensor_value_info("n", TensorProto.FLOAT, None))
    start = [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 2, 8, 8))]
    graph = helper.make_graph(nodes, "stopped", start, outputs, constants)
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


@pytest.mark.parametrize("read_twice", [False, True])
@pytest.mark.parametrize("moves", MOVED.values(), ids=MOVED)
def test_unsigned_activations_stop_at_127_steps_behind_what_moves_values(
    moves: list[tuple[str, dict[str, Any]]], read_twice: bool
) -> None:
    model = stopped(moves, read_twice=read_twice)
    before = run(model)
    assert before.max() == pytest.approx(1.27)
    assert unsigned_(model) == (0 if read_twice else 1)
    np.testing.assert_array_equal(run(model), before)
