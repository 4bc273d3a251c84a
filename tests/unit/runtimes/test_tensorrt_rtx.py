"""TensorRT-RTX: real ahead-of-time builds, on a machine with or without a GPU."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from pydantic import ValidationError

from sparsify_deploy.errors import ModelError, NativeCrash, RuntimeUnavailable
from sparsify_deploy.runtimes import _metadata, tensorrt_rtx

pytestmark = pytest.mark.skipif(
    tensorrt_rtx.unavailable_reason() is not None, reason=str(tensorrt_rtx.unavailable_reason())
)


@pytest.mark.parametrize("batch", [1, "N"])
def test_builds_for_an_absent_gpu(tiny_net, tmp_path, batch):
    engine = tmp_path / "net.rtx.engine"
    notes = tensorrt_rtx.build(tiny_net(batch).path, engine, tensorrt_rtx.Params(opt_batch=8, max_batch=16))
    assert engine.stat().st_size > 1000
    assert notes.files == ("net.rtx.engine",)
    assert notes.facts["layers_parsed"] > 5
    assert notes.facts["strongly_typed"]
    assert notes.facts["sparse_picked"] is None
    assert "no verdict" in notes.facts["sparse_verdict"]
    log = (tmp_path / "net.rtx.engine.log").read_text()
    assert "INFO: " in log
    assert "VERBOSE: " in log
    assert json.loads(_metadata.metadata_path(engine).read_text())["params"]["targets"] == ["sm86"]
    if tensorrt_rtx.cannot_run_reason() is not None:
        assert not notes.runs_here
        assert notes.label == "built, not run here"


def test_every_target_is_in_the_file(tiny_net, tmp_path):
    path = tiny_net().path
    one, all_four = tmp_path / "one.rtx.engine", tmp_path / "all.rtx.engine"
    tensorrt_rtx.build(path, one, tensorrt_rtx.Params(targets=("sm86",)))
    tensorrt_rtx.build(path, all_four, tensorrt_rtx.Params(targets=("sm80", "sm86", "sm89", "sm120")))
    assert all_four.stat().st_size > one.stat().st_size


def test_an_operator_it_does_not_know_is_named_with_its_node(tiny_net, tmp_path):
    engine = tmp_path / "odd.rtx.engine"
    with pytest.raises(ModelError, match=r"node '/last' \(operator Det\): unsupported node\. Export") as caught:
        tensorrt_rtx.build(tiny_net(last="Det").path, engine, tensorrt_rtx.Params())
    assert "\n" not in str(caught.value)
    assert not engine.exists()


def test_a_dynamic_axis_besides_the_batch_is_named(tmp_path):
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3, "W"]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "wide", value[:1], value[1:])
    path = tmp_path / "wide.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    with pytest.raises(ModelError, match=r"input 'x' has the dynamic axis 2 and no range .* opt: \[16, 3, 16\]"):
        tensorrt_rtx.build(path, tmp_path / "wide.rtx.engine", tensorrt_rtx.Params())
    shapes = {"x": {"min": [1, 3, 8], "opt": [4, 3, 16], "max": [8, 3, 64]}}
    params = tensorrt_rtx.Params.model_validate({"shapes": shapes})
    assert tensorrt_rtx.build(path, tmp_path / "wide.rtx.engine", params).facts["engine_bytes"] > 1000


class Heard:
    def __init__(self):
        self.updates = []

    def update(self, label, done, total, note=""):
        self.updates.append((label, done, total, note))

    def say(self, message):
        raise AssertionError(message)


def test_what_is_not_quantised_is_fp16_and_the_builder_tells_its_progress(tiny_net, tmp_path):
    heard = Heard()
    net = tiny_net("N")
    half = tensorrt_rtx.build(net.path, tmp_path / "h.rtx.engine", tensorrt_rtx.Params(), progress=heard)
    full = tensorrt_rtx.build(net.path, tmp_path / "f.rtx.engine", tensorrt_rtx.Params(precision="fp32"))
    assert half.facts["float16"] == {"nodes": 4, "kept_fp32": {}}  # both DQ, Conv and ReLU
    assert full.facts["float16"] is None
    assert half.options["precision"] == "fp16"
    assert "[HALF]" in (tmp_path / "h.rtx.engine.log").read_text()
    assert "[HALF]" not in (tmp_path / "f.rtx.engine.log").read_text()
    assert heard.updates
    assert {label for label, *_ in heard.updates} == {"TensorRT-RTX"}
    assert all(0 <= done <= total and note for _, done, total, note in heard.updates)
    assert any(done == total for _, done, total, _ in heard.updates)


def test_options_without_effect_are_said(tiny_net, tmp_path):
    params = tensorrt_rtx.Params(timing_cache=str(tmp_path / "cache"))
    notes = tensorrt_rtx.build(tiny_net().path, tmp_path / "net.rtx.engine", params)
    line = "timing_cache has no effect: TensorRT-RTX times no kernels while it builds"
    assert line in notes.warnings
    assert notes.facts["timing_cache"] == {"file": None, "reason": line}
    assert not (tmp_path / "cache").exists()


def test_a_profile_says_why_it_has_no_layers(tmp_path):
    found = tensorrt_rtx.profile(tmp_path / "net.rtx.engine", tensorrt_rtx.Params(), {})
    assert (found.layers, found.runs) == ((), 0)
    assert "does not say which layer" in found.note


def test_what_the_builder_refuses_is_one_line_with_its_reason(tmp_path):
    # parses, but the two dynamic batches can never be equal to a constant axis of 7
    values = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3]),
    ]
    constant = onnx.numpy_helper.from_array(np.ones((7, 3), np.float32), "c")
    graph = helper.make_graph([helper.make_node("Add", ["x", "c"], ["y"])], "clash", values[:1], values[1:], [constant])
    path = tmp_path / "clash.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    params = tensorrt_rtx.Params(min_batch=2, opt_batch=3, max_batch=4)
    with pytest.raises(ModelError, match=r"the TensorRT-RTX builder refused the network: \S") as caught:
        tensorrt_rtx.build(path, tmp_path / "clash.rtx.engine", params)
    assert "\n" not in str(caught.value)


def test_junk_is_refused_before_the_builder_sees_it(tmp_path):
    path = tmp_path / "junk.onnx"
    path.write_bytes(b"")
    with pytest.raises(ModelError, match="empty"):
        tensorrt_rtx.build(path, tmp_path / "junk.rtx.engine", tensorrt_rtx.Params())
    assert not (tmp_path / "junk.rtx.engine.log").exists()


def test_the_time_limit_stops_the_builder(tiny_net, tmp_path):
    with pytest.raises(NativeCrash, match=r"the TensorRT-RTX builder was stopped after its time limit of 0.01 s"):
        tensorrt_rtx.build(tiny_net().path, tmp_path / "slow.rtx.engine", tensorrt_rtx.Params(time_limit_s=0.01))


def test_without_a_gpu_an_engine_is_not_opened(tiny_net, tmp_path):
    if tensorrt_rtx.cannot_run_reason() is None:
        pytest.skip("this machine can run it")
    engine = tmp_path / "net.rtx.engine"
    tensorrt_rtx.build(tiny_net().path, engine, tensorrt_rtx.Params())
    with pytest.raises(RuntimeUnavailable, match="need a GPU to run"), tensorrt_rtx.open(engine, tensorrt_rtx.Params()):
        pass


@pytest.mark.parametrize(
    "values",
    [
        {"targets": []},
        {"targets": ["sm90"]},
        {"min_batch": 4},
        {"opt_batch": 64},
        {"precision": "fp8"},
        {"shapes": {"x": {"min": [2], "opt": [1], "max": [3]}}},
    ],
)
def test_params_that_make_no_sense_are_refused(values):
    with pytest.raises(ValidationError):
        tensorrt_rtx.Params.model_validate(values)
