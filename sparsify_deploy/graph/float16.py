"""FP16 for what is not quantised, written into the ONNX file: a strongly typed builder takes each precision from there.

The networks that `to_float16` makes compute in FP16 except where that is known to cost accuracy: reductions, softmax,
normalisation, powers, exponentials, division by what was computed, and every operator one of whose constants FP16
cannot hold. Inputs and outputs of the graph stay FP32. Integers of quantised weights are kept to the bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.inliner
from onnx import helper, numpy_helper

from sparsify_deploy.errors import ModelError
from sparsify_deploy.graph import file
from sparsify_deploy.graph.constants import Graph
from sparsify_deploy.graph.file import opset
from sparsify_deploy.graph.float16_plan import ANY_TYPE, FLOAT, HALF, LEAST, MOST, Plan, formal_types, planned
from sparsify_deploy.graph.int8_weights import store_int8_weights_
from sparsify_deploy.graph.opset import to_opset_19_

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ONE_FILE_BYTES, _MOST_BYTES = 1 << 30, (1 << 31) - (1 << 24)
"""protobuf writes no message of 2 GiB; a copy above the first keeps its weights beside it."""


@dataclass(frozen=True)
class Float16:
    """What `to_float16` did: nodes that compute in FP16, operators kept in FP32 by type, and what a person should know.

    Nodes without a float input or output count as neither.
    """

    half: int
    kept: Mapping[str, int]
    warnings: tuple[str, ...]


def to_float16(model: onnx.ModelProto) -> tuple[onnx.ModelProto, Float16]:
    """A copy of `model` that computes in FP16 what is neither quantised nor numerically fragile.

    Q/DQ need opset 19 for FP16 scales, so a quantised file is brought to it. A scale is rounded to FP16; where that
    is not possible its DequantizeLinear stays FP32 behind a Cast, which keeps the layer from INT8 kernels and is a
    warning. Nodes keep their names; inserted casts are called `<tensor>/fp16` and `<tensor>/fp32`.

    Raises:
        ModelError: a Q/DQ scale is not above 0, the opset is too old to be brought to 19, or the file is too large.
    """
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) > _MOST_BYTES:
        raise ModelError("its weights are above 2 GiB, which onnx cannot infer types of")
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    if changed.functions:
        changed = onnx.inliner.inline_local_functions(changed)
    Graph(changed).check_scales()
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in changed.graph.node):
        to_opset_19_(changed)
        store_int8_weights_(changed)
    plan = planned(changed)
    _rewrite_(changed, plan)
    kept = Counter(
        node.op_type
        for i, node in enumerate(plan.graph.nodes)
        if i not in plan.half
        and node.op_type not in ("Constant", "Cast", "QuantizeLinear", *ANY_TYPE)
        and any(plan.is_float(name) for name in (*node.input, *node.output))
    )
    return changed, Float16(len(plan.half), dict(sorted(kept.items())), tuple(plan.warnings))


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write a model to `path`, its weights beside it as `<path>.data` where one file cannot hold them."""
    if model.ByteSize() > _ONE_FILE_BYTES:
        onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data")
    else:
        file.save(model, path)


class _Writer:
    """The rewritten node list, and the name under which each float tensor stands in each precision so far."""

    def __init__(self, graph: onnx.GraphProto, plan: Plan) -> None:
        self.graph, self.plan = graph, plan
        self.nodes: list[onnx.NodeProto] = []
        self._in_half: set[str] = set()
        self._names: dict[tuple[str, int], str] = {}
        self._rounded = _rounded_scales(plan)

    def made_in_half(self, name: str) -> str:
        """The name for a tensor that a node now makes in FP16."""
        self._in_half.add(name)
        self._names[name, HALF] = f"{name}/fp16"
        return f"{name}/fp16"

    def present(self, name: str) -> str:
        """The name of a tensor in the precision it is made in."""
        return self._names[name, HALF] if name in self._in_half else name

    def read(self, name: str, kind: int) -> str:
        """The name under which the float tensor `name` can be read as `kind`; made the first time."""
        if (name, kind) not in self._names:
            if name in self.plan.constants:
                self._names[name, kind] = self._constant(name, kind)
            elif kind == FLOAT and name not in self._in_half:
                return name
            else:
                target, suffix = (name, "fp32") if kind == FLOAT else (f"{name}/fp16", "fp16")
                cast = helper.make_node("Cast", [self.present(name)], [target], name=f"{name}/{suffix}", to=kind)
                self.nodes.append(cast)
                self._names[name, kind] = target
        return self._names[name, kind]

    def _constant(self, name: str, kind: int) -> str:
        if kind == FLOAT and name not in self._rounded:
            return name
        values = self._rounded.get(name, self.plan.constants[name])
        with np.errstate(over="ignore"):  # infinities in a mask
            stored = values.astype(np.float16 if kind == HALF else np.float32)
        target = f"{name}/fp16" if kind == HALF else f"{name}/rounded"
        self.graph.initializer.append(numpy_helper.from_array(stored, target))
        return target


