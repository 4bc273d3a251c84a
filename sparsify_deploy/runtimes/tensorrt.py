"""NVIDIA TensorRT: engines for data-centre and other GPUs, with 2:4-sparse INT8 kernels.

The builder times kernels on the GPU of this machine and takes a sparse one only where it is faster; which layers were
eligible and which were picked is read from its log. Reference: https://docs.nvidia.com/deeplearning/tensorrt
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from sparsify_deploy.artifacts import environment
from sparsify_deploy.artifacts.fingerprint import file_digest
from sparsify_deploy.errors import RuntimeUnavailable
from sparsify_deploy.runtimes import _gpu, _metadata, _packages, _trt, _trt_load, _trt_profile
from sparsify_deploy.types import BuildNotes, EngineProfile, Progress

if TYPE_CHECKING:
    from sparsify_deploy.runtimes._cuda import CudaSession
    from sparsify_deploy.types import Arrays

VERSION = 2
SUFFIX = ".engine"
FLAVOUR = "tensorrt"
_RTX_TARGETS = ("sm80", "sm86", "sm89", "sm120")
_FLAVOUR = _trt.Flavour("tensorrt", "TensorRT")


class Params(_trt.BuilderParams):
    """The builder's settings. `targets` are the architectures that the engine must run on; none: this machine's."""

    targets: tuple[Literal["sm80", "sm86", "sm89", "sm90"], ...] = Field(
        (), strict=False, description="what the engine must run on; TensorRT builds only on the GPU it builds for"
    )
    version_compatible: bool = Field(
        False,
        description="an engine for later versions too; it holds NVIDIA's runtime as code, run once sha256 matches",
    )
    ampere_plus: bool = Field(False, description="an engine for every GPU from Ampere on, slower than one for this GPU")
    library_tactics: bool = Field(False, description="also try cuBLAS, cuBLASLt and cuDNN kernels (8.6 and 10)")


def lower_precision(params: Params, /) -> tuple[str, Params] | None:
    """The float precision below the one of `params`, and the parameters for it; None: there is none."""
    return ("FP16", params.model_copy(update={"precision": "fp16"})) if params.precision == "fp32" else None


def version() -> str | None:
    """TensorRT's version, None where it is not installed."""
    return _packages.version_of("tensorrt")


def unavailable_reason() -> str | None:
    """None where it can build here, else one line: the package or the GPU is missing."""
    if reason := _packages.missing("TensorRT", "tensorrt", "gpu"):
        return reason
    if reason := _gpu.no_gpu_reason():
        return f"TensorRT builds only on the GPU it builds for: {reason}"
    return _trt.probe_reason(_FLAVOUR)


def cannot_run_reason() -> str | None:
    """None where it can execute engines here, else one line."""
    from sparsify_deploy.runtimes import _cuda

    return _packages.missing("TensorRT", "tensorrt", "gpu") or _cuda.cannot_run_reason(_FLAVOUR)


def target_reason(params: Params) -> str | None:
    """None where an engine built here runs on all of `params.targets`, else one line with the ways out."""
    here = next((gpu.architecture for gpu in _gpu.gpus()), None)
    spans = params.ampere_plus and here is not None and _trt_load.number(here) >= 80
    absent = [target for target in params.targets if target != here and not spans]
    if not absent:
        return None
    ways = [f"build on {'a machine' if len(absent) == 1 else 'machines'} with {' and '.join(absent)}"]
    if here is not None and not params.ampere_plus and _trt_load.number(here) >= 80:
        ways.append("set ampere_plus: true, for one slower engine that runs on sm80 and every later GPU")
    if ahead := [target for target in absent if target in _RTX_TARGETS]:
        rtx = f"use runtime tensorrt_rtx, which builds ahead of time for {' and '.join(ahead)} without a GPU"
        ways.append(rtx + ("" if len(ahead) == len(absent) else ", though not for sm90"))
    else:
        ways.append("tensorrt_rtx builds ahead of time for sm80, sm86, sm89 and sm120, but has no sm90")
    gpu = f"this one is {here}" if here is not None else "there is none here"
    return f"TensorRT builds only on the GPU it builds for and {gpu}, not {' and '.join(absent)}: {'; or '.join(ways)}"


def build(onnx: Path, engine: Path, params: Params, /, *, progress: Progress | None = None) -> BuildNotes:
    """Build for the GPU of this machine. Raises ModelError, NativeCrash or RuntimeUnavailable."""
    missing = _packages.missing("TensorRT", "tensorrt", "gpu")
    if reason := missing or target_reason(params) or unavailable_reason():
        raise RuntimeUnavailable(reason)
    facts, warnings, seconds = _trt.build(_FLAVOUR, onnx, engine, params, progress)
    notes = BuildNotes(
        runtime="tensorrt",
        version=version() or "unknown",
        files=(engine.name,),
        seconds=seconds,
        options=params.model_dump(mode="json"),
        runs_here=cannot_run_reason() is None,
        warnings=warnings,
        facts={
            **facts,
            "gpu": _gpu.gpus()[0].name,
            "architecture": _gpu.gpus()[0].architecture,
            "driver": environment.fact("driver"),
        },
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
    """Device time of every layer, mean of 30 runs, and its kernel; `threads` has no effect. Raises what `open` does."""
    shapes = {name: tuple(array.shape) for name, array in inputs.items()}
    with open(engine, params, threads=threads, shapes=shapes) as session:
        session.bind(inputs)
        return _trt_profile.profile(session)
