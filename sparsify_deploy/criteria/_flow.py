"""The flow of ones through a network of absolute values, and the proof that such a flow means something there.

SynFlow's theory needs activations with φ(x) = φ'(x) · x on what reaches them: ReLU, LeakyReLU, ELU (all the identity
above 0), max and average pooling, and BatchNorm with fixed statistics. Clipped ones (ReLU6, Hardtanh, clamp)
saturate on these huge sums and lose their gradient, so they are run as ReLU. Smooth gates (GELU, SiLU, Hardswish,
sigmoid, tanh), softmax, attention and norms that look at the activations are refused, as module or as plain function:
every torch call is seen. A norm written out by hand in subtractions and products is the one thing not recognised.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from sparsify_deploy.errors import ModelError, is_out_of_memory
from sparsify_deploy.types import outputs_of

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

    from sparsify_deploy.types import Batch

_CLIPPED = {"relu6", "hardtanh"}
_CLAMPS = {"clamp", "clip", "clamp_max"}
_REFUSED = {
    *("gelu", "silu", "mish", "hardswish", "hardsigmoid", "sigmoid", "special_expit", "tanh", "softplus", "softsign"),
    *("tanhshrink", "softshrink", "hardshrink", "threshold", "logsigmoid", "log_sigmoid", "glu", "erf", "sin", "cos"),
    *("exp", "expm1", "log", "log1p", "pow", "square", "sqrt", "rsqrt", "reciprocal", "var", "std", "var_mean"),
    *("std_mean", "norm", "linalg_norm", "linalg_vector_norm", "normalize", "layer_norm", "group_norm", "rms_norm"),
    *("instance_norm", "local_response_norm", "softmax", "softmin", "log_softmax", "gumbel_softmax"),
    *("scaled_dot_product_attention", "multi_head_attention_forward"),
    *("_native_multi_head_attention", "_transformer_encoder_layer_fwd"),
}
_CACHED = 1 << 16
"""Weights worked on together: half a MiB stays in the cache between one operation and the next."""
_INSTEAD = "choose init.criterion snip, grasp, magnitude or random"


def all_ones(batch: Batch, inputs: Sequence[str], model: nn.Module) -> dict[str, Tensor]:
    """One example of ones, float64, for each input of `batch` `(B, ...)`, where the model is."""
    first = next(model.parameters(), None)
    device = first.device if first is not None else torch.device("cpu")
    for name in inputs:
        if not batch[name].is_floating_point():
            kind = str(batch[name].dtype).removeprefix("torch.")
            raise ModelError(f"SynFlow feeds ones, which mean nothing to the {kind} input {name!r}: {_INSTEAD}")
    return {name: torch.ones(1, *batch[name].shape[1:], dtype=torch.float64, device=device) for name in inputs}


def positive_copy(model: nn.Module) -> nn.Module:
    """A float64 copy in eval mode with the absolute value of every float parameter and buffer; none needs grad."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(f"SynFlow cannot look inside {_place(name)}, which is TorchScript: {_INSTEAD}")
    try:
        positive = copy.deepcopy(model).double().eval()
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"SynFlow works on a copy of the model, which cannot be copied: {error}") from error
    with torch.no_grad():
        for tensor in (*positive.parameters(), *positive.buffers()):
            tensor.requires_grad_(False)
            if tensor.is_floating_point():
                tensor.abs_()
    return positive


