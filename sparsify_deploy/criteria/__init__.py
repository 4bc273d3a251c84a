"""Criteria: what makes a weight worth keeping, before training. A file is an entry; here stands what it defines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import nn

    from sparsify_deploy.params import Params as AnyParams
    from sparsify_deploy.sparsity.prune import Scorer
    from sparsify_deploy.types import Batches, LossFn, Scores


class Criterion(Protocol):
    """A menu module of `criteria/` meets it with plain functions and constants.

    Scores are keyed by parameter name, cover every layer of `layers.prunable(model)`, are finite in a sane
    network, and higher means keep. The model, its gradients and flags, and every global random state are left
    as found.
    """

    VERSION: int
    Params: type[AnyParams]
    NEEDS_DATA: bool
    """Whether the values of the batches matter; where False, `batches` still gives the inputs' shapes."""

    def rounds(self, params: Any, /) -> int:
        """How many times to score and prune on the way to the final density."""
        ...

    def prepare(
        self, model: nn.Module, batches: Batches, loss_fn: LossFn, params: Any, /, *, inputs: tuple[str, ...], seed: int
    ) -> Scorer:
        """Do once what every round shares, and return the function from a mask to the scores of `W * mask`.

        `inputs` are the batch fields the model takes, `seed` the only source of randomness.
        """
        ...

    def score(
        self,
        model: nn.Module,
        batches: Batches,
        loss_fn: LossFn,
        params: Any,
        /,
        *,
        inputs: tuple[str, ...],
        seed: int = 0,
    ) -> Scores:
        """The scores of the unmasked network: `prepare(...)(None)`."""
        ...
