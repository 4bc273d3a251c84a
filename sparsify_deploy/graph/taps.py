"""Tensors inside two graphs of one network, matched with each other and made outputs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import onnx

from sparsify_deploy.graph.constants import Graph, label
from sparsify_deploy.graph.layers import weight_layers

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)
_NO_LAYERS = ("QuantizeLinear", "DequantizeLinear", "Constant", "Identity", "Cast")


@dataclass(frozen=True)
class Tap:
    """A float tensor that depends on the input: the node that makes it, and the weight it multiplies by or ""."""

    layer: str
    op: str
    tensor: str
    weight: str


def taps(model: onnx.ModelProto) -> tuple[Tap, ...]:
    """What the nodes of the top graph return, in graph order, as far as shape inference finds it to be float."""
    graph = Graph(model)
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.output)}
    weights = {layer.name: layer.weight for layer in weight_layers(model)}
    fed = {value.name for value in model.graph.input} - set(graph.initializers)
    found = []
    for node in model.graph.node:
        if fed.isdisjoint(node.input):
            continue
        fed.update(node.output)
        if node.op_type not in _NO_LAYERS and types.get(node.output[0]) in _FLOATS:
            found.append(Tap(label(node), node.op_type, node.output[0], weights.get(label(node), "")))
    return tuple(found)


def matched(first: tuple[Tap, ...], second: tuple[Tap, ...]) -> tuple[tuple[Tap, Tap], ...]:
    """Pairs in the order of the first: layers of one weight, which each graph uses once, else one tensor name and
    operator."""
    once = Counter(tap.weight for tap in first)
    by_weight = {tap.weight: tap for tap in second if tap.weight}
    repeated = {name for name, count in Counter(tap.weight for tap in second).items() if count > 1}
    by_tensor = {(tap.tensor, tap.op): tap for tap in second}
    pairs = []
    for tap in first:
        unique = tap.weight and once[tap.weight] == 1 and tap.weight not in repeated
        other = by_weight.get(tap.weight) if unique else by_tensor.get((tap.tensor, tap.op))
        if other is not None:
            pairs.append((tap, other))
    return tuple(pairs)


def with_outputs(model: onnx.ModelProto, names: tuple[str, ...]) -> onnx.ModelProto:
    """A copy of `model` that returns the tensors `names` as well, those of its inputs and outputs excepted."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    known = {value.name for value in (*copy.graph.output, *copy.graph.input)}
    types = {value.name: value for value in onnx.shape_inference.infer_shapes(model).graph.value_info}
    for name in dict.fromkeys(names):
        if name not in known:
            copy.graph.output.append(types.get(name) or onnx.helper.make_empty_tensor_value_info(name))
    return copy


def is_quantised(model: onnx.ModelProto) -> bool:
    """Whether the top graph holds Q/DQ."""
    return any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node)
