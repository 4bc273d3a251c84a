"""The entry point: run a verb, turn every known error into one line on stderr and its exit code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

from sparsify_deploy.errors import Interrupted, OutOfResources, SparsifyError, is_out_of_memory


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code the README documents."""
    from sparsify_deploy import cli

    arguments = list(sys.argv[1:] if argv is None else argv)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller closed it
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    try:
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
        return ["out of memory: use a smaller batch (training.batch_size) or model"], OutOfResources.exit_code
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at exit
        return [], 0
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}the disk is full: free some space, the same command goes on"
        return [text], OutOfResources.exit_code
    return None


def _fail(lines: Sequence[str], code: int) -> int:
    from sparsify_deploy import console

    for line in lines:
        console.error(line)
    return code


if __name__ == "__main__":
    sys.exit(main())
