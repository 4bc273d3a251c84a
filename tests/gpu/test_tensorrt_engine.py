"""A real TensorRT engine, built and run on the GPU of this machine."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsify_deploy.runtimes import _metadata, tensorrt
from sparsify_deploy.timing import race

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def _available():
    if reason := tensorrt.unavailable_reason() or tensorrt.cannot_run_reason():
        pytest.skip(reason)


def test_builds_runs_and_is_timed_by_the_device(tmp_path):
    weight = np.random.default_rng(0).standard_normal((64, 32, 1, 1)).astype(np.float32)
    weight[:, 2::4] = weight[:, 3::4] = 0
    node = helper.make_node("Conv", ["x", "weight"], ["y"], name="/conv")
    values = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 32, 8, 8]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 64, 8, 8]),
    ]
    graph = helper.make_graph([node], "conv", values[:1], values[1:], [numpy_helper.from_array(weight, "weight")])
    path, engine = tmp_path / "conv.onnx", tmp_path / "conv.engine"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    params = tensorrt.Params(max_batch=4)
    notes = tensorrt.build(path, engine, params)
    assert notes.runs_here
    assert _metadata.check(engine, trust=False)["runtime"] == "tensorrt"
    x = np.random.default_rng(1).standard_normal((3, 32, 8, 8)).astype(np.float32)
    with tensorrt.open(engine, params, shapes={"x": x.shape}) as session:
        session.bind({"x": x})
        session.execute()
        # TF32 keeps ten bits of the mantissa
        want = np.einsum("bchw,kc->bkhw", x, weight[:, :, 0, 0])
        np.testing.assert_allclose(session.fetch()["y"], want, atol=0.05)
        outcome = race({"first": session, "again": session}, rounds=5, round_ms=5.0, warmup_ms=5.0)
        assert outcome.clock == "device time"
        assert outcome.device_latencies["first"].p50_ms > 0
