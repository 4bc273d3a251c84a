"""Where INT8 goes: which layers are quantised, and which input of a residual add gets a quantizer.

TensorRT fuses Conv + Add + ReLU into one INT8 kernel if the *other* input of the Add comes out of Q/DQ and the
convolution's own output does not (TensorRT developer guide, "Explicit Quantization"). The rules for an add of two
activations, looking through Dropout and Identity:

- one side straight from a quantised layer: the other side is quantised;
- both sides straight from quantised layers: the shorter branch is, the downsample one: the side with fewer quantised
  layers on its longest way back to the last common ancestor. A tie goes to the side computed first, for the builder
  fuses the Add into the convolution that runs last;
- neither: both sides are, if a quantised layer reads the sum through elementwise or pooling operators. Else the sum
  lives in float anyway (embeddings, attention masks) and stays so;
- a sum that a LayerNorm reads and no quantised layer (a transformer's residual stream) stays float: the engine must
  write it in float, and its outliers would take the range of everything else. What a layer adds to it may be
  quantised, so that this layer writes INT8 (`stream`).

The rules of concatenations and pooling stand in `joins`, those of attention in `attention`.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from sparsify_deploy.quantization.padding import same_padded
from sparsify_deploy.quantization.tracing import NO_OPS, label_of, reaches, runs

_ADDS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add)
_KEYS = ("input", "other", "tensors", "mat2")
_IN_PLACE: dict[Any, Any] = {operator.iadd: operator.add, "add_": "add"}
_PASSED_MODULES = (
    *NO_OPS,
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardtanh, nn.Flatten),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)
_PASSED_FUNCTIONS = {
    *_ADDS,
    *(torch.relu, functional.relu, functional.relu6, functional.leaky_relu, functional.dropout, torch.clamp),
    *(torch.flatten, torch.reshape, torch.mean, functional.max_pool2d, functional.avg_pool2d),
    *(functional.adaptive_avg_pool2d,),
}
_PASSED_METHODS = {
    "add",
    "add_",
    "relu",
    "relu_",
    "clamp",
    "clamp_",
    "flatten",
    "reshape",
    "view",
    "mean",
    "contiguous",
}
_PASSED = _PASSED_FUNCTIONS | _PASSED_METHODS | {same_padded}
_FLOAT_STREAM = "float: LayerNorm reads the sum, and no quantised layer does"
_NORMS = (nn.LayerNorm, nn.RMSNorm)
_SHAPE_METHODS = {"size", "dim", "numel", "stride", "__len__", "new_zeros", "new_ones", "new_full", "new_empty"}


@dataclass(frozen=True)
class Row:
    """One line of the placement table: what, whether it is INT8, and the rule that decided."""

    name: str
    kind: str
    quantised: bool
    rule: str


@dataclass(frozen=True)
class Place:
    """An operation of several activations and the positions of its inputs that get a quantizer.

    `shared`: one quantizer for all positions, hence one scale. Positions count the tensors that are joined.
    """

    name: str
    kind: str
    node: fx.Node
    sides: tuple[int, ...]
    rule: str
    shared: bool = False

    @property
    def quantizers(self) -> tuple[str, ...]:
        """The names of its quantizers, one a side or one for all."""
        if self.shared:
            return (f"{self.name}_quantizer",) if self.sides else ()
        return tuple(f"{self.name}_quantizer_{side}" for side in self.sides)

    @property
    def tensors(self) -> tuple[fx.Node, ...]:
        """What it reads at `sides`."""
        values = _operands(self.node)
        return tuple(values[side] for side in self.sides)


def residuals(module: fx.GraphModule, quantised: Collection[str], *, stream: bool = False) -> list[Place]:
    """Every add of two activations, in graph order. `quantised` holds the module names of the INT8 layers.

    `stream`: quantise what layers add to a sum that stays float for a LayerNorm.
    """
    known = activations(module.graph.nodes)
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    found = []
    for node in module.graph.nodes:
        sides = _sides(node)
        if sides is None or not all(side in known for side in sides):
            continue
        chosen, rule = _choose(module, node, sides, quantised, order)
        if rule == _FLOAT_STREAM and stream:
            chosen, rule = _added(module, sides, quantised)
        found.append(Place(label_of(node), "residual add", node, chosen, rule))
    return found


def insert_(module: fx.GraphModule, place: Place, quantizers: Sequence[nn.Module]) -> None:
    """Put `quantizers`, named by `place.quantizers`, on the inputs of an operation, which becomes an out-of-place one.

    Call `recompile` afterwards.
    """
    node = place.node
    for name, quantizer in zip(place.quantizers, quantizers, strict=True):
        module.add_submodule(name, quantizer)
    for i, (side, tensor) in enumerate(zip(place.sides, place.tensors, strict=True)):
        with module.graph.inserting_before(node):
            inserted = module.graph.call_module(place.quantizers[0 if place.shared else i], (tensor,))
        _put(node, side, inserted)
    if place.sides:
        node.target = _IN_PLACE.get(node.target, node.target)


def _operands(node: fx.Node) -> list[fx.Node]:
    """The tensors an operation joins: those of a list, or its first two arguments."""
    values = [*node.args[:2], *(node.kwargs[key] for key in _KEYS if key in node.kwargs)]
    if values and isinstance(values[0], (list, tuple)):
        values = list(values[0])
    return values  # type: ignore[return-value]


def _put(node: fx.Node, side: int, value: fx.Node) -> None:
    args = list(node.args)
    if args and isinstance(args[0], (list, tuple)):
        args[0] = [value if i == side else old for i, old in enumerate(args[0])]
    elif side < len(args):
        args[side] = value
    else:
        keys = [key for key in _KEYS if key in node.kwargs]
        old = node.kwargs[keys[0]]
        if isinstance(old, (list, tuple)):
            node.kwargs = {**node.kwargs, keys[0]: [value if i == side else x for i, x in enumerate(old)]}
        else:
            node.kwargs = {**node.kwargs, keys[side - len(args)]: value}
    node.args = tuple(args)


def _sides(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two inputs of an add of two values, neither a Python number."""
    is_function = node.op == "call_function" and node.target in _ADDS
    if not is_function and not (node.op == "call_method" and node.target in ("add", "add_")):
        return None
    values = [*node.args[:2], *(node.kwargs[key] for key in ("input", "other") if key in node.kwargs)]
    if len(values) != 2 or "out" in node.kwargs:
        return None
    a, b = values
    return (a, b) if isinstance(a, fx.Node) and isinstance(b, fx.Node) else None


