"""A real TensorRT engine, built and run on the GPU of this machine."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsify_deploy.errors import DataError, NativeCrash
from sparsify_deploy.runtimes import _metadata, tensorrt
from sparsify_deploy.timing import race

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def _available():
    if reason := tensorrt.unavailable_reason() or tensorrt.cannot_run_reason():
        pytest.skip(reason)


def sparse_convolution(folder):
    """A 1x1 convolution whose weights are 2:4, as an ONNX file, and the weights."""
    weight = np.random.default_rng(0).standard_normal((64, 32, 1, 1)).astype(np.float32)
    weight[:, 2::4] = weight[:, 3::4] = 0
    node = helper.make_node("Conv", ["x", "weight"], ["y"], name="/conv")
    values = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 32, 8, 8]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 64, 8, 8]),
    ]
    graph = helper.make_graph([node], "conv", values[:1], values[1:], [numpy_helper.from_array(weight, "weight")])
    path = folder / "conv.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path, weight


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_builds_runs_and_is_timed_by_the_device(precision, tmp_path):
    path, weight = sparse_convolution(tmp_path)
    engine = tmp_path / "conv.engine"
    params = tensorrt.Params(max_batch=4, precision=precision, timing_cache=str(tmp_path / "cache"))
    notes = tensorrt.build(path, engine, params)
    assert notes.runs_here
    assert _metadata.check(engine, trust=False)["runtime"] == "tensorrt"
    x = np.random.default_rng(1).standard_normal((3, 32, 8, 8)).astype(np.float32)
    with tensorrt.open(engine, params, shapes={"x": x.shape}) as session:
        session.bind({"x": x})
        session.execute()
        # TF32 and FP16 keep ten bits of the mantissa
        want = np.einsum("bchw,kc->bkhw", x, weight[:, :, 0, 0])
        np.testing.assert_allclose(session.fetch()["y"], want, atol=0.05)
        outcome = race({"first": session, "again": session}, rounds=5, round_ms=5.0, warmup_ms=5.0)
        assert outcome.clock == "device time"
        assert outcome.device_latencies["first"].p50_ms > 0


def test_a_second_build_finds_the_timings_of_the_first(tmp_path):
    path, _ = sparse_convolution(tmp_path)
    params = tensorrt.Params(timing_cache=str(tmp_path / "cache"))
    loaded = [
        tensorrt.build(path, tmp_path / f"{i}.engine", params).facts["timing_cache"]["loaded_bytes"] for i in range(2)
    ]
    assert loaded[0] == 0
    assert loaded[1] > 0


def test_the_profile_names_layers_times_and_kernels(tmp_path):
    path, _ = sparse_convolution(tmp_path)
    engine, params = tmp_path / "conv.engine", tensorrt.Params(timing_cache=False)
    tensorrt.build(path, engine, params)
    found = tensorrt.profile(engine, params, {"x": np.ones((4, 32, 8, 8), np.float32)})
    assert found.runs == 30
    assert all(layer.ms > 0 for layer in found.layers)
    assert any("/conv" in layer.nodes or "/conv" in layer.name for layer in found.layers)
    assert any(layer.kernel for layer in found.layers)


def test_an_engine_of_another_gpu_or_version_is_refused_by_its_record(tmp_path):
    path, _ = sparse_convolution(tmp_path)
    engine, params = tmp_path / "conv.engine", tensorrt.Params(timing_cache=False)
    tensorrt.build(path, engine, params)
    record = json.loads(_metadata.metadata_path(engine).read_text())
    record["facts"]["architecture"], record["version"] = "sm70", "7.0.0"
    _metadata.metadata_path(engine).write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"built by TensorRT 7\.0\.0 for sm70"), tensorrt.open(engine, params):
        pass


def test_a_damaged_engine_is_an_error_and_this_process_lives(tmp_path):
    engine = tmp_path / "bad.engine"
    engine.write_bytes(b"ptrt\0\1" + bytes(range(256)) * 40)
    with pytest.raises((DataError, NativeCrash)), tensorrt.open(engine, tensorrt.Params()):
        pass
