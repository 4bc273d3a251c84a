"""The weighted layers of an ONNX graph, with the values an engine will really multiply by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsify_deploy.graph.constants import Graph, Weight, attribute
from sparsify_deploy.graph.eligibility import UNPRUNED

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

_MOVES = ("Identity", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Split", "Slice", "Gather")
_PUTS_TOGETHER = ("Slice", "Split", "Squeeze", "Unsqueeze", "Reshape", "Transpose", "Identity", "Cast")
_FUSED = ("Relu", "Clip", "LeakyRelu", "MaxPool", "Concat", *_MOVES)
_GELU = ("Div", "Erf", "Add", "Mul", "Mul")
"""The operators of GELU as torch writes it."""


@dataclass(frozen=True, eq=False)
class WeightLayer:
    """A Conv, Gemm or MatMul with a constant weight, or one that nothing here prunes, see `all_layers`.

    `shape` and `values` are `(K, C / groups, *kernel)` whatever way round the file holds them. `values` are the
    integers behind Q/DQ with the zero point taken off, where the weight is quantised, else its floats. `weight` is
    the initializer's name. `precision` is that of the weight: "INT8", "FP32"... `int8_in`: the activation comes out
    of an 8-bit DequantizeLinear. `int8_out`: everything that reads the output is a QuantizeLinear, looking through
    Relu, Clip, LeakyRelu, MaxPool, Concat, nearest Resize, Pad with zeros, reshaping and splitting, Add whose other
    side is constant or comes out of DequantizeLinear, and GELU by the error function. What a builder makes of it is
    the builder's to say.
    `float_reader` is the first that does not read it in INT8, such as "Add /layer1/add" or "the output of the network".
    `output` is the name of the tensor it makes.
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
    float_reader: str = ""
    output: str = ""


def weight_layers(model: onnx.ModelProto) -> tuple[WeightLayer, ...]:
    """Every Conv, Gemm and MatMul of the top graph that multiplies by a constant, in graph order.

    Transposed convolutions and recurrent layers are left out: nothing here prunes them.

    Raises:
        ModelError: a Q/DQ scale is not positive and finite, or a quantised weight is malformed; names the node.
    """
    return tuple(layer for layer in all_layers(model) if layer.op not in UNPRUNED)


def all_layers(model: onnx.ModelProto) -> tuple[WeightLayer, ...]:
    """`weight_layers`, and in their places ConvTranspose, LSTM, GRU and RNN: all that a size or a share is taken of.

    A recurrent node has one layer a weight, under the weight's own name. Raises as `weight_layers`.
    """
    graph = Graph(model)
    graph.check_scales()
    found = []
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type in ("LSTM", "GRU", "RNN"):
            found += _recurrent(graph, node)
        elif (read := _READERS.get(node.op_type)) is not None and (result := read(graph, node)) is not None:
            found.append(_layer(graph, node, node.name or node.output[0], result, node.output[0]))
    return tuple(found)


def _layer(graph: Graph, node: onnx.NodeProto, name: str, found: _Read, output: str) -> WeightLayer:
    weight, values, groups, activation = found
    reader = _float_reader(graph, output) if output else ""
    return WeightLayer(
        name=name,
        op=node.op_type,
        weight=weight.initializer,
        shape=tuple(values.shape),
        groups=groups,
        precision=weight.precision,
        int8_in=_int8_in(graph, activation),
        int8_out=reader is None,
        values=np.ascontiguousarray(values),
        float_reader=reader or "",
        output=output,
    )


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


