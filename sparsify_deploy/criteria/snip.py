"""SNIP: sensitivity of the loss to removing a weight, from one gradient (Lee 2019, arXiv 1810.02340).

A weight's score is |θ · ∂L/∂θ|, the derivative of the loss by a factor on the weight, with the gradient summed over
all scoring examples before the absolute value. One shot as published. With more `rounds` it is Iter-SNIP (de Jorge
2021, arXiv 2006.09081): the density falls exponentially, every round scores W * mask, and a pruned weight scores 0, so
it does not come back; unlike there, all rounds see the same examples. Iteration is what keeps SNIP from layer collapse
at extreme sparsity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from sparsify_deploy.params import Params as Base

if TYPE_CHECKING:
    from torch import nn

    from sparsify_deploy.sparsity.mask import Mask
    from sparsify_deploy.sparsity.prune import Scorer
    from sparsify_deploy.types import Batches, LossFn, Scores

VERSION = 1
NEEDS_DATA = True


class Params(Base):
    """How SNIP goes to the final density."""

    rounds: int = Field(1, ge=1, description="1: SNIP; more: Iter-SNIP, score-and-prune rounds of falling density")


def rounds(params: Params) -> int:
    """As many as asked for."""
    return params.rounds


def prepare(
    model: nn.Module, batches: Batches, loss_fn: LossFn, params: Params, *, inputs: tuple[str, ...], seed: int
) -> Scorer:
    """Return mask -> |θ · ∂L/∂θ| of every prunable weight at θ = W * mask, on the model's device, float32 or wider.

    BatchNorm uses batch statistics, all else evaluation mode (see `_saliency`). ModelError where a score is not finite,
    where the loss does not depend on a layer, and where a layer's scores are all 0 before anything is pruned.
    """
    from sparsify_deploy.criteria._saliency import Probe

    instead = "choose init.criterion synflow, magnitude or random"
    probe = Probe("SNIP", instead, model, tuple(batches), loss_fn, inputs, seed)

    def scorer(mask: Mask | None) -> Scores:
        with probe.at(mask) as weights:
            gradients = probe.gradients(weights)
            scores = {name: gradients[name].mul_(weight.detach()).abs_() for name, weight in weights.items()}
        probe.check(scores, mask)
        return scores

    return scorer


def score(
    model: nn.Module, batches: Batches, loss_fn: LossFn, params: Params, *, inputs: tuple[str, ...], seed: int = 0
) -> Scores:
    """|θ · ∂L/∂θ| of every prunable weight of the unmasked network."""
    return prepare(model, batches, loss_fn, params, inputs=inputs, seed=seed)(None)
