"""The standard streams: there from the start, and what they cannot take any more goes nowhere and ends nothing."""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

_results: TextIO | None = None


def open_closed() -> None:
    """Give descriptors 0, 1 and 2 that the caller closed to /dev/null, or the next files opened would get them, and
    with them all that is written to stderr."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # the lowest that is free, so this one
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, Lasting(number, "utf-8"))


def results() -> TextIO:
    """Where results go: stdout, or what it was before `divert`."""
    return _results if _results is not None else sys.stdout


def divert(native: int) -> None:
    """Leave stdout to results: what else this process prints goes to stderr, by Python or, by the descriptor `native`,
    by native code."""
    global _results  # noqa: PLW0603 a process has one stdout
    out, err = sys.stdout, sys.stderr
    out.flush()
    _results = open(os.dup(1), "w", encoding=out.encoding, errors=out.errors)  # noqa: SIM115 as long as the process
    sys.stderr = sys.stdout = Lasting(os.dup(2), err.encoding, err.errors, line_buffering=True)
    os.dup2(native, 1)
    os.dup2(native, 2)


class Lasting(io.TextIOWrapper):
    """Text to a descriptor; silent once that fails, so that code of others may print what it likes."""

    def __init__(self, number: int, encoding: str, errors: str | None = None, *, line_buffering: bool = False) -> None:
        file = open(number, "wb", closefd=False)  # noqa: SIM115 open as long as the process is
        super().__init__(file, encoding=encoding, errors=errors, line_buffering=line_buffering)

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            silence(self)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            silence(self)


class Shown:
    """A stream that libraries may print to; silent once that fails, and `lost` then says why, as `write` does."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost = ""

    def write(self, text: str) -> int:
        self.lost = write(self._stream, text) or self.lost
        return len(text)

    def flush(self) -> None:
        self.lost = write(self._stream, "", flush=True) or self.lost

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def kept() -> Iterator[Shown]:
    """Inside, results that cannot be written end nothing; what this yields says afterwards why they could not."""
    global _results  # noqa: PLW0603
    diverted, before = _results is not None, results()
    shown = Shown(before)
    if diverted:
        _results = cast("TextIO", shown)
    else:
        sys.stdout = cast("TextIO", shown)
    try:
        yield shown
    finally:
        shown.flush()
        if diverted:
            _results = before
        else:
            sys.stdout = before


def write(stream: TextIO, text: str, *, flush: bool = False) -> str:
    """Write `text`, and with `flush` whatever waits; where that fails, say why and be silent from then on.

    "" where all is well, and where the reader of a pipe or a terminal went away, which is nobody's mistake.
    """
    try:
        if text or not flush:
            stream.write(text)
        if flush:
            stream.flush()
    except UnicodeError:
        raise
    except (OSError, ValueError) as error:  # ValueError: it is closed
        gone = _reader_went(stream, error)
        silence(stream)
        return "" if gone else getattr(error, "strerror", None) or str(error)
    return ""


def _reader_went(stream: TextIO, error: OSError | ValueError) -> bool:
    if isinstance(error, BrokenPipeError):
        return True
    if not isinstance(error, OSError) or error.errno != errno.EIO:
        return False
    try:
        return stat.S_ISCHR(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):
        return False


def silence(stream: TextIO) -> None:
    """Point the descriptor of `stream` nowhere, so that what waits in buffers fails nobody at the end either."""
    try:
        number = stream.fileno()
    except (OSError, ValueError):  # it has none, or is closed
        return
    with suppress(OSError):  # there is no descriptor to be had
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, number, inheritable=number < 3)
        os.close(nothing)
