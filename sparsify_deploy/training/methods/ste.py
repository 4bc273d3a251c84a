"""Learned masks by straight-through scores: every weight has a score, the highest live, and the scores are trained.

The forward pass uses w * mask(s), where the mask is the top of the scores s at the density asked for. Its step
function has no useful gradient, so the backward pass goes straight through it (Bengio 2013, arXiv 1308.3432): with g
the loss's gradient for w * mask(s), the scores of all weights get g * w, pruned ones included, as in edge-popup
(Ramanujan 2020, arXiv 1911.13299) and movement pruning (Sanh 2020, arXiv 2005.07683). Scores start at |w|.

The weights are trained beside them, as in movement pruning, and get the true gradient of what the forward pass
computed, g * mask: a pruned weight learns nothing while it is pruned. To the optimizer it is a weight like others,
so weight decay and what is left of its momentum still move it, and it comes back with the value it then has.
`freeze_weights` leaves the start values of all pruned layers as they are (edge-popup); the rest of the network trains.

The scores have an optimizer of their own, of the same kind and settings but without weight decay, which follows the
learning-rate schedule; `clip_norm` does not act on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from sparsify_deploy.errors import Diverged, ModelError, UsageError
from sparsify_deploy.params import Params as Base
from sparsify_deploy.params import Positive

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparsify_deploy.sparsity.mask import Mask
    from sparsify_deploy.training.loop import Trainer
    from sparsify_deploy.training.updater import Update

VERSION = 1
NEEDS_MASK = False
NEEDS_SPARSITY = True
LEAVES_MASK = True
CAN_END_EARLY = False


class Params(Base):
    """Where scores are compared, how fast they learn, and what else does."""

    allocation: Literal["global", "uniform", "erk"] = Field(
        "uniform", description="how density is shared out over layers: one threshold, the same for all, or ERK"
    )
    keep_dense: tuple[str, ...] = Field((), strict=False, description="shell patterns of layer names never pruned")
    score_lr: Positive | None = Field(
        None, description="first learning rate of the scores; none: that of training.optimizer"
    )
    freeze_weights: bool = Field(False, description="train the scores of pruned layers, not their weights")
    end_fraction: float = Field(
        1.0, gt=0.0, le=1.0, description="part of training after which the mask stands still and only weights train"
    )


def optimizer_steps(params: Params, total_steps: int, density: float | None) -> int:
    """One fit."""
    return total_steps


def train(trainer: Trainer, mask: Mask | None, params: Params, density: float | None = None) -> Mask:
    """One fit that ends with `density` of the weights of the layers that are pruned; frozen layers stay dense."""
    if mask is not None:
        raise UsageError("train.method ste learns its mask and takes none: remove the init section")
    if density is None:
        raise UsageError("train.method ste needs the share of weights to drop: give sparsity at the top")
    updater = Ste(trainer, params, density)
    for note in updater.notes:
        trainer.context.progress.say(note)
    trainer.fit(updater)
    return updater.mask


class Ste:
    """The updater: masks the forward pass by the top scores and trains the scores after each backward pass."""

    dense_gradient_every: int | None = 0

    def __init__(self, trainer: Trainer, params: Params, density: float) -> None:
        from torch import nn

        from sparsify_deploy.training.methods._straight_through import MaskedForward
        from sparsify_deploy.training.optimizer import build_optimizer

        self._params, self._density = params, density
        self._total = trainer.total_steps
        self._end = max(1, round(params.end_fraction * self._total))
        parameters, self._notes = _pruned(trainer.model, params.keep_dense)
        self._scores = {name: nn.Parameter(p.detach().abs()) for name, p in parameters.items()}
        settings = trainer.settings.optimizer
        self._trained = trainer.optimizer
        self._ratio = 1.0 if params.score_lr is None else params.score_lr / settings.lr
        self._optimizer = build_optimizer(
            nn.ParameterList(self._scores.values()), settings.model_copy(update={"weight_decay": 0.0})
        )
        self._behind = MaskedForward(parameters, self._top(0))
        self._stale = False

    @property
    def mask(self) -> Mask:
        return self._behind.mask

    @property
    def updates(self) -> Sequence[Update]:
        return self._behind.updates

    @property
    def notes(self) -> Sequence[str]:
        from sparsify_deploy.sparsity.prune import collapsed

        empty = collapsed(self.mask)
        return (*self._notes, *([f"layer collapse: no weight is left in {', '.join(empty)}"] if empty else []))

    @property
    def scores(self) -> Mapping[str, Tensor]:
        """The scores as they stand, by parameter name."""
        return {name: score.detach() for name, score in self._scores.items()}

    def before_forward(self, step: int) -> None:
        self._behind.restore_()  # a step before may have failed half way
        self._behind.wear_(step, self._now(step))

    def after_backward(self, step: int) -> bool:
        self._behind.restore_()
        for name, weight in self._behind.parameters.items():
            if weight.grad is None:
                continue
            self._scores[name].grad = weight.grad * self._behind.dense(name)
            if self._params.freeze_weights:
                weight.grad = None  # the optimizer passes it by, weight decay and momentum included
            else:
                weight.grad.masked_fill_(~self._behind.kept(name), 0.0)
        if step < self._end:
            for group in self._optimizer.param_groups:
                group["lr"] = self._trained.param_groups[0]["lr"] * self._ratio
            self._optimizer.step()
            self._stale = True
        self._optimizer.zero_grad(set_to_none=True)
        return True

    def after_step(self, step: int) -> None:
        self._behind.restore_()  # a skipped step has no after_backward

    def finish(self) -> None:
        self._behind.keep_(self._total, self._now(self._total))

    def _now(self, step: int) -> Mapping[str, Tensor]:
        """The mask of the scores as they stand, by the tensors of the last forward pass if they did not move."""
        kept = self._top(step) if self._stale else {name: self._behind.kept(name) for name in self._scores}
        self._stale = False
        return kept

    def _top(self, step: int) -> Mapping[str, Tensor]:
        from sparsify_deploy.sparsity.prune import allocate

        try:
            mask = allocate(self.scores, self._density, self._params.allocation)
        except ModelError as error:
            raise Diverged(
                f"ste: at step {step}: {error}; lower train.params.score_lr or training.optimizer.lr"
            ) from error
        return {name: mask[name].to(score.device) for name, score in self._scores.items()}

    def state_dict(self) -> dict[str, Any]:
        return {
            **self._behind.state_dict(),
            "scores": {name: score.detach() for name, score in self._scores.items()},
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._behind.load_state_dict(state)
        for name, score in self._scores.items():
            score.detach().copy_(state["scores"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self._stale = True


def _pruned(model: nn.Module, keep_dense: Sequence[str]) -> tuple[dict[str, nn.Parameter], tuple[str, ...]]:
    """The weights that get scores, by name, and a note on those that cannot learn any."""
    from sparsify_deploy.sparsity.layers import to_prune
    from sparsify_deploy.training.methods._straight_through import named

    wanted = to_prune(model, keep_dense, "train.params.keep_dense")
    frozen = [layer.name for layer in wanted if not layer.weight.requires_grad]
    parameters = {layer.parameter: layer.weight for layer in wanted if layer.weight.requires_grad}
    if not parameters:
        raise UsageError("ste has no layer to prune: name fewer in train.params.keep_dense, or unfreeze some")
    notes = (f"ste: {named(frozen, 'frozen weights give scores no gradient')}",) if frozen else ()
    return parameters, notes
