"""Classification: one label an example, by cross-entropy.

Label smoothing is that of Szegedy et al. 2016 (arXiv 1512.00567); it shapes the training loss only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from sparsify_deploy.errors import DataError
from sparsify_deploy.params import Fraction
from sparsify_deploy.params import Params as Base
from sparsify_deploy.tasks._fields import chosen_output, target_of

if TYPE_CHECKING:
    from torch import Tensor

    from sparsify_deploy.types import Arrays, Batch, Direction, Outputs, Task

VERSION = 1


class Params(Base):
    """What a classifier's loss needs."""

    label_smoothing: Fraction = Field(0.0, description="share of the target spread evenly over the classes")
    output: str | None = Field(None, description="the output that holds the logits; none: the only one, or logits")


def create(params: Params) -> Task:
    """Logits `(N, classes)` against integer labels `(N,)` in the field `target`."""
    return Classification(params)


@dataclass(frozen=True)
class Classification:
    """Cross-entropy; `accuracy` is the share of examples whose largest logit is the label's; ties: the lower."""

    params: Params
    metrics: ClassVar[Mapping[str, Direction]] = {"accuracy": "higher"}

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Mean cross-entropy in the logits' dtype, with label smoothing."""
        import torch
        from torch.nn import functional as F

        logits, target = chosen_output(outputs, self.params.output), target_of(batch)
        whole = not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
        _check(logits.shape, target.shape, target.dtype, whole)
        if target.numel():
            lowest, highest = target.aminmax()
            _check_range(int(lowest), int(highest), logits.shape[1])
        loss: Tensor = F.cross_entropy(logits, target.long(), label_smoothing=self.params.label_smoothing)
        return loss

    def evaluate(self, outputs: Arrays, batch: Arrays) -> dict[str, float]:
        """`accuracy` in 0..1 and `loss`, the mean cross-entropy without smoothing."""
        import numpy as np

        logits, target = chosen_output(outputs, self.params.output), target_of(batch)
        _check(logits.shape, target.shape, target.dtype, bool(np.issubdtype(target.dtype, np.integer)))
        if len(target) == 0:
            raise DataError("there are no examples to evaluate")
        _check_range(int(target.min()), int(target.max()), logits.shape[1])
        if not np.isfinite(logits).all():
            raise DataError(
                "the model's logits are not all finite, so no metric means anything: it overflowed somewhere"
            )
        wide = logits.astype(np.float64)
        wide -= wide.max(axis=1, keepdims=True)
        right = wide[np.arange(len(target)), target]
        return {
            "accuracy": float((logits.argmax(axis=1) == target).mean()),
            "loss": float((np.log(np.exp(wide).sum(axis=1)) - right).mean()),
        }


def _check(logits: tuple[int, ...], target: tuple[int, ...], dtype: Any, whole: bool) -> None:
    if len(logits) != 2:
        raise DataError(f"classification needs logits of shape (N, classes), the model gives {tuple(logits)}")
    if tuple(target) != (logits[0],):
        raise DataError(f"classification needs a target of shape ({logits[0]},), the data gives {tuple(target)}")
    if not whole:
        raise DataError(f"classification needs integer labels as target, the data gives {dtype}")


def _check_range(lowest: int, highest: int, classes: int) -> None:
    if lowest < 0 or highest >= classes:
        wrong = lowest if lowest < 0 else highest
        raise DataError(f"label {wrong} is not one of the model's {classes} classes, 0 to {classes - 1}")
