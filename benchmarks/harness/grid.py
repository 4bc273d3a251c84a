"""A grid: which recipes are trained, and where in a table their accuracies stand. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from sparsify_deploy.types import Json

DENSE = "dense"
"""The column of networks that keep every weight."""
TWO_OF_FOUR = "2:4"
"""The column of networks in which two of every four input channels are kept."""


@dataclass(frozen=True)
class Row:
    """One line of the table; `key` names it in runs and claims."""

    key: str
    label: str


@dataclass(frozen=True)
class Column:
    """One density of the table: 0.8 to the power `level`, or None for a pattern."""

    key: str
    head: str
    level: int | None = None


def density_of(level: int) -> float:
    """What is left after `level` times dropping 20 % of the remaining weights."""
    return float(0.8**level)


def level_column(level: int) -> Column:
    """The column of one density 0.8^level."""
    if level == 0:
        return Column(DENSE, "1", 0)
    return Column(f"n{level}", f"{density_of(level):.2g}".removeprefix("0"), level)


@dataclass(frozen=True)
class Run:
    """One recipe to train. Runs of one `lane` share a store and so their stages, and never run at the same time."""

    row: str
    column: str
    seed: int
    lane: str
    recipe: Mapping[str, Json]
    also: tuple[str, ...] = ()
    """Columns that it fills on the way to its own."""

    @property
    def name(self) -> str:
        """Unique in its grid, and good for a file name."""
        return f"{self.row}-{self.column.replace(':', 'of')}-s{self.seed}"

    def matches(self, patterns: tuple[str, ...]) -> bool:
        """Whether a shell pattern means its name or its row; no pattern means everything."""
        return not patterns or any(fnmatchcase(text, p) for p in patterns for text in (self.name, self.row))


@dataclass(frozen=True)
class Claim:
    """`better` is at least `margin` points of accuracy above `worse`; each is a row and a column."""

    text: str
    better: tuple[str, str]
    worse: tuple[str, str]
    margin: float = 0.0


@dataclass(frozen=True)
class Grid:
    """All runs of one table in the order they are worth doing, and what the table says."""

    name: str
    title: str
    how: str
    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    runs: tuple[Run, ...]
    settings: Mapping[str, Json]
    claims: tuple[Claim, ...] = ()
    published: str = ""
    seeds: tuple[int, ...] = field(default=(0,))
