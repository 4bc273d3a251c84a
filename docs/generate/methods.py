"""The menus, from the docstrings of their entries, which name the papers."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import sparsify_deploy
from generate.text import linked, table
from sparsify_deploy import menu

PACKAGE = Path(inspect.getfile(sparsify_deploy)).parent

_WORDS = {
    "NEEDS_DATA": ("training data", "no data"),
    "NEEDS_MASK": ("a starting mask (`init`)", ""),
    "NEEDS_SPARSITY": ("`sparsity`", ""),
}
"""What an entry's constants mean, where true and where false."""


def docstring(which: str, name: str) -> str:
    """The docstring of an entry, read without importing it."""
    source = (PACKAGE / menu.MENUS[which] / f"{name}.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)) or ""


def overview(which: str) -> str:
    """One row an entry: its name, and the first line of its docstring."""
    section = {"models": "model", "datasets": "data", "tasks": "task", "runtimes": "deploy"}[which]
    rows = [
        (f"[`{name}`](recipe.md#{section}-{name.replace('_', '-')})", linked(menu.summary(which, name)))
        for name in menu.names(which)
    ]
    return table(("name", "what it is"), rows)


def entries(which: str) -> str:
    """One row an entry with what it needs, then the whole docstring of each."""
    section = {"criteria": "init", "methods": "train"}[which]
    rows, parts = [], []
    for name in menu.names(which):
        entry = menu.entry(which, name)
        needs = [words[not getattr(entry, flag)] for flag, words in _WORDS.items() if hasattr(entry, flag)]
        anchor = f"{section}-{name.replace('_', '-')}"
        rows.append(
            (f"[`{name}`](#{anchor})", linked(menu.summary(which, name)), ", ".join(filter(None, needs)) or "-")
        )
        parts.append(
            f"### `{name}` {{#{anchor}}}\n\n{linked(docstring(which, name))}\n\n[Parameters](recipe.md#{anchor})"
        )
    return "\n\n".join([table(("name", "what it is", "needs"), rows), *parts])


def costs() -> str:
    """What a training step costs, as the module that counts it says."""
    source = (PACKAGE / "training" / "cost.py").read_text(encoding="utf-8")
    return linked(ast.get_docstring(ast.parse(source)) or "")


def folders() -> str:
    """One row a menu: its folder, and what an entry is."""
    rows = []
    for which, folder in menu.MENUS.items():
        source = (PACKAGE / folder / "__init__.py").read_text(encoding="utf-8")
        rows.append(
            (
                f"`{which}`",
                f"`sparsify_deploy/{folder}/`",
                (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0],
            )
        )
    return table(("menu", "folder", "what it holds"), rows)
