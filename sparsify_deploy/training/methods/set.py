"""SET: drop the smallest weights and grow as many at random (Mocanu 2018, Nature Communications 9, 2383).

The rules are those RigL's authors compared with (`SparseSETOptimizer` in `rigl/sparse_optimizers.py`): the optimizer
takes its step first, gradient and all, and then the mask moves; new weights are 0. The first paper drops the smallest
positive and the largest negative weights, once an epoch, a constant share (zeta = 0.3, `anneal: constant`), and
gives new weights random values. Growth is uniform over all positions that are free after dropping, those just
dropped included; it is drawn from the seed, the layer's name and the step alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from sparsify_deploy.training.methods import _rewiring

if TYPE_CHECKING:
    from torch import Tensor

    from sparsify_deploy.sparsity.mask import Mask
    from sparsify_deploy.training.loop import Trainer
    from sparsify_deploy.training.updater import HoldMask

VERSION = 1
NEEDS_MASK = True
NEEDS_SPARSITY = False
LEAVES_MASK = True
CAN_END_EARLY = True


class Params(_rewiring.RewiredInGroups):
    """When and how much SET rewires; the defaults are RigL's, with whom it is compared."""

    anneal: Literal["cosine", "constant"] = Field(
        "cosine", description="how drop_fraction moves; constant is the first paper's"
    )


def optimizer_steps(params: Params, total_steps: int, density: float | None) -> int:
    """One fit."""
    return total_steps


def train(trainer: Trainer, mask: Mask | None, params: Params, density: float | None = None) -> Mask:
    """One fit; every layer keeps its number of weights. Dense layers and frozen ones are never rewired."""
    from sparsify_deploy.training.updater import HoldMask

    mask = _rewiring.starting_mask("set", mask, "random with erk is SET's own")
    _rewiring.check_pattern("set", mask, params.pattern)
    held = HoldMask(trainer.model, trainer.optimizer, mask)
    return _rewiring.fit(trainer, SET(held, params, trainer.total_steps, trainer.seed))


class SET(_rewiring.Trading):
    """The updater: holds the mask, and after every `update_every`-th step before T_end moves it at random."""

    name = "set"

    def __init__(self, held: HoldMask, params: Params, total_steps: int, seed: int) -> None:
        self._clock = _rewiring.Clock.of(params, total_steps)
        self._params = params
        self._seed = seed
        super().__init__(held, self._clock.notes(self.name))

    def after_step(self, step: int) -> None:
        super().after_step(step)
        done = step + 1
        if not self._clock.due(done):
            return
        constant = self._params.anneal == "constant"
        fraction = self._params.drop_fraction if constant else self._clock.fraction(done)
        layers = {}
        for name, weight, mask in self._sparse():
            _rewiring.check_finite(self.name, f"weight {name}", weight, done)
            score = scores(mask, name, self._seed, done)
            layers[name] = _rewiring.replaced(weight, mask, score, fraction, self._params.pattern)
        self._move(done, fraction, layers)


def scores(mask: Tensor, name: str, seed: int, done: int) -> Tensor:
    """Uniform float64 numbers of `mask`'s shape, so fine that ties, and with them a bias, do not happen."""
    import torch

    from sparsify_deploy.training.batches import generator

    return torch.rand(mask.shape, dtype=torch.float64, generator=generator(f"set {name}", seed, done))
