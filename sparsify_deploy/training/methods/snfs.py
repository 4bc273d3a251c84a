"""SNFS: grow where the momentum is largest, and share the weights anew over the layers (Dettmers 2019, 1907.04840).

Sparse Networks from Scratch, or sparse momentum. At each update every layer drops its smallest weights; all that was
freed is shared out over the layers by the mean |momentum| of the weights each had, and a layer grows its share where
|momentum| is largest among its missing weights. What a full layer cannot take goes in equal parts to the layers that
have room, as in the authors' code (`sparselearning/core.py`), so the whole network keeps its number of weights.

Momentum must be dense, so no gradient is masked: the weights are masked again after each step, and `clip_norm` sees
the dense gradient. A new weight starts at 0 and keeps the momentum that made it grow. The momentum is SGD's buffer, or
the first moment of Adam and AdamW, which the authors also divide by the root of the second. The paper's interval is an
epoch. Counts are exact here: shares are rounded by largest remainder, where the authors' code corrects its total at
the next update and stops short of filling a layer. Two more rules of that code are left out: that a layer denser than
0.8 with more than an equal share of the momentum drops no larger part than its sparsity, and that after an update all
missing weights get the mean momentum of the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from sparsify_deploy.errors import UsageError
from sparsify_deploy.training.methods import _rewiring

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from sparsify_deploy.sparsity.mask import Mask
    from sparsify_deploy.training.loop import Trainer
    from sparsify_deploy.training.updater import HoldMask

VERSION = 1
NEEDS_MASK = True
NEEDS_SPARSITY = False
LEAVES_MASK = True
CAN_END_EARLY = True


class Params(_rewiring.Rewired):
    """When and how much SNFS rewires; drop_fraction and its cosine to the end of training are the paper's."""

    drop_fraction: float = Field(
        0.5,
        gt=0.0,
        lt=1.0,
        description="share of each layer's weights dropped at first; falls as a cosine to 0",
    )
    end_fraction: float = Field(
        1.0, gt=0.0, le=1.0, description="part of training after which the mask no longer moves"
    )


def optimizer_steps(params: Params, total_steps: int, density: float | None) -> int:
    """One fit."""
    return total_steps


def train(trainer: Trainer, mask: Mask | None, params: Params, density: float | None = None) -> Mask:
    """One fit; the mask keeps its number of weights, its layers do not. Frozen layers are never rewired."""
    from sparsify_deploy.training.methods._dense_momentum import DenseMomentum

    mask = _rewiring.starting_mask("snfs", mask, "random with uniform is SNFS's own")
    if trainer.settings.optimizer.name == "sgd" and not trainer.settings.optimizer.momentum:
        raise UsageError("train.method snfs grows by momentum and optimizer.momentum is 0: set it, such as 0.9")
    held = DenseMomentum(trainer.model, trainer.optimizer, mask)
    return _rewiring.fit(trainer, SNFS(held, params, trainer.total_steps, trainer.optimizer))


class SNFS(_rewiring.Trading):
    """The updater: masks the weights again after each step, and after every `update_every`-th moves the mask."""

    name = "snfs"

    def __init__(self, held: HoldMask, params: Params, total_steps: int, optimizer: torch.optim.Optimizer) -> None:
        self._clock = _rewiring.Clock.of(params, total_steps)
        self._optimizer = optimizer
        super().__init__(held, notes := self._clock.notes(self.name))
        self.dense_gradient_every = None if notes else 0

    def after_step(self, step: int) -> None:
        super().after_step(step)
        done = step + 1
        if self._clock.due(done):
            fraction = self._clock.fraction(done)
            self._move(done, fraction, self._next(done, fraction))

    def _next(self, done: int, fraction: float) -> dict[str, Tensor]:
        from sparsify_deploy.training.methods._selection import drop, grow_, kept

        momenta, left, freed, room, contribution = {}, {}, {}, {}, {}
        for name, weight, mask in self._trained():
            momentum = momentum_of(self._optimizer, weight)
            if momentum is None:  # under fp16 the first steps may all have been skipped
                continue
            momenta[name] = momentum
            _rewiring.check_finite(self.name, f"momentum of {name}", momentum, done)
            _rewiring.check_finite(self.name, f"weight {name}", weight, done)
            active = kept(mask)
            freed[name] = math.floor(fraction * active)
            room[name] = mask.numel() - active + freed[name]
            contribution[name] = mean_magnitude(momentum, mask)
            left[name] = drop(weight, mask, freed[name])
        shares = redistribute(freed, room, contribution)
        return {name: grow_(left[name], momenta[name], count) for name, count in shares.items()}


def redistribute(
    freed: Mapping[str, int], room: Mapping[str, int], contribution: Mapping[str, float]
) -> dict[str, int]:
    """How many weights each layer grows: `freed` in all, in proportion to `contribution`, at most `room` each.

    Where no layer contributes, each gets back its own. Fractions are rounded by largest remainder, ties to the first
    layer. `room` must hold all that was freed.
    """
    total, weight = sum(freed.values()), math.fsum(contribution.values())
    if total == 0 or weight == 0:
        return dict(freed)
    wanted = {name: total * contribution[name] / weight for name in freed}
    open_ = set(freed)
    while full := {name for name in open_ if wanted[name] > room[name]}:
        excess = math.fsum(wanted[name] - room[name] for name in sorted(full))
        open_ -= full
        for name in freed:
            if name in full:
                wanted[name] = room[name]
            elif name in open_:
                wanted[name] += excess / len(open_)
    shares = {name: min(room[name], math.floor(wanted[name])) for name in freed}
    while missing := total - sum(shares.values()):
        have_room = [name for name in freed if shares[name] < room[name]]
        have_room.sort(key=lambda name: shares[name] - wanted[name])
        for name in have_room[:missing]:
            shares[name] += 1
    return shares


def momentum_of(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> Tensor | None:
    """SGD's momentum buffer or Adam's first moment; None before the first step."""
    state = optimizer.state.get(weight, {})
    found: Tensor | None = state.get("momentum_buffer", state.get("exp_avg"))
    return found


def mean_magnitude(momentum: Tensor, mask: Tensor) -> float:
    """The mean of |momentum| over the weights that `mask` keeps; 0 where it keeps none."""
    kept = momentum.detach().to("cpu")[mask].abs()
    return float(kept.double().mean()) if len(kept) else 0.0
