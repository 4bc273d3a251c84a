"""One builder path for TensorRT 8.6, 10, 11 and TensorRT-RTX, which share their Python API but not all of it.

What a version lacks is found by `getattr(..., None)`. Everything native happens in a child process: a builder that
crashes or hangs is then a message, and TensorRT 8.6 dies of SIGSEGV in `Runtime()` where there is no GPU.
"""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from pydantic import Field, model_validator

from sparsify_deploy.errors import ModelError, NativeCrash
from sparsify_deploy.params import Params as Base
from sparsify_deploy.params import Positive
from sparsify_deploy.runtimes import _child, _gpu
from sparsify_deploy.runtimes._trt_build import new_logger
from sparsify_deploy.runtimes._trt_refusals import objection, refusal
from sparsify_deploy.types import Facts, Json, Progress

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


@dataclass(frozen=True)
class Flavour:
    """TensorRT or TensorRT-RTX: its import name and how messages call it."""

    package: str
    name: str


class ShapeRange(Base):
    """The shapes of one input that an engine takes, and the one it is tuned for; each axis 1 or more."""

    min: tuple[int, ...] = Field(strict=False, description="smallest shape it takes")
    opt: tuple[int, ...] = Field(strict=False, description="shape it is tuned for")
    max: tuple[int, ...] = Field(strict=False, description="largest shape it takes")

    @model_validator(mode="after")
    def _ordered(self) -> ShapeRange:
        if not len(self.min) == len(self.opt) == len(self.max):
            raise ValueError("min, opt and max must have as many axes")
        if not all(1 <= low <= mid <= high for low, mid, high in zip(self.min, self.opt, self.max, strict=True)):
            raise ValueError("must be 1 <= min <= opt <= max on every axis")
        return self


class BuilderParams(Base):
    """What both runtimes let a recipe say to the builder."""

    precision: Literal["fp16", "fp32"] = Field(
        "fp16",
        description="what is not quantised computes in it; fp16 keeps softmax, normalisation, sums and powers in FP32",
    )
    sparse: bool = Field(True, description="allow 2:4 kernels; the builder takes one only where it is faster")
    min_batch: int = Field(1, ge=1, description="the batch sizes matter only where the ONNX file's batch is dynamic")
    opt_batch: int = Field(1, ge=1, description="the batch size that the engine is tuned for")
    max_batch: int = Field(32, ge=1, description="largest batch an engine takes")
    shapes: dict[str, ShapeRange] = Field(
        {},
        description="input name to {min, opt, max} shapes; needed where another axis than the batch is dynamic and the "
        "file does not say which sizes it takes, as a file exported here from text data does",
    )
    optimization_level: int | None = Field(None, ge=0, le=5, description="none: the builder's default")
    workspace_mib: int | None = Field(None, ge=1, description="none: all of the GPU's memory")
    timing_cache: bool | str = Field(
        True,
        description="kernel timings kept for later builds, a file a version and GPU: in the user's cache folder, "
        "in the folder named here, or (false) not at all",
    )
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
    logger, _ = new_logger(trt, None)
    try:
        trt.Builder(logger)
    except TypeError:  # 8.6 without a GPU: the factory returned nullptr
        return {"reason": "its builder cannot be created (no usable NVIDIA GPU?)"}
    trt.Runtime(logger)
    return {"reason": None}


def build(
    flavour: Flavour, onnx: Path, engine: Path, params: BuilderParams, progress: Progress | None = None
) -> tuple[Facts, tuple[str, ...], float]:
    """Build an engine file in a child process; returns facts about it, warnings, and the seconds it took.

    The builder's whole log is left beside it as `<engine>.log`, and its phases go to `progress`. Raises ModelError
    where the file cannot be parsed or built (with node, operator and what to do), NativeCrash where the builder
    crashes or outruns its time limit.
    """
    from sparsify_deploy.graph import axis_sizes
    from sparsify_deploy.graph.file import load

    model = load(onnx)
    if reason := objection(model):
        raise ModelError(f"{onnx}: {reason}")
    engine.parent.mkdir(parents=True, exist_ok=True)
    log = log_path(engine)
    gpu = next((f"{gpu.name} {gpu.architecture}" for gpu in _gpu.gpus()), "no GPU")
    cache_folder = timing_cache_folder(params.timing_cache)
    started = time.perf_counter()
    with TemporaryDirectory(prefix="sparsify-deploy-") as scratch:
        told = Path(scratch, "progress.jsonl")
        request = {
            **params.model_dump(mode="json"),
            "package": flavour.package,
            "onnx": str(onnx.resolve()),
            "engine": str(engine.resolve()),
            "log": str(log.resolve()),
            "quantised": any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node),
            "scratch": scratch,
            "axis_sizes": axis_sizes.plain(model),
            "progress": str(told),
            "gpu": gpu,
            "timing_cache_asked": params.timing_cache,
            "timing_cache": str(cache_folder) if cache_folder is not None else None,
        }
        answer = _child.call(
            "sparsify_deploy.runtimes._trt_build:build_here",
            request,
            what=f"the {flavour.name} builder",
            time_limit_s=params.time_limit_s,
            advice=f"try a smaller part of {onnx.name}, or another version of {flavour.name}; its log is {log}",
            waiting=follow(told, flavour.name, progress) if progress is not None else None,
        )
    if "failed" in answer:
        raise ModelError(refusal(flavour.name, onnx, answer))
    sizes = {"axis_sizes": request["axis_sizes"]} if request["axis_sizes"] else {}
    return {**answer["facts"], **sizes}, tuple(answer["warnings"]), time.perf_counter() - started


def follow(told: Path, name: str, progress: Progress) -> Callable[[], None]:
    """A function that hands what was appended to the file `told` since its last call on to `progress`.

    A line is `[phase, steps done, steps]` as JSON; one that is not yet whole waits for the next call.
    """
    position = 0

    def look() -> None:
        nonlocal position
        if not told.is_file():
            return
        with told.open("rb") as file:
            file.seek(position)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        position += len(whole)
        for line in whole.splitlines():
            phase, done, steps = json.loads(line)
            progress.update(name, done, steps, phase)

    return look


def timing_cache_folder(asked: bool | str) -> Path | None:
    """Where timing caches lie: `asked`, or `sparsify-deploy/tensorrt` in $XDG_CACHE_HOME or ~/.cache; None: nowhere."""
    if asked is False:
        return None
    if isinstance(asked, str):
        return Path(asked).expanduser().resolve()
    home = os.environ.get("XDG_CACHE_HOME", "")
    # the XDG specification: a relative path is to be ignored
    base = Path(home) if Path(home).is_absolute() else Path.home() / ".cache"
    return base / "sparsify-deploy" / "tensorrt"


def log_path(engine: Path) -> Path:
    """`model.engine.log` for `model.engine`."""
    return engine.with_name(engine.name + ".log")
