"""The workloads of an ONNX file, by shape inference with the batch size set to one and free axes to typical sizes."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from sparsify_deploy.errors import ModelError
from sparsify_deploy.graph import file
from sparsify_deploy.graph.axis_sizes import input_axes
from sparsify_deploy.graph.constants import attribute, label
from sparsify_deploy.graph.layers import weight_layers
from sparsify_deploy.graph.workload import Tally, Workload

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparsify_deploy.graph.layers import WeightLayer


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MOVES = _names(
    "Identity Reshape Flatten Transpose Squeeze Unsqueeze Cast CastLike QuantizeLinear DequantizeLinear "
    "DynamicQuantizeLinear Dropout Slice Split Expand Concat Pad Tile"
)
_POINTWISE = _names(
    "Relu Clip LeakyRelu PRelu Elu Selu Celu Gelu Sigmoid HardSigmoid HardSwish Mish Softplus Softsign Tanh "
    "Erf Add Sub Mul Div Pow Sqrt Exp Log Neg Abs Reciprocal Sign Floor Ceil Round Min Max Sum Mean Where "
    "Equal Greater GreaterOrEqual Less LessOrEqual And Or Not Mod Sin Cos ThresholdedRelu BatchNormalization"
)
_SHAPES = frozenset(("Shape", "Size", "ConstantOfShape", "EyeLike", "Range"))
_NAMES = {
    **dict.fromkeys(("LogSoftmax", "Softmax"), "Softmax"),
    **dict.fromkeys(("MaxPool", "AveragePool", "LpPool"), "Pool"),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool"), "Reduce"),
    "Gemm": "MatMul",
    "LayerNormalization": "LayerNorm",
    "InstanceNormalization": "GroupNorm",
    "Gather": "Embedding",
}
_ARITHMETIC = _names(
    "Constant Gather Unsqueeze Squeeze Concat Mul Div Add Sub Cast Slice Reshape Identity Floor Ceil Neg Min "
    "Max Mod ConstantOfShape Equal Where Expand Range ReduceProd"
)
"""What exporters compute shapes with."""

_LARGE = 4096
"""Elements from which a constant is surely no shape."""


def workloads(model: onnx.ModelProto) -> tuple[Workload, ...]:
    """One row a layer, in graph order, for one example: axis 0 of every input that leaves it open is 1.

    Other open axes have the typical size that the file says.

    Raises:
        ModelError: an input leaves another axis open and the file does not say its size, or shape
            inference does not know a shape; names it.
    """
    shapes = _shapes(model)
    tally = Tally()
    constant = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        if value.name not in constant:
            tally.feed(value.name, prod(shapes[value.name]))
    weighted = [*reversed(weight_layers(model))]
    for node in model.graph.node:
        own = (node.name or node.output[0], node.op_type)
        layer = weighted.pop() if weighted and (weighted[-1].name, weighted[-1].op) == own else None
        if node.op_type not in _SHAPES:
            _add(tally, node, layer, shapes)
    return tally.done(value.name for value in model.graph.output)


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors for one example, those that inference does not know left out.

    Inference alone stops at a Reshape whose target is computed from shapes with a Div, say; so what is computed from
    known shapes becomes a constant, and inference runs again, as long as that brings something new.
    """
    bare = _for_one_example(model)
    while True:
        found = _inferred(bare)
        if all(name in found for node in bare.graph.node for name in node.output if name):
            return found
        if not _fold_(bare, found):
            return found


