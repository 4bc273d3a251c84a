"""A network that torch.fx cannot follow as a torch.fx graph over its own modules, by way of torch.export.

torch.fx calls `forward` with symbols and fails where code asks a tensor for its size or branches on its type, as the
networks of Hugging Face do. torch.export runs it on stand-ins of real shape and writes operators down. Here these are
read back: what a layer of torch.nn computed is a call of that very module again, under its own name, so that it
trains, is pruned and quantised like any other; the rest becomes functions and methods. Sizes stay free where asked
for. The result is compared with the network on other sizes before it is used.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree

from sparsify_deploy.errors import ModelError
from sparsify_deploy.models._aten import attention_weights, dropout_of, name_of, translated
from sparsify_deploy.sparsity.tracing import EXPORTED, check_names, is_layer, trace

Call = Callable[[nn.Module, Mapping[str, Tensor]], Any]
"""How to call a network on its named inputs."""

_NETWORK = "network"
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Exported:
    """The graph of an architecture, for any network of its class and settings, and the modules it adds.

    `constants`: tensors that are no parameters; `dropouts`: the rates of dropout that no module of the network does.
    """

    graph: fx.Graph
    name: str
    constants: Mapping[str, Tensor]
    dropouts: Mapping[str, float]
    notes: tuple[str, ...] = ()

    def over(self, network: nn.Module) -> fx.GraphModule:
        """The graph on the modules and parameters of `network`, which it shares; `network` is not changed.

        Parameters that the graph does not use are left out.
        """
        root = nn.Module()
        root._modules, root._parameters, root._buffers = (
            dict(network._modules),
            dict(network._parameters),
            dict(network._buffers),
        )
        for name, value in self.constants.items():
            root.add_module(name, Constant(value))
        for name, rate in self.dropouts.items():
            root.add_module(name, nn.Dropout(rate))
        module = fx.GraphModule(root, copy.deepcopy(self.graph), self.name)
        module.meta.update({EXPORTED: True, "notes": self.notes})
        return module.train(network.training)


@dataclass(frozen=True)
class Refused:
    """Why torch.export cannot follow a network that torch.fx cannot follow."""

    reason: str


class Constant(nn.Module):
    """A tensor that moves with the network and is no part of its weights."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value.detach().clone(), persistent=False)

    def forward(self) -> Tensor:
        """The tensor."""
        return self.value


def export(
    network: nn.Module,
    example: Mapping[str, Tensor],
    others: Sequence[Mapping[str, Tensor]],
    *,
    free: Mapping[str, Sequence[int]],
    call: Call | None = None,
) -> Exported:
    """The graph of `network` called on the named tensors of `example`, which hold two examples or more.

    `free`: the axes of each input whose size is not fixed. In `others` their sizes differ from the example's; there
    the graph must give what the network gives in eval mode.

    Raises:
        ModelError: torch.export cannot follow the network, a free axis turns out fixed, or outputs differ.
    """
    call = call or (lambda network, inputs: network(*inputs.values()))
    kind = type(network).__name__
    modes = [(part, part.training) for part in network.modules()]
    called = _Called(network.train(), call, tuple(example))
    auto: Any = torch.export.Dim.AUTO
    dynamic = tuple(dict.fromkeys(free.get(name, ()), auto) for name in example)
    try:
        with _quiet():
            program = torch.export.export(called, tuple(example.values()), dynamic_shapes=(dynamic,), strict=False)
        found = _Reader(program, network, tuple(example)).read()
        _check(found, network, call, (example, *others))
    except ModelError:
        raise
    except Exception as error:  # whatever the network's forward raises on stand-ins
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"{kind} cannot be exported by torch.export: {text[:200]}") from error
    finally:
        for part, training in modes:
            part.training = training
    return found


