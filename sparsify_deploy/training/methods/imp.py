"""Iterative magnitude pruning: lottery tickets (Frankle & Carbin 2019, arXiv 1803.03635; Renda 2020, arXiv 2003.02389).

Train the dense network, prune a share of the remaining weights by magnitude, retrain, and again until the density is
reached. What a retraining starts from has three modes that are often confused:

- `weight_rewind`: weights, BatchNorm buffers, optimizer slots and schedule of step k, then masked. With k = 0 this is
  the original lottery ticket; larger networks need k a little above it (Frankle 2020, arXiv 1912.05671).
- `learning_rate_rewind`: the trained weights and buffers are kept and only the schedule returns to step k, warm-up
  included where k lies in it; the slots start anew.
- `finetune`: the trained weights and buffers are kept and train on at one low rate; the slots start anew.

Each retraining takes the steps k..T of T, and with them the batches, augmentation and dropout of these steps of the
first training: rewinding takes the order of the data back as well. (The authors shuffle anew; here nothing but the
mask, and the weights in the two modes that keep them, tells one level from another.)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from sparsify_deploy.errors import ModelError, UsageError
from sparsify_deploy.params import Fraction
from sparsify_deploy.params import Params as Base

if TYPE_CHECKING:
    from torch import nn

    from sparsify_deploy.sparsity.layers import Layer
    from sparsify_deploy.sparsity.mask import Mask
    from sparsify_deploy.training.loop import Trainer

VERSION = 1
NEEDS_MASK = False
NEEDS_SPARSITY = True
LEAVES_MASK = True
CAN_END_EARLY = False

_SLIVER = 0.05
"""A last level that would do less than this part of a level's pruning is joined to the one before it, so that a
density that was rounded in a recipe costs no training more."""


class Params(Base):
    """How much a level prunes, and what its retraining starts from."""

    retrain: Literal["weight_rewind", "learning_rate_rewind", "finetune"] = Field(
        "weight_rewind", description="what a level retrains from: step k whole, only its learning rate, or neither"
    )
    rate: float = Field(0.2, gt=0.0, lt=1.0, description="share of the remaining weights pruned at each level")
    rewind_to: Fraction = Field(
        0.0, description="step k as a part of training; 0 is the original lottery ticket; each level retrains the rest"
    )
    rewind_step: int | None = Field(None, ge=0, description="step k itself, in place of rewind_to")
    allocation: Literal["global", "uniform"] = Field(
        "global", description="one threshold over all layers, or the same density in each"
    )
    keep_dense: tuple[str, ...] = Field(
        (), strict=False, description="layers left dense, shell patterns over module names"
    )
    finetune_fraction: float = Field(
        0.01,
        gt=0.0,
        le=1.0,
        description="finetune: its rate as a part of optimizer.lr; a step schedule's last rate in the paper, "
        "where a cosine would end at 0",
    )

    @model_validator(mode="after")
    def _agree(self) -> Params:
        if self.rewind_step is not None and self.rewind_to:
            raise ValueError("give rewind_to or rewind_step, not both")
        if "finetune_fraction" in self.model_fields_set and self.retrain != "finetune":
            raise ValueError(f"finetune_fraction has no effect with retrain {self.retrain}: remove it")
        return self


def densities(density: float, rate: float) -> tuple[float, ...]:
    """The density after each level, from 1.0 of the dense network: (1 - rate)^i, and at last exactly `density`."""
    levels = max(0, math.ceil(math.log(density) / math.log(1.0 - rate) - _SLIVER))
    if density < 1.0:
        levels = max(1, levels)
    return (1.0, *((1.0 - rate) ** level for level in range(1, levels)), density)[: levels + 1]


def optimizer_steps(params: Params, total_steps: int, density: float | None) -> int:
    """The first training, and the steps from k on for each level."""
    levels = len(densities(_asked(density), params.rate)) - 1
    return total_steps + levels * (total_steps - _step(params, total_steps))


def train(trainer: Trainer, mask: Mask | None, params: Params, density: float | None = None) -> Mask:
    """A dense fit, then a fit a level; every level's metrics are in the history.

    On disk are the rewind point and the level at work; the one before goes once it is done.
    """
    from sparsify_deploy.sparsity.mask import Mask as AnyMask
    from sparsify_deploy.training import checkpoint
    from sparsify_deploy.training.updater import Dense, HoldMask

    if trainer.settings.chooses:
        raise UsageError("training.keep best and early_stop have no meaning for imp, which prunes after each whole fit")
    if mask is not None:
        raise UsageError("train.method imp starts dense and finds its own mask: remove the init section")
    goals = densities(_asked(density), params.rate)
    k = _step(params, trainer.total_steps)
    layers = _layers(trainer.model, params.keep_dense)
    labels = [f"{trainer.label}.level-{level}" for level in range(len(goals))]
    rewinds = params.retrain == "weight_rewind" and len(goals) > 1
    low = params.finetune_fraction * trainer.settings.optimizer.lr if params.retrain == "finetune" else None
    held = AnyMask.ones(layers)
    reached = max((i for i, label in enumerate(labels) if trainer.checkpoint(label).exists()), default=0)
    for level, label in enumerate(labels):
        if level < reached:
            continue
        if level > reached:
            held = pruned(layers, held, goals[level], params.allocation)
            if rewinds:
                trainer.rewind(labels[0], k)
            else:
                trainer.optimizer.state.clear()
        if level == 0:
            trainer.fit(Dense(), label, keep_at=k if rewinds else None, measured=True)
        else:
            updater = HoldMask(trainer.model, trainer.optimizer, held)
            for note in updater.notes:
                trainer.context.progress.say(f"{label}: {note}")
            trainer.fit(updater, label, start=k, constant_rate=low, measured=True)
            held = updater.mask  # a level gone on with brings its own
        for before in labels[:level]:
            checkpoint.delete(trainer.checkpoint(before))
    return held


def pruned(layers: tuple[Layer, ...], mask: Mask, density: float, allocation: Literal["global", "uniform"]) -> Mask:
    """The part of `mask` with the largest |weight|, of `density` of all weights of `layers`; ties by lower index.

    `global` keeps exactly round(density · all weights), `uniform` round(density · size) of each layer.
    """
    from sparsify_deploy.sparsity.prune import allocate

    scores = {}
    for layer in layers:
        weight = layer.weight.detach()
        scores[layer.parameter] = weight.abs().masked_fill(~mask[layer.parameter].to(weight.device), -1.0)
    return allocate(scores, density, allocation)


def _asked(density: float | None) -> float:
    if density is None:
        raise UsageError("train.method imp prunes while it trains: set sparsity in the recipe")
    return density


def _step(params: Params, total_steps: int) -> int:
    if params.rewind_step is None:
        return min(round(params.rewind_to * total_steps), total_steps - 1)
    if params.rewind_step >= total_steps:
        raise UsageError(
            f"train.params.rewind_step {params.rewind_step} leaves nothing to retrain: training has {total_steps} steps"
        )
    return params.rewind_step


def _layers(model: nn.Module, keep_dense: tuple[str, ...]) -> tuple[Layer, ...]:
    from sparsify_deploy.sparsity.layers import to_prune

    if not (layers := to_prune(model, keep_dense, "train.params.keep_dense")):
        raise ModelError("imp has no layer to prune: the model has none, or train.params.keep_dense names them all")
    return layers
