"""The workloads of a torch network, by one forward pass of one example, and which layers a recipe would make sparse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING, Any

from sparsify_deploy.graph.workload import Tally, Workload
from sparsify_deploy.prediction.roofline import Layer, skips_zeros
from sparsify_deploy.recipe import NM, Quantize
from sparsify_deploy.stages.project_nm import choose
from sparsify_deploy.stages.subject import Subject

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparsify_deploy.types import Batch


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MOVES = _names(
    "view _unsafe_view reshape _reshape_alias permute transpose t expand unsqueeze squeeze slice select split "
    "split_with_sizes unbind alias detach clone _to_copy contiguous flatten unflatten cat stack as_strided "
    "narrow constant_pad_nd unfold repeat flip lift_fresh movedim chunk diagonal"
)
_POINTWISE = _names(
    "native_batch_norm _native_batch_norm_legit_no_training cudnn_batch_norm _native_batch_norm_legit copy "
    "dropout native_dropout relu relu6 hardtanh gelu silu mish leaky_relu masked_fill where clamp elu prelu "
    "_prelu_kernel"
)
_OPS = {
    **dict.fromkeys(("_softmax", "_safe_softmax", "_log_softmax"), "Softmax"),
    **dict.fromkeys(("mean", "sum", "amax", "_adaptive_avg_pool2d", "adaptive_max_pool2d"), "Reduce"),
    **dict.fromkeys(("max_pool2d_with_indices", "max_pool2d", "avg_pool2d", "avg_pool1d", "avg_pool3d"), "Pool"),
    "native_layer_norm": "LayerNorm",
    "native_group_norm": "GroupNorm",
    "embedding": "Embedding",
}


def network_workloads(model: nn.Module, example: Batch, inputs: Sequence[str]) -> tuple[Workload, ...]:
    """One row a layer, in the order they run, for one example: `example` holds one, on the model's device.

    Parts keep their mode. Raises what the model raises on `example`.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from sparsify_deploy.training.evaluation import mode
    from sparsify_deploy.types import outputs_of

    tally = Tally()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held: list[object] = []  # an id is a tensor's name only as long as the tensor lives

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            held.append((args, kwargs, result))
            _add(tally, func, (args, kwargs or {}), result, names)
            return result

    for name in inputs:
        tally.feed(id(example[name]), example[name].numel())
    with mode(model, train=False), torch.no_grad(), _plain(model), Watch():  # type: ignore[no-untyped-call]
        outputs = outputs_of(model, example, inputs)
    return tally.done(id(value) for value in outputs.values())


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """Attention and recurrence as single matrix products, for the fused operators of evaluation mode hide them."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fused = torch.backends.mha.get_fastpath_enabled()
    recurrent = any(isinstance(module, torch.nn.RNNBase) for module in model.modules())
    backends: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn) if recurrent else ()
    before = [backend.enabled for backend in backends]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for backend in backends:
            backend.enabled = False
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for backend, enabled in zip(backends, before, strict=True):
            backend.enabled = enabled


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in nested arguments or results."""
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (tuple, list)) else []


def _add(tally: Tally, func: Any, given: Any, result: Any, names: dict[int, str]) -> None:
    """One operator of torch's own, as `Tally` has it; `names` learns the views of parameters."""
    import torch

    name = func.overloadpacket.__name__
    name = name.removesuffix("_") if not name.startswith("__") else name
    taken, made = _tensors(given), _tensors(result)
    live = tally.live(id(tensor) for tensor in taken)
    if not live:
        if name in _MOVES and taken and id(taken[0]) in names:
            names.update((id(tensor), names[id(taken[0])]) for tensor in made)
        return
    outputs = [(id(tensor), tensor.numel()) for tensor in made]
    if name in ("convolution", "mm", "addmm", "bmm", "baddbmm"):
        _product(tally, name, given[0], live, made, names=names)
    elif name in _MOVES:
        tally.move(live, outputs)
    elif name in _POINTWISE or torch.Tag.pointwise in func.tags:
        tally.pointwise(name, live, outputs[:1])  # batch norm returns statistics besides
    else:
        tally.layer(name, _OPS.get(name, name), live, outputs[:1])


def _product(
    tally: Tally, name: str, args: Any, live: Sequence[Any], made: Sequence[Tensor], *, names: dict[int, str]
) -> None:
    """A convolution or matrix product, with a parameter of the network or of two activations."""
    outputs = [(id(made[0]), made[0].numel())]
    if name == "convolution":
        weight, groups, transposed = args[1], args[8], args[6]
        shape = tuple(weight.shape)
        if transposed:
            tally.layer(name, "ConvTranspose", live, outputs, macs=args[0].numel() * prod(shape[1:]))
            return
        kind, macs = "Conv", made[0].numel() * prod(shape[1:])
    else:
        left, weight = args[-2:]
        macs, groups = made[0].numel() * left.shape[-1], 1
        if id(weight) not in names:
            weight = left
        shape = (weight.shape[-1], weight.shape[-2]) if weight is not left else tuple(left.shape[-2:])
        kind = "Linear"
    parameter = names.get(id(weight), "")
    if not parameter:
        tally.layer(name, "MatMul", live, outputs, macs=macs)
        return
    tally.layer(
        parameter.removesuffix(".weight"),
        kind,
        live,
        outputs,
        macs=macs,
        shape=shape,
        groups=groups,
        parameter=parameter,
    )


def recipe_layers(subject: Subject, nm: NM | None, quantize: Quantize | None) -> tuple[Layer, ...]:
    """The layers of a recipe's network, and which of them would be INT8 and 2:4 in the final engine.

    Without a section for it, 2:4 is by the rule of thumb, and every Conv and Linear is taken as INT8.
    """
    from sparsify_deploy.sparsity.layers import prunable

    model = subject.network()
    found = network_workloads(model, subject.example(), subject.examples.inputs)
    layers = prunable(model)
    answers = choose(layers, nm or NM())
    by_parameter = {layer.parameter: answers[layer.name] for layer in layers}
    keep_float = quantize.keep_float if quantize is not None else ()
    usable = skips_zeros(*(nm or NM()).nm)
    rows = []
    for work in found:
        answer = by_parameter.get(work.parameter)
        int8 = answer is not None and not any(fnmatchcase(work.name, pattern) for pattern in keep_float)
        if answer is None:
            reason = "not a weight that is projected" if work.shape else "no weight"
        elif not int8:
            reason = "kept in float by the recipe (quantize.keep_float)"
        elif answer.ok and not usable:
            reason = f"its pattern {(nm or NM()).pattern} is not within 2:4, which hardware skips"
        else:
            reason = answer.reason
        rows.append(Layer(work, int8, int8 and usable and answer is not None and answer.ok, reason))
    return tuple(rows)
