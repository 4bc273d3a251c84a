"""Markdown from what the program says of itself: tables, and text with its papers linked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_CODE = re.compile(r"(`[^`]*`)")
_ARXIV = re.compile(r"\b(\d{4}\.\d{5})\b")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; bars and line ends inside cells are escaped."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def linked(text: str) -> str:
    """`text` with every arXiv number linked to its paper, and no asterisk outside code taken for emphasis."""
    parts = _CODE.split(text)
    parts[::2] = [_ARXIV.sub(r"[\1](https://arxiv.org/abs/\1)", part.replace("*", "\\*")) for part in parts[::2]]
    return "".join(parts)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
