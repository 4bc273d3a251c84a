"""Limits of the system other than memory: how each shows, and the one line that names it."""

from __future__ import annotations

import errno
import os

_THREADS = ("thread creation failed", "can't start new thread", "pthread_create", "thread constructor failed")
_PROCESSES = "raise the limit on processes and threads (ulimit -u), or end others of this user"


def line(error: BaseException) -> str | None:
    """One line on an error that means a limit was reached; None for any other."""
    if isinstance(error, OSError):
        where = f"{os.fsdecode(error.filename)}: " if error.filename is not None else ""
        if error.errno == errno.EMFILE:
            return f"{where}too many open files: raise the limit (ulimit -n 4096), the same command goes on"
        if error.errno == errno.ENFILE:
            return f"{where}too many open files on this machine: end other programs, the same command goes on"
        if error.errno == errno.EAGAIN and error.filename is None:
            return f"no process or thread could be started: {_PROCESSES}; the same command goes on"
    return None


def no_thread(words: str, memory_bytes: int | None) -> bool:
    """Whether `words` tell that no thread could be started for there being too many, and not for lack of memory.

    The system says the same of both; only where addresses are limited to `memory_bytes` may it be that.
    """
    return memory_bytes is None and any(each in words.lower() for each in _THREADS)


def threads(place: str) -> str:
    """What happened and what to do where no thread could be started."""
    return f"no thread could be started{place}: {_PROCESSES}; or use fewer (export OMP_NUM_THREADS=1)"


def cpu_time() -> int | None:
    """The limit on the CPU time of this process and those it starts, s; None: there is none.

    Not that of a child as the system has it: it moves on by a second with each signal.
    """
    import resource

    limit = resource.getrlimit(resource.RLIMIT_CPU)[0]
    return None if limit == resource.RLIM_INFINITY else limit
