"""Static: the mask never moves (as in SNIP, Lee 2019, arXiv 1810.02340, and SynFlow, Tanaka 2020, 2006.05467)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsify_deploy.errors import UsageError
from sparsify_deploy.params import Params as Base

if TYPE_CHECKING:
    from sparsify_deploy.sparsity.mask import Mask
    from sparsify_deploy.training.loop import Trainer

VERSION = 1
NEEDS_MASK = True
NEEDS_SPARSITY = False
LEAVES_MASK = True
CAN_END_EARLY = True


class Params(Base):
    """Training with a fixed mask has no parameters."""


def optimizer_steps(params: Params, total_steps: int, density: float | None) -> int:
    """One fit."""
    return total_steps


def train(trainer: Trainer, mask: Mask | None, params: Params, density: float | None = None) -> Mask:
    """One fit with `mask` held at every step."""
    from sparsify_deploy.training.updater import HoldMask

    if mask is None:
        raise UsageError("train.method static needs a starting mask: add an init section")
    updater = HoldMask(trainer.model, trainer.optimizer, mask)
    trainer.fit(updater)
    return updater.mask
