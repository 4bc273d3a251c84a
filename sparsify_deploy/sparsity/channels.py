"""Which channels of a network must move together: the axes of its tensors that share one permutation.

The network is traced (torch.fx) and run once on an example, so that every value's shape is known. A value that has
channels carries its *layout*: the axis they lie on, and the segments along it. A segment is `count` channels of one
`Space`, each of `width` consecutive entries (more than one behind a flattened map). Layers that write channels open a
space; adding two values joins their spaces; concatenating puts segments side by side. Whatever is not understood
freezes the spaces it reads, with the reason, so that an operator nobody thought of costs a gain and never an output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from sparsify_deploy.errors import ModelError
from sparsify_deploy.sparsity import modules, operators
from sparsify_deploy.sparsity.spaces import Channels, Layout, freeze
from sparsify_deploy.sparsity.tracing import WEIGHTED, trace


def channel_groups(model: nn.Module, arguments: Sequence[Any]) -> Channels:
    """Find the channels of `model`, called as `model(*arguments)`; it must be in eval mode and is left as it is.

    Batches of two examples or more make a reshape that splits channels tell itself from one that keeps them.

    Raises:
        ModelError: torch.fx cannot trace the network, or it fails on `arguments`.
    """
    module = trace(model, len(arguments))
    shapes = _shapes(module, arguments)
    found = Channels()
    layouts: dict[fx.Node, Layout | None] = {}
    why: dict[fx.Node, str] = {}
    uses = _uses(module)
    for node in module.graph.nodes:
        visit = operators.Visit(node, module, shapes, layouts, why, found)
        layouts[node] = _propagate(visit)
        if node.op == "call_module":
            calls = uses.called[id(module.get_submodule(str(node.target)))]
            if len(calls) > 1 and _has_tensors(module.get_submodule(str(node.target))):
                visit.stop(f"{calls[0].target} is called more than once")
                layouts[node] = None
    _freeze_shared(found, model, uses.read)
    for name, submodule in model.named_modules():
        if isinstance(submodule, WEIGHTED) and name not in found.reads:
            found.unreadable.setdefault(name, "the traced network does not call it as a layer of its own")
    return found


def _propagate(visit: operators.Visit) -> Layout | None:
    node = visit.node
    if node.op == "call_module":
        return modules.follow(visit)
    if node.op in ("call_function", "call_method"):
        return operators.follow(visit)
    if node.op == "output":
        visit.freeze("the network's output holds these channels")
    else:
        visit.why[node] = (
            f"it reads {'the network input' if node.op == 'placeholder' else 'the parameter'} {node.target}"
        )
    return None


def _has_tensors(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


@dataclass(frozen=True)
class _Uses:
    called: Mapping[int, list[fx.Node]]
    read: set[str]


def _uses(module: fx.GraphModule) -> _Uses:
    """Calls by module identity, and the names of tensors that the graph reads directly."""
    called: dict[int, list[fx.Node]] = {}
    read: set[str] = set()
    for node in module.graph.nodes:
        if node.op == "call_module":
            called.setdefault(id(module.get_submodule(str(node.target))), []).append(node)
        elif node.op == "get_attr":
            read.add(str(node.target))
    return _Uses(called, read)


def _freeze_shared(found: Channels, model: nn.Module, read: set[str]) -> None:
    """Freeze the spaces of tensors that the graph reads directly or that two modules share."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    for axis in found.axes:
        same = names[id(tensors[axis.name])]
        if read.intersection(same):
            freeze(axis.segments, f"{axis.name} is also read outside its layer")
        elif len(same) > 1:
            freeze(axis.segments, f"{' and '.join(same[:2])} are one tensor")


class _Shapes(fx.Interpreter):
    """Runs the graph and notes each tensor's shape."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape)
        return value


def _shapes(module: fx.GraphModule, arguments: Sequence[Any]) -> dict[fx.Node, tuple[int, ...]]:
    interpreter = _Shapes(module)
    interpreter.extra_traceback = False
    try:
        with torch.no_grad():
            interpreter.run(*arguments)
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"the traced network fails on the example: {reason}; give examples that fit it") from error
    return interpreter.shapes
