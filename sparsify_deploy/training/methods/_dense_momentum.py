"""A held mask under which the optimizer's slots stay dense."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsify_deploy.sparsity.mask import Mask
from sparsify_deploy.training.updater import HoldMask


class DenseMomentum(HoldMask):
    """Masks the weights after each step instead of their gradients, and never touches a slot, on resuming neither.

    Pruned weights are 0 in every forward pass, so weight decay adds nothing to their momentum.
    """

    def hold(self, mask: Mask) -> None:
        super().hold(mask)
        self._pruned = [(p, ~mask[name].to(p.device)) for name, p in self.parameters.items()]

    def rewire_to(self, mask: Mask) -> int:
        grown = sum(int((mask[name] & ~old).sum()) for name, old in self.mask.items())
        self.hold(mask)  # a new weight is 0 already, and keeps the momentum that made it grow
        return grown

    def _reset_slots_(self, parameter: nn.Parameter, where: Tensor) -> None:
        pass

    def after_backward(self, _step: int) -> bool:
        return True

    def after_step(self, _step: int) -> None:
        with torch.no_grad():
            for parameter, pruned in self._pruned:
                parameter.masked_fill_(pruned, 0.0)
