"""FP16 written into the file: what it computes, by ONNX Runtime, OpenVINO and TensorRT-RTX, and what stays FP32."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsify_deploy.errors import ModelError
from sparsify_deploy.graph import file
from sparsify_deploy.graph.constants import Graph
from sparsify_deploy.graph.float16 import save, to_float16
from sparsify_deploy.runtimes import onnxruntime, openvino, tensorrt_rtx

RELATIVE = 4e-3
"""Four times the rounding of FP16: what a handful of layers add up to, by the largest output."""


def model(nodes, constants, shapes, version=17, outputs=("y",)):
    """A checked model; `shapes` of inputs and outputs, the latter by `outputs`."""
    values = {n: helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in shapes.items()}
    stored = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    inputs = [value for name, value in values.items() if name not in outputs]
    graph = helper.make_graph(nodes, "net", inputs, [values[name] for name in outputs], stored)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], ir_version=9)
    onnx.checker.check_model(made)
    return made


def node(kind, inputs, output, **attributes):
    return helper.make_node(kind, inputs.split(), [output], name=f"/{output}", **attributes)


def normal(*shape, scale=0.2, seed=0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def convolutions():
    """Conv-BN-ReLU with a residual Add, pooling and a Gemm."""
    pads = {"pads": [1, 1, 1, 1]}
    nodes = [
        node("Conv", "x w1", "c1", **pads),
        node("BatchNormalization", "c1 s b m v", "bn"),
        node("Relu", "bn", "r1"),
        node("Conv", "r1 w2", "c2", **pads),
        node("Add", "c2 r1", "sum"),
        node("Relu", "sum", "r2"),
        node("GlobalAveragePool", "r2", "pool"),
        node("Flatten", "pool", "flat"),
        node("Gemm", "flat w3 b3", "y"),
    ]
    ones = np.ones(8, np.float32)
    constants = {"w1": normal(8, 4, 3, 3), "w2": normal(8, 8, 3, 3), "s": ones, "b": 0 * ones, "m": 0.1 * ones}
    constants |= {"v": ones, "w3": normal(8, 5), "b3": normal(5)}
    return model(nodes, constants, {"x": ["N", 4, 6, 6], "y": ["N", 5]})


def attention():
    """One head over 6 tokens of 8, a mask of finfo.min, LayerNorm as torch 1 exports it, and one as an operator."""
    last = {"axes": [-1]}
    nodes = [
        node("MatMul", "x wq", "q"),
        node("MatMul", "x wk", "k"),
        node("MatMul", "x wv", "v"),
        node("Transpose", "k", "kt", perm=[0, 2, 1]),
        node("MatMul", "q kt", "scores"),
        node("Div", "scores root", "scaled"),
        node("Add", "scaled mask", "masked"),
        node("Softmax", "masked", "p"),
        node("MatMul", "p v", "mixed"),
        node("Add", "mixed x", "res"),
        node("ReduceMean", "res", "mean", **last),
        node("Sub", "res mean", "centred"),
        node("Pow", "centred two", "squared"),
        node("ReduceMean", "squared", "variance", **last),
        node("Add", "variance eps", "shifted"),
        node("Sqrt", "shifted", "std"),
        node("Div", "centred std", "normed"),
        node("Mul", "normed gain", "scaled_up"),
        node("LayerNormalization", "scaled_up gain", "y"),
    ]
    mask = np.zeros((1, 6, 6), np.float32)
    mask[:, :, -1] = np.finfo(np.float32).min
    constants = {f"w{c}": normal(8, 8, scale=0.4, seed=ord(c)) for c in "qkv"}
    constants |= {"root": np.float32(8**0.5), "mask": mask, "two": np.float32(2), "eps": np.float32(1e-12)}
    constants["gain"] = np.linspace(0.5, 1.5, 8, dtype=np.float32)
    return model(nodes, constants, {"x": [2, 6, 8], "y": [2, 6, 8]})


def quantised(scale=0.0625, weight_scales=None, version=17):
    """Q -> DQ -> Conv with Q/DQ weights -> Relu -> Q -> DQ -> Conv, scales that FP16 holds exactly."""
    scales = np.full(8, 0.015625, np.float32) if weight_scales is None else weight_scales
    nodes = []
    for source, name in (("x", "a"), ("r", "b")):
        nodes.append(node("QuantizeLinear", f"{source} step zero", f"{name}q"))
        nodes.append(node("DequantizeLinear", f"{name}q step zero", f"{name}d"))
        nodes.append(node("QuantizeLinear", f"{name}w steps zeros", f"{name}wq", axis=0))
        nodes.append(node("DequantizeLinear", f"{name}wq steps zeros", f"{name}wd", axis=0))
        nodes.append(node("Conv", f"{name}d {name}wd", f"{name}c" if name == "a" else "y"))
        if name == "a":
            nodes.append(node("Relu", "ac", "r"))
    constants = {"step": np.float32(scale), "zero": np.int8(0), "steps": scales, "zeros": np.zeros(8, np.int8)}
    constants |= {"aw": normal(8, 8, 1, 1), "bw": normal(8, 8, 1, 1, seed=1)}
    return model(nodes, constants, {"x": ["N", 8, 4, 4], "y": ["N", 8, 4, 4]}, version)


def run(runtime, made, inputs, folder, name="net"):
    """What a runtime's session answers to a model written to `folder`."""
    path, engine = folder / f"{name}.onnx", folder / f"{name}{runtime.SUFFIX}"
    save(made, path)
    if runtime is openvino:
        runtime.build(path, engine, runtime.Params())
    with runtime.open(path if runtime is onnxruntime else engine, runtime.Params()) as session:
        session.bind(inputs)
        session.execute()
        return session.fetch()["y"]


