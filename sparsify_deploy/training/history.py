"""What fits did, as facts: losses, the mask's densities over time, metrics and seconds."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from sparsify_deploy.training.updater import Update


@dataclass(frozen=True)
class History:
    """What one fit did, or all fits of a method that has several.

    `steps` are the optimizer steps done; `start` is the schedule's step at which a fit began. `losses` and `updates`
    count steps of training, over all fits of a method together. `density` and, by parameter name, `densities` are the
    mask's at the start. `curve` is the `metric` on the validation split, by step, of the network as it would have ended
    there; empty where nothing was measured. `dense_gradient_every` and `dense_steps`, the steps of the dense training
    to compare with (None: as many), are for the training cost. `metrics` are the test metrics after a fit that was
    asked for them.
    `train_s` and `cpu_s` are seconds on the clock and of CPU time spent in steps and checkpoints, interruptions left
    out. `resumed_from` is the step a checkpoint held. `levels` are the single fits where there were several, each on
    the schedule's own steps and without losses.
    """

    steps: int
    losses: tuple[tuple[int, float], ...]
    densities: Mapping[str, float] = field(default_factory=dict)
    updates: tuple[Update, ...] = ()
    dense_gradient_every: int | None = None
    resumed_from: int | None = None
    notes: tuple[str, ...] = ()
    label: str = ""
    start: int = 0
    density: float = 1.0
    dense_steps: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    train_s: float = 0.0
    cpu_s: float = 0.0
    levels: tuple[History, ...] = ()
    metric: str = ""
    curve: tuple[tuple[int, float], ...] = ()


def joined(fits: Sequence[History]) -> History:
    """Several fits as one, on one clock that counts the steps of all: each fit's starting mask is an update there.

    One fit is itself; none is an empty history.
    """
    if len(fits) <= 1:
        return fits[0] if fits else History(0, ())
    losses: list[tuple[int, float]] = []
    curve: list[tuple[int, float]] = []
    updates: list[Update] = []
    begins = list(accumulate((fit.steps for fit in fits), initial=0))
    for begin, before, fit in zip(begins, [None, *fits], fits, strict=False):
        if before is not None:
            pruned = 1.0 - fit.density / before.density if before.density else 0.0
            updates.append(Update(begin, pruned, 0, fit.densities))
        losses += [(begin + step - fit.start, loss) for step, loss in fit.losses]
        curve += [(begin + step - fit.start, value) for step, value in fit.curve]
        updates += [dataclasses.replace(u, step=begin + u.step - fit.start) for u in fit.updates]
    first, last = fits[0], fits[-1]
    return dataclasses.replace(
        first,
        steps=sum(fit.steps for fit in fits),
        losses=tuple(losses),
        curve=tuple(curve),
        updates=tuple(updates),
        resumed_from=last.resumed_from,
        notes=tuple(dict.fromkeys(note for fit in fits for note in fit.notes)),
        metrics=last.metrics,
        train_s=sum(fit.train_s for fit in fits),
        cpu_s=sum(fit.cpu_s for fit in fits),
        levels=tuple(dataclasses.replace(fit, losses=(), curve=()) for fit in fits),
    )


def restored(state: Mapping[str, Any]) -> History:
    """A history back from `dataclasses.asdict`."""
    parts = {"updates": [Update(**update) for update in state["updates"]], "levels": map(restored, state["levels"])}
    return History(**{**state, **{name: tuple(part) for name, part in parts.items()}})


class Stopwatch:
    """Seconds on the clock and of CPU time; runs from its creation, on top of what an interrupted run had."""

    def __init__(self, wall: float = 0.0, cpu: float = 0.0) -> None:
        self._wall, self._cpu = wall - time.monotonic(), cpu - time.process_time()

    def read(self) -> tuple[float, float]:
        """(seconds on the clock, seconds of CPU time) so far."""
        return self._wall + time.monotonic(), self._cpu + time.process_time()
