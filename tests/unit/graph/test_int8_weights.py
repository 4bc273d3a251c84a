"""Storing quantised weights as integers changes the bytes and nothing else."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsify_deploy.graph.int8_weights import store_int8_weights_
from sparsify_deploy.graph.layers import weight_layers

onnxruntime = pytest.importorskip("onnxruntime")


def conv_model(*, shared: bool = False) -> onnx.ModelProto:
    """x -> Q -> DQ -> Conv with a per-channel Q/DQ weight; `shared` makes a second node read the FP32 weight."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((8, 4, 3, 3)).astype(np.float32)
    scale = (np.abs(weight).max(axis=(1, 2, 3)) / 127).astype(np.float32)
    tensors = {
        "w": weight,
        "w_scale": scale,
        "w_zero": np.zeros(8, np.int8),
        "x_scale": np.float32(0.02),
        "x_zero": np.int8(0),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "x_scale", "x_zero"], ["xd"]),
        helper.make_node("QuantizeLinear", ["w", "w_scale", "w_zero"], ["wq"], axis=0),
        helper.make_node("DequantizeLinear", ["wq", "w_scale", "w_zero"], ["wd"], axis=0),
        helper.make_node("Conv", ["xd", "wd"], ["y"], pads=[1, 1, 1, 1], name="conv"),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 8, 6, 6])]
    if shared:
        nodes.append(helper.make_node("ReduceSum", ["w"], ["total"], keepdims=0))
        outputs.append(helper.make_tensor_value_info("total", TensorProto.FLOAT, []))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4, 6, 6])],
        outputs,
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def run(model: onnx.ModelProto) -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((2, 4, 6, 6)).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": x})[0]


def test_outputs_and_values_stay_and_the_bytes_shrink():
    model = conv_model()
    before, (layer,), size = run(model), weight_layers(model), model.ByteSize()
    assert store_int8_weights_(model) == 1
    onnx.checker.check_model(model, full_check=True)
    (after,) = weight_layers(model)
    np.testing.assert_array_equal(run(model), before)
    np.testing.assert_array_equal(after.values, layer.values)
    assert (after.weight, after.precision, after.int8_in) == ("w", "INT8", True)
    assert size - model.ByteSize() >= 3 * layer.values.size
    assert numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == "w")).dtype == np.int8


def test_a_weight_that_something_else_reads_in_float_is_left_alone():
    model = conv_model(shared=True)
    assert store_int8_weights_(model) == 0


def test_a_second_time_finds_nothing():
    model = conv_model()
    assert [store_int8_weights_(model) for _ in range(2)] == [1, 0]


def tied_model(second_scale: float, *, also_float: bool = False) -> onnx.ModelProto:
    """x -> Gemm -> Gemm with one FP32 weight that two Q/DQ pairs read, the second with a scale so many times larger."""
    weight = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    scale = np.float32(np.abs(weight).max() / 127)
    tensors = {"w": weight, "s1": scale, "s2": np.float32(scale * second_scale), "zero": np.int8(0)}
    nodes = []
    for i, (source, target) in enumerate((("x", "hidden"), ("hidden", "y")), start=1):
        nodes += [
            helper.make_node("QuantizeLinear", ["w", f"s{i}", "zero"], [f"q{i}"]),
            helper.make_node("DequantizeLinear", [f"q{i}", f"s{i}", "zero"], [f"d{i}"]),
            helper.make_node("Gemm", [source, f"d{i}"], [target], transB=1, name=f"gemm{i}"),
        ]
    if also_float:
        nodes[-1].input[0] = "sum"
        nodes.insert(-1, helper.make_node("Gemm", ["hidden", "w"], ["sum"], name="gemm3"))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def matrices(model: onnx.ModelProto) -> dict[str, str]:
    """The stored matrices, by name, with their type."""
    return {t.name: numpy_helper.to_array(t).dtype.name for t in model.graph.initializer if len(t.dims) == 2}


@pytest.mark.parametrize(("second_scale", "stored"), [(1.0, {"w": "int8"}), (2.0, {"w": "int8", "w/int8_1": "int8"})])
def test_a_tied_weight_is_stored_once_for_each_set_of_integers(second_scale: float, stored: dict[str, str]):
    model = tied_model(second_scale)
    x = np.random.default_rng(1).standard_normal((2, 4)).astype(np.float32)

    def answer() -> np.ndarray:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return session.run(["y"], {"x": x})[0]

    before = answer()
    assert store_int8_weights_(model) == 1
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_array_equal(answer(), before)
    assert matrices(model) == stored
    assert not [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert {layer.weight: layer.precision for layer in weight_layers(model)} == dict.fromkeys(stored, "INT8")


def test_a_tied_weight_that_is_read_in_float_as_well_stays_as_it_is():
    model = tied_model(1.0, also_float=True)
    assert store_int8_weights_(model) == 0
    assert matrices(model) == {"w": "float32"}