def kinds(made):
    """Operator name to the element type of its first output, by shape inference."""
    inferred = onnx.shape_inference.infer_shapes(made, strict_mode=True, check_type=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.output)}
    return {n.name: types[n.output[0]] for n in made.graph.node}


NETS = {"convolutions": (convolutions, (3, 4, 6, 6)), "attention": (attention, (2, 6, 8))}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("runtime", [onnxruntime, openvino], ids=["onnxruntime", "openvino"])
def test_it_computes_the_same_within_fp16(net, runtime, tmp_path):
    make, shape = NETS[net]
    x = {"x": normal(*shape, scale=1.0)}
    half, done = to_float16(make())
    file.check(half, tmp_path / "half.onnx")
    want = run(onnxruntime, make(), x, tmp_path, "full")
    found = run(runtime, half, x, tmp_path)
    assert found.dtype == np.float32
    assert np.abs(found - want).max() <= RELATIVE * np.abs(want).max()
    assert np.abs(found - want).max() > 0  # else nothing was converted
    assert done.warnings == ()


@pytest.mark.parametrize("make", [convolutions, attention, quantised])
def test_tensorrts_parser_and_builder_take_it(make, tmp_path):
    if reason := tensorrt_rtx.unavailable_reason():
        pytest.skip(reason)
    save(make(), tmp_path / "net.onnx")
    notes = tensorrt_rtx.build(tmp_path / "net.onnx", tmp_path / "net.rtx.engine", tensorrt_rtx.Params())
    assert notes.facts["float16"]["nodes"] == to_float16(make())[1].half
    assert notes.facts["engine_bytes"] > 0


def test_what_is_fragile_stays_in_fp32_and_the_rest_does_not():
    half, done = to_float16(attention())
    found = kinds(half)
    full = {name for name, kind in found.items() if kind == TensorProto.FLOAT and not name.endswith(("fp16", "fp32"))}
    assert full == {
        *("/masked", "/p", "/mean", "/squared", "/variance", "/shifted", "/std", "/normed", "/y"),
        "/scaled_up",  # between two FP32 operators: two casts would buy nothing
    }
    assert {"/q", "/kt", "/scores", "/scaled", "/mixed", "/res", "/centred"} <= found.keys() - full
    assert done.kept == {
        "Add": 2,
        "Div": 1,
        "LayerNormalization": 1,
        "Mul": 1,
        "Pow": 1,
        "ReduceMean": 2,
        "Softmax": 1,
        "Sqrt": 1,
    }
    assert done.half == 9
    constants = {tensor.name: tensor.data_type for tensor in half.graph.initializer}
    assert constants["mask"] == constants["eps"] == TensorProto.FLOAT
    assert constants["wq/fp16"] == TensorProto.FLOAT16
    assert "wq" not in constants


