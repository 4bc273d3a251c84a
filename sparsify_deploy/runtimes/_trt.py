"""One builder path for TensorRT 8.6, 10, 11 and TensorRT-RTX, which share their Python API but not all of it.

What a version lacks is found by `getattr(..., None)`. Everything native happens in a child process: a builder that
crashes or hangs is then a message, and TensorRT 8.6 dies of SIGSEGV in `Runtime()` where there is no GPU.
"""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TextIO

from pydantic import Field, model_validator

from sparsify_deploy.errors import ModelError, NativeCrash
from sparsify_deploy.params import Params as Base
from sparsify_deploy.params import Positive
from sparsify_deploy.runtimes import _child
from sparsify_deploy.types import Facts, Json

DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}
"""numpy's name of a `DataType`; `trt.nptype` of 8.6 needs a numpy that still has `np.bool`."""

_LIBRARIES = ("CUBLAS", "CUBLAS_LT", "CUDNN")


@dataclass(frozen=True)
class Flavour:
    """TensorRT or TensorRT-RTX: its import name and how messages call it."""

    package: str
    name: str


class BuilderParams(Base):
    """What both runtimes let a recipe say to the builder."""

    sparse: bool = Field(True, description="allow 2:4 kernels; the builder takes one only where it is faster")
    min_batch: int = Field(1, ge=1, description="the batch sizes matter only where the ONNX file's batch is dynamic")
    opt_batch: int = Field(1, ge=1, description="the batch size that the engine is tuned for")
    max_batch: int = Field(32, ge=1)
    optimization_level: int | None = Field(None, ge=0, le=5, description="none: the builder's default")
    workspace_mib: int | None = Field(None, ge=1, description="none: all of the GPU's memory")
    time_limit_s: Positive = Field(300.0, description="the builder is stopped after that, s")

    @model_validator(mode="after")
    def _ordered(self) -> BuilderParams:
        if not self.min_batch <= self.opt_batch <= self.max_batch:
            raise ValueError("must be min_batch <= opt_batch <= max_batch")
        return self


@cache
def probe_reason(flavour: Flavour) -> str | None:
    """None where the package imports and makes a builder and a runtime here, else one line."""
    try:
        answer = _child.call(
            f"{__name__}:probe",
            {"package": flavour.package},
            what=f"loading {flavour.name}",
            time_limit_s=120,
            advice="does this machine have a usable NVIDIA GPU and a driver that is new enough?",
        )
    except NativeCrash as crash:
        return f"{flavour.name} is installed but does not work here: {crash}"
    reason: str | None = answer["reason"]
    return reason and f"{flavour.name} is installed but does not work here: {reason}"


def probe(request: Json) -> Json:
    """The child's side of `probe_reason`: `{"reason": None or one line}`."""
    try:
        trt = importlib.import_module(request["package"])
    except (ImportError, OSError, AttributeError) as error:
        return {"reason": f"it does not import: {' '.join(str(error).split())}"}
    logger, _ = _logger(trt, None)
    try:
        trt.Builder(logger)
    except TypeError:  # 8.6 without a GPU: the factory returned nullptr
        return {"reason": "its builder cannot be created (no usable NVIDIA GPU?)"}
    trt.Runtime(logger)
    return {"reason": None}


def build(flavour: Flavour, onnx: Path, engine: Path, params: BuilderParams) -> tuple[Facts, tuple[str, ...], float]:
    """Build an engine file in a child process; returns facts about it, warnings, and the seconds it took.

    The builder's whole log is left beside it as `<engine>.log`. Raises ModelError where the file cannot be parsed or
    built (with node, operator and reason), NativeCrash where the builder crashes or outruns its time limit.
    """
    from sparsify_deploy.graph.file import load

    model = load(onnx)
    engine.parent.mkdir(parents=True, exist_ok=True)
    log = log_path(engine)
    request = {
        **params.model_dump(mode="json"),
        "package": flavour.package,
        "onnx": str(onnx.resolve()),
        "engine": str(engine.resolve()),
        "log": str(log.resolve()),
        "quantised": any(node.op_type == "QuantizeLinear" for node in model.graph.node),
    }
    started = time.perf_counter()
    answer = _child.call(
        f"{__name__}:build_here",
        request,
        what=f"the {flavour.name} builder",
        time_limit_s=params.time_limit_s,
        advice=f"try a smaller part of {onnx.name}, or another version of {flavour.name}; its log is {log}",
    )
    if "failed" in answer:
        nodes = [(node.name, node.op_type) for node in model.graph.node]
        raise ModelError(_refusal(flavour, onnx, answer, nodes))
    return answer["facts"], tuple(answer["warnings"]), time.perf_counter() - started


def log_path(engine: Path) -> Path:
    """`model.engine.log` for `model.engine`."""
    return engine.with_name(engine.name + ".log")


def _refusal(flavour: Flavour, onnx: Path, answer: Json, nodes: Sequence[tuple[str, str]]) -> str:
    if answer["failed"] == "axes":
        return f"{onnx}: {answer['reason']}"
    if answer["failed"] == "build":
        return f"{onnx}: the {flavour.name} builder refused the network: {answer['reason']}"
    said = []
    for error in answer["errors"]:
        index = error["index"]
        name, operator = nodes[index] if 0 <= index < len(nodes) else ("", "")
        name, operator = error["name"] or name, error["operator"] or operator
        where = f"node {name!r} (operator {operator})" if operator else "the file"
        said.append(f"{where}: {error['reason']}")
    return (
        f"{onnx}: {flavour.name} cannot parse {'; '.join(dict.fromkeys(said)) or 'the file'}. "
        "Export the model without that operator, or choose another runtime"
    )


