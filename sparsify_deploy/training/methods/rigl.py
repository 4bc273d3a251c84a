"""RigL: drop the smallest weights and grow where the dense gradient is largest (Evci 2020, arXiv 1911.11134).

The rules are those of the authors' code (`rigl/sparse_optimizers_base.py`), with two differences: an update counts as
an optimizer step, where theirs does not advance the counter, and the first comes at step `update_every`, where theirs
comes at step 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from sparsify_deploy.errors import Diverged, UsageError
from sparsify_deploy.params import Params as Base

if TYPE_CHECKING:
    from torch import Tensor

    from sparsify_deploy.sparsity.mask import Mask
    from sparsify_deploy.training.loop import Trainer
    from sparsify_deploy.training.updater import HoldMask, Update

VERSION = 1
NEEDS_MASK = True
NEEDS_SPARSITY = False
LEAVES_MASK = True


class Params(Base):
    """When and how much RigL rewires; the defaults are the paper's."""

    update_every: int = Field(100, ge=1, description="optimizer steps from one rewiring to the next (the paper's ΔT)")
    drop_fraction: float = Field(
        0.3,
        gt=0.0,
        lt=1.0,
        description="share of each layer's weights replaced at first (alpha); falls as a cosine to 0",
    )
    end_fraction: float = Field(
        0.75, gt=0.0, le=1.0, description="part of training after which the mask no longer moves (T_end)"
    )


def train(trainer: Trainer, mask: Mask | None, params: Params, density: float | None = None) -> Mask:
    """One fit; every layer keeps its number of weights. Dense layers and frozen ones are never rewired."""
    from sparsify_deploy.training.updater import HoldMask

    if mask is None:
        raise UsageError("train.method rigl needs a starting mask: add an init section (random with erk is RigL's own)")
    updater = RigL(HoldMask(trainer.model, trainer.optimizer, mask), params, trainer.total_steps)
    for note in updater.notes:
        trainer.context.progress.say(note)
    trainer.fit(updater)
    return updater.mask


def rewire(weight: Tensor, mask: Tensor, gradient: Tensor, count: int) -> Tensor:
    """The mask after `count` weights were dropped and as many grown; all tensors of one shape and device.

    Kept are the `active - count` masked-in weights of largest |weight|; then `count` positions are grown among all
    others, those just dropped included, by |gradient|. Ties go to the lower index.
    """
    flat = mask.flatten()
    magnitude = weight.abs().flatten().masked_fill(~flat, -1.0)
    by_magnitude = magnitude.sort(descending=True, stable=True).indices
    new = flat & False
    new[by_magnitude[: int(flat.sum()) - count]] = True
    growth = gradient.abs().flatten().masked_fill(new, -1.0)
    new[growth.sort(descending=True, stable=True).indices[:count]] = True
    return new.view_as(mask)


class RigL:
    """The updater: holds the mask, and on every `update_every`-th step up to T_end rewires instead of training."""

    def __init__(self, held: HoldMask, params: Params, total_steps: int) -> None:
        self._held = held
        self._params = params
        self._end = round(params.end_fraction * total_steps)
        self._updates: list[Update] = []
        self.notes: Sequence[str] = ()
        self.dense_gradient_every: int | None = params.update_every
        if params.update_every >= self._end:
            self.dense_gradient_every = None
            self.notes = (
                f"rigl: the mask never moves: update_every {params.update_every} does not come before "
                f"step {self._end}, where rewiring ends (end_fraction {params.end_fraction:g} of {total_steps} steps); "
                "lower train.params.update_every or train longer",
            )

    @property
    def mask(self) -> Mask:
        return self._held.mask

    @property
    def updates(self) -> Sequence[Update]:
        return self._updates

    def before_forward(self, step: int) -> None:
        self._held.before_forward(step)

    def after_backward(self, step: int) -> bool:
        if step > 0 and step % self._params.update_every == 0 and step < self._end:
            self._rewire(step)
            return False
        return self._held.after_backward(step)

    def after_step(self, step: int) -> None:
        self._held.after_step(step)

    def finish(self) -> None:
        self._held.finish()

    def _rewire(self, step: int) -> None:
        from sparsify_deploy.sparsity.schedules import cosine_drop_fraction
        from sparsify_deploy.training.updater import Update

        fraction = cosine_drop_fraction(step, self._end, self._params.drop_fraction)
        rewired: dict[str, Tensor] = {}
        changed = 0
        for name, old in self._held.mask.items():
            weight, gradient = self._held.parameters[name], self._held.parameters[name].grad
            if gradient is None or bool(old.all()):
                continue
            if not bool(gradient.isfinite().all()):
                raise Diverged(f"rigl: the gradient of {name} is not finite at step {step}: lower optimizer.lr")
            kept = old.to(weight.device)
            new = rewire(weight.detach(), kept, gradient, math.floor(fraction * int(old.sum())))
            changed += int((new & ~kept).sum())
            rewired[name] = new
        self._held.rewire_to(self._held.mask.with_(rewired))
        self._updates.append(Update(step, fraction, changed, self._held.mask.densities()))

    def state_dict(self) -> dict[str, Any]:
        return {**self._held.state_dict(), "updates": [dataclasses.asdict(update) for update in self._updates]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        from sparsify_deploy.training.updater import Update

        self._held.load_state_dict(state)
        self._updates = [Update(**update) for update in state["updates"]]