def activations(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Nodes whose values depend on the data and not merely on its shape: no parameters, sizes or constants."""
    found: set[fx.Node] = set()
    for node in nodes:
        shape = (node.op == "call_method" and node.target in _SHAPE_METHODS) or (
            node.op == "call_function" and (node.target is getattr or node.target in (len, torch.numel))
        )
        if node.op == "placeholder" or (not shape and any(source in found for source in node.all_input_nodes)):
            found.add(node)
    return found


def _choose(
    module: fx.GraphModule,
    node: fx.Node,
    sides: tuple[fx.Node, fx.Node],
    quantised: Collection[str],
    order: dict[fx.Node, int],
) -> tuple[tuple[int, ...], str]:
    """The sides to quantise and the rule, see the module's text."""
    if node.target in _IN_PLACE and any(order[user] > order[node] for user in sides[0].users):
        return (), "float: the sum is written over a value that is read again"
    a, b = (source_layer(module, side, quantised) for side in sides)
    if not _feeds_layer(module, node, quantised) and _feeds_norm(module, node):
        return (), _FLOAT_STREAM
    if a is not None and b is not None:
        depths = _branch_depths(module, (a, b), quantised, order)
        short = min((0, 1), key=lambda i: (depths[i], order[(a, b)[i]]))
        return (short,), f"both sides are layers: the shorter branch, from {(a, b)[short].target}"
    if a is not None or b is not None:
        other, layer = (1, a) if a is not None else (0, b)
        assert layer is not None
        return (other,), f"the side opposite to {layer.target}, which fuses with the add"
    if _feeds_layer(module, node, quantised):
        return (0, 1), "both sides: neither is straight from a quantised layer, and one reads the sum"
    return (), "float: neither side is straight from a quantised layer, and none reads the sum"


def _added(
    module: fx.GraphModule, sides: tuple[fx.Node, fx.Node], quantised: Collection[str]
) -> tuple[tuple[int, ...], str]:
    """The sides that come straight from quantised layers, and the rule."""
    layers = [source_layer(module, side, quantised) for side in sides]
    chosen = tuple(i for i, layer in enumerate(layers) if layer is not None)
    if not chosen:
        return (), _FLOAT_STREAM
    names = " and ".join(str(layer.target) for layer in layers if layer is not None)
    return chosen, f"what {names} adds to a stream that LayerNorm reads in float"


def source_layer(module: fx.GraphModule, node: fx.Node, quantised: Collection[str]) -> fx.Node | None:
    """The quantised layer whose output `node` is, looking through what does nothing in eval mode."""
    while True:
        if node.op == "call_module":
            if node.target in quantised:
                return node
            if not isinstance(module.get_submodule(str(node.target)), NO_OPS):
                return None
        elif not (node.op == "call_function" and node.target is functional.dropout):
            return None
        source = node.args[0]
        if not isinstance(source, fx.Node) or len(source.users) > 1:
            return None
        node = source


def _branch_depths(
    module: fx.GraphModule, heads: tuple[fx.Node, fx.Node], quantised: Collection[str], order: dict[fx.Node, int]
) -> tuple[int, int]:
    """Quantised layers on the longest way from the last common ancestor to each head, the heads included."""
    shared = _ancestors(heads[0]) & _ancestors(heads[1])
    start = max(shared, key=lambda n: order[n], default=None)

    def depth(head: fx.Node) -> int:
        inside = sorted(_ancestors(head), key=lambda n: order[n])
        longest: dict[fx.Node, int] = {}
        for node in inside:
            before = [longest[s] for s in node.all_input_nodes if s in longest]
            if node is start or (start is None and not before):
                longest[node] = 0 if node is start else int(node.target in quantised)
            elif before:
                longest[node] = max(before) + int(node.op == "call_module" and node.target in quantised)
        return longest.get(head, 0)

    return depth(heads[0]), depth(heads[1])


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """`node` and everything it is computed from."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting.extend(current.all_input_nodes)
    return found


def _feeds_layer(module: fx.GraphModule, node: fx.Node, quantised: Collection[str]) -> bool:
    """Whether a quantised layer reads `node`, looking through elementwise, pooling and reshaping operators."""
    return reaches(
        node,
        lambda user: user.op == "call_module" and user.target in quantised,
        lambda user: runs(module, user, _PASSED_MODULES, _PASSED),
    )


def _feeds_norm(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a LayerNorm reads `node`, looking through the same operators."""
    return reaches(
        node,
        lambda user: runs(module, user, _NORMS, {functional.layer_norm}),
        lambda user: runs(module, user, _PASSED_MODULES, _PASSED),
    )
