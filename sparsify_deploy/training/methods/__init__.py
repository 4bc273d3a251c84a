"""Training methods: each drives a trainer in its own way. A file is an entry; here stands what it defines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from sparsify_deploy.params import Params as AnyParams
    from sparsify_deploy.sparsity.mask import Mask
    from sparsify_deploy.training.loop import Trainer


class TrainingMethod(Protocol):
    """A menu module of `training/methods/` meets it with two functions and constants."""

    VERSION: int
    Params: type[AnyParams]
    NEEDS_MASK: bool
    """Whether it starts from a mask; where False, giving it one is `UsageError`."""
    NEEDS_SPARSITY: bool
    """Whether it prunes while it trains, down to the recipe's `sparsity`."""
    LEAVES_MASK: bool
    """Whether it ends with a mask."""
    CAN_END_EARLY: bool
    """Whether training could end with the network of any step: `keep: best` and `early_stop` need that."""

    def optimizer_steps(self, params: Any, total_steps: int, density: float | None, /) -> int:
        """The optimizer steps it takes where a dense training takes `total_steps`: as many, but for repeated ones."""
        ...

    def train(self, trainer: Trainer, mask: Mask | None, params: Any, density: float | None = None, /) -> Mask | None:
        """Train `trainer.model` in place and return its final mask; `trainer.history` tells how it went.

        `density` is given where NEEDS_SPARSITY: the share of the weights of the layers it prunes to end with.
        """
        ...
