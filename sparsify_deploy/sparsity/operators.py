"""What each function or method of a traced network does to the channels it reads: keeps, joins, moves, fixes them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from sparsify_deploy.sparsity.spaces import Channels, Layout, Segment, Space, freeze

_SHAPE_QUERIES = {"size", "dim", "numel", "stride", "ndimension", "is_floating_point", "__len__", "getattr", "len"}


@dataclass(frozen=True, eq=False)
class Visit:
    """One node of the graph with all that is known so far; `why` says of a value without a layout why it has none."""

    node: fx.Node
    module: fx.GraphModule
    shapes: dict[fx.Node, tuple[int, ...]]
    layouts: dict[fx.Node, Layout | None]
    why: dict[fx.Node, str]
    found: Channels

    @property
    def source(self) -> fx.Node | None:
        """The first argument, if the graph computes it."""
        first = self.node.args[0] if self.node.args else self.node.kwargs.get("input")
        return first if isinstance(first, fx.Node) else None

    def layout(self, value: Any) -> Layout | None:
        """Where the channels of an argument lie."""
        return self.layouts.get(value) if isinstance(value, fx.Node) else None

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument of a function or method, given by position or by name."""
        return self.node.args[position] if len(self.node.args) > position else self.node.kwargs.get(name, default)

    def freeze(self, reason: str) -> None:
        """Fix the channels of everything this node reads, and of what it gives."""
        for node in (*self.node.all_input_nodes, self.node):
            layout = self.layouts.get(node)
            if layout is not None:
                freeze(layout.segments, reason)

    def stop(self, reason: str) -> None:
        """`freeze`, and say of the result that nothing is known of its channels."""
        self.freeze(reason)
        self.why[self.node] = f"its input comes through a barrier: {reason}"

    def inherit(self, what: str, *, keeps: bool) -> None:
        """Nothing to follow: the reason is that of the first argument which has one, if `what` only `keeps` channels;
        else that nothing is known of those that it makes."""
        reasons = [self.why[node] for node in self.node.all_input_nodes if node in self.why]
        if not keeps:
            reasons = [f"it reads what {what} makes, whose channels are not followed"]
        self.why[self.node] = reasons[0] if reasons else "its input has no channels the graph computes"


def follow(visit: Visit) -> Layout | None:
    """Where the channels of the value of a function or method lie; joins or freezes spaces."""
    node, name = visit.node, _name(visit.node)
    if name in _SHAPE_QUERIES and node not in visit.shapes:
        return None
    if not any(visit.layout(source) for source in node.all_input_nodes):
        visit.inherit(f"{name or _plain_name(node)} ({node.name})", keeps=name in _RULES)
        return None
    rule = _RULES.get(name)
    if rule is None or node not in visit.shapes or "out" in node.kwargs:
        visit.stop(f"{name or node.target} ({node.name}) may depend on the order of channels")
        return None
    layout = rule(visit)
    if layout is None:
        visit.stop(f"{name} ({node.name}) mixes, splits or reorders channels")
    return layout


def _name(node: fx.Node) -> str:
    """The operator's name, the same for a function, a method and its in-place form; "" for one not known."""
    if node.op == "call_method":
        method = str(node.target)
        return method.rstrip("_") if not method.startswith("__") else method
    if node.target is getattr:
        return "getattr"
    if node.target is len:
        return "len"
    return _FUNCTIONS.get(node.target, "")


def _plain_name(node: fx.Node) -> str:
    """What a function is called in Python, for one that has no rule."""
    return str(getattr(node.target, "__name__", node.target))


def _keep(visit: Visit) -> Layout | None:
    return visit.layout(visit.source) if len(visit.node.all_input_nodes) == 1 else None


def _pool(visit: Visit) -> Layout | None:
    layout = _keep(visit)
    assert visit.source is not None
    return layout if layout is not None and layout.axis == 1 and len(visit.shapes[visit.source]) > 2 else None


def reshape(visit: Visit) -> Layout | None:
    """Channels that stay whole: the axis that begins where theirs began and is a multiple of their number."""
    source, layout = visit.source, visit.layout(visit.source)
    if source is None or layout is None:
        return None
    old, new = visit.shapes[source], visit.shapes[visit.node]
    before, length = math.prod(old[: layout.axis]), old[layout.axis]
    for axis, size in enumerate(new):
        if math.prod(new[:axis]) == before and size % length == 0 and size > 0:
            width = size // length
            if math.prod(new[axis + 1 :]) * width == math.prod(old[layout.axis + 1 :]):
                return Layout(axis, tuple(Segment(s.space, s.width * width) for s in layout.segments))
    return None


def _binary(visit: Visit) -> Layout | None:
    """Join what is added channel by channel; numbers, and tensors that are broadcast along the channels, are free."""
    tensors = [node for node in visit.node.all_input_nodes if node in visit.shapes]
    size = len(visit.shapes[visit.node])
    whole = visit.shapes[visit.node]
    joined: Layout | None = None
    for node in sorted(tensors, key=lambda node: visit.layout(node) is None):
        layout, shape = visit.layout(node), visit.shapes[node]
        shift = size - len(shape)
        if joined is None:
            if layout is None:
                return None
            joined = layout.at(layout.axis + shift)
            continue
        place = joined.axis - shift
        free = place < 0 or shape[place] == 1 < whole[joined.axis]
        if layout is None or layout.axis != place:
            if layout is not None or not free:
                return None
        elif free and joined.length > 1:
            continue
        elif not free and joined.length == 1 < layout.length:
            joined = layout.at(joined.axis)
        elif not _join(joined, layout):
            return None
    return joined


