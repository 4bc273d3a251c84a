"""Packages of data sets, imported when one is asked for, with what to do where that fails."""

from __future__ import annotations

import importlib
from typing import Any

from sparsify_deploy.errors import EnvironmentProblem, MissingExtra

_EXTRAS = {"datasets": "hf", "httpx": "hf", "huggingface_hub": "hf", "torchvision": "vision"}


def imported(package: str) -> Any:
    """The package. Raises MissingExtra where it is not installed, EnvironmentProblem where it does not load."""
    extra = _EXTRAS[package]
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or package, extra, f"data source {package}") from error
    except (ImportError, RuntimeError, OSError) as error:
        text = " ".join(str(error).split())[:200]
        advice = f"reinstall it: pip install --force-reinstall 'sparsify-deploy[{extra}]'"
        if package == "torchvision":
            advice = "install torch and torchvision from one index, so that they are built for each other"
        raise EnvironmentProblem(f"{package} is installed and does not load: {text}; {advice}") from error
