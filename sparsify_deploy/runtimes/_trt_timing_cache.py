"""TensorRT's timing cache: kernel timings of earlier builds, one file a version and GPU.

A file is the sha256 of what follows, then the cache as TensorRT serialises it: a cut-off or damaged one is found here
and not by native code.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsify_deploy.types import Json

_DIGEST_BYTES = 32
_NO_EFFECT = "timing_cache has no effect: TensorRT-RTX times no kernels while it builds"


@dataclass
class TimingCache:
    """The file that a build's timings come from and go to, None for none; `kept` counts the bytes that were loaded."""

    path: Path | None
    kept: int = 0
    reason: str = ""
    warnings: list[str] = field(default_factory=list)

    def facts(self) -> Json:
        """For the engine's record."""
        if self.path is None:
            return {"file": None, "reason": self.reason}
        return {"file": self.path.name, "loaded_bytes": self.kept}


def attach(trt: Any, config: Any, request: Json) -> TimingCache:
    """Give the builder the timings of earlier builds. A file that cannot be used is a warning."""
    if request["timing_cache"] is None:
        return TimingCache(None, reason="switched off")
    if request["package"] == "tensorrt_rtx":
        named = request["timing_cache_asked"] is not True
        return TimingCache(None, reason=_NO_EFFECT, warnings=[_NO_EFFECT] if named else [])
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{request['package']} {trt.__version__} {request['gpu']}")
    cache = TimingCache(Path(request["timing_cache"], f"{name}.timing"))
    content = _load(cache)
    if content and not _accepted(config, content):
        cache.warnings.append(f"{cache.path}: the builder does not take this timing cache: it starts an empty one")
        content = b""
    if not content:
        config.set_timing_cache(config.create_timing_cache(b""), False)
    cache.kept = len(content)
    return cache


def _load(cache: TimingCache) -> bytes:
    assert cache.path is not None
    if not cache.path.is_file():
        return b""
    try:
        content = cache.path.read_bytes()
    except OSError as error:
        cache.warnings.append(f"{cache.path}: the timing cache cannot be read: {error.strerror}")
        return b""
    digest, body = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        cache.warnings.append(f"{cache.path}: the timing cache is damaged: it is ignored and written anew")
        return b""
    return body


def _accepted(config: Any, content: bytes) -> bool:
    try:
        loaded = config.create_timing_cache(content)
        return loaded is not None and bool(config.set_timing_cache(loaded, False))
    except (RuntimeError, TypeError, ValueError):  # what pybind makes of a refusal differs by version
        return False


def save(config: Any, cache: TimingCache) -> None:
    """Write the builder's timings back, whole or not at all. A folder that cannot be written is a warning."""
    if cache.path is None:
        return
    body = bytes(memoryview(config.get_timing_cache().serialize()))
    partial = cache.path.with_name(f"{cache.path.name}.{os.getpid()}.partial")
    try:
        cache.path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(hashlib.sha256(body).digest() + body)
        partial.replace(cache.path)
    except OSError as error:
        cache.warnings.append(f"{cache.path}: the timing cache cannot be written: {error.strerror}")
