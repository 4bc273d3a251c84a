"""Where concatenations, global average pooling and what breaks a chain of INT8 stand.

A concatenation runs in INT8 if all that it joins has one scale, for then Q/DQ commutes with it (TensorRT developer
guide, "Explicit Quantization": quantise all inputs of a Concat with the same scale). So one quantizer stands on all
its inputs, and every other quantizer that reads one of them, or the result, gets the same range after calibration
(`groups`): else the engine would have to keep a second copy.

Global average pooling reads INT8 where nothing else reads its input in float: then the convolution before it writes
INT8, as TensorRT's rule for a pooling layer wants. Max pooling, nearest upsampling and reshaping need no rule: Q/DQ
moves through them.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from sparsify_deploy.quantization.padding import same_padded
from sparsify_deploy.quantization.placement import Place, Row, activations, source_layer
from sparsify_deploy.quantization.tracing import MOVES, NO_OPS, label_of, reaches, runs

_CATS = (torch.cat, torch.concat, torch.concatenate)
_COMMUTING_MODULES = (
    *NO_OPS,
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardtanh, nn.Flatten, nn.ChannelShuffle),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.UpsamplingNearest2d),
)
_COMMUTING: frozenset[object] = MOVES | {
    same_padded,
    *_CATS,
    *(torch.relu, functional.relu, functional.relu6, functional.leaky_relu, functional.hardtanh, torch.clamp),
    *(functional.max_pool1d, functional.max_pool2d, functional.max_pool3d, functional.channel_shuffle),
    *("relu", "relu_", "clamp", "clamp_"),
}
_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_POOL_FUNCTIONS = {functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d, functional.adaptive_avg_pool3d}
_BREAKING_MODULES = (nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Hardsigmoid, nn.Mish, nn.ELU, nn.PReLU, nn.Tanh)
_BREAKING: set[object] = {
    *(functional.silu, functional.hardswish, functional.hardsigmoid, functional.mish, functional.elu),
    *(torch.sigmoid, torch.tanh, "sigmoid", "tanh"),
}
_GATES: set[Any] = {"mul", "mul_", torch.mul, operator.mul, operator.imul}


def concats(module: fx.GraphModule, quantised: Collection[str]) -> list[Place]:
    """Every concatenation of activations, in graph order. `quantised` holds the module names of the INT8 layers."""
    known = activations(module.graph.nodes)
    found = []
    for node in module.graph.nodes:
        if node.op != "call_function" or node.target not in _CATS or node not in known:
            continue
        joined = node.args[0] if node.args else node.kwargs["tensors"]
        if not isinstance(joined, (list, tuple)):
            continue
        feeds = reaches(
            node,
            lambda user: user.op == "call_module" and user.target in quantised,
            lambda user: _commutes(module, user) or _is_global_pool(module, user),
        )
        if feeds:
            sides, rule = tuple(range(len(joined))), f"all {len(joined)} inputs, with one scale"
        else:
            sides, rule = (), "float: no quantised layer reads it through operators that Q/DQ moves through"
        found.append(Place(label_of(node), "concatenation", node, sides, rule, shared=True))
    return found


def pools(module: fx.GraphModule, quantised: Collection[str]) -> list[Place]:
    """Every global average pooling that a quantised layer reads."""
    found = []
    for node in module.graph.nodes:
        if not _is_global_pool(module, node):
            continue
        feeds = reaches(
            node,
            lambda user: user.op == "call_module" and user.target in quantised,
            lambda user: runs(module, user, (*NO_OPS, nn.Flatten), MOVES),
        )
        source = node.all_input_nodes[0]
        sides: tuple[int, ...] = ()
        if not feeds:
            rule = "float: no quantised layer reads the mean"
        elif len(source.users) > 1:
            rule = "float: its input is read elsewhere too"
        else:
            sides, rule = (0,), "the input, so that the layer before it writes INT8"
        found.append(Place(label_of(node), "average pooling", node, sides, rule))
    return found


def breaks(module: fx.GraphModule, quantised: Collection[str]) -> Iterator[Row]:
    """What ends a chain of INT8 behind a layer: activations that need float, products with a gate."""
    known = activations(module.graph.nodes)
    for node in module.graph.nodes:
        sources = node.all_input_nodes
        if runs(module, node, _BREAKING_MODULES, _BREAKING):
            layer = source_layer(module, sources[0], quantised) if sources else None
            if layer is not None:
                rule = f"float: computed on what {layer.target} writes, which therefore is not INT8"
                yield Row(label_of(node), _kind(module, node), False, rule)
        elif runs(module, node, (), _GATES) and len(sources) == 2 and all(source in known for source in sources):
            rule = "float: a product with a gate (squeeze-excite, swish) is not quantised"
            yield Row(label_of(node), "product", False, rule)


def groups(module: fx.GraphModule, places: Iterable[Place], quantised: Collection[str]) -> tuple[tuple[str, ...], ...]:
    """Names of quantizers that must hold one range, because concatenations tie what they read. Before insertion."""
    places = list(places)
    readers: dict[fx.Node, set[str]] = {}
    for node in module.graph.nodes:
        if node.op == "call_module" and node.target in quantised and node.all_input_nodes:
            readers.setdefault(node.all_input_nodes[0], set()).add(f"{node.target}.input_quantizer")
    for place in places:
        names = place.quantizers * len(place.sides) if place.shared else place.quantizers
        for tensor, name in zip(place.tensors, names, strict=True):
            readers.setdefault(tensor, set()).add(name)
    found: list[set[str]] = []
    for place in places:
        if not place.shared or not place.sides:
            continue
        tied = set(place.quantizers).union(*(readers.get(t, ()) for t in (*place.tensors, place.node)))
        for other in [group for group in found if group & tied]:
            found.remove(other)
            tied |= other
        found.append(tied)
    return tuple(tuple(sorted(group)) for group in found if len(group) > 1)


def _commutes(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a quantiser may stand before or behind `node` alike."""
    if runs(module, node, _COMMUTING_MODULES, _COMMUTING):
        return True
    if node.op == "call_module":
        upsample = module.get_submodule(str(node.target))
        return isinstance(upsample, nn.Upsample) and upsample.mode == "nearest"
    return node.target is functional.interpolate and node.kwargs.get("mode", "nearest") == "nearest"


def _is_global_pool(module: fx.GraphModule, node: fx.Node) -> bool:
    if runs(module, node, _POOLS, ()):
        size: Any = module.get_submodule(str(node.target)).output_size
    elif node.op == "call_function" and node.target in _POOL_FUNCTIONS:
        size = node.args[1] if len(node.args) > 1 else node.kwargs["output_size"]
    elif runs(module, node, (), (torch.mean, "mean")):
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return isinstance(dims, Sequence) and len(dims) > 1
    else:
        return False
    return all(side == 1 for side in (size if isinstance(size, (list, tuple)) else (size,)))


def _kind(module: fx.GraphModule, node: fx.Node) -> str:
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))).__name__
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))
