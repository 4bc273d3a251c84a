"""Magnitude: keep the weights of largest absolute value (Han 2015, arXiv 1506.02626).

At initialisation this mostly measures the initialiser: with torch's default, layers of large fan-in have small
weights and are the first to be emptied. Use it on a pretrained network, or with uniform or ERK allocation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsify_deploy.params import Params as Base

if TYPE_CHECKING:
    from torch import nn

    from sparsify_deploy.sparsity.mask import Mask
    from sparsify_deploy.sparsity.prune import Scorer
    from sparsify_deploy.types import Batches, LossFn, Scores

VERSION = 1
NEEDS_DATA = False


class Params(Base):
    """Magnitude has no parameters."""


def rounds(params: Params) -> int:
    """1: magnitudes do not depend on the mask."""
    return 1


def prepare(
    model: nn.Module, batches: Batches, loss_fn: LossFn, params: Params, *, inputs: tuple[str, ...], seed: int
) -> Scorer:
    """Return mask -> |w * mask| of every prunable weight, in the weight's dtype."""
    from sparsify_deploy.sparsity.layers import prunable

    magnitudes = {layer.parameter: layer.weight.detach().abs() for layer in prunable(model)}

    def scorer(mask: Mask | None) -> Scores:
        if mask is None:
            return magnitudes
        return {n: s * mask[n].to(s.device) if n in mask else s for n, s in magnitudes.items()}

    return scorer


def score(
    model: nn.Module, batches: Batches, loss_fn: LossFn, params: Params, *, inputs: tuple[str, ...], seed: int = 0
) -> Scores:
    """|w| of every prunable weight."""
    return prepare(model, batches, loss_fn, params, inputs=inputs, seed=seed)(None)
