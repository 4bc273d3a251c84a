"""Contestants that take turns, the ratio of two of them with its interval, and the machine that was measured on."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence

_BOOTSTRAPS = 2000


def race(turns: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """One row a round, one column a contestant: what each returns of its own time. The order rotates."""
    rows = []
    for number in range(rounds):
        row = [0.0] * len(turns)
        for k in range(len(turns)):
            turn = (number + k) % len(turns)
            row[turn] = turns[turn]()
        rows.append(row)
    return rows


def median_ratio(rows: Sequence[Sequence[float]], over: int, under: int) -> dict[str, float]:
    """The median over rounds of column `over` / column `under`, with a 95 % bootstrap interval."""
    ratios = [row[over] / row[under] for row in rows]
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(_BOOTSTRAPS))
    return {"median": statistics.median(ratios), "low": medians[50], "high": medians[1949]}


def ratio_text(ratio: Mapping[str, float], digits: int = 3) -> str:
    """`1.250  [1.243, 1.257]`."""
    median, low, high = (f"{ratio[key]:.{digits}f}" for key in ("median", "low", "high"))
    return f"{median}  [{low}, {high}]"


def machine() -> dict[str, str]:
    """What torch is and which CPU instructions it uses here."""
    import torch

    return {"torch": str(torch.__version__), "cpu_instruction_set": torch.backends.cpu.get_cpu_capability()}