def test_a_square_and_an_unfolded_norm_of_tiny_variance_stay_in_fp32():
    nodes = [
        node("Mul", "x x", "sq"),
        node("BatchNormalization", "sq s s s v", "bn"),
        node("Relu", "bn", "r"),
        node("Neg", "r", "n"),
        node("Conv", "n w", "y"),
    ]
    constants = {"s": np.ones(2, np.float32), "v": np.array([1, 1e-6], np.float32), "w": normal(2, 2, 1, 1)}
    found = kinds(to_float16(model(nodes, constants, {"x": [1, 2, 3, 3], "y": [1, 2, 3, 3]}))[0])
    assert found["/sq"] == found["/bn"] == TensorProto.FLOAT
    assert found["/r"] == found["/n"] == TensorProto.FLOAT16


def test_quantised_weights_keep_their_integers_and_the_grid_is_the_same(tmp_path):
    before = quantised()
    half, done = to_float16(before)
    assert done.half == 4 + 2 + 1 + 1  # DQ, Conv, Relu and the Q behind it
    for name in ("ad", "bd"):
        assert kinds(half)[f"/{name}"] == TensorProto.FLOAT16
    reader = {n.name: n for n in half.graph.node}
    assert reader["/aq"].input[0] == "x"  # the input is quantised as it comes, without a cast
    convolution = reader["/ac"]
    assert {n.output[0]: n.op_type for n in half.graph.node}[convolution.input[0]] == "DequantizeLinear"
    for name in ("awd", "bwd"):
        old = Graph(before).weight(name).values
        np.testing.assert_array_equal(Graph(half).weight(f"{name}/fp16").values, old)
    x = {"x": normal(5, 8, 4, 4, scale=1.0)}
    want = run(onnxruntime, before, x, tmp_path, "full")
    found = run(onnxruntime, half, x, tmp_path)
    # products of grid points are exact in FP16 here but for the rounding of sums before the second quantizer
    assert np.abs(found - want).max() <= 0.02 * np.abs(want).max()
    assert np.mean(np.abs(found - want) <= RELATIVE * np.abs(want).max()) > 0.9


def test_a_scale_that_fp16_lacks_keeps_its_dequantizer_in_fp32(tmp_path):
    scales = np.full(8, 0.015625, np.float32)
    scales[3] = 1e-6
    half, done = to_float16(quantised(weight_scales=scales))
    assert kinds(half)["/awd"] == kinds(half)["/bwd"] == TensorProto.FLOAT
    assert kinds(half)["/ac"] == TensorProto.FLOAT16
    assert [warning.split(":")[0] for warning in done.warnings] == ["/awd", "/bwd"]
    assert "1 of 8 scales are outside of FP16's range" in done.warnings[0]
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in half.graph.initializer}
    np.testing.assert_array_equal(stored["steps"], scales)


def test_the_scale_of_an_empty_channel_does_not_matter(tmp_path):
    scales = np.full(8, 0.015625, np.float32)
    scales[3] = 1e-6
    net = quantised(weight_scales=scales)
    for tensor in net.graph.initializer:
        if tensor.name in ("aw", "bw"):
            values = numpy_helper.to_array(tensor).copy()
            values[3] = 0
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    half, done = to_float16(net)
    assert done.warnings == ()
    assert kinds(half)["/awd"] == TensorProto.FLOAT16
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in half.graph.initializer}
    assert (stored["steps/fp16"] > 0).all()
    x = {"x": normal(2, 8, 4, 4, scale=1.0)}
    want, found = run(onnxruntime, net, x, tmp_path, "full"), run(onnxruntime, half, x, tmp_path)
    np.testing.assert_array_equal(found[:, 3], want[:, 3])


