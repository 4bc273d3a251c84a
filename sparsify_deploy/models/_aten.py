"""Operators of torch.export's graphs as the functions and methods of torch that people write.

What comes later (INT8 placement, channel permutation, ONNX export) knows those. An operator without a form here stays
as it is, which torch runs and exports all the same. Devices are left out: a network moves after it was traced.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

Remembered = Mapping[Any, Any]
"""Nodes of torch.export's graph to those that stand for them."""

Given = tuple[Any, ...]
"""Arguments of an operator, those by name last."""

_ENDLESS = 2**63 - 1
_FACTORIES = {"arange", "zeros", "ones", "full", "empty", "eye", "linspace", "scalar_tensor"}
_METHODS = {
    *("view", "view_as", "expand", "expand_as", "contiguous", "type_as", "repeat", "masked_fill"),
    *("new_zeros", "new_ones", "new_full", "new_empty"),
}
_PLACES = ("device", "layout", "pin_memory", "memory_format")


def name_of(node: fx.Node) -> str:
    """The operator's name without namespace and overload; "" for what is none."""
    schema = getattr(node.target, "_schema", None)
    return str(schema.name).rpartition("::")[2] if schema is not None else ""


def translated(graph: fx.Graph, node: fx.Node, known: Remembered, device: Callable[[], fx.Node]) -> Any:
    """What stands for `node` in `graph`: a new node, or that of an input where nothing is computed; None for a check.

    `device` gives the node of the device on which the network's inputs are.
    """
    name = name_of(node)
    if name.startswith("_assert"):
        return None
    rule = _RULES.get(name)
    if rule is not None:
        return rule(graph, (*node.args, *node.kwargs.values()), known)
    args, kwargs = fx.map_arg(node.args, known.__getitem__), fx.map_arg(node.kwargs, known.__getitem__)
    if not name:
        return graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
    kwargs = {key: value for key, value in kwargs.items() if key not in _PLACES}
    if name in _FACTORIES:
        return graph.call_function(getattr(torch, name), args, {**kwargs, "device": device()})
    if name in _METHODS or (name.endswith("_") and not name.endswith("__")):
        return graph.call_method(name, args, kwargs)
    return graph.call_function(_function(name, node.target), args, kwargs)


def dropout_of(node: fx.Node) -> float:
    """The rate at which fused attention drops weights, as written down in train mode; 0 where it can stay fused."""
    if name_of(node) != "scaled_dot_product_attention" or node.kwargs.get("enable_gqa", False):
        return 0.0
    rate = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
    causal = node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False)
    return rate if isinstance(rate, float) and not causal else 0.0


def attention_weights(graph: fx.Graph, node: fx.Node, known: Remembered) -> tuple[fx.Node, fx.Node]:
    """The softmax of fused attention in steps, and value: dropout between the two needs a module, for its rate is a
    number in the graph that would act in eval mode too."""
    query, key, value = (known[each] for each in node.args[:3])
    mask = node.args[3] if len(node.args) > 3 else None
    scale = node.kwargs.get("scale")
    scores = graph.call_function(torch.matmul, (query, graph.call_method("transpose", (key, -2, -1))))
    width = int(_value(node.args[0]).shape[-1])
    scores = graph.call_function(operator.mul, (scores, width**-0.5 if scale is None else scale))
    if mask is not None and _value(mask).dtype == torch.bool:
        hidden = graph.call_method("logical_not", (known[mask],))
        scores = graph.call_method("masked_fill", (scores, hidden, -torch.inf))
    elif mask is not None:
        scores = graph.call_function(operator.add, (scores, known[mask]))
    return graph.call_function(torch.softmax, (scores, -1)), value


def _function(name: str, overload: Any) -> Any:
    """The public function of an operator, of the same arguments in the same order, or the operator itself."""
    if name.startswith("__"):
        return getattr(operator, name, overload)
    for space in (functional, torch) if "pool" in name else (torch, functional):
        if hasattr(space, name):
            return getattr(space, name)
    return overload


def _same(graph: fx.Graph, args: Given, known: Remembered) -> Any:
    return known[args[0]]


def _size(graph: fx.Graph, args: Given, known: Remembered) -> Any:
    return graph.call_method("size", (known[args[0]], args[1]))


def _to(graph: fx.Graph, args: Given, known: Remembered) -> Any:
    """Another type, if it is another; never another device."""
    source, *rest = args
    kind = next((value for value in rest if isinstance(value, torch.dtype)), None)
    if kind is None and rest and isinstance(rest[0], fx.Node):
        return graph.call_method("to", (known[source], known[rest[0]]))
    if kind is None or kind == _value(source).dtype:
        return known[source]
    return graph.call_method("to", (known[source], kind))


def _slice(graph: fx.Graph, args: Given, known: Remembered) -> Any:
    source, axis, start, stop, step = (*args, *(None,) * 5)[:5]
    stop = None if stop == _ENDLESS else stop
    if start in (None, 0) and stop is None and step in (None, 1):
        return known[source]
    part = slice(*(known.get(end, end) for end in (start, stop, step)))
    return _item(graph, known[source], source, axis or 0, part)


def _select(graph: fx.Graph, args: Given, known: Remembered) -> Any:
    source, axis, index = args
    return _item(graph, known[source], source, axis, known.get(index, index))


def _item(graph: fx.Graph, source: Any, original: Any, axis: Any, entry: Any) -> Any:
    place = (*[slice(None)] * (axis % _value(original).dim()), entry)
    return graph.call_function(operator.getitem, (source, place))


def _index(graph: fx.Graph, args: Given, known: Remembered) -> Any:
    source, entries = args
    place = tuple(slice(None) if entry is None else known[entry] for entry in entries)
    return graph.call_function(operator.getitem, (known[source], place))


def _embedding(graph: fx.Graph, args: Given, known: Remembered) -> Any:
    weight, numbers, *rest = args
    padding = rest[0] if rest and rest[0] != -1 else None
    return graph.call_function(functional.embedding, (known[numbers], known[weight], padding))


def _layer_norm(graph: fx.Graph, args: Given, known: Remembered) -> Any:
    return graph.call_function(functional.layer_norm, fx.map_arg(args[:5], known.__getitem__))


def _softmax(graph: fx.Graph, args: Given, known: Remembered) -> Any:
    source, axis, *rest = args
    given: Any = {"dtype": rest[0]} if rest and rest[0] not in (None, _value(source).dtype) else {}
    return graph.call_function(torch.softmax, (known[source], axis), given)


def _value(node: Any) -> Tensor:
    value: Tensor = node.meta["val"]
    return value


_RULES: Mapping[str, Callable[[fx.Graph, Given, Remembered], Any]] = {
    **dict.fromkeys(("lift_fresh_copy", "lift_fresh", "alias"), _same),
    "detach_": _same,  # what torch.export puts behind a constant
    "sym_size": _size,
    "to": _to,
    "slice": _slice,
    "select": _select,
    "index": _index,
    "embedding": _embedding,
    "layer_norm": _layer_norm,
    "softmax": _softmax,
}
