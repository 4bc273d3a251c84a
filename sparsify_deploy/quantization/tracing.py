"""Where in a traced network modules are called and operations were written."""

from __future__ import annotations

from torch import fx


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