def _for_one_example(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with the batch size 1 and typical sizes, and with its large constants as inputs of the same shape."""
    bare = onnx.ModelProto()
    bare.ir_version = model.ir_version
    bare.opset_import.extend(model.opset_import)
    bare.functions.extend(model.functions)
    bare.graph.name = model.graph.name
    bare.graph.node.extend(model.graph.node)
    constant = {tensor.name for tensor in model.graph.initializer}
    known = input_axes(model)
    for value in model.graph.input:
        if value.name in constant:
            continue
        sizes = known.get(value.name, {})
        kept = bare.graph.input.add()
        kept.CopyFrom(value)
        for axis, dim in enumerate(kept.type.tensor_type.shape.dim):
            if dim.HasField("dim_value"):
                continue
            if axis and axis not in sizes:
                raise ModelError(f"input {value.name!r} leaves axis {axis} open: export it with a fixed size there")
            dim.dim_value = sizes[axis].typical if axis else 1
    for tensor in model.graph.initializer:
        if prod(tensor.dims) > _LARGE:
            bare.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, [*tensor.dims]))
        else:
            bare.graph.initializer.append(tensor)
    for value in model.graph.output:
        kept = bare.graph.output.add()
        kept.CopyFrom(value)
        kept.type.tensor_type.ClearField("shape")
    return bare


def _inferred(bare: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    inferred = onnx.shape_inference.infer_shapes(bare, data_prop=True).graph
    found = {tensor.name: tuple(tensor.dims) for tensor in inferred.initializer}
    for value in (*inferred.value_info, *inferred.input, *inferred.output):
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(dim.HasField("dim_value") for dim in kind.shape.dim):
            found[value.name] = tuple(dim.dim_value for dim in kind.shape.dim)
    return found


def _fold_(bare: onnx.ModelProto, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Put a constant in place of each small output of known inputs, Shape's above all; whether there was any."""
    opset = file.opset(bare)
    known = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in bare.graph.initializer}
    results: dict[str, NDArray[Any]] = {}
    kept = []
    for node in bare.graph.node:
        name = node.output[0]
        if node.op_type == "Shape" and not node.attribute and node.input[0] in shapes:
            results[name] = np.array(shapes[node.input[0]], np.int64)
        elif (
            len(node.output) == 1
            and node.domain in ("", "ai.onnx")
            and node.op_type in _ARITHMETIC
            and all(source in known for source in node.input if source)
        ):
            given = {source: known[source] for source in node.input if source}
            results[name] = np.asarray(next(iter(ReferenceEvaluator(node, opsets={"": opset}).run(None, given))))
        else:
            kept.append(node)
            continue
        known[name] = results[name]
    if not results:
        return False
    del bare.graph.node[:]
    bare.graph.node.extend(kept)
    bare.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in results.items())
    return True


def _add(tally: Tally, node: onnx.NodeProto, layer: WeightLayer | None, shapes: dict[str, tuple[int, ...]]) -> None:
    live = tally.live(node.input)
    if not live:
        return
    written = [name for name in node.output if name]
    if unknown := [name for name in written if name not in shapes]:
        raise ModelError(f"{node.op_type} {label(node)!r}: shape inference does not know the shape of {unknown[0]!r}")
    outputs = [(name, prod(shapes[name])) for name in written]
    if layer is not None:
        tally.layer(
            layer.weight.removesuffix(".weight"),
            "Conv" if node.op_type == "Conv" else "Linear",
            live,
            outputs,
            macs=outputs[0][1] * prod(layer.shape[1:]),  # an output element sums C / groups * kernel products
            shape=layer.shape,
            groups=layer.groups,
            parameter=layer.weight,
        )
    elif node.op_type in _MOVES or (node.op_type == "Gather" and node.input[0] in live):
        tally.move(live, outputs)
    elif node.op_type in _POINTWISE:
        tally.pointwise(node.name or written[0], live, outputs)
    else:
        op = "Reduce" if node.op_type.startswith("Reduce") else _NAMES.get(node.op_type, node.op_type)
        macs = _products(node, shapes, outputs[0][1])
        tally.layer(node.name or written[0], op, live, outputs, macs=macs)


def _products(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]], written: int) -> int:
    """Multiply-adds of an operator whose weight is no constant, or that is transposed."""
    if node.op_type in ("MatMul", "Gemm"):
        left = shapes[node.input[0]]
        return written * left[0 if attribute(node, "transA", 0) else -1]
    if node.op_type == "ConvTranspose":
        return prod(shapes[node.input[0]]) * prod(shapes[node.input[1]][1:])
    return 0
