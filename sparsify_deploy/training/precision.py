"""Mixed precision: autocast around the forward pass and, for fp16, a loss scale that keeps gradients representable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparsify_deploy.types import Outputs

Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SMALLEST = 2.0**-10
"""Below this loss scale it is not the scale that makes gradients overflow."""


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The context of a forward pass; weights stay FP32."""
    return torch.autocast(device.type, _TYPES.get(precision), enabled=precision in _TYPES)


def in_fp32(outputs: Outputs, precision: Precision) -> Outputs:
    """Outputs of a forward pass under `autocast`, floats as float32, so that the loss is computed in it."""
    if precision not in _TYPES:
        return outputs
    return {name: value.float() if value.is_floating_point() else value for name, value in outputs.items()}


class LossScale:
    """torch's GradScaler for fp16, a bystander otherwise.

    A step whose gradients overflowed is skipped: it lowers the scale, nobody sees its gradients, and `skipped` counts
    it.
    """

    def __init__(self, device: torch.device, precision: Precision) -> None:
        self._scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.skipped = 0

    def backward(self, loss: Tensor) -> None:
        """Add the scaled loss's gradients to `.grad`."""
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def unscaled_(self, optimizer: torch.optim.Optimizer) -> bool:
        """Divide the scale out of every `.grad`, once a step; False if a gradient is not finite."""
        if not self._scaler.is_enabled():
            return True
        self._scaler.unscale_(optimizer)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        finite = not gradients or bool(torch.stack(torch._foreach_norm(gradients, float("inf"))).isfinite().all())
        self.skipped += not finite
        return finite

    def update(self) -> None:
        """Raise or lower the scale by what `unscaled_` found."""
        if self._scaler.is_enabled():
            self._scaler.update()

    def exhausted(self) -> bool:
        """Whether the scale fell so low that the gradients themselves must be infinite."""
        return self._scaler.is_enabled() and self._scaler.get_scale() < _SMALLEST

    def state_dict(self) -> dict[str, Any]:
        """Numbers only, enough to go on exactly."""
        return {"scaler": self._scaler.state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Back to what `state_dict` told."""
        self._scaler.load_state_dict(state["scaler"])
        self.skipped = state["skipped"]
