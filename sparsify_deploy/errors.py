"""Every mistake the program can name, with its exit code.

One tree: `SparsifyError` is what a caller catches. A subclass stands for one answer to "what should I do now?",
and carries the exit code documented in the README. A message says what happened, where, and what to do,
in one line; only our own bugs end in a traceback.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence


class SparsifyError(Exception):
    """Base of every error that is not a bug of this program."""

    exit_code = 1

    @property
    def lines(self) -> Sequence[str]:
        """The message, one mistake a line: each argument of the error is one, whatever a name quoted in it holds."""
        return tuple(map(str, self.args)) or (type(self).__name__,)

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class UsageError(SparsifyError):
    """The command line is wrong: an unknown stage, a flag that does not apply, a missing trust flag."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe holds mistakes; each is one line `file:line:column: path: what, what to do`."""

    def __init__(self, mistakes: Sequence[str]) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = tuple(mistakes)

    @property
    def lines(self) -> Sequence[str]:
        return self.mistakes


class EnvironmentProblem(SparsifyError):
    """Something this machine lacks or that broke natively: a package, a device, a crashed or hung child."""

    exit_code = 3


class MissingExtra(EnvironmentProblem):
    """A package is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}, which is not installed: pip install 'sparsify-deploy[{extra}]'")
        self.package = package
        self.extra = extra


class RuntimeUnavailable(EnvironmentProblem):
    """A runtime cannot work here; the message is its own reason."""


class NativeCrash(EnvironmentProblem):
    """A child process died of a signal or outran its time limit; the parent lives on."""


class CheckFailed(SparsifyError):
    """A gate, the output parity or the N:M invariant is not met; the artifacts are kept."""

    exit_code = 4


class DataError(SparsifyError):
    """A data set, model file or engine cannot be read, or has the wrong shape."""

    exit_code = 5


class ModelError(DataError):
    """A model cannot be loaded, traced, scored or quantised; the message names the layer."""


class Diverged(SparsifyError):
    """Training reached a loss or a gradient that is not finite."""

    exit_code = 6


class OutOfResources(SparsifyError):
    """The disk is full or memory ran out."""

    exit_code = 7


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, in Python, in the system (ENOMEM) or in a library that has an error of its own for it."""
    if isinstance(error, SparsifyError):
        return isinstance(error, OutOfResources)
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(words in str(error).lower() for words in SPENT)
    )


SPENT = (
    "bad_alloc",
    "bad allocation",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "cuda out of memory",
    "cublas_status_alloc_failed",
    "failed to allocate memory",
    "failed to map segment from shared object",
    "can't start new thread",
)
"""What libraries say, in lower case, where memory is spent: C++, torch, CUDA, ONNX Runtime, the loader, Python."""


class Locked(SparsifyError):
    """Another process works in this run directory."""

    exit_code = 8


class CorruptArtifact(SparsifyError):
    """A committed artifact's bytes are not the ones its manifest lists."""

    exit_code = 9


class Interrupted(SparsifyError):
    """The user or the system asked to stop; everything needed to go on is on disk."""

    exit_code = 75
