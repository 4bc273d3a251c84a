"""The child's side of a TensorRT build: parse, configure, build, and say what came of it."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from sparsify_deploy.artifacts import durable
from sparsify_deploy.errors import ModelError
from sparsify_deploy.graph.engine_names import listed
from sparsify_deploy.runtimes import _trt_timing_cache
from sparsify_deploy.types import Json

_LIBRARIES = ("CUBLAS", "CUBLAS_LT", "CUDNN")


def build_here(request: Json) -> Json:
    """Facts and warnings, or `{"failed": "parse" | "axes" | "build", ...}`."""
    trt = importlib.import_module(request["package"])
    # a line at a time, so that the log is whole when the builder crashes
    with open(request["log"], "w", encoding="utf-8", buffering=1) as log:
        logger, messages = new_logger(trt, log)
        return _build(trt, logger, messages, request)


def _build(trt: Any, logger: Any, messages: Sequence[tuple[str, str]], request: Json) -> Json:
    builder = trt.Builder(logger)
    # precision lives in the ONNX file where that is possible (10 and newer); 8.6 wants the batch made explicit
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    flag = typed if typed is not None else trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH
    network = builder.create_network(1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    onnx, converted = _with_precision(request, typed is not None)
    parsed = parser.parse_from_file(onnx)
    if not parsed or network.num_layers == 0:
        errors = [parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
        return {"failed": "parse", "errors": errors, "nodes": _nodes(onnx)}
    config = builder.create_builder_config()
    without_effect = configure(trt, config, request, typed is not None)
    if failure := add_profile(builder, config, network, request):
        return {"failed": "axes", **failure}
    cache = _trt_timing_cache.attach(trt, config, request)
    with _told(trt, config, Path(request["progress"])):
        serialised = builder.build_serialized_network(network, config)
    if serialised is None:
        last = [message for level, message in messages if level.endswith("ERROR")][-2:]
        return {"failed": "build", "reason": " ".join(" ".join(last).split()) or "it gave no reason"}
    _trt_timing_cache.save(config, cache)
    engine = Path(request["engine"])
    durable.write(engine, [memoryview(serialised)])
    facts = {
        "layers_parsed": network.num_layers,
        "strongly_typed": typed is not None,
        "engine_bytes": engine.stat().st_size,
        "float16": converted and {"nodes": converted["half"], "kept_fp32": converted["kept"]},
        "timing_cache": cache.facts(),
        **sparsity_said([message for _, message in messages]),
    }
    said = [message for level, message in messages if level == "WARNING"]
    ours = [*without_effect, *cache.warnings, *(converted["warnings"] if converted else ())]
    return {"facts": facts, "warnings": [*ours, *dict.fromkeys(said)]}


def _with_precision(request: Json, strongly_typed: bool) -> tuple[str, Json]:
    """The ONNX file to parse, and what its conversion to FP16 did; None where it is parsed as it is."""
    if request["precision"] != "fp16" or not strongly_typed:
        return request["onnx"], None
    from sparsify_deploy.graph import file
    from sparsify_deploy.graph.float16 import save, to_float16

    try:
        model, done = to_float16(file.load(Path(request["onnx"])))
    except ModelError as error:
        raise ModelError(f"{request['onnx']}: cannot be made FP16: {error}; or set precision: fp32") from None
    path = Path(request["scratch"], Path(request["onnx"]).name)
    save(model, path)
    return str(path), asdict(done)


def _nodes(onnx: str) -> list[tuple[str, str]]:
    from sparsify_deploy.graph.file import load

    return [(node.name, node.op_type) for node in load(Path(onnx)).graph.node]


def configure(trt: Any, config: Any, request: Json, strongly_typed: bool) -> list[str]:
    """Set what this version knows; returns a line for every option that has no effect in it."""
    lost: list[str] = []
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    flags = {"SPARSE_WEIGHTS": request["sparse"], "VERSION_COMPATIBLE": request.get("version_compatible")}
    if not strongly_typed:
        flags |= {"INT8": request["quantised"], "FP16": request["precision"] == "fp16"}
    for name in [name for name, wanted in flags.items() if wanted]:
        flag = getattr(trt.BuilderFlag, name, None)
        if flag is not None:
            config.set_flag(flag)
        else:
            lost.append(f"{name.lower()} has no effect: this version has no such option")
    _set(config, "builder_optimization_level", request["optimization_level"], "optimization_level", lost)
    if request["workspace_mib"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace_mib"] << 20)
    if request.get("ampere_plus"):
        levels = getattr(trt, "HardwareCompatibilityLevel", None)
        level = getattr(levels, "AMPERE_PLUS", None)
        _set(config, "hardware_compatibility_level", level, "ampere_plus", lost)
        if level is None:
            lost.append("ampere_plus has no effect: this version has no such option")
    lost += _tactic_sources(trt, config, request)
    targets = request.get("targets", [])
    if targets and request["package"] == "tensorrt_rtx":  # TensorRT builds for the GPU it runs on
        config.num_compute_capabilities = len(targets)
        for i, target in enumerate(targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), i)
    return lost


def _set(config: Any, attribute: str, value: Any, option: str, lost: list[str]) -> None:
    if value is None:
        return
    if hasattr(config, attribute):
        setattr(config, attribute, value)
    else:
        lost.append(f"{option} has no effect: this version has no such option")


def _tactic_sources(trt: Any, config: Any, request: Json) -> list[str]:
    known = getattr(trt, "TacticSource", None)
    sources = [source for name in _LIBRARIES if (source := getattr(known, name, None)) is not None]
    if not sources:
        asked = request.get("library_tactics")
        return ["library_tactics has no effect: this version has no cuBLAS or cuDNN tactics"] if asked else []
    mask = config.get_tactic_sources()
    for source in sources:
        bit = 1 << int(source)
        mask = mask | bit if request.get("library_tactics") else mask & ~bit
    config.set_tactic_sources(mask)
    return []


def add_profile(builder: Any, config: Any, network: Any, request: Json) -> Json:
    """A profile for inputs with dynamic axes; `{"reason": ...}` where one is missing or does not fit, else None."""
    profile = builder.create_optimization_profile()
    given = dict(request["shapes"])
    dynamic = False
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        shape, asked = tuple(tensor.shape), given.pop(tensor.name, None)
        if asked is None:
            sizes = _sizes(shape, request, request.get("axis_sizes", {}).get(tensor.name, {}))
            if any(-1 in size[1:] for size in sizes):
                return {"reason": _no_range(tensor.name, shape)}
        else:
            sizes = [tuple(asked[key]) for key in ("min", "opt", "max")]
            if not all(_fits(size, shape) for size in sizes):
                return {"reason": f"params.shapes.{tensor.name}: does not fit the file's {_text(shape)}"}
        if -1 in shape:
            dynamic = True
            profile.set_shape(tensor.name, *sizes)
    if given:
        names = ", ".join(network.get_input(i).name for i in range(network.num_inputs))
        return {"reason": f"params.shapes.{next(iter(given))}: there is no such input; the file has {names}"}
    if dynamic:
        config.add_optimization_profile(profile)
    return None


def _sizes(shape: Sequence[int], request: Json, known: Mapping[str, Sequence[int]]) -> list[tuple[int, ...]]:
    """The least, typical and largest shape: batch sizes as the request has them, free axes as the file has them."""
    found = []
    for i, batch in enumerate(("min_batch", "opt_batch", "max_batch")):
        rest = [known[str(axis)][i] if n == -1 and str(axis) in known else n for axis, n in enumerate(shape)][1:]
        found.append((*([request[batch] if shape[0] == -1 else shape[0]] if shape else []), *rest))
    return found


def _fits(size: Sequence[int], shape: Sequence[int]) -> bool:
    return len(size) == len(shape) and all(axis in (-1, n) for axis, n in zip(shape, size, strict=True))


def _no_range(name: str, shape: Sequence[int]) -> str:
    def example(size: int) -> str:
        return "[" + ", ".join(str(size if axis == -1 else axis) for axis in shape) + "]"

    return (
        f"input {name!r} has the dynamic axis {tuple(shape).index(-1, 1)} and no range for it: write params.shapes: "
        f"{{{name}: {{min: {example(1)}, opt: {example(16)}, max: {example(64)}}}}} with the sizes that you need, "
        "or fix the axis at export"
    )


def _text(shape: Sequence[int]) -> str:
    return "(" + ", ".join("?" if axis == -1 else str(axis) for axis in shape) + ")"


@contextmanager
def _told(trt: Any, config: Any, path: Path) -> Iterator[None]:
    """While this is open the builder's outermost two levels of phases are appended to `path`.

    A line is `[phase, steps done, steps]`.
    """
    base = getattr(trt, "IProgressMonitor", None)
    if base is None or not hasattr(config, "progress_monitor"):
        yield
        return
    with path.open("a", encoding="utf-8", buffering=1) as told:
        config.progress_monitor = _monitor(base, told)
        yield
        config.progress_monitor = None


def _monitor(base: Any, told: TextIO) -> Any:
    steps: dict[str, int] = {}
    outermost: set[str] = set()

    class Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None or parent_phase in outermost:
                steps[phase_name] = num_steps
                if parent_phase is None:
                    outermost.add(phase_name)
                told.write(json.dumps([phase_name, 0, num_steps]) + "\n")

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in steps:
                told.write(json.dumps([phase_name, step + 1, steps[phase_name]]) + "\n")
            return True

        def phase_finish(self, phase_name: str) -> None:
            if (number := steps.pop(phase_name, None)) is not None:
                told.write(json.dumps([phase_name, number, number]) + "\n")

    return Monitor()


def parser_error(error: Any) -> Json:
    """A ParserError of any version as `{"index", "reason", "name", "operator"}`."""
    try:
        reason = " ".join(error.desc().split())
    except UnicodeDecodeError:
        reason = ""
    if reason in ("", "false"):  # RTX 1.7 says "false" of an operator it does not know
        reason = str(error.code()).rpartition(".")[2].lower().replace("_", " ")
    ask = {key: getattr(error, method, None) for key, method in (("name", "node_name"), ("operator", "node_operator"))}
    return {"index": error.node(), "reason": reason, **{key: f() if f else "" for key, f in ask.items()}}


def sparsity_said(messages: Sequence[str]) -> Mapping[str, list[str] | None]:
    """Layers that were `sparse_eligible` and `sparse_picked` by the builder's own log; None where it names none.

    8.6 lists them after a sentence, 10 counts them as well (`Found 3 layer(s) eligible to use sparse tactics: ...`):
    a count above 0 without the names is None.
    """
    patterns = {
        "sparse_eligible": r"Layers eligible for sparse math:(.*)"
        r"|Found (\d+) layer\(s\) eligible to use sparse tactics:?(.*)",
        "sparse_picked": r"TRT inference plan picked sparse implementation for layers:(.*)"
        r"|Chose (\d+) layer\(s\) using sparse tactics:?(.*)",
    }
    found: dict[str, list[str] | None] = dict.fromkeys(patterns)
    for message in messages:
        for key, pattern in patterns.items():
            if match := re.search(rf"\(Sparsity\) (?:{pattern})", message, re.DOTALL):
                names = [*listed(match[1] or match[3] or "")]
                if names or int(match[2] or 0) == 0:
                    found[key] = [*(found[key] or []), *names]
    return found


def new_logger(trt: Any, log: TextIO | None) -> tuple[Any, list[tuple[str, str]]]:
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