def followable(
    network: nn.Module, given: Callable[[], tuple[Sequence[Mapping[str, Tensor]], Mapping[str, Sequence[int]]]]
) -> Exported | Refused | None:
    """The graph of a network that torch.fx cannot trace and torch.export can, or why neither can; None: torch.fx can.

    `given`, called where it is needed, gives an example of two examples or more and batches of other sizes, and the
    free axes of each input. The result says in its notes what it is. `ModelError` where a part has a name that no
    graph can keep.
    """
    check_names(network)
    try:
        trace(network)
    except ModelError as refused:
        (example, *others), free = given()
        try:
            found = export(network, example, others, free=free)
        except ModelError as error:
            return Refused(str(error))
        reason = str(refused).partition("; ")[0]
        note = f"{reason}; it runs as the graph that torch.export made of it, which gave the same outputs"
        return dataclasses.replace(found, notes=(note,))
    return None


class _Called(nn.Module):
    """A network called with positional tensors that have names."""

    def __init__(self, network: nn.Module, call: Call, names: tuple[str, ...]) -> None:
        super().__init__()
        self.network = network
        self.call, self.names = call, names

    def forward(self, *values: Tensor) -> Any:
        return self.call(self.network, dict(zip(self.names, values, strict=True)))


class _Reader:
    """Turns one exported program into a graph over the network's modules."""

    def __init__(self, program: torch.export.ExportedProgram, network: nn.Module, names: Sequence[str]) -> None:
        self.program, self.network, self.names = program, network, names
        self.old, self.graph = program.graph, fx.Graph()
        self.known: dict[fx.Node, Any] = {}
        self.constants: dict[str, Tensor] = {}
        self.dropouts: dict[str, float] = {}
        self._device: fx.Node | None = None
        self._stored: dict[fx.Node, str | Tensor] = {}

    def read(self) -> Exported:
        """The whole graph."""
        self._placeholders()
        calls, inside = self._calls()
        for node in self.old.nodes:
            if node in calls:
                path, source = calls[node]
                self._put(node, self.graph.call_module(path, (self._source(source),)))
            elif node.op == "call_function" and node not in inside:
                self._put(node, self._function(node))
        (output,) = (node for node in self.old.nodes if node.op == "output")
        spec = self.program.call_spec.out_spec
        values = [self._source(value) for value in output.args[0]]
        self.graph.output(_plain(_pytree.tree_unflatten(values, spec)))
        self.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        self.graph.lint()
        used = {str(node.target) for node in self.graph.nodes if node.op == "call_module"}
        return Exported(
            self.graph,
            type(self.network).__name__,
            {name: value for name, value in self.constants.items() if name in used},
            {name: rate for name, rate in self.dropouts.items() if name in used},
        )

    def _placeholders(self) -> None:
        inputs = iter(self.names)
        stored = self.program.graph_signature
        names = {**stored.inputs_to_parameters, **stored.inputs_to_buffers}
        constants = stored.inputs_to_lifted_tensor_constants
        for node in self.old.nodes:
            if node.op != "placeholder":
                continue
            if node.name in names:
                self._stored[node] = names[node.name].removeprefix(f"{_NETWORK}.")
            elif node.name in constants:
                self._stored[node] = self.program.constants[constants[node.name]]
            else:
                self.known[node] = self.graph.placeholder(next(inputs))

    def _source(self, node: Any) -> Any:
        """What stands for `node`; parameters and buffers are read where they are first used."""
        if node not in self.known:
            stored = self._stored[node]
            if isinstance(stored, str) and stored in self.network.state_dict():
                self.known[node] = self.graph.get_attr(stored)
            else:
                value = self.network.get_buffer(stored) if isinstance(stored, str) else stored
                self.known[node] = self._constant(value)
        return self.known[node]

    def _constant(self, value: Tensor) -> fx.Node:
        name = self._fresh("constant")
        self.constants[name] = value
        return self.graph.call_module(name, ())

    def _fresh(self, stem: str) -> str:
        taken = {*self.constants, *self.dropouts, *(name for name, _ in self.network.named_children())}
        return next(name for i in range(len(taken) + 1) if (name := f"{stem}_{i}") not in taken)

    def _calls(self) -> tuple[dict[fx.Node, tuple[str, fx.Node]], set[fx.Node]]:
        """The last node of what each layer of torch.nn computed, to its name and what it reads; the nodes inside."""
        groups: dict[str, list[fx.Node]] = {}
        paths: dict[str, str] = {}
        for node in self.old.nodes:
            for key, (full, _) in (node.meta.get("nn_module_stack") or {}).items():
                path = full.removeprefix(_NETWORK).removeprefix(".")
                if node.op == "call_function" and path and _is_leaf(self.network, path):
                    groups.setdefault(key, []).append(node)
                    paths[key] = path
                    break
        calls: dict[fx.Node, tuple[str, fx.Node]] = {}
        inside: set[fx.Node] = set()
        for key, group in groups.items():
            members = set(group)
            given = {s for n in group for s in n.all_input_nodes if s not in members and s not in self._stored}
            read = [source for source in given if isinstance(source.meta.get("val"), Tensor)]
            left = [node for node in group if any(user not in members for user in node.users)]
            if len(read) == len(left) == 1 and isinstance(left[0].meta.get("val"), Tensor):
                calls[left[0]] = (paths[key], read[0])
                inside |= members
        return calls, inside

    def _function(self, node: fx.Node) -> Any:
        source = node.args[0] if node.args else None
        if name_of(node) == "dropout" and isinstance(source, fx.Node):
            return self._dropped(self._source(source), float(node.args[1]))  # type: ignore[arg-type]
        for each in node.all_input_nodes:
            self._source(each)
        rate = dropout_of(node)
        if rate > 0.0:
            weights, value = attention_weights(self.graph, node, self.known)
            return self.graph.call_function(torch.matmul, (self._dropped(weights, rate), value))
        return translated(self.graph, node, self.known, self._device_of_inputs)

    def _dropped(self, source: fx.Node, rate: float) -> fx.Node:
        """`source` through a dropout module of its own, which does nothing in eval mode."""
        if rate == 0.0:
            return source
        name = self._fresh("dropout")
        self.dropouts[name] = rate
        return self.graph.call_module(name, (source,))

    def _device_of_inputs(self) -> fx.Node:
        if self._device is None:
            first = next(node for node in self.graph.nodes if node.op == "placeholder")
            self._device = self.graph.call_function(getattr, (first, "device"))
        return self._device

    def _put(self, node: fx.Node, made: Any) -> None:
        self.known[node] = made
        if isinstance(made, fx.Node) and "nn_module_stack" not in made.meta:
            made.meta["nn_module_stack"] = _stack(node)


