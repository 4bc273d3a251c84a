"""Quantised weights stored as integers: a quarter of the bytes, and the very values that a runtime will use."""

from __future__ import annotations

import onnx
from onnx import numpy_helper

from sparsify_deploy.graph.constants import Graph


def store_int8_weights_(model: onnx.ModelProto) -> int:
    """Replace each FP32 initializer that only a QuantizeLinear reads by its integers, under its own name.

    `initializer -> Q -> DQ` becomes `initializer -> DQ`; what the network computes is the same to the bit. ONNX
    Runtime, OpenVINO and TensorRT-RTX read it; TensorRT before 10 refuses INT8 weights. Returns how many were replaced.
    """
    graph = Graph(model)
    replaced = 0
    for node in graph.nodes:
        if node.op_type != "QuantizeLinear" or node.input[0] not in graph.initializers:
            continue
        name = node.input[0]
        if len(graph.consumers[name]) > 1 or name in graph.outputs:
            continue
        readers = graph.consumers[node.output[0]]
        if any(reader.op_type != "DequantizeLinear" for reader in readers) or node.output[0] in graph.outputs:
            continue
        stored = graph.weight(readers[0].output[0])
        if stored is None or stored.precision != "INT8" or stored.values.dtype.name != "int8":
            continue
        graph.initializers[name].CopyFrom(numpy_helper.from_array(stored.values, name))
        for reader in readers:
            reader.input[0] = name
        model.graph.node.remove(node)
        replaced += 1
    return replaced
