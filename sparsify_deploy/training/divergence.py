"""When training has failed: values that are not finite, or a loss that has left every scale it could come back from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsify_deploy.training.checkpoint import tensors_of

if TYPE_CHECKING:
    from sparsify_deploy.types import Batch

EXPLODED = 1e6
"""A loss this many times the first one, or this large where the first one was below 1, has exploded."""

_STEPS = 5
"""An exploded loss is divergence where it stays so for this many steps in a row: one odd batch may be an outlier."""


class LossWatch:
    """Notices a loss that is finite and grows without end.

    The measure is the first loss of the fit, or 1 where that is smaller: against a first loss of 1e-5 an ordinary spike
    would look like an explosion. A loss that later doubles, or is a thousand times what it was, is bad training, for
    the metrics to tell; one a million times the first for five steps in a row has no way back.
    """

    def __init__(self) -> None:
        self._first: float | None = None
        self._beyond = 0

    def see(self, loss: float) -> None:
        """Take in the loss of a step, which is finite."""
        if self._first is None:
            self._first = loss
        self._beyond = self._beyond + 1 if abs(loss) > self._limit else 0

    def exploded(self, *, last: bool = False) -> str | None:
        """What is wrong, or None. A short fit, at its `last` step, has exploded where its last two losses have."""
        if self._beyond < (2 if last else _STEPS):
            return None
        return f"the loss was above {self._limit:.3g} for {self._beyond} steps, and {self._first:.3g} at first"

    @property
    def _limit(self) -> float:
        return EXPLODED * max(abs(self._first or 0.0), 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Enough to go on exactly."""
        return {"first": self._first, "beyond": self._beyond}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Back to what `state_dict` told."""
        self._first, self._beyond = state["first"], state["beyond"]


def finite_names(model: nn.Module) -> frozenset[str]:
    """The model's tensors that hold only finite numbers now; a buffer such as an attention mask may hold -inf."""
    return frozenset(name for name, tensor in tensors_of(model).items() if _finite(tensor))


def not_finite(tensors: Mapping[str, Tensor], names: frozenset[str]) -> Iterator[str]:
    """Those of `names` whose tensor holds a value that is not finite."""
    return (name for name in names if name in tensors and not _finite(tensors[name]))


def broken_slots(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[str]:
    """The optimizer's slots that are not finite, as `exp_avg of conv1.weight`."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, slots in optimizer.state.items():
        for key, value in slots.items():
            if isinstance(value, Tensor) and not _finite(value):
                yield f"the optimizer's {key} of {names.get(parameter, 'a weight')}"


def cause_outside(batch: Batch, model: nn.Module, sound: frozenset[str]) -> str:
    """Why a loss is not finite where training did nothing wrong, and what to do; "" where it did.

    `sound` names the tensors that were finite before training.
    """
    if fields := [name for name, values in batch.items() if not _finite(values)]:
        return f"the field {' and '.join(fields)} of this batch is not finite: correct or leave out that example"
    if weights := [name for name, _ in model.named_parameters() if name not in sound]:
        more = f" and {len(weights) - 1} more" if len(weights) > 1 else ""
        return f"{weights[0]}{more} was not finite before training: correct the weights that it starts from"
    return ""


def _finite(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex()) or bool(torch.isfinite(tensor).all())
