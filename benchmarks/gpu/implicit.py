"""INT8 without Q/DQ, as TensorRT before 10 has it: a float network, and a range for every tensor instead.

The package never builds so, for the builder then chooses the precision of each layer by speed and not by what was
trained. It is here because sparse kernels were seen to be picked this way and not behind Q/DQ (NVIDIA/TensorRT#4694).
"""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

from gpu.graphs import RANGE
from sparsify_deploy.errors import ModelError, RuntimeUnavailable
from sparsify_deploy.runtimes import _child
from sparsify_deploy.runtimes._trt import log_path
from sparsify_deploy.runtimes._trt_build import new_logger, sparsity_said
from sparsify_deploy.types import BuildNotes, Json

_LIBRARIES = ("CUBLAS", "CUBLAS_LT", "CUDNN")


def build(onnx: Path, engine: Path, *, sparse: bool, time_limit_s: float) -> BuildNotes:
    """Build in a child process. Raises RuntimeUnavailable where this TensorRT cannot, ModelError where it refuses."""
    began = time.perf_counter()
    log = log_path(engine)
    request = {"onnx": str(onnx.resolve()), "engine": str(engine.resolve()), "sparse": sparse, "log": str(log)}
    answer = _child.call(
        f"{__name__}:build_here",
        request,
        what="the TensorRT builder",
        time_limit_s=time_limit_s,
        advice=f"its log is {log}",
    )
    if "lacking" in answer:
        raise RuntimeUnavailable(answer["lacking"])
    if "refused" in answer:
        raise ModelError(f"{onnx}: the TensorRT builder refused it: {answer['refused']}")
    options = {"implicit_int8": True, "fp16": True, "sparse": sparse, "range": RANGE}
    seconds = time.perf_counter() - began
    return BuildNotes("tensorrt", answer["version"], (engine.name,), seconds, options, True, facts=answer["facts"])


def build_here(request: Json) -> Json:
    """The child's side: `{"version", "facts"}`, or `{"lacking" | "refused": one line}`."""
    trt = importlib.import_module("tensorrt")
    if not trt.__version__.startswith("8."):
        return {"lacking": f"TensorRT {trt.__version__} has no INT8 without Q/DQ to compare with; 8.6 has"}
    with open(request["log"], "w", encoding="utf-8", buffering=1) as log:
        logger, messages = new_logger(trt, log)
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
        parser = trt.OnnxParser(network, logger)
        engine = None
        if parser.parse_from_file(request["onnx"]) and network.num_layers:
            _set_ranges(network)
            engine = builder.build_serialized_network(network, _config(trt, builder, sparse=request["sparse"]))
    if engine is None:
        errors = [" ".join(message.split()) for level, message in messages if level.endswith("ERROR")]
        return {"refused": errors[-1] if errors else "it gave no reason"}
    Path(request["engine"]).write_bytes(memoryview(engine))
    facts = {"layers_parsed": network.num_layers, **sparsity_said([message for _, message in messages])}
    return {"version": trt.__version__, "facts": facts}


def _config(trt: Any, builder: Any, *, sparse: bool) -> Any:
    """INT8 and FP16 allowed, every kernel but those of cuBLAS and cuDNN, as the package builds."""
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for name in ("INT8", "FP16", *(["SPARSE_WEIGHTS"] if sparse else [])):
        config.set_flag(getattr(trt.BuilderFlag, name))
    sources = config.get_tactic_sources()
    for name in _LIBRARIES:
        sources &= ~(1 << int(getattr(trt.TacticSource, name)))
    config.set_tactic_sources(sources)
    return config


def _set_ranges(network: Any) -> None:
    """Five standard deviations of values of power 1, for every tensor; accuracy is not asked for."""
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        tensors += [layer.get_output(k) for k in range(layer.num_outputs)]
    for tensor in tensors:
        tensor.dynamic_range = (-RANGE, RANGE)
