"""Run a model over examples without training it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsify_deploy.errors import DataError, ModelError
from sparsify_deploy.process import watch
from sparsify_deploy.types import Split, Task, outputs_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparsify_deploy.types import Arrays, Batch, LossFn


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter."""
    for parameter in model.parameters():
        return parameter.device
    raise ModelError("the model has no parameters")


def moved(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """`batch` on `device`."""
    return {name: value.to(device) for name, value in batch.items()}


@contextmanager
def mode(model: nn.Module, *, train: bool) -> Iterator[None]:
    """Put the whole model in training or evaluation mode; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(train)
    try:
        yield
    finally:
        for module, was in modes:
            module.training = was


def loss_of(task: Task, inputs: Sequence[str]) -> LossFn:
    """The task's loss as a function of a model and a batch, which is moved to the model's device."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        batch = moved(batch, device_of(model))
        return task.loss(outputs_of(model, batch, inputs), batch)

    return loss


def predict(
    model: nn.Module,
    split: Split,
    inputs: Sequence[str],
    indices: Tensor | None = None,
    batch_size: int = 256,
) -> tuple[Arrays, Arrays]:
    """Outputs of the model in evaluation mode for the examples at `indices` (None: all), and those examples."""
    return _run(model, split, inputs, indices, batch_size, with_inputs=True)


def evaluate(
    model: nn.Module, task: Task, split: Split, inputs: Sequence[str], batch_size: int = 256
) -> dict[str, float]:
    """The task's metrics over the whole split, in evaluation mode and full precision.

    The task sees every field but the model's inputs, so that a large test set need not fit into memory.
    """
    return task.evaluate(*_run(model, split, inputs, None, batch_size, with_inputs=False))


def _run(
    model: nn.Module, split: Split, inputs: Sequence[str], indices: Tensor | None, batch_size: int, *, with_inputs: bool
) -> tuple[Arrays, Arrays]:
    indices = torch.arange(len(split)) if indices is None else indices
    if len(indices) == 0:
        raise DataError("there are no examples to evaluate")
    device = device_of(model)
    outputs: dict[str, list[NDArray[Any]]] = {}
    fields: dict[str, list[NDArray[Any]]] = {}
    with mode(model, train=False), torch.no_grad(), watch.batch(min(batch_size, len(indices))):
        for chunk in torch.split(indices, batch_size):
            batch = split.take(chunk)
            for name, value in outputs_of(model, moved(batch, device), inputs).items():
                plain = value.float() if value.is_floating_point() else value
                outputs.setdefault(name, []).append(plain.cpu().numpy())
            for name, value in batch.items():
                if with_inputs or name not in inputs:
                    fields.setdefault(name, []).append(value.numpy())
    return _joined(outputs), _joined(fields)


def _joined(parts: dict[str, list[NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    return {name: np.concatenate(pieces) for name, pieces in parts.items()}
