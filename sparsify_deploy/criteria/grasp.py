"""GraSP: keep the weights whose removal hurts the gradient flow (Wang 2020, arXiv 2002.07376).

Removing θ changes the squared norm of the gradient by S(−θ) = −θ ⊙ (H g) to first order; the weights of largest S are
dropped, so the score, of which the highest are kept, is θ ⊙ (H g), with its sign. The loss is taken of the logits over
a temperature of 200. g and H are those of the prunable weights alone, over all scoring examples: one pass for g without
a graph, a second one for the gradient of g · ∂L/∂θ with g held constant. One shot, as published.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from sparsify_deploy.params import Params as Base
from sparsify_deploy.params import Positive

if TYPE_CHECKING:
    from torch import nn

    from sparsify_deploy.sparsity.mask import Mask
    from sparsify_deploy.sparsity.prune import Scorer
    from sparsify_deploy.types import Batches, LossFn, Scores

VERSION = 1
NEEDS_DATA = True


class Params(Base):
    """What GraSP differentiates."""

    temperature: Positive = Field(
        200.0, description="divides the logits before the loss; 1 for a task whose outputs are no logits"
    )


def rounds(params: Params) -> int:
    """1: GraSP is one shot."""
    return 1


def prepare(
    model: nn.Module, batches: Batches, loss_fn: LossFn, params: Params, *, inputs: tuple[str, ...], seed: int
) -> Scorer:
    """Return mask -> θ ⊙ (H g) of every prunable weight at θ = W * mask, on the model's device, float32 or wider.

    Scores may be negative; pruned weights get the lowest of all. BatchNorm uses batch statistics, all else evaluation
    mode (see `_saliency`). ModelError where a score is not finite, where the loss does not depend on a layer, where it
    cannot be differentiated twice, and where a layer's scores are all 0.
    """
    import torch

    from sparsify_deploy.criteria._saliency import Probe

    instead = "choose init.criterion snip, synflow, magnitude or random"
    probe = Probe("GraSP", instead, model, tuple(batches), loss_fn, inputs, seed, params.temperature)

    def scorer(mask: Mask | None) -> Scores:
        with probe.at(mask) as weights:
            products = probe.hessian_times(weights, probe.gradients(weights))
            scores = {name: products[name].mul_(weight.detach()) for name, weight in weights.items()}
        probe.check(scores, mask)
        if mask is None:
            return scores
        # a pruned weight's own score, 0, would beat every negative one
        lowest = min(float(score.min()) for score in scores.values()) - 1.0
        return {
            n: torch.where(mask[n].to(s.device), s, torch.full_like(s, lowest)) if n in mask else s
            for n, s in scores.items()
        }

    return scorer


def score(
    model: nn.Module, batches: Batches, loss_fn: LossFn, params: Params, *, inputs: tuple[str, ...], seed: int = 0
) -> Scores:
    """θ ⊙ (H g) of every prunable weight of the unmasked network."""
    return prepare(model, batches, loss_fn, params, inputs=inputs, seed=seed)(None)
