"""What the `Params` of every menu entry and every section of a recipe share: strictness, and paths by content."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo


class Params(BaseModel):
    """Frozen settings in which an unknown key, NaN and a value of another type are mistakes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


class GivenHere(str):
    """Text from `--set`: a relative path in it starts at the working directory, not at the recipe's folder."""

    __slots__ = ()


_LONGEST = 4095
"""Bytes of a path that Linux takes."""


def _path(value: object, info: ValidationInfo) -> object:
    if not isinstance(value, str):
        return value
    base = Path.cwd() if isinstance(value, GivenHere) else Path((info.context or {}).get("folder", "."))
    try:
        path = base / Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{value.partition('/')[0]} is nobody's home here: write the path out") from error
    if "\0" in value or len(os.fsencode(path)) > _LONGEST or any(len(os.fsencode(p)) > 255 for p in path.parts):
        raise ValueError("no file can have this name: shorten it")
    return path


InputPath = Annotated[Path, BeforeValidator(_path)]
"""A file or folder that is read. Relative paths start at the recipe's folder; its content, not its name, enters
the fingerprint of a stage."""

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]


def n_and_m(pattern: str) -> tuple[int, int]:
    """`(N, M)` of a pattern `N:M`."""
    n, m = map(int, pattern.split(":"))
    return n, m


def _n_below_m(pattern: str) -> str:
    n, m = n_and_m(pattern)
    if not n < m <= 16:
        raise ValueError("N must be below M and M at most 16, as in 2:4")
    return pattern


NMPattern = Annotated[str, Field(pattern=r"^[1-9][0-9]?:[1-9][0-9]?$"), AfterValidator(_n_below_m)]
"""`N:M`: N of every M consecutive input channels are kept, N < M <= 16."""
