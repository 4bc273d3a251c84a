"""Layers of an engine: names into ONNX nodes, both inspector formats, and the profiler's times."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from sparsify_deploy.runtimes import _cuda, _trt_profile


@pytest.mark.parametrize(
    ("kernel", "sparse"),
    [
        ("sm80_xmma_fprop_sparse_conv_interleaved_i8i8_i8i32_f32", True),
        ("sm90_xmma_sparse_gemm_f16f16", True),
        ("sm80_xmma_fprop_implicit_gemm_i8i8", False),
        ("", False),
    ],
)
def test_a_sparse_kernel_is_known_by_its_name(kernel, sparse):
    assert _trt_profile.is_sparse_tactic(kernel) is sparse


@pytest.mark.parametrize(
    ("layer", "precision"),
    [
        ({"Inputs": [{"Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}]}, "INT8"),
        ({"Inputs": [{"Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}]}, "FP16"),
        ({"Inputs": [{"Format/Datatype": "Half"}]}, "FP16"),
        ({"Inputs": [{"Format/Datatype": "Row major linear FP32"}], "Outputs": [{"Format/Datatype": "Int8"}]}, "FP32"),
        ({"Inputs": [{"Format": "Row major linear", "Datatype": "BFloat16"}]}, "BF16"),
        ({"Inputs": [{"Format": "CHW32", "Datatype": "Int8"}], "Outputs": [{"Datatype": "Half"}]}, "INT8"),
        ({"Inputs": [{"Datatype": "FP8"}]}, "FP8"),
        ({"I/O Tensors": {"Inputs": [{"Datatype": "Int8"}]}}, "INT8"),
        ({"Inputs": []}, ""),
        ({}, ""),
    ],
)
def test_the_precision_is_that_of_the_first_input(layer, precision):
    assert _trt_profile.precision_of(layer) == precision


DETAILED = {
    "Layers": [
        {
            "Name": "conv1 + relu1",
            "Inputs": [{"Name": "x", "Format/Datatype": "Int8"}],
            "TacticName": "sm80_xmma_fprop_sparse_conv_i8",
            "Metadata": "[ONNX Layer: /conv1]\x1e[ONNX Layer: /relu1]",
        },
        {"Name": "never run", "Inputs": []},
    ],
    "Bindings": ["x", "y"],
}


@pytest.mark.parametrize("key", ["Bindings", "I/O Tensors"])
def test_times_and_the_inspectors_words_meet_by_name(key):
    information = {"Layers": DETAILED["Layers"], key: ["x", "y"]}
    times = {"conv1 + relu1": 3.0, "Reformatting CopyNode for Output Tensor 0 to conv1": 1.5}
    session = SimpleNamespace(layer_times=lambda runs: times, information=lambda: json.dumps(information))
    found = _trt_profile.profile(session, runs=30)
    first, copy = found.layers
    assert (first.nodes, first.kernel, first.precision) == (
        ("/conv1", "/relu1"),
        "sm80_xmma_fprop_sparse_conv_i8",
        "INT8",
    )
    assert (first.ms, copy.ms, found.runs, found.note) == (0.1, 0.05, 30, "")
    assert (copy.nodes, copy.kernel, copy.precision) == ((), "", "")


def test_an_engine_without_details_still_has_times():
    session = SimpleNamespace(layer_times=lambda runs: {"a + b": 1.0}, information=lambda: '{"Layers": ["a + b"]}')
    assert _trt_profile.profile(session, runs=2).layers[0].nodes == ("a", "b")
    silent = SimpleNamespace(layer_times=lambda runs: {}, information=lambda: "{}")
    assert _trt_profile.profile(silent).note == "TensorRT's profiler reported no layer"


class FakeProfiler:
    """IProfiler, which must be initialised by its own constructor."""

    def __init__(self):
        self.ready = True


class FakeContext:
    profiler = None

    def __init__(self):
        self.enqueued = 0

    def execute_async_v3(self, stream):
        self.enqueued += 1
        assert self.profiler.ready
        for name in ("conv", "fc", "conv"):  # two layers of one name are one row
            self.profiler.report_layer_time(name, 2.0)
        return True


def test_the_profiler_hears_every_run_but_the_warm_up():
    session = object.__new__(_cuda.CudaSession)
    success = SimpleNamespace(CUDA_SUCCESS=0, CUDA_ERROR_OUT_OF_MEMORY=2)
    session._driver = SimpleNamespace(cuStreamSynchronize=lambda stream: (0,), CUresult=success)
    session._trt, session._stream, session._context = SimpleNamespace(IProfiler=FakeProfiler), 7, FakeContext()
    assert session.layer_times(5) == {"conv": 20.0, "fc": 10.0}
    assert session._context.enqueued == 8