def build_here(request: Json) -> Json:
    """The child's side of `build`: facts and warnings, or `{"failed": "parse" | "axes" | "build", ...}`."""
    trt = importlib.import_module(request["package"])
    # a line at a time, so that the log is whole when the builder crashes
    with open(request["log"], "w", encoding="utf-8", buffering=1) as log:
        logger, messages = _logger(trt, log)
        return _build(trt, logger, messages, request)


def _build(trt: Any, logger: Any, messages: Sequence[tuple[str, str]], request: Json) -> Json:
    builder = trt.Builder(logger)
    # precision lives in the ONNX file where that is possible (10 and newer); 8.6 wants the batch made explicit
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    flag = typed if typed is not None else trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH
    network = builder.create_network(1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(request["onnx"])
    if not parsed or network.num_layers == 0:
        errors = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
        return {"failed": "parse", "errors": errors}
    config = builder.create_builder_config()
    without_effect = _configure(trt, config, request, typed is not None)
    if reason := _add_profile(builder, config, network, request):
        return {"failed": "axes", "reason": reason}
    serialised = builder.build_serialized_network(network, config)
    if serialised is None:
        last = [message for level, message in messages if level.endswith("ERROR")][-2:]
        return {"failed": "build", "reason": " ".join(" ".join(last).split()) or "it gave no reason"}
    engine = Path(request["engine"])
    partial = engine.with_name(engine.name + ".partial")
    partial.write_bytes(memoryview(serialised))
    partial.replace(engine)
    facts = {
        "layers_parsed": network.num_layers,
        "strongly_typed": typed is not None,
        "engine_bytes": engine.stat().st_size,
        **sparsity_said([message for _, message in messages]),
    }
    said = [message for level, message in messages if level == "WARNING"]
    return {"facts": facts, "warnings": [*without_effect, *dict.fromkeys(said)]}


def _configure(trt: Any, config: Any, request: Json, strongly_typed: bool) -> list[str]:
    """Set what this version knows; returns a line for every option that has no effect in it."""
    without_effect = []
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if request["sparse"]:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if not strongly_typed and request["quantised"]:
        config.set_flag(trt.BuilderFlag.INT8)
    if request["optimization_level"] is not None:
        config.builder_optimization_level = request["optimization_level"]
    if request["workspace_mib"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace_mib"] << 20)
    if request.get("ampere_plus"):
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    sources = [getattr(trt.TacticSource, name, None) for name in _LIBRARIES]
    if any(source is not None for source in sources):
        mask = config.get_tactic_sources()
        for source in sources:
            if source is not None:
                bit = 1 << int(source)
                mask = mask | bit if request.get("library_tactics") else mask & ~bit
        config.set_tactic_sources(mask)
    elif request.get("library_tactics"):
        without_effect.append("library_tactics has no effect: this version has no cuBLAS or cuDNN tactics")
    targets = request.get("targets", [])
    if targets:
        config.num_compute_capabilities = len(targets)
        for i, target in enumerate(targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), i)
    return without_effect


def _add_profile(builder: Any, config: Any, network: Any, request: Json) -> str | None:
    """A profile for inputs with a dynamic batch axis; a line where another axis is dynamic."""
    profile = builder.create_optimization_profile()
    dynamic = False
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        shape = tuple(tensor.shape)
        if -1 in shape[1:]:
            axis = shape.index(-1, 1)
            return f"input {tensor.name!r} has the dynamic axis {axis}: only the batch axis 0 may be, fix it at export"
        if shape[:1] == (-1,):
            dynamic = True
            sizes = (request["min_batch"], request["opt_batch"], request["max_batch"])
            profile.set_shape(tensor.name, *((size, *shape[1:]) for size in sizes))
    if dynamic:
        config.add_optimization_profile(profile)
    return None


def _parser_error(error: Any) -> Json:
    try:
        reason = " ".join(error.desc().split())
    except UnicodeDecodeError:
        reason = ""
    if reason in ("", "false"):  # RTX 1.7 says "false" of an operator it does not know
        reason = str(error.code()).rpartition(".")[2].lower().replace("_", " ")
    ask = {key: getattr(error, method, None) for key, method in (("name", "node_name"), ("operator", "node_operator"))}
    return {"index": error.node(), "reason": reason, **{key: f() if f else "" for key, f in ask.items()}}


def sparsity_said(messages: Sequence[str]) -> Mapping[str, list[str] | None]:
    """Layers that were `sparse_eligible` and `sparse_picked` by the builder's own log; None where it says nothing."""
    patterns = {
        "sparse_eligible": r"\(Sparsity\) Layers eligible for sparse math:(.*)",
        "sparse_picked": r"\(Sparsity\) TRT inference plan picked sparse implementation for layers:(.*)",
    }
    found: dict[str, list[str] | None] = dict.fromkeys(patterns)
    for message in messages:
        for key, pattern in patterns.items():
            if match := re.search(pattern, message, re.DOTALL):
                names = [name.strip() for name in match[1].split(",") if name.strip()]
                found[key] = [*(found[key] or []), *names]
    return found


def _logger(trt: Any, log: TextIO | None) -> tuple[Any, list[tuple[str, str]]]:
    """A logger that writes everything from VERBOSE up to `log`, and the list it fills with `(level, message)`.

    The list leaves out VERBOSE, which runs to gigabytes on a large net, but for what it says of sparsity.
    """
    messages: list[tuple[str, str]] = []

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            level = str(severity).rpartition(".")[2]
            if log is not None:
                log.write(f"{level}: {message}\n")
            if level != "VERBOSE" or "(Sparsity)" in message:
                messages.append((level, message))

    return Log(), messages
