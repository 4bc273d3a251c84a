"""A copy of a network as a torch.fx graph, with weighted layers and BatchNorms kept whole."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparsify_deploy.errors import ModelError

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
WEIGHTED: tuple[type[nn.Module], ...] = (*CONVOLUTIONS, nn.Linear)
EXPORTED = "exported"
"""The key in a GraphModule's `meta` that says it is a graph as `trace` makes them, and need not be traced."""


_TAKEN = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph()))) - frozenset(dir(nn.Module()))


def check_names(model: nn.Module) -> None:
    """Raises ModelError where a graph of `model` could not have its parts under their names: torch.fx needs some."""
    parts = (model.named_children(), model.named_parameters(recurse=False), model.named_buffers(recurse=False))
    for name in (name for some in parts for name, _ in some):
        if name in _TAKEN:
            raise ModelError(
                f"{type(model).__name__} has a part called {name!r}, a name that torch.fx needs in its graphs: give it "
                "another, in a checkpoint of it too"
            )


def trace(model: nn.Module, arguments: int = 0) -> fx.GraphModule:
    """A deep copy of `model` in eval mode, traced; parameter names and the module hierarchy are kept.

    Arguments of `forward` that have a default are fixed to it, except the first `arguments`. Modules that no path
    reaches are left out of the copy. Functional dropout becomes what it is in eval mode, nothing. A graph that is
    marked `EXPORTED` is copied as it is.

    Raises:
        ModelError: the network cannot be copied or traced, naming the module and torch.fx's reason, or a part of it has
            a name that graphs need.
    """
    if isinstance(model, fx.GraphModule) and model.meta.get(EXPORTED):
        return copy.deepcopy(model).eval()
    check_names(model)
    tracer = _Tracer()
    try:
        root = copy.deepcopy(model).eval()
        graph = tracer.trace(root, concrete_args=_defaults(root, arguments))
    except Exception as error:  # whatever the user's forward raises on a symbolic value
        where = f" in {tracer.path!r}" if tracer.path else ""
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{type(model).__name__} cannot be traced{where}: {reason}; "
            "make its forward independent of tensor values and of types torch.fx does not know"
        ) from error
    _drop_fixed_arguments(graph)
    return fx.GraphModule(root, graph, type(model).__name__)


def is_layer(module: nn.Module) -> bool:
    """Whether a graph calls `module` as a whole: it is torch's own, or a weighted layer or BatchNorm of any class."""
    return isinstance(module, (*WEIGHTED, _BatchNorm)) or _ANY.is_leaf_module(module, "")


_ANY = fx.Tracer()


class _Tracer(fx.Tracer):
    """Stops at weighted layers and BatchNorms of any class, so that subclasses outside torch.nn stay modules too."""

    def __init__(self) -> None:
        super().__init__()
        self.path = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_layer(m)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        outer, self.path = self.path, self.path_of_module(m)
        result = super().call_module(m, forward, args, kwargs)
        self.path = outer  # not in a finally: after an error it names the innermost module
        return result


def _defaults(model: nn.Module, arguments: int) -> dict[str, Any]:
    parameters = list(inspect.signature(model.forward).parameters.values())[arguments:]
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def _drop_fixed_arguments(graph: fx.Graph) -> None:
    """Remove the placeholders of fixed arguments, and the checks torch.fx puts on them."""
    for node in [n for n in graph.nodes if n.op == "placeholder" and n.args]:
        users = list(node.users)
        for user in users:
            for check in [*user.users, user]:
                graph.erase_node(check)
        graph.erase_node(node)
