"""Named facts about this machine that a result may depend on, found without importing what they name."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsify_deploy.types import Json

ABSENT = "absent"
NO_GPU = "none"

PACKAGES: Mapping[str, tuple[str, ...]] = {
    "torch": ("torch",),
    "modelopt": ("nvidia-modelopt",),
    "onnx": ("onnx",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu11"),
    "tensorrt_rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
}
"""Import name to the distributions that bring it, the usual one first."""

_ISA = (
    *("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
"""Instruction sets for which INT8 and BF16 kernels differ: x86, then ARM."""


@cache
def fact(name: str) -> str:
    """The fact `name`, the same for the life of the process: a package of `PACKAGES`, or a name in `FACTS`.

    A missing package is `ABSENT`, a missing GPU or driver `NO_GPU`. Raises `KeyError` for a name it does not know.
    """
    return package(name) if name in PACKAGES else FACTS[name]()


def machine() -> dict[str, Json]:
    """What a report says about the machine it was made on."""
    return {
        "cpu": fact("cpu"),
        "cores": available_cores(),
        "memory_mib": _memory_mib(),
        "gpu": fact("gpu"),
        "driver": fact("driver"),
        "os": f"{platform.system()} {platform.release()}",
        "python": fact("python"),
        "packages": {name: fact(name) for name in sorted(PACKAGES) if fact(name) != ABSENT},
    }


def available_cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def package(name: str) -> str:
    """The version of an importable package of `PACKAGES`, with its distribution where that is not the usual one."""
    found = [text for dist in PACKAGES[name] if (text := _version(dist, PACKAGES[name][0])) is not None]
    if found:
        return " and ".join(found)
    return "version unknown" if importlib.util.find_spec(name) is not None else ABSENT


def _version(dist: str, usual: str) -> str | None:
    try:
        version = importlib.metadata.version(dist)
    except importlib.metadata.PackageNotFoundError:
        return None
    return version if dist == usual else f"{version} ({dist})"


def _cpu() -> str:
    model, flags = _cpuinfo(Path("/proc/cpuinfo"))
    name = model or platform.processor() or platform.machine()
    return " ".join([name, *(flag for flag in _ISA if flag in flags)])


def _cpuinfo(path: Path) -> tuple[str, frozenset[str]]:
    """Model name and flags of the first processor; empty where the system has no such file."""
    if not path.exists():
        return "", frozenset()
    fields: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    model = fields.get("model name") or fields.get("cpu part") or ""
    return " ".join(model.split()), frozenset((fields.get("flags") or fields.get("features") or "").split())


def _memory_mib() -> int | None:
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20


@cache
def _gpu_and_driver() -> tuple[str, str]:
    """Every distinct GPU as `name sm86`, and the driver's version."""
    if importlib.util.find_spec("pynvml") is not None and _driver_loads():
        return _from_nvml()
    if shutil.which("nvidia-smi") is not None:
        return _from_nvidia_smi()
    return NO_GPU, NO_GPU


def _driver_loads() -> bool:
    """Whether there is the library that pynvml opens, which takes longer to import than all other facts to find."""
    import ctypes

    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True


def _from_nvml() -> tuple[str, str]:
    import pynvml  # type: ignore[import-untyped,unused-ignore]

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        return NO_GPU, NO_GPU
    except pynvml.NVMLError as error:  # a driver that does not answer is a fact worth showing
        return f"{NO_GPU} ({error})", NO_GPU
    try:
        names = set()
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            names.add(f"{_text(pynvml.nvmlDeviceGetName(handle))} sm{major}{minor}")
        return "; ".join(sorted(names)) or NO_GPU, _text(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()


def _from_nvidia_smi() -> tuple[str, str]:
    command = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{NO_GPU} (nvidia-smi: {type(error).__name__})", NO_GPU
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    rows = [row for row in rows if len(row) == 3]
    if done.returncode != 0 or not rows:
        return NO_GPU, NO_GPU
    return "; ".join(sorted({f"{name} sm{cap.replace('.', '')}" for name, cap, _ in rows})), rows[0][2]


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


FACTS: Mapping[str, Callable[[], str]] = {
    "cpu": _cpu,
    "gpu": lambda: _gpu_and_driver()[0],
    "driver": lambda: _gpu_and_driver()[1],
    "python": platform.python_version,
}
"""The facts that are not packages."""
