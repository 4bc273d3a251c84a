"""Memory that ran out: what to say of it, by the process it happened in or by its supervisor."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparsify_deploy.errors import SPENT, OutOfResources, is_out_of_memory
from sparsify_deploy.process import limits, watch

_NATIVE = ("out of memory", "memory allocation of", "memoryerror", "unable to allocate", "thread creation failed")
"""More of what is written to stderr before a process ends itself."""


_PERHAPS = ("could not create a primitive", "could not execute a primitive", "could not create a memory")
"""What oneDNN says of every failure, where no more memory could be had among them."""

_LEFT_BYTES = 64 << 20


def told_of(words: str) -> bool:
    """Whether what a native library said before it ended the process tells that memory ran out."""
    return any(each in words.lower() for each in (*SPENT, *_NATIVE))


@contextmanager
def explained() -> Iterator[None]:
    """Turn every error that means spent memory into `OutOfResources` with step, batch size, peak and advice."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfResources) or not (is_out_of_memory(error) or _perhaps(error)):
            raise
        raise OutOfResources(line(error)) from error


def _perhaps(error: Exception) -> bool:
    """Whether an error that may mean spent memory came where the limit on it (`ulimit -v`) was all but reached."""
    if not any(words in str(error).lower() for words in _PERHAPS):
        return False
    limit, status = limit_bytes(os.getpid()), Path("/proc/self/status")
    if limit is None or not status.is_file():
        return False
    fields = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
    return limit - (int(fields["VmPeak"].split()[0]) << 10) < _LEFT_BYTES


def limit_bytes(process: int) -> int | None:
    """The limit on a process's addresses; None: there is none, or it cannot be seen."""
    import resource

    try:
        limit = resource.prlimit(process, resource.RLIMIT_AS)[0] if hasattr(resource, "prlimit") else -1
    except (ProcessLookupError, PermissionError):
        return None
    return None if limit == resource.RLIM_INFINITY else limit


def line(error: BaseException) -> str:
    """One line on an error that means spent memory, raised in this process."""
    doing = watch.where(error)
    if limits.no_thread(str(error), limit_bytes(os.getpid())):
        return limits.threads(place(doing))
    return f"out of memory{place(doing)}; {_peaks(error)}: {advice(doing)}"


def place(doing: watch.Doing) -> str:
    """` in sparse/train, with batch size 64 (training.batch_size)`, as far as it is known.

    A native call is named in brackets.
    """
    text = f" in {doing.step}" if doing.step else ""
    text += f" ({doing.call})" if doing.call else ""
    if doing.batch_size:
        text += f", with batch size {doing.batch_size}" + (f" ({doing.batch_field})" if doing.batch_field else "")
    return text


def peak(peak_bytes: int) -> str:
    """`peak memory 1.53 GiB`."""
    return f"peak memory {peak_bytes / 2**30:.2f} GiB"


def advice(doing: watch.Doing) -> str:
    """What to do where memory ran out."""
    if doing.batch_field:
        section = doing.batch_field.rpartition(".")[0]
        return (
            f"use a smaller {doing.batch_field}, with {section}.accumulate so much larger if the steps are to stay "
            "the same, or a smaller model; or free memory, then the same command goes on"
        )
    if doing.batch_size:
        return "use smaller batches or a smaller model; or free memory, then the same command goes on"
    return "use a smaller batch (training.batch_size) or model; or free memory, then the same command goes on"


def _peaks(error: BaseException) -> str:
    text = peak(peak_here_bytes())
    torch = sys.modules.get("torch")
    if torch is not None and type(error).__name__ == "OutOfMemoryError" and torch.cuda.is_initialized():
        on_gpu = torch.cuda.max_memory_allocated() / 2**30
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30
        text += f", on the GPU {on_gpu:.2f} GiB of {total:.2f} GiB"
    return text


def peak_here_bytes() -> int:
    """The most memory this process had at once."""
    import resource

    return in_bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def in_bytes(maximum_resident: int) -> int:
    """`ru_maxrss`, which is in KiB but on macOS."""
    return maximum_resident if sys.platform == "darwin" else maximum_resident << 10
