"""Dense: every weight trains; the twin that a sparse network is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsify_deploy.errors import UsageError
from sparsify_deploy.params import Params as Base

if TYPE_CHECKING:
    from sparsify_deploy.sparsity.mask import Mask
    from sparsify_deploy.training.loop import Trainer

VERSION = 1
NEEDS_MASK = False
NEEDS_SPARSITY = False
LEAVES_MASK = False
CAN_END_EARLY = True


class Params(Base):
    """Dense training has no parameters."""


def optimizer_steps(params: Params, total_steps: int, density: float | None) -> int:
    """One fit."""
    return total_steps


def train(trainer: Trainer, mask: Mask | None, params: Params, density: float | None = None) -> None:
    """One fit without a mask."""
    from sparsify_deploy.training.updater import Dense

    if mask is not None:
        raise UsageError("train.method dense takes no mask: use static to keep one fixed")
    trainer.fit(Dense())
