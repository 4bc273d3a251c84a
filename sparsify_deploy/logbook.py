"""`run.log` of a run directory: what was done there and when, and the whole traceback of what went wrong.

One event a line, in UTC, appended by one write each, so that a kill leaves whole lines. A file above its bound becomes
`run.log.1`, in place of an older one. Secrets are taken out first. The log is kept by whoever holds the run's lock.

A folder that cannot be written is refused before the run begins, for its reports could not be written either. A disk
that is full costs lines of the log and nothing else: that is said once, and the run goes on.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify_deploy import __version__
from sparsify_deploy.errors import SparsifyError, UsageError
from sparsify_deploy.process import watch
from sparsify_deploy.safety.printable import one_line
from sparsify_deploy.safety.redaction import redact

if TYPE_CHECKING:
    from sparsify_deploy.types import Json, Progress

NAME = "run.log"
BOUND_BYTES = 5 << 20
_UPDATE_EVERY_S = 10.0
_PASSING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENFILE, errno.EMFILE, errno.ENOMEM})
"""What may keep a log from being written while the folder can be: nothing to stop a run for."""

_failed: Path | None = None


class Logbook:
    """Appends to the log of one folder. Once a write fails, `lost` says why, and nothing more is written."""

    def __init__(self, folder: Path, bound_bytes: int = BOUND_BYTES) -> None:
        self.path = folder / NAME
        self.lost = ""
        self._bound_bytes = bound_bytes
        self._descriptor: int | None = None
        self._written = 0

    def open(self) -> None:
        """Make ready to write; UsageError where the folder or the file there cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._open()
        except OSError as error:
            if error.errno not in _PASSING:
                why = "is a link" if error.errno == errno.ELOOP else error.strerror or str(error)
                raise UsageError(
                    f"{self.path}: cannot be written ({why}): choose another place with --run-dir, or correct its "
                    "permissions"
                ) from error
            self._lose(error)

    def write(self, kind: str, text: str) -> None:
        """One line, or of a text with several one each, all at once."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        head = f"{now} {os.getpid()} {kind:<8} "
        lines = [f"{head}{one_line(line)}\n" for line in redact(text).splitlines() or [""]]
        self._append("".join(lines).encode("utf-8", "backslashreplace"))

    def close(self) -> None:
        """Give the file back; may be called again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(self.path, flags, 0o644)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "is no file", str(self.path))
        self._descriptor, self._written = descriptor, status.st_size

    def _append(self, data: bytes) -> None:
        if self._descriptor is None:
            return
        try:
            if self._written and self._written + len(data) > self._bound_bytes:
                self.close()
                os.replace(self.path, self.path.with_name(f"{NAME}.1"))
                self._open()
            assert self._descriptor is not None
            self._written += (taken := os.write(self._descriptor, data))
            if taken < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        self.lost = error.strerror or str(error)
        self.close()


class _Logged:
    """Progress that is logged as well: each line said, and of what is under way its start and a line now and then."""

    def __init__(self, log: Logbook, shown: Progress, clock: Callable[[], float]) -> None:
        self._log, self._shown, self._clock = log, shown, clock
        self._label, self._done, self._last = "", 0, 0.0
        self._unwritten = ""
        self._told = False

    def update(self, label: str, done: int, total: int, note: str = "") -> None:
        now, line = self._clock(), f"{label} {done}/{total} {note}".rstrip()
        if label != self._label or done < self._done:
            self.catch_up()
            self._label, self._last = label, now
            self._log.write("progress", line)
        elif now - self._last >= _UPDATE_EVERY_S:
            self._last, self._unwritten = now, ""
            self._log.write("progress", line)
        else:
            self._unwritten = line
        self._done = done
        self._shown.update(label, done, total, note)

    def say(self, message: str) -> None:
        self.catch_up()
        self._log.write("says", message)
        self._shown.say(message)
        self.tell_if_lost()

    def catch_up(self) -> None:
        """Log how far what was under way came."""
        if self._unwritten:
            self._log.write("progress", self._unwritten)
            self._unwritten = ""

    def tell_if_lost(self) -> None:
        """Say once that the log ends here."""
        if self._log.lost and not self._told:
            self._told = True
            self._shown.say(f"{self._log.path}: cannot be written any more ({self._log.lost}); the run goes on")


@contextmanager
def keeping(
    folder: Path,
    shown: Progress,
    verb: str,
    *,
    facts: Callable[[], Json] = dict,
    arguments: Sequence[str] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Progress]:
    """Inside, all that the returned progress is told, every warning, and the error that leaves, go to `folder`'s log.

    `facts` are those of the machine; `arguments` the command line, that of this process by default. Raises UsageError
    where the folder cannot be written.
    """
    global _failed  # noqa: PLW0603 one run at a time is at work in a process
    log = Logbook(folder)
    log.open()
    progress, began = _Logged(log, shown, clock), clock()
    watch.logs_to(str(log.path))
    try:
        log.write("begins", f"{verb}: sparsify-deploy {__version__}: {_command(arguments)}")
        for name, value in sorted(facts().items()):
            log.write("machine", f"{name}: {value}")
        progress.tell_if_lost()
        with _warnings_to(log):
            yield progress
    except BaseException as error:
        progress.catch_up()
        _log_error(log, error)
        _failed = log.path if not log.lost else None
        log.write("ends", f"{verb}: {_code(error)} after {clock() - began:.1f} s")
        raise
    else:
        progress.catch_up()
        log.write("ends", f"{verb}: done after {clock() - began:.1f} s")
    finally:
        progress.tell_if_lost()
        log.close()


def take_failed() -> Path | None:
    """The log that tells of the run that failed in this process, once; None where there is none."""
    global _failed
    failed, _failed = _failed, None
    return failed


def append(path: Path, kind: str, text: str) -> None:
    """Add a line to a log that another process kept and left, as its supervisor does; nothing where there is none."""
    if path.name != NAME or not path.is_file():
        return
    log = Logbook(path.parent)
    try:
        log.open()
    except UsageError:  # what it would say is on the terminal too
        return
    log.write(kind, text)
    log.close()


def _log_error(log: Logbook, error: BaseException) -> None:
    lines = error.lines if isinstance(error, SparsifyError) else [f"{type(error).__name__}: {error}"]
    for line in lines:
        log.write("error", line)
    import traceback

    log.write("trace", "".join(traceback.format_exception(type(error), error, error.__traceback__)))


def _code(error: BaseException) -> str:
    return f"exit code {error.exit_code}" if isinstance(error, SparsifyError) else type(error).__name__


def _command(arguments: Sequence[str] | None) -> str:
    import shlex

    return shlex.join(map(redact, sys.argv if arguments is None else arguments))  # quoting may split what is secret


@contextmanager
def _warnings_to(log: Logbook) -> Iterator[None]:
    """Inside, a warning that Python shows is logged as well."""
    show = warnings.showwarning

    def shown(message: Any, category: Any, filename: str, lineno: int, *more: Any) -> None:
        log.write("warning", f"{filename}:{lineno}: {category.__name__}: {message}")
        show(message, category, filename, lineno, *more)

    warnings.showwarning = shown  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.showwarning = show
