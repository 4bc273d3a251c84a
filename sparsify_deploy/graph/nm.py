"""N:M patterns on weight values, along input channels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def violations(values: NDArray[Any], n: int, m: int) -> int:
    """Groups of `m` consecutive input channels with more than `n` non-zeros.

    `values` is `(K, C, *kernel)`; a group belongs to one output channel and one kernel position. A last group of
    fewer than `m` channels counts like the others.
    """
    channels = values.shape[1]
    kept = values.reshape(values.shape[0], channels, -1) != 0
    padded = np.pad(kept, ((0, 0), (0, -channels % m), (0, 0))) if channels % m else kept
    groups = padded.view(np.uint8).reshape(kept.shape[0], -1, m, kept.shape[2])
    counts = groups[:, :, 0].astype(np.uint16)
    for i in range(1, m):  # several times faster than a sum over so short an axis
        counts += groups[:, :, i]
    return int(np.count_nonzero(counts > n))


def blocks(values: NDArray[Any], m: int) -> int:
    """How many groups of `m` input channels `violations` looks at."""
    outputs, channels = values.shape[:2]
    return int(outputs * -(-channels // m) * (values.size // (outputs * channels))) if values.size else 0


def density(values: NDArray[Any]) -> float:
    """The share of values that are not zero, 0 for none at all."""
    return float(np.count_nonzero(values) / values.size) if values.size else 0.0
