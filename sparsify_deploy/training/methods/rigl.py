"""RigL: drop the smallest weights and grow where the dense gradient is largest (Evci 2020, arXiv 1911.11134).

The rules are those of the authors' code (`rigl/sparse_optimizers_base.py`), with two differences: an update counts as
an optimizer step, where theirs does not advance the counter, and the first comes at step `update_every`, where theirs
comes at step 0. An update replaces the gradient step. With `pattern` a layer loses its smallest weights wherever they
are, and each group of N:M grows as many as it lost, so that a projection afterwards finds nothing to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsify_deploy.training.methods import _rewiring

if TYPE_CHECKING:
    from sparsify_deploy.sparsity.mask import Mask
    from sparsify_deploy.training.loop import Trainer
    from sparsify_deploy.training.updater import HoldMask

VERSION = 1
NEEDS_MASK = True
NEEDS_SPARSITY = False
LEAVES_MASK = True
CAN_END_EARLY = True


class Params(_rewiring.RewiredInGroups):
    """When and how much RigL rewires; the defaults are the paper's."""


def optimizer_steps(params: Params, total_steps: int, density: float | None) -> int:
    """One fit."""
    return total_steps


def train(trainer: Trainer, mask: Mask | None, params: Params, density: float | None = None) -> Mask:
    """One fit; every layer keeps its number of weights. Dense layers and frozen ones are never rewired."""
    from sparsify_deploy.training.updater import HoldMask

    mask = _rewiring.starting_mask("rigl", mask, "random with erk is RigL's own")
    _rewiring.check_pattern("rigl", mask, params.pattern)
    held = HoldMask(trainer.model, trainer.optimizer, mask)
    return _rewiring.fit(trainer, RigL(held, params, trainer.total_steps))


class RigL(_rewiring.Trading):
    """The updater: holds the mask, and on every `update_every`-th step up to T_end rewires instead of training."""

    name = "rigl"

    def __init__(self, held: HoldMask, params: Params, total_steps: int) -> None:
        self._clock = _rewiring.Clock.of(params, total_steps)
        self._pattern = params.pattern
        super().__init__(held, notes := self._clock.notes(self.name))
        self.dense_gradient_every = None if notes else params.update_every

    def after_backward(self, step: int) -> bool:
        if not self._clock.due(step):
            return super().after_backward(step)
        fraction = self._clock.fraction(step)
        layers = {}
        for name, weight, mask in self._sparse():
            assert weight.grad is not None
            _rewiring.check_finite(self.name, f"gradient of {name}", weight.grad, step)
            layers[name] = _rewiring.replaced(weight, mask, weight.grad, fraction, self._pattern)
        self._move(step, fraction, layers)
        return False
