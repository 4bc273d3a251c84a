"""Which NVIDIA GPUs the driver shows, asked in a child process through the driver library alone."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

from sparsify_deploy.errors import NativeCrash
from sparsify_deploy.runtimes import _child
from sparsify_deploy.types import Json

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True)
class Gpu:
    """A device by its name and architecture, such as `sm86`."""

    name: str
    architecture: str


def no_gpu_reason() -> str | None:
    """None where a GPU can be used, else one line."""
    return _ask()[1]


def gpus() -> tuple[Gpu, ...]:
    """The devices in the driver's order; empty without a usable GPU."""
    return _ask()[0]


@cache
def _ask() -> tuple[tuple[Gpu, ...], str | None]:
    try:
        answer = _child.call("sparsify_deploy.runtimes._gpu:probe", None, what="the NVIDIA driver", time_limit_s=60)
    except NativeCrash as crash:
        return (), f"no usable NVIDIA GPU: {crash}"
    return tuple(Gpu(*each) for each in answer["gpus"]), answer["reason"]


def probe(request: None) -> Json:
    """The child's side: `{"gpus": [[name, architecture], ...], "reason": None or one line}`."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return {"gpus": [], "reason": "no NVIDIA GPU here (the driver library libcuda.so.1 is not installed)"}
    code = driver.cuInit(0)
    if code != 0:
        return {"gpus": [], "reason": f"no NVIDIA GPU here (the driver's cuInit answered {code}: see `nvidia-smi`)"}
    count = ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    found = [_describe(driver, i) for i in range(count.value)]
    return {"gpus": found, "reason": None if found else "no NVIDIA GPU here (the driver shows no device)"}


def _describe(driver: ctypes.CDLL, index: int) -> list[str]:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    return [name.value.decode(errors="replace"), f"sm{major.value}{minor.value}"]
