"""The one lock on a store: the kernel's, on a file in it, so that it goes with its process however that ends."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sparsify_deploy.artifacts.durable import explained
from sparsify_deploy.errors import Locked, UsageError

NAME = ".lock"
_PATIENCE_S = 1.0
_LOOK_EVERY_S = 0.02
_HOLDER = re.compile(r"process (\d+) on (.*)")

_held: set[int] = set()
"""Descriptors of the locks this process holds."""


def _close_in_child() -> None:
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def locked(
    folder: Path, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
) -> Iterator[None]:
    """Hold the lock of `folder`, which is made if need be; raises `Locked` where another process has it.

    At once where that process is at work; one that is dying, or cannot be seen from here, is given a second: memory is
    taken back before locks are. Child processes do not inherit the lock, whether they are forked or executed.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    _held.add(descriptor)
    try:
        until = clock() + _PATIENCE_S
        while not _taken(descriptor, folder):
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            if clock() >= until or not _is_dying(holder):
                advice = "wait for it to end, stop it, or choose another --run-dir"
                raise Locked(f"{folder} is in use by {holder or 'another process'}: {advice}")
            sleep(_LOOK_EVERY_S)
        with explained(folder):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        if descriptor in _held:  # in a forked child it is closed already
            _held.remove(descriptor)
            os.close(descriptor)


def _taken(descriptor: int, folder: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        why = f"its file system has no locks ({error.strerror})"
        raise UsageError(f"{folder}: {why}: choose another place with --run-dir or --store") from error
    return True


def _is_dying(holder: str) -> bool:
    """Whether the process that the lock file names is not, or may not be, at work any more.

    A file whose lock was taken a moment ago may still name the holder before.
    """
    named = _HOLDER.fullmatch(holder)
    if named is None or named[2] != socket.gethostname():
        return True
    try:
        status = Path("/proc", named[1], "status").read_text(encoding="ascii", errors="replace")
    except OSError:  # it is gone, or this system does not say
        return True
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    killed = 1 << 8  # SIGKILL is number 9
    pending = int(fields.get("SigPnd", "0"), 16) | int(fields.get("ShdPnd", "0"), 16)
    return fields.get("State", "Z")[0] in "ZX" or bool(pending & killed)
