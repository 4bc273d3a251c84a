"""What decides, at each optimizer step, which weights live.

Zeros are stored in the parameters and the forward pass applies no mask, so `.grad` is the dense gradient. A weight
stays zero because weights and optimizer slots start masked and the gradient is masked before the optimizer sees it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from sparsify_deploy.sparsity.mask import Mask
from sparsify_deploy.sparsity.prune import collapsed
from sparsify_deploy.training.optimizer import slots


@dataclass(frozen=True)
class Update:
    """One rewiring: the optimizer step it replaced or followed, the share dropped, how many weights of the mask are
    new, and each layer's density after it, by parameter name."""

    step: int
    drop_fraction: float
    changed: int
    densities: Mapping[str, float]


class Updater(Protocol):
    """Called by the loop around each optimizer step; `step` is the number of optimizer steps done before it.

    Under fp16 a step whose gradients overflowed is skipped: `after_backward` is not called then, `before_forward` and
    `after_step` are.
    """

    @property
    def mask(self) -> Mask | None:
        """The mask as it stands; None for dense training."""
        ...

    @property
    def updates(self) -> Sequence[Update]:
        """Every change of the mask so far."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """Settings without effect and the like, for the history."""
        ...

    @property
    def dense_gradient_every(self) -> int | None:
        """Optimizer steps between two steps that need the dense gradient, for the cost; 0: each, None: never."""
        ...

    def before_forward(self, step: int, /) -> None: ...

    def after_backward(self, step: int, /) -> bool:
        """`.grad` holds the dense gradient, unscaled, averaged over accumulated batches, and finite under fp16.

        False: skip the optimizer this step.
        """
        ...

    def after_step(self, step: int, /) -> None: ...

    def finish(self) -> None:
        """Called once after the last step: the model's parameters become what is kept, pruned weights zero."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings and containers of them, enough to go on exactly."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@runtime_checkable
class Restorable(Updater, Protocol):
    """An updater whose network, with its mask, could end with any step."""

    def restore(self, mask: Mask, step: int, /) -> None:
        """Hold the mask of an earlier step, whose weights are in the model, after `step` optimizer steps."""
        ...


class Dense:
    """No mask at all."""

    mask: Mask | None = None
    updates: Sequence[Update] = ()
    notes: Sequence[str] = ()
    dense_gradient_every: int | None = None

    def before_forward(self, _step: int) -> None:
        pass

    def after_backward(self, _step: int) -> bool:
        return True

    def after_step(self, _step: int) -> None:
        pass

    def finish(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass

    def restore(self, mask: Mask, _step: int) -> None:
        pass


class HoldMask:
    """Keeps pruned weights at zero: zeroes weights and slots once, then every gradient.

    Creating one changes the model: its pruned weights become zero. `ModelError` where the mask does not fit it.
    """

    updates: Sequence[Update] = ()
    dense_gradient_every: int | None = None

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, mask: Mask) -> None:
        self._model, self._optimizer = model, optimizer
        self.hold(mask)

    @property
    def mask(self) -> Mask:
        return self._mask

    @property
    def notes(self) -> Sequence[str]:
        """Layers that the mask empties: nothing passes them but their bias."""
        empty = collapsed(self._mask)
        return (f"layer collapse: no weight is left in {', '.join(empty)}",) if empty else ()

    def hold(self, mask: Mask) -> None:
        """Hold another mask from now on; weights outside it become zero, their slots too."""
        mask.apply_(self._model)
        known = dict(self._model.named_parameters(remove_duplicate=False))
        self._mask = mask
        self.parameters = {name: known[name] for name in mask}
        # Cast once to the weight's type: multiplying in place by a float mask is the cheapest way to mask a gradient.
        self._factors = [(p, _like(p, mask[name])) for name, p in self.parameters.items()]
        for parameter, factor in self._factors:
            self._reset_slots_(parameter, factor == 0)

    def restore(self, mask: Mask, _step: int) -> None:
        self.hold(mask)

    def rewire_to(self, mask: Mask) -> int:
        """Hold another mask of the same layers whose new weights start from nothing: value 0 and all slots 0.

        Returns how many weights are new.
        Only weights that come or go are touched, a few per cent of a layer: what stays pruned is zero already.
        """
        grown = 0
        for (name, where, keeps), (parameter, factor) in zip(self._mask.moves_to(mask), self._factors, strict=True):
            assert parameter is self.parameters[name]
            changed = torch.from_numpy(where).to(factor.device)
            _fill_(parameter.detach(), changed, 0.0)
            for slot in slots(self._optimizer, parameter):
                _fill_(slot, changed, 0.0)
            _fill_(factor, changed, torch.from_numpy(keeps).to(factor.device, factor.dtype))
            grown += int(np.count_nonzero(keeps))
        self._mask = mask
        return grown

    def _reset_slots_(self, parameter: nn.Parameter, where: Tensor) -> None:
        for slot in slots(self._optimizer, parameter):
            slot.masked_fill_(where, 0.0)

    def before_forward(self, _step: int) -> None:
        pass

    def after_backward(self, _step: int) -> bool:
        pairs = [(p.grad, factor) for p, factor in self._factors if p.grad is not None]
        if pairs:
            torch._foreach_mul_([gradient for gradient, _ in pairs], [factor for _, factor in pairs])
        return True

    def after_step(self, _step: int) -> None:
        pass

    def finish(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"mask": dict(self._mask)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.hold(Mask(state["mask"]))


def _like(parameter: nn.Parameter, kept: Tensor) -> Tensor:
    """`kept` with the type, device and memory format of `parameter`."""
    return torch.empty_like(parameter.detach()).copy_(kept)


def _fill_(tensor: Tensor, index: Tensor, value: Tensor | float) -> None:
    """Write `value` at the flat (row-major) `index` of `tensor`, whatever its memory format."""
    # Not put_, which is one line: it has no deterministic form, and stages ask torch for those.
    if tensor.is_contiguous():
        tensor.view(-1)[index] = value
    else:
        tensor[torch.unravel_index(index, tensor.shape)] = value
