"""The same graph without Q/DQ, in float: what INT8 gains is measured against it where nobody brought a float file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import numpy_helper

from sparsify_deploy.errors import ModelError
from sparsify_deploy.graph.constants import Graph, attribute, label

if TYPE_CHECKING:
    from numpy.typing import NDArray

_STOPS_AT_ZERO = ("Relu", "Sigmoid", "Softmax")
_LEAST = {"uint8": 0, "int8": -128, "uint16": 0, "int16": -32768}
BY_OPERATORS = ("QLinear", "QGemm", "ConvInteger", "MatMulInteger", "DynamicQuantize", "MatMulNBits")
"""Starts of operator names that compute on integers without Q/DQ around them."""


def is_quantised(model: onnx.ModelProto) -> bool:
    """Whether an activation goes through Q/DQ."""
    graph = Graph(model)
    return any(n.op_type == "QuantizeLinear" and graph.weight(n.input[0]) is None for n in graph.nodes)


def integer_operators(model: onnx.ModelProto) -> tuple[str, ...]:
    """The types of operators that compute on integers themselves, which Q/DQ tools cannot look into."""
    return tuple(sorted({n.op_type for n in model.graph.node if n.op_type.startswith(BY_OPERATORS)}))


def without_quantizers_(model: onnx.ModelProto) -> int:
    """Take every QuantizeLinear and DequantizeLinear out of the top graph; returns how many.

    A weight stored in integers becomes its floats, as the DQ gives them. A Q whose type holds nothing below 0 does the
    work of a ReLU, and leaves one where there is none before it.

    Raises:
        ModelError: an operator takes integers, or a scale is not constant; names the node.
    """
    if names := integer_operators(model):
        raise ModelError(f"{', '.join(names)} compute on integers, not behind Q/DQ: there is no float form of them")
    graph = Graph(model)
    renamed: dict[str, str] = {}
    kept: list[onnx.NodeProto] = []
    taken = 0
    for node in graph.nodes:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            kept.append(node)
            continue
        taken += 1
        source = node.input[0]
        if node.op_type == "DequantizeLinear" and (stored := _stored(graph, source)) is not None:
            values = _real(graph, node, stored)
            model.graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
        elif node.op_type == "QuantizeLinear" and _cuts(graph, node):
            kept.append(onnx.helper.make_node("Relu", [source], [node.output[0]], f"{label(node)}/relu"))
        else:
            renamed[node.output[0]] = source
    for node in kept:
        for i, name in enumerate(node.input):
            node.input[i] = _followed(renamed, name)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    _keep_outputs_(model, renamed)
    _drop_unused_(model)
    return taken


def _stored(graph: Graph, name: str) -> NDArray[Any] | None:
    """A constant that stands in the file as it is."""
    if name in graph.initializers:
        return numpy_helper.to_array(graph.initializers[name])
    node = graph.producer.get(name)
    if node is None or node.op_type != "Constant":
        return None
    value = attribute(node, "value", None)
    return numpy_helper.to_array(value) if value is not None else None


def _real(graph: Graph, node: onnx.NodeProto, stored: NDArray[Any]) -> NDArray[Any]:
    """(integers - zero point) * scale, in the scale's own type."""
    scale = graph.weight(node.input[1])
    zero = graph.weight(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if scale is None or int(attribute(node, "block_size", 0)):
        raise ModelError(f"{node.op_type} {label(node)!r}: its scale is not constant, or one a block: not supported")
    step, shift = scale.values, zero.values.astype(np.int64) if zero is not None else np.array(0)
    if step.size > 1:
        axis = int(attribute(node, "axis", 1)) % stored.ndim
        along = [-1 if i == axis else 1 for i in range(stored.ndim)]
        step = step.reshape(along)
        shift = shift.reshape(along) if shift.size > 1 else shift
    real: NDArray[Any] = ((stored.astype(np.int64) - shift) * step.astype(np.float64)).astype(scale.values.dtype)
    return real


def _cuts(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a Q makes zeros of what is negative and nothing before it does."""
    kind = graph.quantised_type(node)
    zero = graph.weight(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    least = int(zero.values.min()) if zero is not None else 0
    if kind not in _LEAST or least > _LEAST[kind] or graph.weight(node.input[0]) is not None:
        return False
    before = graph.producer.get(node.input[0])
    return before is not None and before.op_type not in _STOPS_AT_ZERO and not _clips_at_zero(graph, before)


def _clips_at_zero(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a node is a Clip that lets nothing negative through; its least is an input, before opset 11 a field."""
    if node.op_type != "Clip":
        return False
    least = graph.weight(node.input[1]) if len(node.input) > 1 and node.input[1] else None
    lowest = least.values.min() if least is not None else attribute(node, "min", -np.inf)
    return float(lowest) >= 0.0


def _followed(renamed: dict[str, str], name: str) -> str:
    while name in renamed:
        name = renamed[name]
    return name


def _keep_outputs_(model: onnx.ModelProto, renamed: dict[str, str]) -> None:
    """An output of the network that a DQ made keeps its name."""
    for value in model.graph.output:
        if value.name in renamed:
            source = _followed(renamed, value.name)
            model.graph.node.append(onnx.helper.make_node("Identity", [source], [value.name], f"{value.name}/float"))


def _drop_unused_(model: onnx.ModelProto) -> None:
    """Scales, zero points and integers that nothing reads, and types of tensors that are no more."""
    used = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    for node in [n for n in model.graph.node if n.op_type == "Constant" and n.output[0] not in used]:
        model.graph.node.remove(node)
    for tensor in [t for t in model.graph.initializer if t.name not in used]:
        model.graph.initializer.remove(tensor)
    del model.graph.value_info[:]