def _rounded_scales(plan: Plan) -> dict[str, NDArray[Any]]:
    """Scales of FP16 dequantizers and of their quantizers as FP16 holds them, so that both sides have the same grid.

    Those of empty channels are put into its range.
    """
    found = {}
    for i in plan.half:
        node = plan.graph.nodes[i]
        if node.op_type == "DequantizeLinear":
            quantizer = plan.graph.producer.get(node.input[0])
            for name in (node.input[1], *(quantizer.input[1:2] if quantizer is not None else ())):
                if name in plan.constants:
                    found[name] = np.clip(plan.constants[name], LEAST, MOST).astype(np.float16).astype(np.float32)
    return found


def _rewrite_(model: onnx.ModelProto, plan: Plan) -> None:
    writer = _Writer(model.graph, plan)
    fixed = {value.name for value in model.graph.output}
    fixed |= {name for node in model.graph.node for name in _outer_names(node)}
    version = opset(model)
    for i, node in enumerate(plan.graph.nodes):
        _rewrite_node_(writer, node, i in plan.half, version)
        for name in fixed.intersection(node.output):  # who reads it there wants the name and the type of before
            if plan.is_float(name) and name not in plan.constants:
                writer.read(name, FLOAT)
    del model.graph.node[:]
    model.graph.node.extend(writer.nodes)
    _drop_unused_(model.graph, fixed)
    del model.graph.value_info[:]  # it names the types of before


def _rewrite_node_(writer: _Writer, node: onnx.NodeProto, half: bool, version: int) -> None:
    plan, written = writer.plan, onnx.NodeProto()
    written.CopyFrom(node)
    formal = dict(formal_types(onnx.defs.get_schema(node.op_type, version, node.domain), node)) if half else {}
    weights = node.op_type == "QuantizeLinear" and node.input[0] in plan.constants
    for j, name in enumerate(node.input):
        if node.op_type in ANY_TYPE:
            written.input[j] = writer.present(name)
        elif plan.is_float(name) and not (weights and j == 1):  # integers are made from the scale of the calibration
            written.input[j] = writer.read(name, HALF if half and formal[name] != "tensor(float)" else FLOAT)
    writer.nodes.append(written)
    for j, name in enumerate(node.output):
        if half and plan.is_float(name) and formal[name] != "tensor(float)":
            written.output[j] = writer.made_in_half(name)


def _drop_unused_(graph: onnx.GraphProto, wanted: set[str]) -> None:
    """Remove constants that nobody reads any longer."""
    read = {name for node in graph.node for name in node.input} | wanted
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)
        for value in [value for value in graph.input if value.name == tensor.name]:  # in files before IR 4
            graph.input.remove(value)
    for node in [node for node in graph.node if node.op_type == "Constant" and node.output[0] not in read]:
        graph.node.remove(node)


def _outer_names(node: onnx.NodeProto) -> set[str]:
    """Names that the subgraphs of a node read, from around them among others."""
    names: set[str] = set()
    for item in node.attribute:
        for inner in (*([item.g] if item.HasField("g") else []), *item.graphs):
            names |= {value.name for value in inner.output}
            for child in inner.node:
                names |= set(child.input) | _outer_names(child)
    return names
