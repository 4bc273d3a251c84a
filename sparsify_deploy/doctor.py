"""What this machine has and lacks, one finding a line, each with what to do about it.

It needs the core packages alone. What may crash while it is imported is imported in a child process.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from sparsify_deploy import menu
from sparsify_deploy.artifacts import environment
from sparsify_deploy.errors import NativeCrash
from sparsify_deploy.runtimes import _child, _packages
from sparsify_deploy.types import Json

State = Literal["ok", "warn", "missing"]

_CORE = ("numpy", "onnx", "pydantic", "rich", "ruamel.yaml", "safetensors", "typer")
_LEAST_FREE_GIB = 5
_IMPORT_LIMIT_S = 120


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `advice` is empty where there is nothing to do."""

    name: str
    state: State
    detail: str
    advice: str = ""


def diagnose(folder: Path | None = None) -> tuple[Finding, ...]:
    """Everything there is to say of this machine; `folder` is where the disk space counts, by default the current."""
    return (
        _python(),
        _core(),
        *_training(),
        *_runtimes(),
        _both_onnxruntimes(),
        _gpu(),
        _cpu(environment.fact("cpu")),
        _cores(),
        _disk(folder or Path.cwd()),
    )


def _python() -> Finding:
    text = environment.fact("python")
    if sys.version_info < (3, 11):
        return Finding("python", "warn", text, "builds and benchmarks work; training and quantising need 3.11 or newer")
    return Finding("python", "ok", text)


def _core() -> Finding:
    lacking = [name for name in _CORE if not _packages.installed(name)]
    if lacking:
        return Finding("core packages", "missing", ", ".join(lacking), "pip install --force-reinstall sparsify-deploy")
    return Finding("core packages", "ok", ", ".join(f"{name} {metadata.version(name)}" for name in _CORE))


def _training() -> Iterator[Finding]:
    yield _imported("torch", "train", "needed to train and quantise, not to build and benchmark")
    lacking = [name for name in ("modelopt", "requests", "huggingface_hub") if not _packages.installed(name)]
    if lacking == [] or not _packages.installed("modelopt"):
        version = _packages.version_of("modelopt")
        state: State = "missing" if version is None else "ok"
        advice = "" if version else "needed to quantise: pip install 'sparsify-deploy[train]'"
        yield Finding("modelopt", state, version or "not installed", advice)
    else:
        yield Finding("modelopt", "warn", f"lacks {', '.join(lacking)}", "pip install 'sparsify-deploy[train]'")


def _runtimes() -> Iterator[Finding]:
    for name in menu.names("runtimes"):
        runtime = menu.entry("runtimes", name)
        version = runtime.version()
        if (reason := runtime.unavailable_reason()) is not None:
            yield Finding(name, "missing" if version is None else "warn", version or "not installed", reason)
        elif (broken := _import_failure(name)) is not None:
            yield Finding(name, "warn", f"{version}, {broken}", "reinstall the package")
        elif (reason := runtime.cannot_run_reason()) is not None:
            yield Finding(name, "warn", f"{version}, builds engines and cannot run them here", reason)
        else:
            yield Finding(name, "ok", f"{version}, builds and runs engines here")


def _imported(package: str, extra: str, purpose: str) -> Finding:
    version = _packages.version_of(package)
    if version is None:
        advice = f"{purpose}: pip install 'sparsify-deploy[{extra}]'"
        return Finding(package, "missing", "not installed", advice)
    if (broken := _import_failure(package)) is not None:
        return Finding(package, "warn", f"{version}, {broken}", "reinstall the package")
    return Finding(package, "ok", version)


def _import_failure(package: str) -> str | None:
    """None where the package imports in a child process, else one line."""
    try:
        answer: str | None = _child.call(
            f"{__name__}:import_here", package, what=f"importing {package}", time_limit_s=_IMPORT_LIMIT_S
        )
    except NativeCrash as crash:
        return str(crash)
    return answer


def import_here(package: Json) -> Json:
    """The child's side of an import: None, or why it failed."""
    try:
        importlib.import_module(package)
    except Exception as error:  # noqa: BLE001 a broken package raises whatever it likes, and that is the finding
        return f"does not import: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None


def _both_onnxruntimes() -> Finding:
    found = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    if len(found) == 2:
        advice = (
            "they share one folder, so only the CPU works: pip uninstall onnxruntime onnxruntime-gpu, then install "
            "sparsify-deploy[cpu] or [gpu], not both"
        )
        return Finding("onnxruntime packages", "warn", " and ".join(found), advice)
    return Finding("onnxruntime packages", "ok", found[0] if found else "none")


def _gpu() -> Finding:
    gpu, driver = environment.fact("gpu"), environment.fact("driver")
    if gpu.startswith(environment.NO_GPU):
        advice = "engines for NVIDIA GPUs cannot be timed here; CPU engines and TensorRT-RTX builds work"
        return Finding("gpu", "missing", gpu, advice)
    return Finding("gpu", "ok", f"{gpu}, driver {driver}")


def _cpu(text: str) -> Finding:
    flags = set(text.split())
    if "amx_int8" in flags:
        return Finding("cpu", "ok", f"{text}: INT8 in AMX tiles")
    if flags & {"avx512_vnni", "avx_vnni", "i8mm", "asimddp"}:
        return Finding("cpu", "ok", f"{text}: INT8 dot products")
    advice = "INT8 may be slower than FP32 here: race both before shipping"
    return Finding("cpu", "warn", f"{text}: no INT8 dot products", advice)


def _cores() -> Finding:
    cores = environment.available_cores()
    return Finding("cores", "ok", f"{cores} that this process may use")


def _disk(folder: Path) -> Finding:
    free_gib = shutil.disk_usage(folder).free / 2**30
    detail = f"{free_gib:.1f} GiB free in {folder}"
    if free_gib < _LEAST_FREE_GIB:
        return Finding("disk", "warn", detail, f"a run may need {_LEAST_FREE_GIB} GiB: make room")
    return Finding("disk", "ok", detail)
