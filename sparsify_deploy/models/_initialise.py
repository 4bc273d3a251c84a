"""How the built-in networks start."""

from __future__ import annotations

from torch import nn


def initialise_(model: nn.Module) -> None:
    """Draw convolutions Kaiming-normal (fan-out, He et al. 2015), linear weights Glorot-normal; biases become 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
