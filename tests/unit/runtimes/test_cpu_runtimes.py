"""OpenVINO and ONNX Runtime: real engines, their outputs, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from sparsify_deploy import menu
from sparsify_deploy.errors import DataError, ModelError, OutOfResources, RuntimeUnavailable

NAMES = ("openvino", "onnxruntime")


@pytest.fixture(params=NAMES)
def runtime(request):
    found = menu.entry("runtimes", request.param)
    if reason := found.unavailable_reason():
        pytest.skip(reason)
    return found


def built(runtime: ModuleType, onnx_file: Path) -> Path:
    engine = onnx_file.parent / f"built{runtime.SUFFIX}"
    runtime.build(onnx_file, engine, runtime.Params())
    return engine


@pytest.mark.parametrize(("batch", "shapes"), [(1, None), ("N", None), ("N", {"image": (3, 16, 8, 8)})])
def test_outputs_are_those_of_numpy(runtime, tiny_net, batch, shapes):
    net = tiny_net(batch)
    size = 1 if batch == 1 else 3
    inputs = net.example(size)
    with runtime.open(built(runtime, net.path), runtime.Params(), threads=1, shapes=shapes) as session:
        session.bind(inputs)
        session.execute()
        found = session.fetch()
    assert set(found) == {"logits"}
    # one quantisation step of the input times the largest weight is 0.006; INT8 kernels sum in another order
    np.testing.assert_allclose(found["logits"], net.answer(inputs["image"]), atol=2e-3)


def test_bind_copies_and_a_second_bind_of_another_size_counts(runtime, tiny_net):
    net = tiny_net("N")
    first, second = net.example(2), net.example(4)
    with runtime.open(built(runtime, net.path), runtime.Params()) as session:
        session.bind(first)
        want = net.answer(first["image"])
        first["image"][...] = 0
        session.execute()
        kept = session.fetch()["logits"]
        session.bind(second)
        session.execute()
        found = session.fetch()["logits"]
    np.testing.assert_allclose(kept, want, atol=2e-3)
    np.testing.assert_allclose(found, net.answer(second["image"]), atol=2e-3)


def test_shapes_fix_the_axis_and_none_keeps_it(runtime, tiny_net):
    engine = built(runtime, tiny_net("N").path)
    with runtime.open(engine, runtime.Params()) as session:
        assert session.inputs[0].shape == (None, 16, 8, 8)
        assert session.outputs[0].name == "logits"
    with runtime.open(engine, runtime.Params(), shapes={"image": (5, 16, 8, 8)}) as session:
        assert session.inputs[0].shape == (5, 16, 8, 8)
        assert session.inputs[0].dtype == "float32"
        with pytest.raises(DataError, match=r"'image' has shape \(4, 16, 8, 8\), the engine takes \(5, 16, 8, 8\)"):
            session.bind({"image": np.zeros((4, 16, 8, 8), np.float32)})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "input 'image' is missing: the engine takes image"),
        ({"image": (1, 16, 8, 8), "mask": (1,)}, "the engine has no input 'mask'"),
        ({"image": (1, 16, 8, 9)}, r"shape \(1, 16, 8, 9\), the engine takes \(1, 16, 8, 8\)"),
        ({"image": (16, 8, 8)}, r"shape \(16, 8, 8\), the engine takes"),
    ],
)
def test_wrong_inputs_are_one_line(runtime, tiny_net, inputs, message):
    with runtime.open(built(runtime, tiny_net().path), runtime.Params()) as session:
        arrays = {name: np.zeros(shape, np.float32) for name, shape in inputs.items()}
        with pytest.raises(DataError, match=message) as caught:
            session.bind(arrays)
        assert "\n" not in str(caught.value)


def test_a_wrong_dtype_is_not_converted(runtime, tiny_net):
    net = tiny_net()
    with (
        runtime.open(built(runtime, net.path), runtime.Params()) as session,
        pytest.raises(DataError, match="'image' is float64, the engine takes float32"),
    ):
        session.bind({"image": net.example(1)["image"].astype(np.float64)})


@pytest.mark.parametrize("shapes", [{"image": (1, 16, 8, 9)}, {"imagine": (1, 16, 8, 8)}])
def test_shapes_that_contradict_the_file_are_refused(runtime, tiny_net, shapes):
    engine = built(runtime, tiny_net("N").path)
    with pytest.raises(DataError), runtime.open(engine, runtime.Params(), shapes=shapes):
        pass


def test_an_unknown_operator_is_one_line(runtime, tmp_path):
    node = helper.make_node("Frobnicate", ["x"], ["y"], name="/odd", domain="com.example")
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in ("x", "y")]
    graph = helper.make_graph([node], "odd", value[:1], value[1:])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.example", 1)]
    path = tmp_path / "odd.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    engine = tmp_path / f"engine{runtime.SUFFIX}"
    with pytest.raises(ModelError, match="Frobnicate") as caught:
        runtime.build(path, engine, runtime.Params())
    assert "\n" not in str(caught.value)
    assert not engine.exists()


def test_a_file_that_openvino_has_no_room_for_is_no_fault_of_the_model(tiny_net):
    resource = pytest.importorskip("resource")
    openvino = menu.entry("runtimes", "openvino")
    if reason := openvino.unavailable_reason():
        pytest.skip(reason)
    net = tiny_net(1)
    built(openvino, net.path)
    engine = net.path.with_name("second.xml")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with pytest.raises(OutOfResources, match="no file may be that large here"):
            openvino.build(net.path, engine, openvino.Params())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [*net.path.parent.glob("*second*"), *net.path.parent.glob(".openvino-*")]


def test_several_outputs_keep_their_names(runtime, tmp_path):
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Identity", ["a"], ["b"]),
        helper.make_node("Neg", ["x"], ["c"]),
    ]
    value = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 2]) for name in "xabc"}
    graph = helper.make_graph(nodes, "three", [value["x"]], [value["c"], value["a"], value["b"]])
    path = tmp_path / "three.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    x = np.array([[-1.0, 2.0]], np.float32)
    with runtime.open(built(runtime, path), runtime.Params()) as session:
        session.bind({"x": x})
        session.execute()
        found = session.fetch()
    assert list(found) == ["c", "a", "b"]
    for name, want in {"a": [[0, 2]], "b": [[0, 2]], "c": [[1, -2]]}.items():
        np.testing.assert_array_equal(found[name], np.array(want, np.float32))


def test_external_weights_are_taken_along(runtime, tiny_net, tmp_path):
    net = tiny_net(1, external=True)
    engine = built(runtime, net.path)
    (tmp_path / "tiny.data").unlink()
    inputs = net.example(1)
    with runtime.open(engine, runtime.Params()) as session:
        session.bind(inputs)
        session.execute()
        np.testing.assert_allclose(session.fetch()["logits"], net.answer(inputs["image"]), atol=2e-3)


def test_threads_reach_openvino(tiny_net, monkeypatch):
    openvino = pytest.importorskip("openvino")
    runtime = menu.entry("runtimes", "openvino")
    seen = []
    compile_model = openvino.Core.compile_model
    spy = lambda core, model, device, config: seen.append(config) or compile_model(core, model, device, config)  # noqa: E731
    engine = built(runtime, tiny_net().path)
    monkeypatch.setattr(openvino.Core, "compile_model", spy)
    with runtime.open(engine, runtime.Params(), threads=2):
        pass
    assert seen[0]["INFERENCE_NUM_THREADS"] == 2
    assert seen[0]["INFERENCE_PRECISION_HINT"] == "f32"


def test_a_fixed_shape_reaches_the_compiled_openvino_model(tiny_net):
    pytest.importorskip("openvino")
    runtime = menu.entry("runtimes", "openvino")
    engine = built(runtime, tiny_net("N").path)
    with runtime.open(engine, runtime.Params(), shapes={"image": (5, 16, 8, 8)}) as session:
        assert session.outputs[0].shape == (5, 32, 8, 8)
    with runtime.open(engine, runtime.Params()) as session:
        assert session.outputs[0].shape == (None, 32, 8, 8)


def test_bf16_where_the_cpu_has_none_is_said(tiny_net):
    openvino = pytest.importorskip("openvino")
    if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU computes in BF16")
    runtime = menu.entry("runtimes", "openvino")
    net = tiny_net()
    engine = net.path.with_suffix(".xml")
    notes = runtime.build(net.path, engine, runtime.Params(precision="bf16"))
    assert not notes.runs_here
    assert "BF16" in notes.warnings[0]
    with pytest.raises(RuntimeUnavailable, match="BF16"), runtime.open(engine, runtime.Params(precision="bf16")):
        pass


def test_a_session_that_fell_back_to_the_cpu_is_refused(tiny_net, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    runtime = menu.entry("runtimes", "onnxruntime")
    path = tiny_net().path
    fallen = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *args, **kwargs: fallen)
    with (
        pytest.raises(RuntimeUnavailable, match="asked for CUDA and has CPU"),
        runtime.open(path, runtime.Params(provider="CUDA")),
    ):
        pass


def test_cuda_without_its_provider_is_refused(tiny_net):
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is installed")
    runtime = menu.entry("runtimes", "onnxruntime")
    path = tiny_net().path
    engine = path.with_name("engine.onnx")
    with pytest.raises(RuntimeUnavailable, match="asked for CUDA"):
        runtime.build(path, engine, runtime.Params(provider="CUDA"))
    assert not engine.exists()


def test_one_free_axis_cannot_have_two_sizes(tmp_path):
    pytest.importorskip("onnxruntime")
    runtime = menu.entry("runtimes", "onnxruntime")
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 2]) for name in "xyz"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "y"], ["z"])], "add", value[:2], value[2:])
    path = tmp_path / "add.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    shapes = {"x": (1, 2), "y": (3, 2)}
    with (
        pytest.raises(DataError, match="axis 'N' cannot be both 1 and 3"),
        runtime.open(path, runtime.Params(), shapes=shapes),
    ):
        pass


def test_an_output_that_a_layer_reads_as_well_keeps_its_name(runtime, tmp_path):
    """A compiler that drops the Identity is left with two names for one value."""
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["image"], ["/Flatten_output_0"], name="/Flatten"),
            helper.make_node("Identity", ["/Flatten_output_0"], ["features"], name="/Identity"),
            helper.make_node("MatMul", ["/Flatten_output_0", "w"], ["logits"], name="/fc"),
        ],
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 2, 3])],
        [
            helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 6]),
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2]),
        ],
        [helper.make_tensor("w", TensorProto.FLOAT, [6, 2], np.arange(12, dtype=np.float32))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "net.onnx")
    engine = built(runtime, tmp_path / "net.onnx")
    image = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    for shapes in (None, {"image": (2, 2, 3)}):
        with runtime.open(engine, runtime.Params(), shapes=shapes) as session:
            assert [tensor.name for tensor in session.outputs] == ["features", "logits"]
            session.bind({"image": image})
            session.execute()
            found = session.fetch()
        np.testing.assert_array_equal(found["features"], image.reshape(2, 6))
        np.testing.assert_allclose(found["logits"], image.reshape(2, 6) @ np.arange(12).reshape(6, 2))
