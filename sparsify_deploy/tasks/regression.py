"""Regression: one or more real values an example, by mean squared error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from sparsify_deploy.errors import DataError
from sparsify_deploy.params import Params as Base
from sparsify_deploy.tasks._fields import chosen_output, target_of

if TYPE_CHECKING:
    from torch import Tensor

    from sparsify_deploy.types import Arrays, Batch, Direction, Outputs, Task

VERSION = 2
RUNS_USER_CODE = False


class Params(Base):
    """What a regressor's loss needs."""

    output: str | None = Field(None, description="the output that holds the values; none: the only one, or logits")


def files(params: Params) -> Mapping[str, Path]:
    """No file."""
    return {}


def create(params: Params) -> Task:
    """Values `(N, ...)` against real targets of the same shape in the field `target`; `(N, 1)` fits `(N,)`."""
    return Regression(params)


@dataclass(frozen=True)
class Regression:
    """Mean squared error; `rmse` and `mae` in the target's unit, over all values of all examples.

    `r2` is the share of the target's variance that is explained, averaged over an example's values; below 0 the mean
    is a better answer. Where a target never varies it is 1 if it is met exactly, else 0.
    """

    params: Params
    metrics: ClassVar[Mapping[str, Direction]] = {"rmse": "lower", "mae": "lower", "r2": "higher"}

    def answers(self, outputs: Mapping[str, Any]) -> tuple[str, ...]:
        """None: of several values the largest is no answer."""
        return ()

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Mean squared error in the output's dtype."""
        from torch.nn import functional as F

        values, target = chosen_output(outputs, self.params.output), target_of(batch)
        _check(values, target, target.is_floating_point())
        loss: Tensor = F.mse_loss(values, target.reshape(values.shape).to(values.dtype))
        return loss

    def evaluate(self, outputs: Arrays, batch: Arrays) -> dict[str, float]:
        """`rmse`, `mae`, `r2` and `loss`, the mean squared error."""
        import numpy as np

        values, target = chosen_output(outputs, self.params.output), target_of(batch)
        _check(values, target, bool(np.issubdtype(target.dtype, np.floating)))
        if values.size == 0:
            raise DataError("there are no examples to evaluate")
        error = values.astype(np.float64) - target.reshape(values.shape).astype(np.float64)
        if not np.isfinite(error).all():
            raise DataError("the model's values or the targets are not all finite, so no metric means anything")
        mse = float((error**2).mean())
        r2 = _explained(error.reshape(len(error), -1), target.astype(np.float64).reshape(len(error), -1))
        return {"rmse": mse**0.5, "mae": float(np.abs(error).mean()), "r2": r2, "loss": mse}


def _explained(error: Any, target: Any) -> float:
    """R2 of errors and targets `(N, values)`, mean over the values."""
    import numpy as np

    left = (error**2).sum(axis=0)
    whole = ((target - target.mean(axis=0)) ** 2).sum(axis=0)
    varies = target.max(axis=0) > target.min(axis=0)  # by the values: their mean is rounded
    share = np.where(left > 0, 0.0, 1.0)
    share[varies] = 1.0 - left[varies] / whole[varies]
    return float(share.mean())


def _check(values: Any, given: Any, real: bool) -> None:
    shape, target = tuple(values.shape), tuple(given.shape)
    # Without this check (N, 1) against (N,) would broadcast to (N, N) and train on nonsense.
    column = {shape, target} == {shape[:1], (*shape[:1], 1)}
    if shape != target and not column:
        # a network with several values for one target is a classifier whose labels came as floats
        labels = len(shape) == 2 and len(target) == 1 and bool((given % 1 == 0).all())
        hint = ": these targets are whole numbers; class labels have to be saved as integers" if labels else ""
        raise DataError(f"regression needs a target of the output's shape {shape}, the data gives {target}{hint}")
    if not real:
        raise DataError(f"regression needs a floating-point target, the data gives {given.dtype}")
