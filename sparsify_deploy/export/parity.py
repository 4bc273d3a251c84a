"""How far two sets of outputs of one network are apart; numpy only."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sparsify_deploy.errors import ModelError

if TYPE_CHECKING:
    from sparsify_deploy.types import Arrays


_MAP = 4
"""Axes of an output that has classes along axis 1 and places after it."""


@dataclass(frozen=True)
class Parity:
    """The worst over all outputs.

    `max_relative` is the largest difference over the largest magnitude of the reference, output by output.
    `top1_agreement` is the share of equal arg-max answers over the last axis, of maps `(N, C, H, W)` over axis 1; None
    where no output that answers so has two or more there. `examples` is the length of axis 0.
    """

    max_absolute: float
    max_relative: float
    top1_agreement: float | None
    examples: int


def compare(reference: Arrays, other: Arrays, answers: Collection[str] | None = None) -> Parity:
    """Compare outputs by name, computed in float64.

    `answers` are those whose largest value is an answer; None: all but maps, which may as well be a picture.

    Raises:
        ModelError: names or shapes differ, there is nothing to compare, or a value is not finite.
    """
    if set(reference) != set(other):
        raise ModelError(f"outputs differ: {', '.join(sorted(reference))} against {', '.join(sorted(other))}")
    absolute = relative = 0.0
    equal: list[float] = []
    sizes: set[int] = set()
    for name, expected in reference.items():
        found = other[name]
        if expected.shape != found.shape:
            raise ModelError(f"output {name!r} has shape {found.shape}, not {expected.shape}")
        if not expected.size:
            raise ModelError(f"output {name!r} is empty: nothing to compare")
        a, b = expected.astype(np.float64), found.astype(np.float64)
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise ModelError(f"output {name!r} holds values that are not finite")
        difference = float(np.abs(a - b).max())
        largest = float(np.abs(a).max())
        absolute = max(absolute, difference)
        relative = max(relative, difference / largest if largest else (np.inf if difference else 0.0))
        axis = 1 if a.ndim >= _MAP else -1
        told = a.ndim < _MAP if answers is None else name in answers
        if a.ndim >= 2 and a.shape[axis] >= 2 and told:
            equal.append(float((a.argmax(axis) == b.argmax(axis)).mean()))
        sizes.add(a.shape[0] if a.ndim else 1)
    if not sizes:
        raise ModelError("there is no output to compare")
    return Parity(absolute, relative, min(equal, default=None), min(sizes))


def together(parts: Sequence[Parity]) -> Parity:
    """Several comparisons as one, each weighted by its examples."""
    if not parts:
        raise ModelError("there is no output to compare")
    agreed = [(part.top1_agreement, part.examples) for part in parts if part.top1_agreement is not None]
    return Parity(
        max_absolute=max(part.max_absolute for part in parts),
        max_relative=max(part.max_relative for part in parts),
        top1_agreement=sum(share * count for share, count in agreed) / sum(count for _, count in agreed)
        if agreed
        else None,
        examples=sum(part.examples for part in parts),
    )
