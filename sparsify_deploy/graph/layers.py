"""The weighted layers of an ONNX graph, with the values an engine will really multiply by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsify_deploy.graph.constants import Graph, Weight, attribute

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

_MOVES = ("Identity", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze")
_FUSED = ("Relu", "Clip", "LeakyRelu", "MaxPool", *_MOVES)


@dataclass(frozen=True, eq=False)
class WeightLayer:
    """A Conv, Gemm or MatMul with a constant weight.

    `shape` and `values` are `(K, C / groups, *kernel)` whatever way round the file holds them. `values` are the
    integers behind Q/DQ with the zero point taken off, where the weight is quantised, else its floats. `weight` is
    the initializer's name. `precision` is that of the weight: "INT8", "FP32"... `int8_in`: the activation comes out
    of an 8-bit DequantizeLinear. `int8_out`: everything that reads the output is a QuantizeLinear, looking through
    Relu, Clip, LeakyRelu, MaxPool, reshaping, and Add whose other side is constant or comes out of DequantizeLinear.
    """

    name: str
    op: str
    weight: str
    shape: tuple[int, ...]
    groups: int
    precision: str
    int8_in: bool
    int8_out: bool
    values: NDArray[Any]


def weight_layers(model: onnx.ModelProto) -> tuple[WeightLayer, ...]:
    """Every Conv, Gemm and MatMul of the top graph that multiplies by a constant, in graph order.

    Transposed convolutions are left out: nothing here prunes them.

    Raises:
        ModelError: a Q/DQ scale is not positive and finite, or a quantised weight is malformed; names the node.
    """
    graph = Graph(model)
    graph.check_scales()
    found = []
    for node in model.graph.node:
        read = _READERS.get(node.op_type)
        result = read(graph, node) if read is not None and node.domain in ("", "ai.onnx") else None
        if result is None:
            continue
        weight, values, groups, activation = result
        layer = WeightLayer(
            name=node.name or node.output[0],
            op=node.op_type,
            weight=weight.initializer,
            shape=tuple(values.shape),
            groups=groups,
            precision=weight.precision,
            int8_in=_int8_in(graph, activation),
            int8_out=_int8_out(graph, node.output[0]),
            values=np.ascontiguousarray(values),
        )
        found.append(layer)
    return tuple(found)


_Read = tuple[Weight, "NDArray[Any]", int, str]


def _conv(graph: Graph, node: onnx.NodeProto) -> _Read | None:
    weight = graph.weight(node.input[1])
    if weight is None or weight.values.ndim < 3:
        return None
    return weight, weight.values, int(attribute(node, "group", 1)), node.input[0]


def _gemm(graph: Graph, node: onnx.NodeProto) -> _Read | None:
    """Gemm multiplies by B `(C, K)`, or by B transposed with transB."""
    weight = graph.weight(node.input[1])
    if weight is None or weight.values.ndim != 2:
        return None
    values = weight.values if attribute(node, "transB", 0) else weight.values.T
    return weight, values, 1, node.input[0]


def _matmul(graph: Graph, node: onnx.NodeProto) -> _Read | None:
    """The right side of a MatMul is `(C, K)`; a constant left side is `(K, C)` already."""
    right = graph.weight(node.input[1])
    if right is not None:
        return (right, right.values.T, 1, node.input[0]) if right.values.ndim == 2 else None
    left = graph.weight(node.input[0])
    return (left, left.values, 1, node.input[1]) if left is not None and left.values.ndim == 2 else None


_READERS: dict[str, Callable[[Graph, onnx.NodeProto], _Read | None]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
}


def _int8_in(graph: Graph, name: str) -> bool:
    """Whether `name` comes out of an 8-bit DequantizeLinear, looking through reshaping."""
    seen: set[str] = set()
    while name not in seen:
        seen.add(name)
        node = graph.producer.get(name)
        if node is None:
            return False
        if node.op_type == "DequantizeLinear":
            return graph.quantised_type(node) in ("int8", "uint8")
        if node.op_type not in _MOVES:
            return False
        name = node.input[0]
    return False


def _int8_out(graph: Graph, name: str) -> bool:
    """See `WeightLayer.int8_out`."""
    seen: set[str] = set()
    waiting = [name]
    quantised = False
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        if current in graph.outputs:
            return False
        for node in graph.consumers.get(current, ()):
            if node.op_type == "QuantizeLinear":
                quantised = True
            elif node.op_type in _FUSED or (node.op_type == "Add" and _add_fuses(graph, node, current)):
                waiting.append(node.output[0])
            elif node.op_type != "Shape":
                return False
    return quantised


def _add_fuses(graph: Graph, node: onnx.NodeProto, name: str) -> bool:
    others = [source for source in node.input if source != name]
    return bool(others) and all(graph.weight(other) is not None or _int8_in(graph, other) for other in others)