class Flow:
    """A positive copy, ready to be scored under many masks; the copy's weights are overwritten each time."""

    def __init__(
        self, positive: nn.Module, names: Sequence[str], ones: Mapping[str, Tensor], inputs: Sequence[str]
    ) -> None:
        self._model, self._ones, self._inputs = positive, ones, tuple(inputs)
        self._weights = {name: positive.get_parameter(name).requires_grad_() for name in names}
        for weight in self._weights.values():
            weight.data = weight.data.contiguous()
        self._whole = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._masks: dict[str, Tensor] = {}
        self._running: list[str] = []
        watch(positive, self._running)

    def products(self, mask: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        """R and, by parameter name, θ · ∂R/∂θ at θ = |W| · mask; layers `mask` lacks are whole."""
        for name in self._weights:
            self._set(name, mask.get(name))
        with torch.enable_grad():
            total = self._forward()
            flow = float(total.detach())
            self._check(flow)
            weights = list(self._weights.values())
            # no grad: a layer that does not run in eval mode, such as an auxiliary head
            gradients: Sequence[Tensor | None] = [None] * len(weights)
            if total.requires_grad:
                gradients = torch.autograd.grad(total, weights, allow_unused=True)
        return flow, self._multiplied(gradients)

    def _set(self, name: str, mask: Tensor | None) -> None:
        """Bring one weight to |W| · mask, touching only what changed: a round prunes a few percent."""
        before = self._masks.pop(name, None)
        if mask is not None:
            self._masks[name] = mask
        if before is None and mask is None:
            return
        everything = torch.ones((), dtype=torch.bool)
        changed = (everything if before is None else before) ^ (everything if mask is None else mask)
        # several times faster than torch's nonzero on one thread
        places = torch.from_numpy(np.flatnonzero(changed.numpy()))
        values = self._whole[name].flatten()[places.to(self._whole[name].device)]
        if mask is not None:
            values *= mask.flatten()[places].to(values.device)
        with torch.no_grad():
            self._weights[name].view(-1)[places.to(values.device)] = values

    def _multiplied(self, gradients: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """θ · gradient, in the gradient's own memory where nothing else can see it."""
        owners = Counter(gradient.data_ptr() for gradient in gradients if gradient is not None)
        found: dict[str, Tensor] = {}
        for (name, weight), gradient in zip(self._weights.items(), gradients, strict=True):
            if gradient is None:
                found[name] = torch.zeros_like(weight, requires_grad=False)
                continue
            own = gradient.is_contiguous() and owners[gradient.data_ptr()] == 1
            product = gradient if own else gradient.clone(memory_format=torch.contiguous_format)
            finite = True
            flat, factors = product.view(-1), weight.detach().view(-1)
            for start in range(0, flat.numel(), _CACHED):
                part = flat[start : start + _CACHED].mul_(factors[start : start + _CACHED])
                # the sum takes one fast pass; where it overflows it proves nothing
                finite = finite and (bool(torch.isfinite(part.sum())) or bool(torch.isfinite(part).all()))
            if not finite:
                raise ModelError(f"SynFlow's gradient overflows float64 at {name}: {_INSTEAD}")
            found[name] = product
        return found

    def _forward(self) -> Tensor:
        self._running.clear()
        try:
            with _random_state_kept(self._ones), _Homogeneous(self._running):
                outputs = outputs_of(self._model, self._ones, self._inputs)
        except (RuntimeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            place = _place(self._running[-1] if self._running else "")
            raise ModelError(
                f"SynFlow runs the model in float64 on one example of ones, and {place} failed: {error}"
            ) from error
        parts = [value.double().sum() for value in outputs.values() if value.is_floating_point()]
        if not parts:
            raise ModelError(f"SynFlow sums the model's float outputs, and there are none: {_INSTEAD}")
        return torch.stack(parts).sum()

    def _check(self, flow: float) -> None:
        if not math.isfinite(flow):
            raise ModelError(
                "SynFlow's flow overflows float64 in this network, which is too deep or too wide for it, or has "
                f"weights that are not finite: {_INSTEAD}"
            )
        if flow == 0:
            empty = [name for name, weight in self._weights.items() if not bool(weight.any())]
            place = f"all weights of {', '.join(empty)} are 0" if empty else "no path from input to output is left"
            raise ModelError(
                f"SynFlow's flow is 0, so no weight has a score: {place}; initialise them otherwise, keep "
                f"more weights, or {_INSTEAD}"
            )


class _Homogeneous(TorchFunctionMode):
    """While active, runs clipped activations as ReLU and refuses calls for which SynFlow's theory fails.

    Only calls on values that depend on a scored weight matter: a constant may be made in any way.
    """

    def __init__(self, running: list[str]) -> None:
        super().__init__()
        self._running = running

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "").rstrip("_")
        if name in _CLIPPED:
            return torch.relu(args[0] if args else kwargs["input"])
        if name in _CLAMPS:
            return _without_upper_bound(name, *args, **kwargs)
        if (name in _REFUSED or _normalises(name, args, kwargs)) and _flows(args, kwargs):
            raise ModelError(
                f"SynFlow's theory does not hold for {_place(self._running[-1] if self._running else '')} "
                f"({name}): {_INSTEAD}"
            )
        return func(*args, **kwargs)


def _normalises(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether the call divides activations by something made of them."""
    if name == "batch_norm":
        statistics = args[1] if len(args) > 1 else kwargs.get("running_mean")
        training = args[5] if len(args) > 5 else kwargs.get("training", False)
        return statistics is None or bool(training)
    if name in {"div", "divide", "true_divide", "__truediv"}:
        return _flows(args[1:2], {key: value for key, value in kwargs.items() if key == "other"})
    return False


def _flows(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return any(isinstance(value, torch.Tensor) and value.requires_grad for value in (*args, *kwargs.values()))


def _without_upper_bound(name: str, input: Tensor, min: Any = None, max: Any = None) -> Tensor:
    if name == "clamp_max" or min is None:
        return input
    return torch.clamp(input, min=min)


def watch(model: nn.Module, running: list[str]) -> list[RemovableHandle]:
    """Keep in `running` the names of the modules whose forward is under way, innermost last; the hooks that do it."""

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: running.append(name)

    def leave(*_: Any) -> None:
        running.pop()

    hooks: list[RemovableHandle] = []
    for name, module in model.named_modules():
        hooks += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
    return hooks


@contextmanager
def _random_state_kept(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Dropout called as a plain function draws random numbers even in eval mode."""
    devices = {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices):
        yield


def _place(name: str) -> str:
    return f"layer {name}" if name else "the model's own forward"
