"""How a density is shared out over layers: uniform, or Erdős-Rényi-Kernel (Evci 2020, arXiv 1911.11134)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Shapes = Mapping[str, Sequence[int]]


def uniform(shapes: Shapes, density: float) -> dict[str, float]:
    """The same density, in [0, 1], for every layer."""
    _check(density)
    return dict.fromkeys(shapes, density)


def erk(shapes: Shapes, density: float) -> dict[str, float]:
    """Density of layer l = ε · Σ dims / Π dims, with ε such that `density` of all weights is kept.

    A layer that would come out above 1 is dense, and ε is solved again for the rest (the others only gain by
    it, so no layer ever has to come back). `shapes` are weight shapes, `(K, C, R, S)` or `(out, in)`.
    """
    _check(density)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    budget = density * sum(sizes.values())
    dense: set[str] = set()
    while True:
        rest = [name for name in shapes if name not in dense]
        if not rest:
            return dict.fromkeys(shapes, 1.0)
        epsilon = (budget - sum(sizes[name] for name in dense)) / sum(sum(shapes[name]) for name in rest)
        wanted = {name: epsilon * sum(shapes[name]) / sizes[name] for name in rest}
        too_much = {name for name in rest if wanted[name] > 1}
        if not too_much:
            return {name: wanted.get(name, 1.0) for name in shapes}
        dense |= too_much


def _check(density: float) -> None:
    if not 0 <= density <= 1:
        raise ValueError(f"density must be in [0, 1], not {density}")
