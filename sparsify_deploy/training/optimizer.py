"""torch's own optimizers from a recipe's settings, and the slots they keep for each parameter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparsify_deploy.errors import ModelError, UsageError

if TYPE_CHECKING:
    from sparsify_deploy.training.settings import Optimizer


def build_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """An optimizer over the parameters that require a gradient, in module order.

    Parameters with at most one axis (biases, normalisation) get no weight decay.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ModelError("the model has no parameter to train: every parameter is frozen or there is none")
    decayed = [p for p in trained if p.ndim > 1]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.name == "sgd":
        if settings.nesterov and not settings.momentum:
            raise UsageError("optimizer.nesterov needs a momentum above 0: set optimizer.momentum, such as 0.9")
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.nesterov)
    kind = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
    return kind(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)


def slots(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Iterator[Tensor]:
    """The optimizer's tensors with one entry a weight (momentum, both moments of Adam), not its step counter."""
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            yield value
