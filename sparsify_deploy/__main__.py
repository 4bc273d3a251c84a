"""The entry point: run a verb, turn every known error into one line on stderr and its exit code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sparsify_deploy.errors import DataError, Interrupted, OutOfResources, SparsifyError, is_out_of_memory

_LIGHT = frozenset({"--help", "--version", "version", "list", "validate"})
"""What needs no supervision, and answers before that is imported."""

_UNREADABLE = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.EROFS, errno.ESTALE}
"""Of a path: no bug of this program, whoever asks about it first."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code the README documents.

    Without `argv` this is the program, and verbs that run native code work in a supervised child process; given one it
    is a function like others, and never forks.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller closed it
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if argv is not None:
        return _called(list(argv))
    arguments = sys.argv[1:]
    if arguments and arguments[0] not in _LIGHT:
        from sparsify_deploy import supervisor

        if supervisor.wanted(arguments):
            return supervisor.supervise(lambda: _called(arguments))
    return _called(arguments)


def _called(arguments: Sequence[str]) -> int:
    """Call the verb, in this process."""
    _failed_log()  # of a call before this one
    try:
        from sparsify_deploy import cli

        code = cli.call(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _fail(["interrupted; what is finished is kept, the same command goes on"], Interrupted.exit_code)
    except Exception as error:
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
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at exit
        return [], 0
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}the disk is full: free some space, the same command goes on"
        return [text], OutOfResources.exit_code
    if isinstance(error, OSError) and error.filename is not None and error.errno in _UNREADABLE:
        return [f"{os.fsdecode(error.filename)}: cannot be read or written: {error.strerror}"], DataError.exit_code
    return None


def _fail(lines: Sequence[str], code: int) -> int:
    from sparsify_deploy import console

    if (log := _failed_log()) is not None and code != Interrupted.exit_code:
        console.error(f"log: {log}")
    for line in lines:  # last, where people look
        console.error(line)
    return code


def _failed_log() -> Path | None:
    """Where the run that failed is told of; without a look into a module that no verb has loaded."""
    if "sparsify_deploy.logbook" not in sys.modules:
        return None
    from sparsify_deploy import logbook

    return logbook.take_failed()


if __name__ == "__main__":
    sys.exit(main())
