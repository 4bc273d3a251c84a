"""Weights read back from every shape of graph, against ONNX's own reference evaluator."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from sparsify_deploy.errors import ModelError
from sparsify_deploy.graph.layers import all_layers, weight_layers


def build(nodes, constants, shape=(1, 4, 5, 5), opset=21):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def node(op, inputs, output, **attributes):
    return helper.make_node(op, inputs, [output], name=output, **attributes)


def quantised(name, output, axis=0):
    """Q and DQ of the initializer `name`, with its scale `name_s` and zero point `name_z`."""
    return [
        node("QuantizeLinear", [name, f"{name}_s", f"{name}_z"], f"{name}_q", axis=axis),
        node("DequantizeLinear", [f"{name}_q", f"{name}_s", f"{name}_z"], output, axis=axis),
    ]


RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=(6, 4, 3, 3)).astype(np.float32)
MATRIX = RNG.normal(size=(6, 4)).astype(np.float32)
SCALE = RNG.uniform(0.005, 0.02, 6).astype(np.float32)


def test_the_final_integers_are_those_of_onnx():
    """Ties included: values that are odd multiples of half a scale."""
    scale = np.float32([0.5, 0.25, 1, 2, 0.125, 4])
    weight = (RNG.integers(-300, 300, (6, 4, 3, 3)) / 2).astype(np.float32) * scale.reshape(6, 1, 1, 1)
    constants = {"w": weight, "w_s": scale, "w_z": np.zeros(6, np.int8)}
    nodes = [*quantised("w", "w_dq"), node("Conv", ["x", "w_dq"], "y")]
    model = build(nodes, constants)
    (layer,) = weight_layers(model)
    only = helper.make_model(
        helper.make_graph(
            [nodes[0]],
            "g",
            [],
            [helper.make_tensor_value_info("w_q", TensorProto.INT8, None)],
            list(model.graph.initializer),
        ),
        opset_imports=[helper.make_opsetid("", 21)],
    )
    (expected,) = ReferenceEvaluator(only).run(None, {})
    assert layer.values.dtype == np.int8
    np.testing.assert_array_equal(layer.values, expected)
    assert {-128, 127} <= set(layer.values.flatten().tolist())
    assert (layer.weight, layer.precision, layer.op, layer.shape) == ("w", "INT8", "Conv", (6, 4, 3, 3))
    assert not layer.int8_in
    assert not layer.int8_out


@pytest.mark.parametrize("how", ["gemm", "gemm transB", "matmul", "matmul transposed", "matmul left", "identity cast"])
def test_every_orientation_comes_out_as_outputs_by_inputs(how):
    nodes, weight = {
        "gemm": ([node("Gemm", ["x", "w"], "y")], MATRIX.T),
        "gemm transB": ([node("Gemm", ["x", "w"], "y", transB=1)], MATRIX),
        "matmul": ([node("MatMul", ["x", "w"], "y")], MATRIX.T),
        "matmul transposed": ([node("Transpose", ["w"], "t"), node("MatMul", ["x", "t"], "y")], MATRIX),
        "matmul left": ([node("MatMul", ["w", "x"], "y")], MATRIX),
        "identity cast": (
            [
                node("Identity", ["w"], "i"),
                node("Cast", ["i"], "c", to=TensorProto.FLOAT),
                node("Gemm", ["x", "c"], "y", transB=1),
            ],
            MATRIX,
        ),
    }[how]
    (layer,) = weight_layers(build(nodes, {"w": np.ascontiguousarray(weight)}, (4, 4)))
    np.testing.assert_array_equal(layer.values, MATRIX)
    assert (layer.weight, layer.precision, layer.groups) == ("w", "FP32", 1)


def test_quantisation_axis_follows_a_transposed_weight():
    constants = {"w": np.ascontiguousarray(MATRIX.T), "w_s": SCALE, "w_z": np.zeros(6, np.int8)}
    nodes = [*quantised("w", "d", axis=1), node("MatMul", ["x", "d"], "y")]
    (layer,) = weight_layers(build(nodes, constants, (1, 4)))
    np.testing.assert_array_equal(layer.values, np.clip(np.rint(MATRIX / SCALE[:, None]), -128, 127))
    turned = [*quantised("w", "d"), node("Transpose", ["d"], "t"), node("MatMul", ["x", "t"], "y")]
    (layer,) = weight_layers(build(turned, {**constants, "w": MATRIX}, (1, 4)))
    np.testing.assert_array_equal(layer.values, np.clip(np.rint(MATRIX / SCALE[:, None]), -128, 127))


def test_stored_integers_and_zero_points():
    stored = RNG.integers(-128, 128, (6, 4)).astype(np.int8)
    nodes = [node("DequantizeLinear", ["w", "w_s"], "d", axis=0), node("Gemm", ["x", "d"], "y", transB=1)]
    (layer,) = weight_layers(build(nodes, {"w": stored, "w_s": SCALE}, (1, 4)))
    np.testing.assert_array_equal(layer.values, stored)
    assert layer.precision == "INT8"
    unsigned = RNG.integers(0, 256, (6, 4)).astype(np.uint8)
    zero = np.full(6, 128, np.uint8)
    nodes[0] = node("DequantizeLinear", ["w", "w_s", "w_z"], "d", axis=0)
    (layer,) = weight_layers(build(nodes, {"w": unsigned, "w_s": SCALE, "w_z": zero}, (1, 4)))
    np.testing.assert_array_equal(layer.values, unsigned.astype(int) - 128)
    assert layer.precision == "UINT8"


def test_blocked_scales():
    scale = RNG.uniform(0.005, 0.02, (6, 2)).astype(np.float32)
    nodes = [
        node("QuantizeLinear", ["w", "w_s"], "q", axis=1, block_size=2, output_dtype=TensorProto.INT8),
        node("DequantizeLinear", ["q", "w_s"], "d", axis=1, block_size=2),
        node("Gemm", ["x", "d"], "y", transB=1),
    ]
    (layer,) = weight_layers(build(nodes, {"w": MATRIX, "w_s": scale}, (1, 4)))
    np.testing.assert_array_equal(layer.values, np.clip(np.rint(MATRIX / np.repeat(scale, 2, 1)), -128, 127))


@pytest.mark.parametrize("bad", [0.0, -0.01, np.nan, np.inf])
def test_a_scale_that_is_not_positive_is_named(bad):
    scale = SCALE.copy()
    scale[3] = bad
    constants = {"w": WEIGHT, "w_s": scale, "w_z": np.zeros(6, np.int8)}
    with pytest.raises(ModelError, match="QuantizeLinear 'w_q': 1 of 6 scales are not above 0"):
        weight_layers(build([*quantised("w", "d"), node("Conv", ["x", "d"], "y")], constants))


def test_weights_that_are_not_finite_are_named():
    weight = WEIGHT.copy()
    weight[1, 2, 0, 0] = np.inf
    constants = {"w": weight, "w_s": SCALE, "w_z": np.zeros(6, np.int8)}
    with pytest.raises(ModelError, match="'w': holds weights that are not finite"):
        weight_layers(build([*quantised("w", "d"), node("Conv", ["x", "d"], "y")], constants))


def test_scales_that_do_not_fit_are_named():
    constants = {"w": WEIGHT, "w_s": SCALE[:5], "w_z": np.zeros(5, np.int8)}
    with pytest.raises(ModelError, match="'w_q': 5 scales for axis 0 of length 6"):
        weight_layers(build([*quantised("w", "d"), node("Conv", ["x", "d"], "y")], constants))


def test_groups_and_products_without_a_constant():
    nodes = [
        node("Conv", ["x", "w"], "a", group=2),
        node("MatMul", ["a", "a"], "b"),
        node("ConvTranspose", ["b", "w"], "y"),
    ]
    (layer,) = weight_layers(build(nodes, {"w": WEIGHT}, (1, 8, 5, 5)))
    assert (layer.name, layer.groups, layer.shape) == ("a", 2, (6, 4, 3, 3))


def activation(source, name):
    """A per-tensor INT8 Q/DQ of an activation; reads the initializers `s` and `z`."""
    return [
        node("QuantizeLinear", [source, "s", "z"], f"{name}_q"),
        node("DequantizeLinear", [f"{name}_q", "s", "z"], name),
    ]


CONSTANTS = {
    "s": np.float32(0.1),
    "z": np.int8(0),
    "w": RNG.normal(size=(4, 4, 1, 1)).astype(np.float32),
    "c": np.float32([1.0]),
}
CONSTANTS |= {
    "up": np.float32([1, 1, 2, 2]),
    "pads": np.int64([0, 0, 1, 1, 0, 0, 1, 1]),
    "c0": np.float32(1.0),
    "root2": np.float32(2**0.5),
    "half": np.float32(0.5),
}
GELU = [
    node("Div", ["a", "root2"], "g1"),
    node("Erf", ["g1"], "g2"),
    node("Add", ["g2", "c0"], "g3"),
    node("Mul", ["a", "g3"], "g4"),
    node("Mul", ["g4", "half"], "g"),
]
CHAINS = {
    "straight": ([], "a", True),
    "relu and max pool": ([node("Relu", ["a"], "b"), node("MaxPool", ["b"], "m", kernel_shape=[1, 1])], "m", True),
    "add with a constant": ([node("Add", ["a", "c"], "b")], "b", True),
    "add with a dequantised side": ([*activation("x", "i"), node("Add", ["a", "i"], "b")], "b", True),
    "add with a float side": ([node("Add", ["a", "x"], "b")], "b", False),
    "sigmoid": ([node("Sigmoid", ["a"], "b")], "b", False),
    "read in float too": ([node("Relu", ["a"], "b"), node("Exp", ["a"], "e")], "b", False),
    "concat": ([node("Concat", ["a", "x"], "b", axis=1)], "b", True),
    "nearest resize": ([node("Resize", ["a", "", "up"], "b", mode="nearest")], "b", True),
    "linear resize": ([node("Resize", ["a", "", "up"], "b", mode="linear")], "b", False),
    "zero pad": ([node("Pad", ["a", "pads"], "b")], "b", True),
    "pad with ones": ([node("Pad", ["a", "pads", "c0"], "b")], "b", False),
    "gelu": (GELU, "g", True),
    "gelu read in float": ([*GELU, node("Exp", ["g4"], "e")], "g", False),
    "half a gelu": (GELU[:2], "g2", False),
    "swish": ([node("Sigmoid", ["a"], "b"), node("Mul", ["a", "b"], "g")], "g", False),
    "shape is no reader": ([node("Shape", ["a"], "e")], "a", True),
}


@pytest.mark.parametrize("kind", CHAINS)
def test_int8_in_and_out(kind):
    between, last, expected = CHAINS[kind]
    nodes = [*activation("x", "d"), node("Conv", ["d", "w"], "a"), *between, *activation(last, "y")]
    (layer,) = weight_layers(build(nodes, CONSTANTS))
    assert layer.int8_in
    assert layer.int8_out is expected
    readers = {
        "add with a float side": "Add b",
        "sigmoid": "Sigmoid b",
        "read in float too": "Exp e",
        "linear resize": "Resize b",
        "pad with ones": "Pad b",
        "gelu read in float": "Div g1",
        "half a gelu": "Div g1",
        "swish": "Sigmoid b",
    }
    assert layer.float_reader == readers.get(kind, "")


@pytest.mark.parametrize("sides", [("d", "e"), ("d", "x")])
def test_int8_in_behind_a_concatenation(sides):
    nodes = [*activation("x", "d"), *activation("x", "e"), node("Concat", list(sides), "j", axis=1)]
    wide = RNG.normal(size=(4, 8, 1, 1)).astype(np.float32)
    (layer,) = weight_layers(build([*nodes, node("Conv", ["j", "wide"], "y")], {**CONSTANTS, "wide": wide}))
    assert layer.int8_in is (sides == ("d", "e"))


def test_a_graph_output_is_not_int8():
    nodes = [*activation("x", "d"), node("Conv", ["d", "w"], "y"), *activation("y", "e")]
    (layer,) = weight_layers(build(nodes, CONSTANTS))
    assert layer.int8_in
    assert not layer.int8_out
    assert layer.float_reader == "the output of the network"


def test_a_circle_ends_in_an_error():
    nodes = [node("Identity", ["p"], "q"), node("Identity", ["q"], "p"), node("Conv", ["x", "p"], "y")]
    with pytest.raises(ModelError, match="circle"):
        weight_layers(build(nodes, {}))


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_is_counted_the_way_round_other_layers_are(groups):
    weight = RNG.normal(size=(4, 6, 3, 3)).astype(np.float32)
    model = build([node("ConvTranspose", ["x", "w"], "y", group=groups)], {"w": weight})
    assert weight_layers(model) == ()
    (layer,) = all_layers(model)
    assert (layer.op, layer.weight, layer.groups, layer.precision) == ("ConvTranspose", "w", groups, "FP32")
    assert layer.shape == (6 * groups, 4 // groups, 3, 3)
    for group in range(groups):
        for out in range(6):
            for into in range(4 // groups):
                held = layer.values[group * 6 + out, into]
                np.testing.assert_array_equal(held, weight[group * (4 // groups) + into, out])


GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@pytest.mark.parametrize("op", GATES)
def test_a_recurrent_layer_is_counted_weight_by_weight(op):
    size, rows = 2, 2 * GATES[op]
    constants = {
        "in": RNG.normal(size=(rows, 3)).astype(np.float32),
        "in_reverse": RNG.normal(size=(rows, 3)).astype(np.float32),
        "hidden": RNG.normal(size=(2, rows, size)).astype(np.float32),
        "none": np.int64([0]),
        "half": np.int64([rows // 2]),
        "whole": np.int64([rows]),
    }
    nodes = [  # exporters put the gates in another order
        node("Slice", ["in", "half", "whole", "none"], "low"),
        node("Slice", ["in", "none", "half", "none"], "high"),
        node("Concat", ["low", "high"], "turned", axis=0),
        node("Unsqueeze", ["turned", "none"], "w_forward"),
        node("Unsqueeze", ["in_reverse", "none"], "w_reverse"),
        node("Concat", ["w_forward", "w_reverse"], "w", axis=0),
        node(op, ["x", "w", "hidden"], "y", hidden_size=size, direction="bidirectional"),
    ]
    model = build(nodes, constants, (5, 1, 3))
    assert weight_layers(model) == ()
    layers = all_layers(model)
    found = {layer.weight: (layer.name, layer.op, layer.shape, layer.precision) for layer in layers}
    assert found == {
        "in": ("in", op, (rows, 3), "FP32"),
        "in_reverse": ("in_reverse", op, (rows, 3), "FP32"),
        "hidden": ("hidden", op, (2 * rows, size), "FP32"),
    }
    np.testing.assert_array_equal(next(x for x in layers if x.weight == "in").values, constants["in"])


def test_layers_that_nothing_prunes_stand_in_their_places_among_the_others():
    constants = {"c": WEIGHT, "t": RNG.normal(size=(6, 4, 1, 1)).astype(np.float32), "w": WEIGHT}
    nodes = [
        node("Conv", ["x", "c"], "first"),
        node("ConvTranspose", ["first", "t"], "second"),
        node("Conv", ["second", "w"], "y"),
    ]
    model = build(nodes, constants)
    assert [layer.name for layer in all_layers(model)] == ["first", "second", "y"]
    assert [layer.name for layer in weight_layers(model)] == ["first", "y"]
