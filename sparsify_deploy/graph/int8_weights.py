"""Quantised weights stored as integers: a quarter of the bytes, and the very values that a runtime will use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import numpy_helper

from sparsify_deploy.graph.constants import Graph

if TYPE_CHECKING:
    from numpy.typing import NDArray


def store_int8_weights_(model: onnx.ModelProto) -> int:
    """Replace each FP32 initializer that QuantizeLinear alone reads by its integers, under its own name.

    `initializer -> Q -> DQ` becomes `initializer -> DQ`; what the network computes is the same to the bit. Of a weight
    that several Q read, tied or called several times, those that make the same integers of it share them; other
    integers get a tensor of their own. ONNX Runtime, OpenVINO and TensorRT-RTX read it; TensorRT before 10 refuses INT8
    weights. Returns how many were replaced.
    """
    graph = Graph(model)
    replaced = 0
    for name, tensor in graph.initializers.items():
        quantizers = graph.consumers.get(name, [])
        made = [_integers(graph, node, name) for node in quantizers]
        if not made or name in graph.outputs or any(values is None for values in made):
            continue
        stored: dict[str, NDArray[Any]] = {}
        for node, values in zip(quantizers, made, strict=True):
            assert values is not None
            own = next((known for known, each in stored.items() if np.array_equal(each, values)), None)
            if own is None:
                own = f"{name}/int8_{len(stored)}" if stored else name
                stored[own] = values
            for reader in graph.consumers[node.output[0]]:
                reader.input[0] = own
            model.graph.node.remove(node)
        tensor.CopyFrom(numpy_helper.from_array(stored.pop(name), name))
        model.graph.initializer.extend(numpy_helper.from_array(values, own) for own, values in stored.items())
        replaced += 1
    return replaced


def _integers(graph: Graph, node: onnx.NodeProto, name: str) -> NDArray[Any] | None:
    """The INT8 values that a node makes of the weight `name` for DequantizeLinear alone; None where it does not."""
    if node.op_type != "QuantizeLinear" or node.input[0] != name or node.output[0] in graph.outputs:
        return None
    readers = graph.consumers.get(node.output[0], [])
    if not readers or any(reader.op_type != "DequantizeLinear" for reader in readers):
        return None
    stored = graph.weight(readers[0].output[0])
    if stored is None or stored.precision != "INT8" or stored.values.dtype.name != "int8":
        return None
    return stored.values
