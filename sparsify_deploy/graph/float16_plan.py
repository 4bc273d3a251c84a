"""Which nodes of a graph can compute in FP16 without costing accuracy that a person would notice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from sparsify_deploy.graph.constants import Graph, attribute, label
from sparsify_deploy.graph.file import opset

if TYPE_CHECKING:
    from numpy.typing import NDArray

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
LEAST, MOST = 2.0**-14, 65504.0
"""The smallest normal and the largest number of FP16."""

_FRAGILE = frozenset(
    [
        "ReduceMean",
        "ReduceSum",
        "ReduceProd",
        "ReduceL1",
        "ReduceL2",
        "ReduceSumSquare",
        "ReduceLogSum",
        "ReduceLogSumExp",
        "CumSum",
        "Softmax",
        "LogSoftmax",
        "Softplus",
        "LayerNormalization",
        "InstanceNormalization",
        "GroupNormalization",
        "RMSNormalization",
        "MeanVarianceNormalization",
        "LpNormalization",
        "LRN",
        "Pow",
        "Exp",
        "Log",
        "Sqrt",
        "Reciprocal",
        "Sin",
        "Cos",
        "ArgMax",
        "ArgMin",
        "TopK",
        "Equal",
        "Greater",
        "GreaterOrEqual",
        "Less",
        "LessOrEqual",
        "Det",
    ]
)
"""Sums, what overflows or loses its small numbers in FP16, and what turns a rounding difference into another answer."""

_TYPED_BY_ATTRIBUTE = frozenset(
    "Cast ConstantOfShape EyeLike RandomNormal RandomUniform RandomNormalLike RandomUniformLike Bernoulli Range".split()  # noqa: SIM905
)
"""Their output's type is written in the node: it stays as it is."""

ANY_TYPE = frozenset(("Shape", "Size"))
_STANDARD = ("", "ai.onnx")


@dataclass
class Plan:
    """Tensor names to types as the file has them, and the nodes (by index) that are to compute in FP16."""

    graph: Graph
    types: Mapping[str, int]
    constants: Mapping[str, NDArray[Any]]
    half: set[int] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)

    def is_float(self, name: str) -> bool:
        return self.types.get(name) == FLOAT

    def floats(self, node: onnx.NodeProto) -> Iterator[str]:
        """Float inputs that are computed, not constant."""
        return (name for name in node.input if self.is_float(name) and name not in self.constants)


def planned(model: onnx.ModelProto) -> Plan:
    """Decide for every node of a checked model; Q/DQ must have been brought to opset 19."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.input, *inferred.output)}
    types.update({tensor.name: tensor.data_type for tensor in model.graph.initializer})
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        value = attribute(node, "value", None) if node.op_type == "Constant" else None
        if value is not None:
            constants[node.output[0]], types[node.output[0]] = numpy_helper.to_array(value), value.data_type
    plan = Plan(Graph(model), types, constants)
    version = opset(model)
    for i, node in enumerate(plan.graph.nodes):
        if node.op_type == "QuantizeLinear":
            continue
        if node.op_type == "DequantizeLinear":
            if _scale_fits(plan, node):
                plan.half.add(i)
        elif not _is_fragile(plan, node) and _takes_half(plan, node, version):
            plan.half.add(i)
    _keep_chains(plan)
    _follow_producers(plan)
    return plan


def _is_fragile(plan: Plan, node: onnx.NodeProto) -> bool:
    if node.op_type in _FRAGILE or node.domain not in _STANDARD:
        return True
    if node.op_type == "Div" and node.input[1] not in plan.constants:
        return True
    if node.op_type == "Mul" and node.input[0] == node.input[1]:  # a square, on its way to a sum
        return True
    if node.op_type == "BatchNormalization":
        variance = plan.constants.get(node.input[4])
        if variance is None or bool(((variance != 0) & (np.abs(variance) < LEAST)).any()):
            return True
    constants = (plan.constants[name] for name in node.input if plan.is_float(name) and name in plan.constants)
    return not all(_fits(values) for values in constants)


def _fits(values: NDArray[Any]) -> bool:
    """Whether FP16 holds the largest of `values` as a normal number; the small ones beside it may round to 0."""
    finite = np.abs(values[np.isfinite(values)])
    largest = float(finite.max()) if finite.size else 0.0
    return largest == 0.0 or LEAST <= largest <= MOST


def _takes_half(plan: Plan, node: onnx.NodeProto, version: int) -> bool:
    """Whether the operator's own definition lets every float of this node be FP16, and all types are known."""
    names = [name for name in (*node.input, *node.output) if name]
    if node.op_type in ("Constant", *_TYPED_BY_ATTRIBUTE, *ANY_TYPE) or any(name not in plan.types for name in names):
        return False
    if any(item.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for item in node.attribute):
        return False
    if not any(plan.is_float(name) for name in names):
        return False
    schema = onnx.defs.get_schema(node.op_type, version, node.domain)
    allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    return all(
        "tensor(float16)" in allowed.get(formal, ()) or formal == "tensor(float)"
        for name, formal in formal_types(schema, node)
        if plan.is_float(name)
    )