def _is_leaf(network: nn.Module, path: str) -> bool:
    try:
        return is_layer(network.get_submodule(path))
    except AttributeError:
        return False


def _stack(node: fx.Node) -> dict[str, tuple[str, Any]]:
    """Where a node was written, as torch.fx's own tracer notes it: the path of each module to path and class."""
    entries: Iterator[tuple[str, Any]] = iter((node.meta.get("nn_module_stack") or {}).values())
    found = {}
    for path, kind in entries:
        within = path.removeprefix(_NETWORK).removeprefix(".")
        if path.startswith(f"{_NETWORK}."):
            found[within] = (within, kind)
    return found


def _plain(outputs: Any) -> Any:
    """Outputs as dict, tuple or tensor, which is what a graph may return."""
    if isinstance(outputs, Mapping):
        return dict(outputs)
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else outputs


@torch.no_grad()
def _check(found: Exported, network: nn.Module, call: Call, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Raises ModelError where the graph does not compute what the network computes, in eval mode."""
    network.eval()
    module = found.over(network).eval()
    for batch in batches:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in batch.items())
        expected = _pytree.tree_leaves(_plain(call(network, batch)))
        try:
            given = _pytree.tree_leaves(module(*batch.values()))
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ModelError(f"{found.name}, as torch.export has it, fails on {shapes}: {reason}") from error
        for a, b in zip(expected, given, strict=True):
            if a.shape != b.shape or not float((a - b).abs().max()) <= _TOLERANCE * float(a.abs().max()) + 1e-12:
                raise ModelError(
                    f"{found.name}, as torch.export has it, gives other values than the network on {shapes}: "
                    "its forward in train mode differs from that in eval mode by more than dropout and BatchNorm"
                )


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.export's hints about its own workings, of which some are printed."""
    logs = [logging.getLogger(name) for name in ("torch.export", "torch.fx.experimental.symbolic_shapes")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
