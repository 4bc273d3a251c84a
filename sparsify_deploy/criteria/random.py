"""Random: independent uniform scores, the control every other criterion has to beat.

With `allocation: erk` this is the starting mask of RigL and SET (Evci 2020, arXiv 1911.11134).
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
    """Random has no parameters; its seed is the recipe's."""


def rounds(params: Params) -> int:
    """1: the scores do not depend on the mask."""
    return 1


def prepare(
    model: nn.Module, batches: Batches, loss_fn: LossFn, params: Params, *, inputs: tuple[str, ...], seed: int
) -> Scorer:
    """Return mask -> uniform scores in (0, 1], float64 on the CPU, 0 where the mask has pruned.

    A layer's scores depend on `seed` and its name alone: another layer more or less changes none of them.
    """
    import hashlib

    import torch

    from sparsify_deploy.sparsity.layers import prunable

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
        return 1 - torch.rand(shape, generator=generator, dtype=torch.float64)

    scores = {layer.parameter: draw(layer.parameter, layer.shape) for layer in prunable(model)}

    def scorer(mask: Mask | None) -> Scores:
        if mask is None:
            return scores
        return {n: s * mask[n] if n in mask else s for n, s in scores.items()}

    return scorer


def score(
    model: nn.Module, batches: Batches, loss_fn: LossFn, params: Params, *, inputs: tuple[str, ...], seed: int = 0
) -> Scores:
    """Uniform scores in (0, 1] of every prunable weight."""
    return prepare(model, batches, loss_fn, params, inputs=inputs, seed=seed)(None)
