"""Q/DQ of activations where builders fuse them best, with no change to what is computed."""

from __future__ import annotations

import onnx

from sparsify_deploy.graph.constants import Graph


def place_quantizers_(model: onnx.ModelProto) -> None:
    """Merge equal Q of one tensor, and move a Q that alone reads a MaxPool in front of it; both change no value.

    Behind a residual block one Q for the next layer and another for the next add leave the sum in float for the both
    of them; and rounding keeps the order of values, so that their maximum may as well be taken of the integers.
    """
    merge_quantizers_(model)
    _advance_(model)
    merge_quantizers_(model)


def merge_quantizers_(model: onnx.ModelProto) -> None:
    """Let one Q stand for all of a tensor that have its scale, zero point and type."""
    graph = Graph(model)
    first: dict[tuple[object, ...], onnx.NodeProto] = {}
    for node in graph.nodes:
        if node.op_type != "QuantizeLinear" or node.output[0] in graph.outputs:
            continue
        scale, zero = graph.weight(node.input[1]), graph.weight(node.input[2]) if node.input[2:] else None
        if scale is None or graph.weight(node.input[0]) is not None:
            continue
        offset = b"" if zero is None else zero.values.tobytes()
        key = (node.input[0], scale.values.tobytes(), offset, graph.quantised_type(node), _attributes(node))
        kept = first.setdefault(key, node)
        if kept is not node:
            _replace(graph, node.output[0], kept.output[0])
            model.graph.node.remove(node)


def _advance_(model: onnx.ModelProto) -> None:
    """`MaxPool -> Q -> DQ` as `Q -> DQ -> MaxPool -> Q -> DQ`, of one scale."""
    graph = Graph(model)
    nodes: list[onnx.NodeProto] = []
    for node in list(model.graph.node):
        reader = _only_quantizer(graph, node)
        if reader is not None:
            real = f"{node.output[0]}/advanced"
            quantised = f"{real}_q"
            constants = list(reader.input[1:])
            nodes += [graph.producer[name] for name in constants if name in graph.producer]
            nodes.append(onnx.helper.make_node("QuantizeLinear", [node.input[0], *constants], [quantised], quantised))
            nodes.append(onnx.helper.make_node("DequantizeLinear", [quantised, *constants], [real], real))
            node.input[0] = real
        if not any(node is other for other in nodes):
            nodes.append(node)
    placed = set()
    del model.graph.node[:]
    for node in nodes:
        if node.output[0] not in placed:
            placed.add(node.output[0])
            model.graph.node.append(node)


def _only_quantizer(graph: Graph, node: onnx.NodeProto) -> onnx.NodeProto | None:
    """The one scalar Q that reads a MaxPool of a value which is not quantised already."""
    if node.op_type != "MaxPool" or node.output[0] in graph.outputs or len(node.output) > 1:
        return None
    source = graph.producer.get(node.input[0])
    readers = graph.consumers.get(node.output[0], [])
    if len(readers) != 1 or readers[0].op_type != "QuantizeLinear":
        return None
    if source is None or source.op_type == "DequantizeLinear":
        return None
    scale = graph.weight(readers[0].input[1])
    return readers[0] if scale is not None and scale.values.size == 1 else None


def _replace(graph: Graph, old: str, new: str) -> None:
    for reader in graph.consumers.get(old, []):
        for i, name in enumerate(reader.input):
            if name == old:
                reader.input[i] = new


def _attributes(node: onnx.NodeProto) -> bytes:
    return b"".join(each.SerializeToString(deterministic=True) for each in node.attribute)
