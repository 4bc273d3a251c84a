"""Undo what the TorchScript exporter and nvidia-modelopt leave in a graph and a builder has to see through."""

from __future__ import annotations

from collections import Counter

import onnx
from onnx import numpy_helper

from sparsify_deploy.graph.constants import Graph, attribute

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def tidy_(model: onnx.ModelProto) -> None:
    """Rewrite `model` in place; what it computes is unchanged.

    - An initializer that the exporter merged with an equal one gets its own name and bytes back.
    - Casts to the type a tensor has already go: modelopt leaves one in front of a value's second quantizer, between
      the convolution and the Q that should fuse with it.
    - Casts of constants become constants: zero points, which older parsers want to be plain.
    - A node that multiplies by `layer1.0.conv1.weight` is named `layer1.0.conv1`, so that builders' logs are readable.
    """
    _split_initializers_(model.graph)
    _drop_casts_(model)
    _drop_unused_(model.graph)
    _name_by_weight_(model)


def _split_initializers_(graph: onnx.GraphProto) -> None:
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    for node in list(graph.node):
        if node.op_type == "Identity" and node.input[0] in initializers:
            copy = graph.initializer.add()
            copy.CopyFrom(initializers[node.input[0]])
            copy.name = node.output[0]
            graph.node.remove(node)


def _drop_casts_(model: onnx.ModelProto) -> None:
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.input)}
    types.update({tensor.name: tensor.data_type for tensor in inferred.initializer})
    constants = Graph(model)
    outputs = {value.name for value in model.graph.output}
    instead: dict[str, str] = {}
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = instead.get(name, name)
        if node.op_type != "Cast" or node.output[0] in outputs:
            continue
        if types.get(node.input[0]) == attribute(node, "to", 0):
            instead[node.output[0]] = node.input[0]
            continue
        source = constants.producer.get(node.input[0])
        if source is not None and source.op_type == "Constant" and (value := constants.weight(node.output[0])):
            output = node.output[0]
            node.Clear()
            tensor = numpy_helper.from_array(value.values)
            node.CopyFrom(onnx.helper.make_node("Constant", [], [output], name=output, value=tensor))


def _drop_unused_(graph: onnx.GraphProto) -> None:
    """Remove nodes nobody reads, last to first. Subgraphs read outer names too."""
    used = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if used.isdisjoint(node.output):
            continue
        kept.append(node)
        used |= set(node.input) | _outer_names(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    unused = [tensor for tensor in graph.initializer if tensor.name not in used]
    for tensor in unused:
        graph.initializer.remove(tensor)


def _outer_names(node: onnx.NodeProto) -> set[str]:
    names: set[str] = set()
    for item in node.attribute:
        for inner in (*([item.g] if item.HasField("g") else []), *item.graphs):
            for child in inner.node:
                names |= set(child.input) | _outer_names(child)
            names |= {value.name for value in inner.output}
    return names


def _name_by_weight_(model: onnx.ModelProto) -> None:
    graph = Graph(model)
    names: list[tuple[onnx.NodeProto, str]] = []
    for node in model.graph.node:
        if node.op_type not in _WEIGHTED:
            continue
        weights = [weight for name in node.input[:2] if (weight := graph.weight(name)) is not None]
        if len(weights) == 1 and weights[0].initializer.endswith(".weight"):
            names.append((node, weights[0].initializer.removesuffix(".weight")))
    taken = Counter(name for _, name in names) + Counter(node.name for node in model.graph.node)
    for node, name in names:
        if taken[name] == 1:
            node.name = name
