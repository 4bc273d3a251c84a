"""Gradual magnitude pruning along a cubic schedule while training (Zhu & Gupta 2017, arXiv 1710.01878).

Training starts dense. Every `update_every` steps from `begin_fraction` to `end_fraction` the smallest weights go, so
that the sparsity follows s_f + (s_i - s_f) (1 - (t - t0) / (t1 - t0))^3; the last update, at the end whatever
`update_every` divides, leaves exactly the density asked for. A pruned weight gets no gradient and stays 0, so masks
only ever shrink. In the paper every layer has the same sparsity (`uniform`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from sparsify_deploy.errors import UsageError
from sparsify_deploy.params import Fraction
from sparsify_deploy.params import Params as Base
from sparsify_deploy.training.methods import _rewiring

if TYPE_CHECKING:
    from sparsify_deploy.sparsity.mask import Mask
    from sparsify_deploy.training.loop import Trainer
    from sparsify_deploy.training.updater import HoldMask

VERSION = 1
NEEDS_MASK = False
NEEDS_SPARSITY = True
LEAVES_MASK = True
CAN_END_EARLY = False


class Params(Base):
    """When and where weights are pruned; `update_every`, `initial_sparsity` and `uniform` are the paper's."""

    begin_fraction: Fraction = Field(0.0, description="part of training before the first weight is pruned")
    end_fraction: float = Field(0.75, gt=0.0, le=1.0, description="part of training after which the mask stands still")
    update_every: int = Field(100, ge=1, description="optimizer steps from one pruning to the next")
    initial_sparsity: Fraction = Field(0.0, description="sparsity at the first pruning")
    allocation: Literal["global", "uniform", "erk"] = Field(
        "uniform", description="how sparsity is shared out over layers: one threshold, the same for all, or ERK"
    )
    keep_dense: tuple[str, ...] = Field((), strict=False, description="shell patterns of layer names never pruned")

    @model_validator(mode="after")
    def _in_order(self) -> Params:
        if self.begin_fraction >= self.end_fraction:
            raise ValueError("begin_fraction must be below end_fraction")
        return self


def optimizer_steps(params: Params, total_steps: int, density: float | None) -> int:
    """One fit."""
    return total_steps


def train(trainer: Trainer, mask: Mask | None, params: Params, density: float | None = None) -> Mask:
    """One fit that starts dense and ends with `density` of the weights of the layers that are not kept dense."""
    from sparsify_deploy.sparsity.layers import to_prune
    from sparsify_deploy.sparsity.mask import Mask
    from sparsify_deploy.training.updater import HoldMask

    if mask is not None:
        raise UsageError("train.method gradual starts dense and takes no mask: remove the init section")
    if density is None:
        raise UsageError("train.method gradual needs the share of weights to drop: give sparsity at the top")
    if params.initial_sparsity > 1.0 - density:
        raise UsageError(
            f"train.params.initial_sparsity {params.initial_sparsity:g} is above the sparsity asked for, "
            f"{1.0 - density:g}: lower it"
        )
    pruned = to_prune(trainer.model, params.keep_dense, "train.params.keep_dense")
    if not pruned:
        raise UsageError("train.params.keep_dense leaves gradual no layer to prune: name fewer layers")
    held = HoldMask(trainer.model, trainer.optimizer, Mask.ones(pruned))
    return _rewiring.fit(trainer, Gradual(held, params, trainer.total_steps, density))


class Gradual(_rewiring.Moving):
    """The updater: holds the mask, and prunes after the optimizer step on the schedule's steps."""

    name = "gradual"

    def __init__(self, held: HoldMask, params: Params, total_steps: int, density: float) -> None:
        from sparsify_deploy.sparsity.prune import final_densities

        self._params = params
        self._begin = round(params.begin_fraction * total_steps)
        self._end = max(1, round(params.end_fraction * total_steps))
        shapes = {name: tuple(kept.shape) for name, kept in held.mask.items()}
        self._density, self._final = density, final_densities(shapes, density, params.allocation)
        every = params.update_every
        one_shot = f"gradual: all is pruned at once, at step {self._end}: update_every {every} does not come before it"
        super().__init__(held, () if any(map(self._due, range(1, self._end))) else (one_shot,))
        if self._begin == 0 and params.initial_sparsity:
            self._held.rewire_to(self._next(0))

    def after_step(self, step: int) -> None:
        super().after_step(step)
        done = step + 1
        if not self._due(done):
            return
        for name, weight in self._held.parameters.items():
            _rewiring.check_finite(self.name, f"weight {name}", weight, done)
        before, new = self._kept(), self._next(done)
        kept = sum(kept for kept, _ in new.counts().values())
        self._move(done, 1.0 - kept / before if before else 0.0, new)

    def _due(self, done: int) -> bool:
        since = done - self._begin
        return done == self._end or (since >= 0 and done < self._end and since % self._params.update_every == 0)

    def _kept(self) -> int:
        return sum(kept for kept, _ in self.mask.counts().values())

    def _next(self, done: int) -> Mask:
        """The mask of the schedule's density then; what is pruned stays so, for it scores below every weight."""
        from sparsify_deploy.sparsity.prune import global_mask, layerwise_mask
        from sparsify_deploy.sparsity.schedules import cubic_sparsity

        def density(final: float) -> float:
            lowest = 1.0 - final
            initial = min(self._params.initial_sparsity, lowest)
            if done >= self._end:
                return final
            return 1.0 - cubic_sparsity(done, begin=self._begin, end=self._end, initial=initial, final=lowest)

        scores = {
            name: self._held.parameters[name].detach().abs().cpu().masked_fill_(~mask, -1.0)
            for name, mask in self.mask.items()
        }
        if self._final is None:
            return global_mask(scores, density(self._density))
        return layerwise_mask(scores, {name: density(final) for name, final in self._final.items()})
