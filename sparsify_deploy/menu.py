"""Menus are folders: each file in one is an entry, and the file's name is its name in a recipe.

A folder is listed without importing it; only the entry chosen is imported. Every entry defines `VERSION` (an int,
raised when the same settings would give another result) and `Params` (a frozen pydantic model with
`extra="forbid"`), both of which load on a Python without torch, numpy or any runtime.
"""

from __future__ import annotations

import ast
import difflib
import importlib
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

MENUS = {
    "criteria": "criteria",
    "methods": "training/methods",
    "models": "models",
    "datasets": "datasets",
    "tasks": "tasks",
    "runtimes": "runtimes",
}
"""Menu name to its folder below the package."""

_PACKAGE = Path(__file__).resolve().parent


@cache
def names(menu: str) -> tuple[str, ...]:
    """The entries of a menu, sorted; files that start with an underscore are not entries."""
    folder = _PACKAGE / MENUS[menu]
    return tuple(sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_")))


def entry(menu: str, name: str) -> ModuleType:
    """Import one entry. `name` must be one of `names(menu)`."""
    if name not in names(menu):
        raise KeyError(f"{menu} has no entry {name!r}")
    return importlib.import_module(f"sparsify_deploy.{MENUS[menu].replace('/', '.')}.{name}")


def summary(menu: str, name: str) -> str:
    """The first line of an entry's docstring, read without importing it."""
    source = (_PACKAGE / MENUS[menu] / f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` where a close name exists, else `; one of a, b, c`."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; one of {', '.join(known)}"
