"""Times of single layers on a CPU that other work disturbs."""

from __future__ import annotations

from collections.abc import Sequence

WARM_UP = 3
RUNS = 60
NOTE = "Each layer's time is the mean of the middle half of the runs."


def middle_half(times: Sequence[float]) -> float:
    """The mean without the fastest and the slowest quarter: a pause of the machine in one run is not the layer's."""
    ordered = sorted(times)
    quarter = len(ordered) // 4
    kept = ordered[quarter : len(ordered) - quarter]
    return sum(kept) / len(kept)
