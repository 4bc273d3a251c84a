"""The entry point: run a verb, turn every known error into one line on stderr and its exit code."""

from __future__ import annotations

import atexit
import errno
import gc
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from sparsify_deploy.errors import (
    DataError,
    EnvironmentProblem,
    Interrupted,
    OutOfResources,
    SparsifyError,
    UsageError,
    is_out_of_memory,
)

_LIGHT = frozenset({"--help", "--version", "version", "list", "validate"})
"""What needs no supervision, and answers before that is imported."""

_OBJECTS_OF_A_START = 200_000
"""More than a light verb makes, and fewer than torch does."""

_UNREADABLE = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.EROFS, errno.ESTALE}
"""Of a path: no bug of this program, whoever asks about it first."""

_LIMITS = {errno.EMFILE, errno.ENFILE, errno.EAGAIN}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code the README documents.

    Without `argv` this is the program: it ends by 75 where a signal asks it to, and verbs that run native code work in
    a supervised child process. Given one it is a function like others, which changes no handler and never forks.
    """
    if argv is not None:
        return _called(list(argv))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    ours = [number for number, handler in before.items() if handler in (signal.SIG_DFL, signal.default_int_handler)]
    for number in ours:  # what the caller has us ignore stays so
        signal.signal(number, _stop)
    _collect_late()
    try:
        from sparsify_deploy.process import streams

        streams.open_closed()
        return _program(sys.argv[1:])
    except KeyboardInterrupt:  # before or after the verb
        return _fail([_STOPPED], Interrupted.exit_code)
    except SparsifyError as error:
        return _fail(error.lines, error.exit_code)
    finally:
        for number in ours:
            if signal.getsignal(number) == _stop:
                signal.signal(number, before[number])


def _collect_late() -> None:
    """Modules and recipes make many objects, all of which stay: the first collection of garbage waits until they are
    made, the last one, at the end of the program, leaves them to go with the process. The others come as usual.

    That is a tenth of the time of a run with nothing to do, and more of that of the lightest verbs.
    """
    atexit.register(gc.freeze)
    usual = gc.get_threshold()

    def first(phase: str, info: dict[str, int]) -> None:
        gc.callbacks.remove(first)
        gc.set_threshold(*usual)

    gc.callbacks.append(first)
    gc.set_threshold(_OBJECTS_OF_A_START)


_STOPPED = "interrupted; what is finished is kept, the same command goes on"

_stopped = False
"""Whether a signal asked this program to end: an error after that is of its making, where a library swallowed it."""


def _stop(number: int, frame: FrameType | None) -> None:
    global _stopped  # noqa: PLW0603 signals are the process's, and so is this
    _stopped = True
    raise KeyboardInterrupt


def _program(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] not in _LIGHT:
        try:
            os.getcwd()
        except FileNotFoundError:  # native libraries die of that, and with words of their own
            raise UsageError("the working directory is gone: cd to one that is there, and call again") from None
        try:
            Path.home()
        except RuntimeError:  # OpenVINO does not even import
            text = "this user has no home folder, and libraries ask for one: set HOME, as in `export HOME=/tmp`"
            raise EnvironmentProblem(text) from None
        from sparsify_deploy import supervisor

        if supervisor.wanted(arguments):
            return supervisor.supervise(lambda: _called(arguments))
    return _called(arguments)


def _called(arguments: Sequence[str]) -> int:
    """Call the verb, in this process."""
    _failed_log()  # of a call before this one
    from sparsify_deploy.process import streams

    with streams.kept() as results:
        code = _code(arguments)
    if results.lost:
        line = (
            f"stdout: cannot be written ({results.lost}), so the result is lost: free some space or send it elsewhere"
        )
        code = _fail([line], code or OutOfResources.exit_code)
    return code


def _code(arguments: Sequence[str]) -> int:
    try:
        from sparsify_deploy import cli

        return cli.call(arguments)
    except KeyboardInterrupt:
        return _fail([_STOPPED], Interrupted.exit_code)
    except Exception as error:
        if _stopped:
            return _fail([_STOPPED], Interrupted.exit_code)
        if (known := _known(error)) is not None:
            return _fail(*known)
        if "--traceback" in arguments:
            raise
        text = next(iter(str(error).splitlines()), "")
        advice = "please report it with what `sparsify-deploy --traceback ...` prints"
        return _fail([f"internal error: {type(error).__name__}: {text}; {advice}"], 1)


def _known(error: Exception) -> tuple[Sequence[str], int] | None:
    """The lines and exit code of an error that is not a bug of ours."""
    if isinstance(error, SparsifyError):
        return error.lines, error.exit_code
    if is_out_of_memory(error):
        from sparsify_deploy.process import memory

        return [memory.line(error)], OutOfResources.exit_code
    if isinstance(error, OSError) and error.errno in _LIMITS:
        from sparsify_deploy.process import limits

        if (line := limits.line(error)) is not None:
            return [line], OutOfResources.exit_code
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        from sparsify_deploy.artifacts.durable import FULL

        where = f"{error.filename}: " if error.filename else ""
        return [f"{where}{FULL[error.errno]}, the same command goes on"], OutOfResources.exit_code
    if isinstance(error, OSError) and error.filename is not None and error.errno in _UNREADABLE:
        return [f"{os.fsdecode(error.filename)}: cannot be read or written: {error.strerror}"], DataError.exit_code
    return None


def _fail(lines: Sequence[str], code: int) -> int:
    from sparsify_deploy import console

    if "sparsify_deploy.process.watch" in sys.modules:  # or nobody watches
        from sparsify_deploy.process import watch

        watch.finished(code)
    if (log := _failed_log()) is not None and code != Interrupted.exit_code:
        console.error(f"log: {_from_here(log)}")
    for line in lines:  # last, where people look
        console.error(line)
    return code


def _from_here(path: Path) -> Path:
    """A path as short as it is from the working directory, where it lies in that."""
    try:
        return path.relative_to(Path.cwd())
    except (OSError, ValueError):
        return path


def _failed_log() -> Path | None:
    """Where the run that failed is told of; without a look into a module that no verb has loaded."""
    if "sparsify_deploy.logbook" not in sys.modules:
        return None
    from sparsify_deploy import logbook

    return logbook.take_failed()


if __name__ == "__main__":
    sys.exit(main())
