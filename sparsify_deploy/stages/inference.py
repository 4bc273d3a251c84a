"""Run a whole set of examples through an opened engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparsify_deploy.types import Session


def run_all(
    session: Session, inputs: Mapping[str, NDArray[Any]], batch_size: int, *, fixed: bool = False
) -> dict[str, NDArray[Any]]:
    """Outputs for all examples, in batches of `batch_size` along axis 0.

    With `fixed` the engine takes only whole batches: the last one is filled up with its first example, and what that
    adds is cut off again.
    """
    import numpy as np

    total = len(next(iter(inputs.values())))
    parts: dict[str, list[NDArray[Any]]] = {}
    for start in range(0, total, batch_size):
        piece = {name: values[start : start + batch_size] for name, values in inputs.items()}
        count = len(next(iter(piece.values())))
        if fixed and count < batch_size:
            piece = {k: np.concatenate([v, np.repeat(v[:1], batch_size - count, axis=0)]) for k, v in piece.items()}
        session.bind(piece)
        session.execute()
        for name, values in session.fetch().items():
            parts.setdefault(name, []).append(values[:count])
    return {name: np.concatenate(pieces) for name, pieces in parts.items()}
