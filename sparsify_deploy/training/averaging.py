"""An exponential moving average of a model's weights, by torch's own averaging functions."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sparsify_deploy.training.checkpoint import tensors_of

if TYPE_CHECKING:
    from sparsify_deploy.training.settings import EMA


class Average:
    """The average of a model's parameters and floating-point buffers, as `torch.optim.swa_utils.AveragedModel` makes it
    with `use_buffers`; without a copy of the model, and with buffers of whole numbers (counters, positions) taken over
    as they are, where torch would truncate their average.

    The first update takes the weights over. An average of weights that came and went is no sparse network: whoever
    uses it masks it.
    """

    def __init__(self, model: nn.Module, settings: EMA) -> None:
        self._model, self._settings = model, settings
        self._tensors = {name: tensor.detach().clone() for name, tensor in tensors_of(model).items()}
        self._updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model as an optimizer step left it."""
        live = tensors_of(self._model)
        averaged = [name for name, tensor in self._tensors.items() if tensor.is_floating_point() and self._updates]
        for name in self._tensors.keys() - averaged:
            self._tensors[name].copy_(live[name])
        step = get_ema_multi_avg_fn(self.decay())  # type: ignore[no-untyped-call]
        for _, names in groupby(sorted(averaged, key=self._kind), key=self._kind):
            group = list(names)
            step([self._tensors[name] for name in group], [live[name].detach() for name in group], self._updates)
        self._updates += 1

    def decay(self) -> float:
        """The decay of the update that comes next."""
        most = self._settings.decay
        return min(most, (1 + self._updates) / (10 + self._updates)) if self._settings.warmup else most

    def _kind(self, name: str) -> str:
        return f"{self._tensors[name].dtype} {self._tensors[name].device}"

    @torch.no_grad()
    def put_(self) -> None:
        """Write the average into the model."""
        live = tensors_of(self._model)
        for name, tensor in self._tensors.items():
            live[name].copy_(tensor)

    def state_dict(self) -> dict[str, Any]:
        """Enough to go on exactly."""
        return {"tensors": self._tensors, "updates": self._updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Back to what `state_dict` told, of the same model."""
        stored: Mapping[str, Tensor] = state["tensors"]
        for name, tensor in self._tensors.items():
            tensor.copy_(stored[name])
        self._updates = state["updates"]
