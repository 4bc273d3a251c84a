"""Reads a file that is one: a pipe in its place would be waited for, a device never end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def read(path: Path, most: int | None = None) -> bytes:
    """The bytes of a file, at most `most` of them. Raises OSError, also for what is no regular file."""
    # Without O_NONBLOCK, opening a pipe waits for someone to write into it.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, "rb") as file:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is no file", str(path))
        return file.read(-1 if most is None else most)
