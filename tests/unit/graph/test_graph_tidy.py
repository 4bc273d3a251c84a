"""Tidying keeps the function and mends the four things it promises."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from sparsify_deploy.graph import file
from sparsify_deploy.graph.tidy import tidy_


def untidy():
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Identity", ["a.weight"], ["b.weight"]),
        helper.make_node("Constant", [], ["zf"], value=numpy_helper.from_array(np.float32(0))),
        helper.make_node("Cast", ["zf"], ["z"], to=TensorProto.INT8),
        helper.make_node("Gemm", ["x", "a.weight"], ["h"], name="/Gemm", transB=1),
        helper.make_node("Cast", ["h"], ["same"], to=TensorProto.FLOAT),
        helper.make_node("QuantizeLinear", ["same", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Exp", ["x"], ["nobody"]),
        helper.make_node("Gemm", ["d", "b.weight"], ["y"], name="/Gemm_1", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [
            numpy_helper.from_array(rng.normal(size=(4, 4)).astype(np.float32), "a.weight"),
            numpy_helper.from_array(np.float32(0.05), "s"),
            numpy_helper.from_array(np.float32(1), "left over"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_tidy(tmp_path):
    model = untidy()
    x = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    (before,) = ReferenceEvaluator(model).run(None, {"x": x})
    tidy_(model)
    file.check(model, tmp_path / "m.onnx")
    (after,) = ReferenceEvaluator(model).run(None, {"x": x})
    np.testing.assert_array_equal(before, after)
    assert file.operators(model) == {"Constant": 1, "DequantizeLinear": 1, "Gemm": 2, "QuantizeLinear": 1}
    assert {tensor.name for tensor in model.graph.initializer} == {"a.weight", "b.weight", "s"}
    assert [n.name for n in model.graph.node if n.op_type == "Gemm"] == ["a", "b"]
    quantise = next(n for n in model.graph.node if n.op_type == "QuantizeLinear")
    assert list(quantise.input) == ["h", "s", "z"]


def test_a_cast_that_changes_the_type_or_is_the_output_stays():
    model = untidy()
    model.graph.node[4].attribute[0].i = TensorProto.DOUBLE
    tidy_(model)
    assert file.operators(model)["Cast"] == 1
    last = untidy()
    last.graph.node.append(helper.make_node("Cast", ["y"], ["out"], to=TensorProto.FLOAT))
    last.graph.output[0].name = "out"
    tidy_(last)
    assert file.operators(last)["Cast"] == 1
    onnx.checker.check_model(last)


def test_a_weight_used_twice_keeps_the_exporters_names():
    model = untidy()
    model.graph.node[8].input[1] = "a.weight"
    tidy_(model)
    assert [n.name for n in model.graph.node if n.op_type == "Gemm"] == ["/Gemm", "/Gemm_1"]
