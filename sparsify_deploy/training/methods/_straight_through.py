"""Weights behind a mask: the forward pass sees w * mask, the optimizer the dense weights.

The parameters hold w * mask from `wear_` to `restore_`, once around each optimizer step with all its accumulated
batches, and the dense weights, bit for bit as the optimizer left them, at every other time. So a checkpoint, which is
written between steps, holds dense weights; only `keep_` zeroes the pruned ones for good.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsify_deploy.sparsity.mask import Mask
from sparsify_deploy.training.updater import Update

RECORD_EVERY = 100
"""Optimizer steps from one entry of the history to the next; the mask itself may move at each of them."""


class MaskedForward:
    """The dense weights of `parameters` while they wear a mask, and how that mask moved.

    Masks are bool tensors by parameter name, on the parameter's device, True where a weight is kept. `kept` is the
    mask before the first step.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], kept: Mapping[str, Tensor]) -> None:
        self.parameters = dict(parameters)
        self.updates: list[Update] = []
        self._kept = dict(kept)
        self._recorded = self._kept
        self._dense = {name: torch.empty_like(p) for name, p in self.parameters.items()}
        self._worn = False

    @property
    def mask(self) -> Mask:
        """The mask of the last forward pass; after `keep_` the final one."""
        return Mask(self._kept)

    def kept(self, name: str) -> Tensor:
        """What the last forward pass kept of a weight."""
        return self._kept[name]

    def dense(self, name: str) -> Tensor:
        """The dense weight between `wear_` and the next `wear_`, as it was at the first of them."""
        return self._dense[name]

    @torch.no_grad()
    def wear_(self, step: int, kept: Mapping[str, Tensor]) -> None:
        """Put the dense weights aside and leave w * kept, with +0.0 where pruned, in the parameters."""
        assert not self._worn
        self._kept = dict(kept)
        if step > 0 and step % RECORD_EVERY == 0:
            self._record(step)
        self._worn = True
        for name, parameter in self.parameters.items():
            self._dense[name].copy_(parameter)
            parameter.masked_fill_(~self._kept[name], 0.0)

    @torch.no_grad()
    def restore_(self) -> None:
        """The dense weights back into the parameters; nothing to do if they are there."""
        if self._worn:
            for name, parameter in self.parameters.items():
                parameter.copy_(self._dense[name])
        self._worn = False

    @torch.no_grad()
    def keep_(self, step: int, kept: Mapping[str, Tensor]) -> None:
        """Zero what `kept` prunes for good; `step` is the number of all optimizer steps."""
        self._kept = dict(kept)
        self._record(step)
        for name, parameter in self.parameters.items():
            parameter.masked_fill_(~self._kept[name], 0.0)

    def _record(self, step: int) -> None:
        mask = self.mask
        new = sum(int((kept & ~self._recorded[name]).sum()) for name, kept in self._kept.items())
        before = sum(int(kept.sum()) for kept in self._recorded.values())
        self.updates.append(Update(step, new / before if before else 0.0, new, mask.densities()))
        self._recorded = self._kept

    def state_dict(self) -> dict[str, Any]:
        """The mask as last recorded, which at the end is the final one, and the record."""
        return {
            "recorded": {name: kept.cpu() for name, kept in self._recorded.items()},
            "updates": [dataclasses.asdict(update) for update in self.updates],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As `state_dict` left it; the parameters must hold that checkpoint's weights already."""
        recorded = state["recorded"]
        self._recorded = {name: recorded[name].to(p.device) for name, p in self.parameters.items()}
        self._kept = self._recorded
        self.updates = [Update(**update) for update in state["updates"]]
        self._worn = False


def named(names: Sequence[str], why: str) -> str:
    """`a, b and c stay dense: why`, for a note."""
    joined = ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]
    return f"{joined} {'stays' if len(names) == 1 else 'stay'} dense: {why}"
