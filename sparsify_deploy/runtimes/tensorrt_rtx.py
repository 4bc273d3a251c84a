"""NVIDIA TensorRT-RTX: ahead-of-time engines for consumer GPUs, built even where there is no GPU.

The file is made for one or more architectures and finished by a just-in-time compiler on the user's machine; it runs
only under TensorRT-RTX. A build proves that NVIDIA's parser and builder take the model. It says nothing about sparse
kernels, so no report draws a verdict on 2:4 from it. Reference: https://docs.nvidia.com/deeplearning/tensorrt-rtx
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from sparsify_deploy.artifacts.fingerprint import file_digest
from sparsify_deploy.errors import RuntimeUnavailable
from sparsify_deploy.runtimes import _gpu, _metadata, _packages, _trt
from sparsify_deploy.types import BuildNotes, EngineProfile, Progress

if TYPE_CHECKING:
    from sparsify_deploy.runtimes._cuda import CudaSession
    from sparsify_deploy.types import Arrays

VERSION = 2
SUFFIX = ".rtx.engine"
FLAVOUR = "tensorrt"
NOT_RUN = "built, not run here"
_FLAVOUR = _trt.Flavour("tensorrt_rtx", "TensorRT-RTX")
_NO_VERDICT = "TensorRT-RTX does not say which kernels are sparse: no verdict on 2:4 can be drawn from this build"


class Params(_trt.BuilderParams):
    """`targets` are the GPU architectures that the engine is made for."""

    targets: tuple[Literal["sm80", "sm86", "sm89", "sm120"], ...] = Field(
        ("sm86",), strict=False, min_length=1, description="GPU architectures the engine is made for"
    )


def lower_precision(params: Params, /) -> tuple[str, Params] | None:
    """The float precision below the one of `params`, and the parameters for it; None: there is none."""
    return ("FP16", params.model_copy(update={"precision": "fp16"})) if params.precision == "fp32" else None


def version() -> str | None:
    """TensorRT-RTX's version, None where it is not installed."""
    return _packages.version_of("tensorrt_rtx")


def unavailable_reason() -> str | None:
    """None where it can build here (no GPU needed), else one line."""
    if reason := _packages.missing("TensorRT-RTX", "tensorrt_rtx", "tensorrt-rtx"):
        return reason
    return _trt.probe_reason(_FLAVOUR)


def cannot_run_reason() -> str | None:
    """None where it can execute engines here, else one line."""
    from sparsify_deploy.runtimes import _cuda

    return _packages.missing("TensorRT-RTX", "tensorrt_rtx", "tensorrt-rtx") or _cuda.cannot_run_reason(_FLAVOUR)


def build(onnx: Path, engine: Path, params: Params, /, *, progress: Progress | None = None) -> BuildNotes:
    """Build ahead of time for `params.targets`. Raises ModelError, NativeCrash or RuntimeUnavailable."""
    if reason := unavailable_reason():
        raise RuntimeUnavailable(reason)
    facts, warnings, seconds = _trt.build(_FLAVOUR, onnx, engine, params, progress)
    here = cannot_run_reason() is None and any(gpu.architecture in params.targets for gpu in _gpu.gpus()[:1])
    notes = BuildNotes(
        runtime="tensorrt_rtx",
        version=version() or "unknown",
        files=(engine.name,),
        seconds=seconds,
        options=params.model_dump(mode="json"),
        runs_here=here,
        label="" if here else NOT_RUN,
        warnings=warnings,
        facts={**facts, "sparse_eligible": None, "sparse_picked": None, "sparse_verdict": _NO_VERDICT},
    )
    _metadata.write_metadata(engine, notes, file_digest(onnx), params)
    return notes


def open(
    engine: Path, params: Params, /, *, threads: int = 1, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> AbstractContextManager[CudaSession]:
    """Load an engine on the first GPU; `threads` has no effect. Raises RuntimeUnavailable where there is no GPU."""
    from sparsify_deploy.runtimes import _cuda

    _metadata.judge(engine)
    return _cuda.open_engine(_FLAVOUR, engine, shapes, time_limit_s=params.time_limit_s)


def profile(engine: Path, params: Params, inputs: Arrays, /, *, threads: int = 1) -> EngineProfile:
    """No layer: TensorRT-RTX compiles its kernels on the user's machine and does not name them."""
    return EngineProfile(
        (), 0, "TensorRT-RTX compiles its kernels when it runs and does not say which layer took how long"
    )