def _join(a: Layout, b: Layout) -> bool:
    if [(s.space.size, s.width) for s in a.segments] != [(s.space.size, s.width) for s in b.segments]:
        return False
    for one, other in zip(a.segments, b.segments, strict=True):
        one.space.join(other.space)
    return True


def _concatenate(visit: Visit) -> Layout | None:
    """Segments side by side, or, along another axis than the channels', one set of channels."""
    parts, dim = visit.argument(0, "tensors"), visit.argument(1, "dim", visit.node.kwargs.get("axis", 0))
    if not isinstance(parts, (tuple, list)) or not isinstance(dim, int):
        return None
    dim %= len(visit.shapes[visit.node])
    layouts = [visit.layout(part) for part in parts]
    first = next(layout for layout in layouts if layout is not None)
    if any(layout is not None and layout.axis != first.axis for layout in layouts):
        return None
    if dim != first.axis:
        same = all(layout is not None and _join(first, layout) for layout in layouts)
        return first if same else None
    segments: list[Segment] = []
    for part, layout in zip(parts, layouts, strict=True):
        fixed = Space(visit.shapes[part][dim], frozen=visit.why.get(part, "it is concatenated with other values"))
        segments.extend(layout.segments if layout is not None else (Segment(fixed),))
    return Layout(dim, tuple(segments))


def _reduce(visit: Visit) -> Layout | None:
    layout, dims = _keep(visit), visit.argument(1, "dim")
    assert visit.source is not None
    if layout is None or dims is None:
        return None
    ndim = len(visit.shapes[visit.source])
    axes = {d % ndim for d in (dims if isinstance(dims, (tuple, list)) else (dims,))}
    if layout.axis in axes:
        return None
    kept = bool(visit.argument(2, "keepdim", False))
    return layout if kept else layout.at(layout.axis - sum(axis < layout.axis for axis in axes))


def _permute(visit: Visit) -> Layout | None:
    layout = _keep(visit)
    assert visit.source is not None
    ndim, dims = len(visit.shapes[visit.source]), visit.argument(1, "dims")
    if layout is None or dims is None:
        return None
    if isinstance(dims, int):
        dims = visit.node.args[1:]
    order = [d % ndim for d in dims]
    return layout.at(order.index(layout.axis))


def _transpose(visit: Visit) -> Layout | None:
    layout = _keep(visit)
    assert visit.source is not None
    ndim, one, other = len(visit.shapes[visit.source]), visit.argument(1, "dim0"), visit.argument(2, "dim1")
    if layout is None or not isinstance(one, int) or not isinstance(other, int):
        return None
    one, other = one % ndim, other % ndim
    return layout.at({one: other, other: one}.get(layout.axis, layout.axis))


def _item(visit: Visit) -> Layout | None:
    """Indexing with numbers, slices, None and ... that takes the channel axis whole."""
    source, index = visit.source, visit.node.args[1]
    layout = visit.layout(source)
    if source is None or layout is None:
        return None
    entries = list(index) if isinstance(index, tuple) else [index]
    if not all(entry is None or entry is Ellipsis or isinstance(entry, (int, slice)) for entry in entries):
        return None
    used = sum(entry is not None and entry is not Ellipsis for entry in entries)
    rest = [slice(None)] * (len(visit.shapes[source]) - used)
    at = entries.index(Ellipsis) if Ellipsis in entries else len(entries)
    entries[at : at + 1] = rest
    old = new = 0
    for entry in entries:
        if entry is None:
            new += 1
            continue
        if old == layout.axis:
            return layout.at(new) if entry == slice(None) else None
        old += 1
        new += not isinstance(entry, int)
    return None


_NAMES: dict[Callable[[Visit], Layout | None], str] = {
    _keep: (
        "relu relu6 leaky_relu elu selu celu gelu silu mish sigmoid tanh hardswish hardsigmoid hardtanh "
        "softplus softsign logsigmoid softmax log_softmax dropout dropout1d dropout2d dropout3d abs neg exp "
        "sqrt rsqrt log square erf clamp clamp_min clamp_max contiguous clone detach float double half to pow"
    ),
    _pool: (
        "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
        "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
        "interpolate"
    ),
    _binary: "add sub mul div truediv maximum minimum iadd isub imul itruediv",
    reshape: "flatten reshape view squeeze unsqueeze unflatten",
    _reduce: "mean sum amax amin",
    _concatenate: "cat concat",
    _item: "getitem",
    _permute: "permute",
    _transpose: "transpose",
}
_RULES = {name: rule for rule, names in _NAMES.items() for name in names.split()}
_FUNCTIONS: dict[Any, str] = {
    getattr(space, form): name
    for name in _RULES
    for form in (name, f"{name}_")
    for space in (torch, functional, operator)
    if hasattr(space, form)
}
