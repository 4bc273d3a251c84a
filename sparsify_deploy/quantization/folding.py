"""BatchNorm folded into the layer before it, by following the data.

In eval mode BatchNorm is y = x * s + t with s = gamma / sqrt(var + eps) and t = beta - mean * s, one pair an output
channel; so W' = W * s and b' = b * s + t. It scales whole output channels: zeros and N:M patterns survive.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from sparsify_deploy.errors import ModelError
from sparsify_deploy.quantization.tracing import called_modules
from sparsify_deploy.sparsity.tracing import WEIGHTED, trace

_UNFOLDED = "unfolded_batchnorm"


def fold_batchnorm(model: nn.Module) -> fx.GraphModule:
    """A traced, folded copy of `model` in eval mode; `model` is left as it is.

    Folded are Conv1d/2d/3d -> BatchNorm and Linear -> BatchNorm1d on `(N, C)`, where nothing else reads the layer's
    output. Parameter names stay ("layer1.0.conv1.weight"); a bias appears where a layer had none. A BatchNorm with
    a dropout and activation of its own (timm's BatchNormAct2d) leaves those behind under its name. What cannot be
    folded stays; `unfolded` lists it.

    Raises:
        ModelError: the network cannot be traced.
    """
    module = trace(model)
    calls = called_modules(module)
    unfolded: dict[str, str] = {}
    for name, nodes in calls.items():
        norm = module.get_submodule(name)
        if not isinstance(norm, _BatchNorm):
            continue
        reason = _obstacle(module, calls, norm, nodes)
        if reason is not None:
            unfolded[name] = reason
            continue
        source = nodes[0].all_input_nodes[0]
        _fold_(module.get_submodule(str(source.target)), norm)
        after = _after(norm)
        if after is None:
            nodes[0].replace_all_uses_with(source)
            module.graph.erase_node(nodes[0])
            module.delete_submodule(name)
        else:
            module.set_submodule(name, after)
    module.graph.lint()
    module.recompile()
    module.meta[_UNFOLDED] = unfolded
    return module


def unfolded(module: fx.GraphModule) -> dict[str, str]:
    """BatchNorms that `fold_batchnorm` had to leave, with the reason."""
    found: dict[str, str] = module.meta.get(_UNFOLDED, {})
    return dict(found)


def _obstacle(  # noqa: PLR0911 - one return a reason
    module: fx.GraphModule, calls: dict[str, list[fx.Node]], norm: _BatchNorm, nodes: list[fx.Node]
) -> str | None:
    """Why `norm` cannot be folded, or None."""
    if len(nodes) > 1:
        return f"it is called {len(nodes)} times"
    if norm.running_mean is None or norm.running_var is None:
        return "it keeps no running statistics"
    source = nodes[0].all_input_nodes[0]
    if source.op != "call_module" or not isinstance(module.get_submodule(str(source.target)), WEIGHTED):
        return "its input does not come straight from a Conv or Linear layer"
    layer = module.get_submodule(str(source.target))
    if len(source.users) > 1:
        return f"the output of {source.target!r} is used elsewhere too"
    if not any(uses == [source] for uses in calls.values()):
        return f"{source.target!r} is called more than once"
    weight = layer._parameters.get("weight")
    if weight is None:
        return f"the weight of {source.target!r} is computed, not stored"
    if sum(p is weight for m in module.modules() for p in m._parameters.values()) > 1:
        return f"the weight of {source.target!r} is shared with another layer"
    if weight.shape[0] != norm.num_features:
        return f"{source.target!r} has {weight.shape[0]} outputs and it normalises {norm.num_features}"
    if not _understood(norm, weight):
        return f"{type(norm).__name__} does more than normalise, drop and activate"
    return None


def _after(norm: _BatchNorm) -> nn.Module | None:
    """What a subclass does after normalising, if it is the timm shape `act(drop(batch_norm(x)))`."""
    parts = [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if isinstance(part, nn.Module)]
    parts = [part for part in parts if not isinstance(part, nn.Identity)]
    return nn.Sequential(*parts) if len(parts) > 1 else next(iter(parts), None)


@torch.no_grad()
def _understood(norm: _BatchNorm, weight: Tensor) -> bool:
    """Whether `norm` is torch's own class, or computes what `_after` says it does on a probe."""
    if type(norm).__module__.startswith("torch.nn."):
        return True
    count = 2 * norm.num_features * 3 ** (weight.dim() - 2)
    probe = torch.linspace(-3, 3, count, dtype=weight.dtype, device=weight.device)
    probe = probe.view(2, norm.num_features, *[3] * (weight.dim() - 2))
    expected = functional.batch_norm(
        probe, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
    )
    after = _after(norm)
    expected = expected if after is None else after(expected)
    return torch.equal(norm(probe), expected)


@torch.no_grad()
def _fold_(layer: nn.Module, norm: _BatchNorm) -> None:
    weight = layer.get_parameter("weight")
    mean, variance = norm.running_mean, norm.running_var
    assert isinstance(mean, Tensor)
    assert isinstance(variance, Tensor)
    scale = torch.rsqrt(variance.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    old = layer._parameters.get("bias")
    bias = shift if old is None else old.double() * scale + shift
    scaled = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
    if not (scaled.isfinite().all() and bias.isfinite().all()):
        raise ModelError("a BatchNorm has statistics that are not finite; train or load the network again")
    layer.weight = nn.Parameter(scaled.to(weight.dtype), requires_grad=weight.requires_grad)
    layer.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=weight.requires_grad)
