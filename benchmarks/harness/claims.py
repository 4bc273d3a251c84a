"""Whether what should hold does hold, beyond the spread of the seeds. Free of torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from harness.grid import Claim

Verdict = Literal[
    "holds",
    "holds within the spread",
    "missed within the spread",
    "does not hold",
    "holds, spread unknown",
    "missed, spread unknown",
    "not run",
]

HOW = (
    "Surplus: difference of the means less what the claim asks. Spread: the pooled standard deviation of the seeds, "
    "sqrt((s1^2 + s2^2) / 2). A claim holds, or does not, where the surplus is larger than the spread; "
    "one seed has no spread."
)


@dataclass(frozen=True)
class Judged:
    """A claim with its numbers, in points of accuracy; None where runs are missing."""

    claim: Claim
    verdict: Verdict
    better: float | None = None
    worse: float | None = None
    surplus: float | None = None
    spread: float | None = None
    seeds: tuple[int, int] = (0, 0)


def judge(claim: Claim, accuracies: Mapping[tuple[str, str], Sequence[float]]) -> Judged:
    """`accuracies` in %, one a seed, by row and column."""
    first, second = (accuracies.get(cell, ()) for cell in (claim.better, claim.worse))
    if not first or not second:
        return Judged(claim, "not run", seeds=(len(first), len(second)))
    better, worse = statistics.fmean(first), statistics.fmean(second)
    surplus = better - worse - claim.margin
    spread = None
    if len(first) > 1 and len(second) > 1:
        spread = math.sqrt((statistics.variance(first) + statistics.variance(second)) / 2)
    return Judged(claim, _verdict(surplus, spread), better, worse, surplus, spread, (len(first), len(second)))


def _verdict(surplus: float, spread: float | None) -> Verdict:
    if spread is None:
        return "holds, spread unknown" if surplus >= 0 else "missed, spread unknown"
    if abs(surplus) <= spread:
        return "holds within the spread" if surplus >= 0 else "missed within the spread"
    return "holds" if surplus > 0 else "does not hold"
