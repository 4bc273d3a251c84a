"""Where in a traced network modules are called and operations were written."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import fx, nn
from torch.nn import functional

NO_OPS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity)
"""Modules that do nothing in eval mode."""

MOVES: frozenset[object] = frozenset(
    (torch.flatten, torch.reshape, torch.transpose, torch.permute, torch.squeeze, torch.unsqueeze, functional.dropout)
) | {"flatten", "reshape", "view", "contiguous", "transpose", "permute", "squeeze", "unsqueeze", "unflatten"}
"""Functions and methods that keep every value."""


def called_modules(module: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """Target to the nodes that call it, in graph order; aliases of one module share the first name's list."""
    calls: dict[str, list[fx.Node]] = {}
    first: dict[int, str] = {}
    for node in module.graph.nodes:
        if node.op == "call_module":
            target = first.setdefault(id(module.get_submodule(node.target)), node.target)
            calls.setdefault(target, []).append(node)
    return calls


def path_of(node: fx.Node) -> str:
    """The module in whose forward `node` was written, "" for the network itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack), "")


def label_of(node: fx.Node) -> str:
    """The name of an operation in the placement table: where it was written, and the node's own name."""
    path = path_of(node)
    return f"{path}.{node.name}" if path else node.name


def runs(
    module: fx.GraphModule, node: fx.Node, modules: tuple[type[nn.Module], ...], calls: Collection[object]
) -> bool:
    """Whether `node` calls one of the module classes, functions or methods (by name)."""
    if node.op == "call_module":
        return isinstance(module.get_submodule(str(node.target)), modules)
    return node.op in ("call_function", "call_method") and node.target in calls


def reaches(node: fx.Node, goal: Callable[[fx.Node], bool], through: Callable[[fx.Node], bool]) -> bool:
    """Whether a reader of `node`, straight or through nodes that `through` lets pass, meets `goal`."""
    seen: set[fx.Node] = set()
    waiting = list(node.users)
    while waiting:
        user = waiting.pop()
        if user in seen:
            continue
        seen.add(user)
        if goal(user):
            return True
        if through(user):
            waiting.extend(user.users)
    return False
