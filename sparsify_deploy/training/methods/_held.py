"""A held mask that moves cheaply."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparsify_deploy.sparsity.mask import Mask
from sparsify_deploy.training.optimizer import slots
from sparsify_deploy.training.updater import HoldMask


class MovingMask(HoldMask):
    """As `HoldMask`, but a move touches only the weights that come or go: a few per cent of a layer.

    That is enough, because what stays pruned is zero already, its slots too.
    """

    def rewire_to(self, mask: Mask) -> None:
        """Hold another mask of the same layers whose new weights start from nothing: value 0 and all slots 0."""
        for (name, parameter), (_, factor) in zip(self.parameters.items(), self._factors, strict=True):
            new = mask[name]
            changed = torch.from_numpy(np.flatnonzero((new ^ self._mask[name]).numpy()))
            if not len(changed):
                continue
            kept = new.view(-1).index_select(0, changed).to(factor.device, factor.dtype)
            changed = changed.to(factor.device)
            fill_(parameter.detach(), changed, 0.0)
            for slot in slots(self._optimizer, parameter):
                fill_(slot, changed, 0.0)
            fill_(factor, changed, kept)
        self._mask = mask


def fill_(tensor: Tensor, index: Tensor, value: Tensor | float) -> None:
    """Write `value` at the flat (row-major) `index` of `tensor`, whatever its memory format."""
    # Not put_, which is one line: it has no deterministic form, and stages ask torch for those.
    if tensor.is_contiguous():
        tensor.view(-1)[index] = value
    else:
        tensor[torch.unravel_index(index, tensor.shape)] = value