def test_a_scale_of_zero_is_an_error():
    with pytest.raises(ModelError, match="scales are not above 0"):
        to_float16(quantised(scale=0.0))


@pytest.mark.parametrize("version", [13, 17, 18])
def test_a_quantised_file_is_brought_to_opset_19(version, tmp_path):
    net = quantised(version=version)
    axes = [{"axes": [1]}, {}][version >= 18]
    net.graph.node.append(node("ReduceMax", "y" if version < 18 else "y axes", "top", keepdims=1, **axes))
    if version >= 18:
        net.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "axes"))
    net.graph.node.append(
        helper.make_node(
            "Split", ["top"], ["left", "right"], name="/split", axis=2, **({"num_outputs": 2} if version >= 18 else {})
        )
    )
    net.graph.output[0].CopyFrom(helper.make_tensor_value_info("left", TensorProto.FLOAT, ["N", 1, 2, 4]))
    half, _ = to_float16(net)
    assert file.opset(half) == 19
    file.check(half, tmp_path / "half.onnx")
    x = {"x": normal(1, 8, 4, 4, scale=1.0)}
    found = []
    for name, made in (("full", net), ("half", half)):
        save(made, tmp_path / f"{name}.onnx")
        with onnxruntime.open(tmp_path / f"{name}.onnx", onnxruntime.Params()) as session:
            session.bind(x)
            session.execute()
            found.append(session.fetch()["left"])
    assert found[0].shape == (1, 1, 2, 4)
    np.testing.assert_allclose(found[1], found[0], atol=0.03 * np.abs(found[0]).max())


def test_a_file_too_old_for_fp16_scales_is_named():
    net = convolutions()
    net.graph.node.insert(0, node("DequantizeLinear", "q s0", "dq"))
    net.graph.initializer.append(numpy_helper.from_array(np.int8(1), "q"))
    net.graph.initializer.append(numpy_helper.from_array(np.float32(1), "s0"))
    net.opset_import[0].version = 12
    with pytest.raises(ModelError, match="opset 12 is too old"):
        to_float16(net)


def test_a_file_above_2_gib_is_named(monkeypatch):
    monkeypatch.setattr("sparsify_deploy.graph.float16._MOST_BYTES", 100)
    with pytest.raises(ModelError, match="above 2 GiB"):
        to_float16(convolutions())


def test_what_a_subgraph_reads_keeps_its_name_and_type(tmp_path):
    branch = [
        helper.make_graph(
            [helper.make_node(kind, ["r"], [out])],
            out,
            [],
            [helper.make_tensor_value_info(out, TensorProto.FLOAT, [1, 2])],
        )
        for kind, out in (("Neg", "t"), ("Abs", "e"))
    ]
    nodes = [node("Relu", "x", "r"), helper.make_node("If", ["c"], ["y"], then_branch=branch[0], else_branch=branch[1])]
    net = model(nodes, {"c": np.array(True)}, {"x": [1, 2], "y": [1, 2]})
    half, done = to_float16(net)
    assert done.half == 1
    x = {"x": np.array([[3.0, -1.0]], np.float32)}
    np.testing.assert_array_equal(run(onnxruntime, half, x, tmp_path), [[-3.0, 0.0]])


def test_the_model_given_is_left_alone():
    net = attention()
    before = net.SerializeToString(deterministic=True)
    to_float16(net)
    assert net.SerializeToString(deterministic=True) == before


def test_a_large_model_keeps_its_weights_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr("sparsify_deploy.graph.float16._ONE_FILE_BYTES", 100)
    x = {"x": normal(1, 4, 6, 6)}
    half = to_float16(convolutions())[0]
    found = run(onnxruntime, half, x, tmp_path)
    assert (tmp_path / "net.onnx.data").is_file()
    assert found.shape == (1, 5)
