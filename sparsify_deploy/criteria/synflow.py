"""SynFlow: synaptic flow of the network of absolute weights; needs no data (Tanaka 2020, arXiv 2006.05467).

Every float parameter and buffer is replaced by its absolute value, one all-ones input goes through in eval mode,
R is the sum of the outputs and a weight's score |θ · ∂R/∂θ|. Where the paper's version breaks, this one does not:
it works on a float64 copy (R of ResNet-50 is 1e72), clipped activations (ReLU6, Hardtanh, clamp) are
scored as ReLU, and networks for which the theory says nothing are refused with the layer's name.
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
NEEDS_DATA = False


class Params(Base):
    """How SynFlow goes to the final density."""

    rounds: int = Field(100, ge=1, description="score-and-prune rounds, density falling exponentially")


def rounds(params: Params) -> int:
    """As many as asked for; the paper's 100 avoid layer collapse, 1 does not."""
    return params.rounds


def prepare(
    model: nn.Module, batches: Batches, loss_fn: LossFn, params: Params, *, inputs: tuple[str, ...], seed: int
) -> Scorer:
    """Copy the model once, in float64, and return mask -> float64 scores of every prunable weight.

    Only the shapes of the first batch are used, with one example. A weight that does not reach the output in
    eval mode scores 0. ModelError where the theory does not hold (see `_flow`), on overflow, and where R is 0.
    """
    from sparsify_deploy.criteria import _flow
    from sparsify_deploy.sparsity.layers import prunable

    names = [layer.parameter for layer in prunable(model)]
    ones = _flow.all_ones(next(iter(batches)), inputs, model)
    flow = _flow.Flow(_flow.positive_copy(model), names, ones, inputs)

    def scorer(mask: Mask | None) -> Scores:
        return {name: product.abs_() for name, product in flow.products(mask or {})[1].items()}

    return scorer


def score(
    model: nn.Module, batches: Batches, loss_fn: LossFn, params: Params, *, inputs: tuple[str, ...], seed: int = 0
) -> Scores:
    """|θ · ∂R/∂θ| of every prunable weight of the unmasked network."""
    return prepare(model, batches, loss_fn, params, inputs=inputs, seed=seed)(None)