def _conv_transpose(graph: Graph, node: onnx.NodeProto) -> _Read | None:
    """ConvTranspose holds `(C, K / groups, *kernel)`."""
    weight = graph.weight(node.input[1])
    if weight is None or weight.values.ndim < 3:
        return None
    groups = int(attribute(node, "group", 1))
    inputs, outputs, *kernel = weight.values.shape
    if groups < 1 or inputs % groups:
        return None
    parts = weight.values.reshape(groups, inputs // groups, outputs, *kernel)
    return weight, parts.swapaxes(1, 2).reshape(groups * outputs, inputs // groups, *kernel), groups, node.input[0]


def _recurrent(graph: Graph, node: onnx.NodeProto) -> list[WeightLayer]:
    """One layer a constant behind W and R, `(directions, gates x H, C)`; exporters put them together of several."""
    found = {}
    for name in node.input[1:3]:
        for weight in _parts(graph, name):
            values = weight.values.reshape(-1, weight.values.shape[-1])
            found[weight.initializer] = _layer(
                graph, node, weight.initializer, (weight, values, 1, node.input[0]), output=""
            )
    return list(found.values())


def _parts(graph: Graph, name: str) -> list[Weight]:
    """The constant matrices that a tensor is put together of, each once."""
    seen: set[str] = set()
    found: dict[str, Weight] = {}
    waiting = [name]
    while waiting:
        current = waiting.pop(0)
        if current in seen:
            continue
        seen.add(current)
        weight, node = graph.weight(current), graph.producer.get(current)
        if weight is not None:
            if weight.values.ndim in (2, 3) and weight.values.size:
                found.setdefault(weight.initializer, weight)
        elif node is not None and node.op_type == "Concat":
            waiting.extend(node.input)
        elif node is not None and node.op_type in _PUTS_TOGETHER:
            waiting.append(node.input[0])
    return list(found.values())


_READERS: dict[str, Callable[[Graph, onnx.NodeProto], _Read | None]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "ConvTranspose": _conv_transpose,
}


def _int8_in(graph: Graph, name: str) -> bool:
    """Whether `name` comes out of 8-bit DequantizeLinear, looking through reshaping and concatenation."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        node = graph.producer.get(current)
        if node is None:
            return False
        if node.op_type == "DequantizeLinear":
            if graph.quantised_type(node) not in ("int8", "uint8"):
                return False
        elif node.op_type == "Concat":
            waiting.extend(node.input)
        elif node.op_type in _MOVES:
            waiting.append(node.input[0])
        else:
            return False
    return True


def _float_reader(graph: Graph, name: str) -> str | None:
    """Who reads the tensor other than in INT8, see `WeightLayer.int8_out`; None: nobody does."""
    seen: set[str] = set()
    waiting = [name]
    quantised = False
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        if current in graph.outputs:
            return "the output of the network"
        for node in graph.consumers.get(current, ()):
            if node.op_type == "QuantizeLinear":
                quantised = True
            elif node.op_type in _FUSED or _fuses(graph, node, current):
                waiting.extend(node.output)
            elif gelu := _gelu(graph, node, current):
                waiting.append(gelu)
            elif node.op_type != "Shape":
                return f"{node.op_type} {node.name or node.output[0]}"
    return None if quantised else "nothing"


def _fuses(graph: Graph, node: onnx.NodeProto, name: str) -> bool:
    """Whether `node` computes on `name` without leaving INT8, by what else it reads."""
    if node.op_type == "Resize":
        return bool(attribute(node, "mode", b"nearest") == b"nearest")
    if node.op_type == "Pad":
        fill = graph.weight(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        return bool(attribute(node, "mode", b"constant") == b"constant" and (fill is None or not fill.values.any()))
    return node.op_type == "Add" and _add_fuses(graph, node, name)


def _gelu(graph: Graph, node: onnx.NodeProto, name: str) -> str | None:
    """The output of GELU of `name`, x (1 + erf(x / sqrt 2)) / 2, of which `node` is one of the first operators.

    NVIDIA's INT8 products have it as an epilogue (`gelu_erf` in the kernels of TensorRT).
    """
    if node.op_type == "Gelu":
        return str(node.output[0])
    known = {name}
    last = name
    used = set()
    for _ in range(len(_GELU)):
        step = next((n for n in _readers(graph, known) if n.op_type in _GELU and _within(graph, n, known)), None)
        if step is None:
            break
        used.add(step.op_type)
        last = step.output[0]
        known.add(last)
    whole = used - {"Div"} == {"Erf", "Add", "Mul"}
    ends = all(n.output[0] in known for k in known - {last} for n in graph.consumers.get(k, ()))
    return last if whole and ends else None


def _readers(graph: Graph, names: set[str]) -> list[onnx.NodeProto]:
    """Who reads any of `names` and is not yet one of them."""
    return [n for name in sorted(names) for n in graph.consumers.get(name, ()) if n.output[0] not in names]


def _within(graph: Graph, node: onnx.NodeProto, names: set[str]) -> bool:
    """Whether all that `node` reads is one of `names` or constant."""
    return all(source in names or graph.weight(source) is not None for source in node.input)


def _add_fuses(graph: Graph, node: onnx.NodeProto, name: str) -> bool:
    others = [source for source in node.input if source != name]
    return bool(others) and all(graph.weight(other) is not None or _int8_in(graph, other) for other in others)
