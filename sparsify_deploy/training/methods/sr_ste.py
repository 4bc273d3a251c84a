"""SR-STE: N:M sparse from scratch, with dense weights behind the mask (Zhou 2021, arXiv 2102.04010).

The forward pass keeps, in every M consecutive input channels, the N weights of largest magnitude. The backward pass
goes straight through to all dense weights w and adds the sparse-refined term: they get g + decay * (1 - mask) * w,
with g the loss's gradient for w * mask, so that pruned weights shrink and the mask settles. As in the authors' code
(`devkit/sparse_ops`) the term is part of the gradient: momentum, the moments of Adam and `clip_norm` see it, and
it is added once an optimizer step. At the end the weights are w * mask, exactly N:M.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from sparsify_deploy.errors import Diverged, ModelError, UsageError
from sparsify_deploy.params import NMPattern, NonNegative, n_and_m
from sparsify_deploy.params import Params as Base

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparsify_deploy.sparsity.mask import Mask
    from sparsify_deploy.training.loop import Trainer
    from sparsify_deploy.training.updater import Update

VERSION = 1
NEEDS_MASK = False
NEEDS_SPARSITY = False
LEAVES_MASK = True
CAN_END_EARLY = False


class Params(Base):
    """The pattern and how strongly pruned weights are pulled to zero; the defaults are the paper's."""

    pattern: NMPattern = Field("2:4", description="N:M: N of every M consecutive input channels are kept")
    decay: NonNegative = Field(2e-4, description="weight of the sparse-refined term (lambda); 0 is plain STE")
    keep_dense: tuple[str, ...] = Field((), strict=False, description="shell patterns of layer names never pruned")


def optimizer_steps(params: Params, total_steps: int, density: float | None) -> int:
    """One fit."""
    return total_steps


def train(trainer: Trainer, mask: Mask | None, params: Params, density: float | None = None) -> Mask:
    """One fit; layers that cannot be N:M (grouped, or M does not divide their channels) stay dense and are named."""
    if mask is not None:
        raise UsageError("train.method sr_ste makes its own N:M mask and takes none: remove the init section")
    updater = SrSte(trainer.model, params, trainer.total_steps)
    for note in updater.notes:
        trainer.context.progress.say(note)
    trainer.fit(updater)
    return updater.mask


class SrSte:
    """The updater: masks the forward pass and adds the sparse-refined term to the dense gradient."""

    dense_gradient_every: int | None = 0

    def __init__(self, model: nn.Module, params: Params, total_steps: int) -> None:
        from sparsify_deploy.training.methods._straight_through import MaskedForward

        self._n, self._m = n_and_m(params.pattern)
        self._decay, self._total = params.decay, total_steps
        parameters, self.notes = _eligible(model, self._m, params)
        self._behind = MaskedForward(parameters, self._top(parameters, 0))

    @property
    def mask(self) -> Mask:
        return self._behind.mask

    @property
    def updates(self) -> Sequence[Update]:
        return self._behind.updates

    def before_forward(self, step: int) -> None:
        self._behind.restore_()  # a step before may have failed half way
        self._behind.wear_(step, self._top(self._behind.parameters, step))

    def after_backward(self, step: int) -> bool:
        self._behind.restore_()
        for name, weight in self._behind.parameters.items():
            if weight.grad is not None:
                pruned = weight.detach().masked_fill(self._behind.kept(name), 0.0)
                weight.grad.add_(pruned, alpha=self._decay)
        return True

    def after_step(self, step: int) -> None:
        self._behind.restore_()  # a skipped step has no after_backward

    def finish(self) -> None:
        self._behind.keep_(self._total, self._top(self._behind.parameters, self._total))

    def _top(self, parameters: Mapping[str, nn.Parameter], step: int) -> Mapping[str, Tensor]:
        from sparsify_deploy.sparsity.nm import nm_mask

        kept = {}
        for name, weight in parameters.items():
            try:
                kept[name] = nm_mask(weight, self._n, self._m)
            except ModelError as error:
                raise Diverged(f"sr_ste: {name} at step {step}: {error}; lower training.optimizer.lr") from error
        return kept

    def state_dict(self) -> dict[str, Any]:
        return self._behind.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._behind.load_state_dict(state)


def _eligible(model: nn.Module, m: int, params: Params) -> tuple[dict[str, nn.Parameter], tuple[str, ...]]:
    """The weights that can have the pattern, by name, and a note on each layer that cannot."""
    from sparsify_deploy.graph.eligibility import pattern_possible
    from sparsify_deploy.sparsity.layers import to_prune
    from sparsify_deploy.training.methods._straight_through import named

    parameters, reasons = {}, []
    for layer in to_prune(model, params.keep_dense, "train.params.keep_dense"):
        answer = pattern_possible(layer.shape, layer.groups, m)
        if answer.ok:
            parameters[layer.parameter] = layer.weight
        else:
            reasons.append(f"sr_ste: {named([layer.name], answer.reason)}")
    if not parameters:
        raise UsageError(
            f"sr_ste finds no layer for {params.pattern}: {'; '.join(reasons) or 'all are kept dense'}; choose another "
            "train.params.pattern or name fewer layers in train.params.keep_dense"
        )
    return parameters, tuple(reasons)
