"""Dense gradients outside training, for choosing where weights grow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparsify_deploy.errors import DataError, Diverged, ModelError
from sparsify_deploy.training.evaluation import device_of, loss_of, mode

if TYPE_CHECKING:
    from sparsify_deploy.types import Batch, Task


def dense_gradients(
    model: nn.Module, task: Task, batches: Iterable[Batch], inputs: Sequence[str], names: Sequence[str]
) -> dict[str, Tensor]:
    """The mean over `batches` of the loss's gradient for each parameter in `names`, zeros in the weights included.

    Evaluation mode: BatchNorm uses its running statistics and dropout is off, so no buffer moves. The model, its
    `.grad` fields and its frozen parameters are left as found; tensors are on the model's device.
    """
    known = dict(model.named_parameters())
    if missing := [name for name in names if name not in known]:
        raise ModelError(f"the model has no parameter {missing[0]!r}")
    parameters = [known[name] for name in names]
    frozen = [p for p in parameters if not p.requires_grad]
    sums = [torch.zeros_like(p) for p in parameters]
    loss_fn, count = loss_of(task, inputs), 0
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with mode(model, train=False), torch.enable_grad():
            for module in model.modules():
                if isinstance(module, nn.RNNBase):  # cuDNN has no backward pass in evaluation mode
                    module.training = not module.dropout
            for batch in batches:
                gradients = torch.autograd.grad(loss_fn(model, batch), parameters, materialize_grads=True)
                torch._foreach_add_(sums, gradients)
                count += 1
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    if count == 0:
        raise DataError(f"dense gradients need at least one batch on {device_of(model)}")
    means = {name: total / count for name, total in zip(names, sums, strict=True)}
    for name, mean in means.items():
        if not torch.isfinite(mean).all():
            raise Diverged(
                f"the gradient of {name} is not finite: the weights it is taken at have diverged, or the "
                "data are not finite: lower the optimizer.lr they were trained with, or correct the data"
            )
    return means
