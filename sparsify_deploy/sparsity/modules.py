"""What each module of a traced network does to the channels it reads, and which axes of its tensors carry them."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from sparsify_deploy.sparsity.operators import Visit, reshape
from sparsify_deploy.sparsity.spaces import Axis, Layout, Segment, Space
from sparsify_deploy.sparsity.tracing import WEIGHTED


def _modules(names: str) -> tuple[type[nn.Module], ...]:
    return tuple(getattr(nn, name) for name in names.split())


_ELEMENTWISE = _modules(
    "ReLU ReLU6 LeakyReLU ELU SELU CELU GELU SiLU Mish Sigmoid Tanh Hardswish Hardsigmoid Hardtanh Softplus Softsign "
    "Hardshrink Softshrink Tanhshrink LogSigmoid Threshold Softmax LogSoftmax Softmax2d Identity "
    "Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout"
)
_SPATIAL = _modules(
    "MaxPool1d MaxPool2d MaxPool3d AvgPool1d AvgPool2d AvgPool3d LPPool1d LPPool2d "
    "AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d "
    "Upsample UpsamplingNearest2d UpsamplingBilinear2d ZeroPad1d ZeroPad2d ZeroPad3d ConstantPad1d ConstantPad2d "
    "ConstantPad3d ReflectionPad1d ReflectionPad2d ReflectionPad3d ReplicationPad1d ReplicationPad2d ReplicationPad3d"
)
_KEEPING = (*_ELEMENTWISE, *_SPATIAL, nn.Flatten, nn.Unflatten, nn.PReLU, _BatchNorm, _InstanceNorm)
"""After one of these a value without a layout has none for the reason that it had before."""
_BLOCKS = _modules("TransformerEncoderLayer TransformerDecoderLayer")


def follow(visit: Visit) -> Layout | None:
    """Where the channels of the value of a module lie; opens and freezes spaces, notes the axes of its parameters."""
    module = visit.module.get_submodule(str(visit.node.target))
    if isinstance(module, WEIGHTED):
        return _weighted(visit, module)
    source = visit.source
    layout = visit.layout(source)
    if layout is None:
        visit.freeze("it is read beside a value without channels")
        visit.inherit(f"{visit.node.target} ({type(module).__name__})", keeps=isinstance(module, _KEEPING))
        _blocks(visit, module)
        return None
    assert source is not None
    result: Layout | None = None
    ndim = len(visit.shapes[source])
    if visit.node in visit.shapes and len(visit.node.all_input_nodes) == 1:
        if isinstance(module, _ELEMENTWISE) or (isinstance(module, nn.PReLU) and module.num_parameters == 1):
            result = layout
        elif isinstance(module, _SPATIAL):
            result = layout if layout.axis == 1 and ndim > 2 else None
        elif isinstance(module, (nn.Flatten, nn.Unflatten)):
            result = reshape(visit)
        elif _follows(module, layout, ndim):
            _note(visit, layout.segments)
            result = layout
    if result is None:
        kind = type(module).__name__
        visit.stop(f"{visit.node.target} ({kind}) may depend on the order of channels")
        _blocks(visit, module)
    return result


def _follows(module: nn.Module, layout: Layout, ndim: int) -> bool:
    """Whether a module's parameters lie along the channels, one each, and it treats all channels alike."""
    if not type(module).__module__.startswith("torch.nn.") or not module._parameters.keys() >= {"weight"}:
        return False
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return len(module.normalized_shape) == 1 and layout.axis == ndim - 1
    if isinstance(module, nn.GroupNorm):
        return layout.axis == 1 and module.num_groups in (1, module.num_channels)
    return layout.axis == 1 and (
        isinstance(module, (_BatchNorm, nn.PReLU)) or (isinstance(module, _InstanceNorm) and ndim > 2)
    )


def _note(visit: Visit, segments: tuple[Segment, ...]) -> None:
    """Every vector of the module at hand lies along `segments`."""
    prefix = str(visit.node.target)
    module = visit.module.get_submodule(prefix)
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and tensor.ndim == 1:
            visit.found.axes.append(Axis(f"{prefix}.{name}", 0, segments))


def _weighted(visit: Visit, module: nn.Module) -> Layout | None:
    """A conv or linear layer reads one layout and opens a space; a depthwise one keeps the layout."""
    name, source, found = str(visit.node.target), visit.source, visit.found
    plain = type(module).__module__.startswith("torch.nn.modules") and "weight" in module._parameters
    if source is None or source not in visit.shapes or not plain:
        found.unreadable[name] = "its weight or its forward is not that of the torch.nn layer"
        visit.stop(f"{name} is no plain torch.nn layer")
        return None
    ndim, layout = len(visit.shapes[source]), visit.layout(source)
    weight = module._parameters["weight"]
    assert weight is not None
    axis = ndim - weight.ndim + 1
    groups = getattr(module, "groups", 1)
    if layout is not None and (layout.axis != axis or (groups == 1 and layout.length != weight.shape[1])):
        visit.freeze(f"{name} reads another axis than that of the channels")
        layout, visit.why[source] = None, "its input's channels lie on another axis"
    if groups > 1:
        return _grouped(visit, name, groups, layout)
    if layout is None:
        found.unreadable[name] = visit.why.get(source, "its input has no channels the graph computes")
    else:
        found.reads[name] = layout.segments
        found.axes.append(Axis(f"{name}.weight", 1, layout.segments))
    written = (Segment(Space(weight.shape[0])),)
    found.axes.append(Axis(f"{name}.weight", 0, written))
    if module._parameters.get("bias") is not None:
        found.axes.append(Axis(f"{name}.bias", 0, written))
    return Layout(axis, written)


def _grouped(visit: Visit, name: str, groups: int, layout: Layout | None) -> Layout | None:
    module = visit.module.get_submodule(name)
    depthwise = groups == module.in_channels == module.out_channels
    kind = "depthwise" if depthwise else "grouped"
    visit.found.unreadable[name] = f"it is a {kind} convolution: its filters do not read all input channels"
    if not depthwise or layout is None:
        visit.stop(f"{name} is a {kind} convolution")
        return None
    visit.found.axes.append(Axis(f"{name}.weight", 0, layout.segments))
    _note(visit, layout.segments)
    return layout


def _blocks(visit: Visit, module: nn.Module) -> None:
    """The hidden units of the MLPs inside torch.nn's transformer layers, which the trace does not look into."""
    for path, block in module.named_modules(prefix=str(visit.node.target)):
        if not isinstance(block, _BLOCKS) or not type(block).__module__.startswith("torch.nn.modules"):
            continue
        linear: Any = block.linear1
        visit.found.unreadable[f"{path}.linear1"] = f"it reads the residual stream inside {type(block).__name__}"
        activation = block.activation
        if activation in (functional.relu, functional.gelu) or isinstance(activation, _ELEMENTWISE):
            hidden = (Segment(Space(linear.out_features)),)
            visit.found.reads[f"{path}.linear2"] = hidden
            visit.found.axes.append(Axis(f"{path}.linear1.weight", 0, hidden))
            visit.found.axes.append(Axis(f"{path}.linear2.weight", 1, hidden))
            if linear.bias is not None:
                visit.found.axes.append(Axis(f"{path}.linear1.bias", 0, hidden))
