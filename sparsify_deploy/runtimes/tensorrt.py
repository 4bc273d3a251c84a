"""NVIDIA TensorRT: engines for data-centre and other GPUs, with 2:4-sparse INT8 kernels.

The builder times kernels on the GPU of this machine and takes a sparse one only where it is faster; which layers were
eligible and which were picked is read from its log. Reference: https://docs.nvidia.com/deeplearning/tensorrt
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from sparsify_deploy.artifacts.fingerprint import file_digest
from sparsify_deploy.errors import RuntimeUnavailable
from sparsify_deploy.runtimes import _gpu, _metadata, _packages, _trt
from sparsify_deploy.types import BuildNotes

if TYPE_CHECKING:
    from sparsify_deploy.runtimes._cuda import CudaSession

VERSION = 1
SUFFIX = ".engine"
FLAVOUR = "tensorrt"
_FLAVOUR = _trt.Flavour("tensorrt", "TensorRT")


class Params(_trt.BuilderParams):
    """The builder's settings; precision is not one of them, it lives in the ONNX file."""

    ampere_plus: bool = Field(False, description="an engine for every GPU from Ampere on, slower than one for this GPU")
    library_tactics: bool = Field(False, description="also try cuBLAS, cuBLASLt and cuDNN kernels (8.6 and 10)")


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


def build(onnx: Path, engine: Path, params: Params, /) -> BuildNotes:
    """Build for the GPU of this machine. Raises ModelError, NativeCrash or RuntimeUnavailable."""
    if reason := unavailable_reason():
        raise RuntimeUnavailable(reason)
    facts, warnings, seconds = _trt.build(_FLAVOUR, onnx, engine, params)
    notes = BuildNotes(
        runtime="tensorrt",
        version=version() or "unknown",
        files=(engine.name,),
        seconds=seconds,
        options=params.model_dump(mode="json"),
        runs_here=cannot_run_reason() is None,
        warnings=warnings,
        facts={**facts, "gpu": _gpu.gpus()[0].name, "architecture": _gpu.gpus()[0].architecture},
    )
    _metadata.write_metadata(engine, notes, file_digest(onnx), params)
    return notes


def open(
    engine: Path, params: Params, /, *, threads: int = 1, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> AbstractContextManager[CudaSession]:
    """Load an engine on the first GPU; `threads` has no effect. Raises RuntimeUnavailable where there is no GPU."""
    from sparsify_deploy.runtimes import _cuda

    _metadata.judge(engine)
    return _cuda.open_engine(_FLAVOUR, engine, shapes)
