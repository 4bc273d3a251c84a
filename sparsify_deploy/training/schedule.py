"""The learning rate as a function of the step alone, so that resuming needs no scheduler state."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsify_deploy.training.settings import Schedule


def lr_factor(settings: Schedule, step: int, total: int) -> float:
    """What the first learning rate is multiplied by at optimizer step `step` of `total`, counted from 0.

    With `w = round(warmup_fraction * total)`, step t < w has `(t + 1) / (w + 1)` of the schedule's own factor: it
    rises linearly from just above 0, and step w is the first whole one. Cosine runs over `p = (t - w) / (total - w)`
    as `final + (1 - final) * (1 + cos(pi p)) / 2`; p is below 1 at the last step, so no step is wasted at rate
    `final = 0`. Step multiplies by `gamma` from step `round(milestone * total)` on.
    """
    warmup = round(settings.warmup_fraction * total)
    factor = (step + 1) / (warmup + 1) if step < warmup else 1.0
    if settings.name == "cosine":
        progress = max(0, step - warmup) / max(1, total - warmup)
        final = settings.final_fraction
        factor *= final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
    elif settings.name == "step":
        passed = sum(step >= round(milestone * total) for milestone in settings.milestones)
        factor *= settings.gamma**passed
    return factor