def formal_types(schema: Any, node: onnx.NodeProto) -> Iterator[tuple[str, str]]:
    """Each input and output with the type that the operator's definition gives it; the last may be variadic."""
    for names, parameters in ((node.input, schema.inputs), (node.output, schema.outputs)):
        for i, name in enumerate(names):
            if name:
                yield name, parameters[min(i, len(parameters) - 1)].type_str


def _scale_fits(plan: Plan, node: onnx.NodeProto) -> bool:
    """Whether a DequantizeLinear can take its scales in FP16."""
    scale = plan.constants.get(node.input[1])
    if scale is None:
        plan.warnings.append(f"{label(node)}: its scale is no constant: it stays FP32")
    if scale is None or not plan.is_float(node.input[1]):
        return False
    outside = (scale < LEAST) | (scale > MOST)
    integers = plan.constants.get(node.input[0])
    if outside.any() and integers is not None and scale.ndim == 1:
        axis = int(attribute(node, "axis", 1))
        others = tuple(i for i in range(integers.ndim) if i != axis % integers.ndim)
        outside &= (integers != 0).any(axis=others)  # the scale of an empty channel may be anything
    if outside.any():
        plan.warnings.append(
            f"{label(node)}: {int(outside.sum())} of {scale.size} scales are outside of FP16's range "
            f"({LEAST:.1e} to {MOST:g}): it stays FP32, which keeps its layer from INT8 kernels"
        )
    return not outside.any()


def _keep_chains(plan: Plan) -> None:
    """Take out of FP16 what lies between FP32 operators only: two casts would cost time and accuracy."""
    at = {id(node): i for i, node in enumerate(plan.graph.nodes)}

    def computed_in_half(name: str) -> bool:
        producer = plan.graph.producer.get(name)
        return producer is not None and at[id(producer)] in plan.half

    def between(node: onnx.NodeProto) -> bool:
        if node.op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm"):
            return False
        readers = [at[id(r)] for name in node.output for r in plan.graph.consumers.get(name, [])]
        if not readers or any(i in plan.half for i in readers):
            return False
        if node.op_type == "DequantizeLinear":
            return all(plan.graph.nodes[i].op_type != "QuantizeLinear" for i in readers)
        sources = list(plan.floats(node))
        return bool(sources) and not any(computed_in_half(name) for name in sources)

    while found := [i for i in sorted(plan.half) if between(plan.graph.nodes[i])]:
        plan.half.difference_update(found)


def _follow_producers(plan: Plan) -> None:
    """A QuantizeLinear reads what is there: FP16 where that was computed in it, else FP32, which needs no cast."""
    at = {name: i for i, node in enumerate(plan.graph.nodes) for name in node.output}
    for i, node in enumerate(plan.graph.nodes):
        if node.op_type == "QuantizeLinear" and at.get(node.input[0], -1) in plan.half:
            scale = plan.constants.get(node.input[1])
            if scale is not None and bool(((scale >= LEAST) & (scale <= MOST)).all()):
                plan.half.add(i)
