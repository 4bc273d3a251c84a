"""Packages of networks, imported when one is asked for, with what to do where that fails."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence
from typing import Any

from sparsify_deploy.errors import EnvironmentProblem, MissingExtra


def imported(package: str, extra: str = "vision") -> Any:
    """The package. Raises MissingExtra where it is not installed, EnvironmentProblem where it does not load."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or package, extra, f"model source {package}") from error
    except (ImportError, RuntimeError, OSError) as error:
        raise unloadable(package, error) from error


def unloadable(package: str, error: BaseException) -> EnvironmentProblem:
    """One line for a package that is there and cannot be imported, with what to do about it."""
    text = " ".join(str(error).split())[:200]
    advice = "install torch and torchvision from one index, so that they are built for each other"
    return EnvironmentProblem(f"{package} is installed and does not load: {text}; {advice}")


def near(word: str, known: Sequence[str]) -> str:
    """`; did you mean 'x' or 'y'?`, or how many names there are: too many to list."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else f"; none of its {len(known)} names is close"


def offline(
    error: Exception, what: str, instead: str = "a local file as model.checkpoint and set pretrained to false"
) -> EnvironmentProblem:
    """One line for weights that could not be downloaded; `instead` is what to give in their place."""
    text = " ".join(str(error).split())[:160]
    return EnvironmentProblem(
        f"{what}: its weights cannot be downloaded ({type(error).__name__}: {text}); give {instead}"
    )
