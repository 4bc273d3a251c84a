"""What training costs in FLOPs (2 x MACs), by the conventions of RigL's authors (Evci 2020, arXiv 1911.11134, app. H).

With f_D the FLOPs of a dense forward pass and f_S those of the sparse one, a step of batch size 1 costs

- dense: 3 f_D, the backward pass being twice the forward;
- static, SET, gradual pruning: 3 f_S, at the density of that step;
- RigL: 3 f_S, and 2 f_S + f_D in one step of ΔT + 1, which needs the whole gradient of the weights;
- SNFS, STE, SR-STE: 2 f_S + f_D, forward and input gradient sparse, the weights' gradient dense at each step;
- IMP: each fit by its own density, all of them together over one dense training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sparsify_deploy.errors import ModelError
from sparsify_deploy.training.evaluation import device_of, mode, moved
from sparsify_deploy.types import outputs_of

if TYPE_CHECKING:
    from sparsify_deploy.training.loop import History
    from sparsify_deploy.types import Batch, Json

_ROOT = "Global"


def forward_flops(model: nn.Module, example: Batch, inputs: Sequence[str]) -> dict[str, int]:
    """FLOPs (2 x MACs) of one forward pass of `example`, all its examples together, by module name.

    A module counts what it does itself, without its children, so that the sum is the whole pass; "" is the model.
    Convolutions and matrix products count, as in `torch.utils.flop_counter`; elementwise work does not.
    """
    example = moved(example, device_of(model))
    counter = FlopCounterMode(display=False)
    with mode(model, train=False), torch.no_grad(), _plain_attention(), _plain_recurrence(model), counter:
        outputs_of(model, example, inputs)
    counted = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    whole = counted.pop(_ROOT, 0)
    root = type(model).__name__
    totals = {name.removeprefix(root).removeprefix("."): count for name, count in counted.items() if name != _ROOT}
    totals[""] = whole
    own = dict(totals)
    for name, count in totals.items():
        if name:
            parent = name
            while True:
                parent = parent.rpartition(".")[0]
                if parent in totals:
                    break
            own[parent] -= count
    return {name: count for name, count in sorted(own.items()) if count}


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention as matrix products: torch's counter knows neither the fused encoder layers of evaluation mode nor
    the fused kernel for CPUs, and would count nothing."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def _plain_recurrence(model: nn.Module) -> Iterator[None]:
    """Recurrent layers in single matrix products: the counter does not know oneDNN's and cuDNN's fused ones."""
    if not any(isinstance(module, nn.RNNBase) for module in model.modules()):
        yield
        return
    backends: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
    before = [backend.enabled for backend in backends]
    try:
        for backend in backends:
            backend.enabled = False
        yield
    finally:
        for backend, enabled in zip(backends, before, strict=True):
            backend.enabled = enabled


def sparse_flops(flops: Mapping[str, int], densities: Mapping[str, float]) -> float:
    """`flops` by module with each weight's share of zeros left out; `densities` by parameter name, else 1."""
    return sum(count * densities.get(f"{name}.weight" if name else "weight", 1.0) for name, count in flops.items())


def relative_training_flops(
    flops: Mapping[str, int],
    densities: Mapping[str, float],
    steps: int,
    *,
    updates: Sequence[tuple[int, Mapping[str, float]]] = (),
    dense_gradient_every: int | None = None,
    dense_steps: int | None = None,
) -> float:
    """Training FLOPs of a run of `steps` over those of dense training for `dense_steps`, None: for as many.

    A method that needs the dense gradient every ΔT steps costs (3 f_S ΔT + 2 f_S + f_D) / (ΔT + 1) a step on average,
    over the whole run, as the authors count; that is a little too much once the mask stands still. ΔT is 0 where each
    step needs it. `updates` are (step, densities from that step on), in order. `ModelError` where the model does no
    counted work.
    """
    dense = sum(flops.values())
    if dense == 0:
        raise ModelError("the model has no convolution or matrix product whose FLOPs could be counted")
    spans = [(0, densities), *updates]
    ends = [step for step, _ in updates] + [steps]
    total = 0.0
    for (start, current), end in zip(spans, ends, strict=True):
        sparse = sparse_flops(flops, current)
        a_step = 3 * sparse
        if dense_gradient_every is not None:
            every = dense_gradient_every
            a_step = (3 * sparse * every + 2 * sparse + dense) / (every + 1)
        total += a_step * (end - start)
    return total / (3 * dense * (steps if dense_steps is None else dense_steps))


def training_cost(model: nn.Module, example: Batch, inputs: Sequence[str], history: History) -> Json:
    """The cost of training, for a report: FLOPs (2 x MACs) of a forward pass of `example`, dense and at the density it
    ends with; training FLOPs relative to one dense training; seconds on the clock and of CPU time."""
    flops = forward_flops(model, example, inputs)
    updates = [(update.step, _by_every_name(model, update.densities)) for update in history.updates]
    first = _by_every_name(model, history.densities)
    last = updates[-1][1] if updates else first
    return {
        "dense_forward_flops": sum(flops.values()),
        "sparse_forward_flops": sparse_flops(flops, last),
        "relative_training_flops": relative_training_flops(
            flops,
            first,
            history.steps,
            updates=updates,
            dense_gradient_every=history.dense_gradient_every,
            dense_steps=history.dense_steps,
        ),
        "train_s": history.train_s,
        "cpu_s": history.cpu_s,
    }


def _by_every_name(model: nn.Module, densities: Mapping[str, float]) -> dict[str, float]:
    """`densities` for each name of a shared weight: a mask has it once, and each of its layers does work."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    by_weight = {id(parameters[name]): density for name, density in densities.items()}
    return {name: by_weight[id(p)] for name, p in parameters.items() if id(p) in by_weight}
