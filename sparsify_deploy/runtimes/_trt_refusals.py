"""Why TensorRT does not take a network, and what to do about it, as one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsify_deploy.errors import ModelError
from sparsify_deploy.types import Json

_FLAVOUR = (
    "that is how files for ONNX Runtime are quantised: export the model with flavour tensorrt, which has symmetric "
    "INT8 Q/DQ and float biases"
)
_ADVICE = (
    ("dropout", "", "call .eval() on the very object that is exported"),
    (
        "",
        "weights type of int8",
        "this version wants FP32 weights behind Q and DQ: export them so, or take TensorRT 10",
    ),
    ("", "int32", _FLAVOUR),
    ("quantizelinear", "zero", _FLAVOUR),
    ("quantizelinear", "scale", "calibrate again: every scale must be above 0"),
    ("", "double", "export the model in float32"),
    ("", "dynamic", "give the input's range with params.shapes, or fix the axis at export"),
)
"""What an operator and a reason hold, in small letters, and what to do then; the first that fits."""

_OTHERWISE = "Export the model without that operator, or choose another runtime"


def objection(model: Any) -> str | None:
    """What an onnx `ModelProto` holds that no version of TensorRT takes, with node and advice; None: nothing known."""
    from sparsify_deploy.graph.constants import Graph, label

    graph = Graph(model)
    try:
        graph.check_scales()
    except ModelError as error:
        return str(error)
    for node in graph.nodes:
        for reason in _objections(graph, node):
            return f"node {label(node)!r} (operator {node.op_type}): {reason}"
    return None


def _objections(graph: Any, node: Any) -> Iterator[str]:
    if node.op_type.startswith("QLinear") or node.op_type in ("ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"):
        yield f"TensorRT reads QuantizeLinear and DequantizeLinear pairs only; {_FLAVOUR}"
    elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        kind = graph.quantised_type(node)
        if kind == "int32":
            yield f"it holds an INT32 bias; {_FLAVOUR}"
        elif kind == "uint8":
            yield f"it quantises to UINT8; {_FLAVOUR}"
        else:
            zero = graph.weight(node.input[2]) if len(node.input) > 2 and node.input[2] else None
            if zero is not None and zero.values.astype(float).any():
                yield f"its zero point is not 0; {_FLAVOUR}"
    elif node.op_type == "Dropout" and len(node.input) > 2 and node.input[2]:
        training = graph.weight(node.input[2])
        if training is None or training.values.any():
            yield "it drops values, as in training: call .eval() on the very object that is exported"


def refusal(name: str, onnx: Path, answer: Json) -> str:
    """One line about a build that failed; `name` is the builder's."""
    if answer["failed"] == "axes":
        return f"{onnx}: {answer['reason']}"
    if answer["failed"] == "build":
        return f"{onnx}: the {name} builder refused the network: {answer['reason']}"
    said: list[str] = []
    nodes, advice = answer["nodes"], _OTHERWISE
    for error in reversed(answer["errors"]):  # the advice is the first error's
        index = error["index"]
        node, operator = nodes[index] if 0 <= index < len(nodes) else ("", "")
        node, operator = error["name"] or node, error["operator"] or operator
        where = f"node {node!r} (operator {operator})" if operator else "the file"
        said.insert(0, f"{where}: {error['reason']}")
        advice = _advice(operator, error["reason"])
    return f"{onnx}: {name} cannot parse {'; '.join(dict.fromkeys(said)) or 'the file'}. {advice}"


def _advice(operator: str, reason: str) -> str:
    for part, words, advice in _ADVICE:
        if part in operator.lower() and words in reason.lower():
            return advice[0].upper() + advice[1:]
    return _OTHERWISE
