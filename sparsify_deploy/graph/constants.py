"""Constants of an ONNX graph, followed through the operators that exporters put in front of a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import numpy_helper

from sparsify_deploy.errors import ModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LONGEST_CHAIN = 32
_BOUNDS = {
    "int8": (-128, 127),
    "uint8": (0, 255),
    "int16": (-32768, 32767),
    "uint16": (0, 65535),
    "int4": (-8, 7),
    "uint4": (0, 15),
    "float8_e4m3fn": (-448, 448),
    "float8_e5m2": (-57344, 57344),
}
"""Quantised types to what QuantizeLinear saturates at."""

_PRECISION = {
    "float64": "FP64",
    "float32": "FP32",
    "float16": "FP16",
    "bfloat16": "BF16",
    "int8": "INT8",
    "uint8": "UINT8",
    "int16": "INT16",
    "uint16": "UINT16",
    "int4": "INT4",
    "uint4": "UINT4",
    "float8_e4m3fn": "FP8",
    "float8_e5m2": "FP8",
}


@dataclass(frozen=True, eq=False)
class Weight:
    """A constant: the initializer it starts from, its values as the last operator gives them, and their precision.

    Behind Q/DQ the values are the integers less the zero point, and the precision is the integers' own.
    """

    initializer: str
    values: NDArray[Any]
    precision: str


class Graph:
    """Who makes and who reads each tensor of a model's top graph."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.nodes = tuple(graph.node)
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.outputs = {value.name for value in graph.output}
        self.producer = {name: node for node in self.nodes for name in node.output if name}
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self.consumers.setdefault(name, []).append(node)

    def weight(self, name: str) -> Weight | None:
        """The constant behind `name`, looking through Identity, Cast, Transpose and Q/DQ; None if it is none."""
        return self._weight(name, 0)

    def quantised_type(self, node: onnx.NodeProto) -> str:
        """The numpy name of the type that a QuantizeLinear writes or a DequantizeLinear reads, "" if unknown."""
        zero_point = self.weight(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if zero_point is not None:
            return zero_point.values.dtype.name
        source = self.producer.get(node.input[0])
        if node.op_type == "DequantizeLinear":
            if node.input[0] in self.initializers:
                return str(onnx.helper.tensor_dtype_to_np_dtype(self.initializers[node.input[0]].data_type))
            return self.quantised_type(source) if source is not None and source.op_type == "QuantizeLinear" else ""
        kind = int(attribute(node, "output_dtype", onnx.TensorProto.UINT8)) or onnx.TensorProto.UINT8
        return str(onnx.helper.tensor_dtype_to_np_dtype(kind))

    def check_scales(self) -> None:
        """Every constant Q/DQ scale must be positive and finite: builders divide by it.

        Raises:
            ModelError: one is not; names the node.
        """
        for node in self.nodes:
            if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
                continue
            scale = self.weight(node.input[1])
            if scale is None:
                continue
            values = scale.values.astype(np.float64)
            if not (np.isfinite(values) & (values > 0)).all():
                bad = int((~(np.isfinite(values) & (values > 0))).sum())
                raise ModelError(
                    f"{node.op_type} {label(node)!r}: {bad} of {values.size} scales are not above 0; "
                    "calibrate again, or give wholly pruned channels a scale"
                )

    def _weight(self, name: str, depth: int) -> Weight | None:  # noqa: PLR0911 - one return an operator
        if depth > _LONGEST_CHAIN:
            raise ModelError(f"{name!r}: more than {_LONGEST_CHAIN} operators in front of a constant, or a circle")
        if name in self.initializers:
            return _constant(name, self.initializers[name])
        node = self.producer.get(name)
        if node is None:
            return None
        if node.op_type == "Constant":
            value = next((a.t for a in node.attribute if a.name == "value"), None)
            return _constant(name, value) if value is not None else None
        if node.op_type == "DequantizeLinear":
            return self._dequantised(node, depth)
        if node.op_type not in ("Identity", "Cast", "Transpose"):
            return None
        source = self._weight(node.input[0], depth + 1)
        if source is None or node.op_type == "Identity":
            return source
        if node.op_type == "Transpose":
            order = attribute(node, "perm", None)
            return Weight(source.initializer, np.transpose(source.values, order), source.precision)
        kind = onnx.helper.tensor_dtype_to_np_dtype(int(attribute(node, "to", 0)))
        if source.values.dtype.kind == "f" and np.dtype(kind).kind == "f":
            kind = source.values.dtype  # the precision stored is what counts, and a wider type changes no value
        return Weight(source.initializer, source.values.astype(kind), _PRECISION.get(kind.name, kind.name.upper()))

    def _dequantised(self, node: onnx.NodeProto, depth: int) -> Weight | None:
        """The integers a DequantizeLinear reads, less its zero point."""
        source = self.producer.get(node.input[0])
        quantised: Weight | None
        if source is not None and source.op_type == "QuantizeLinear":
            quantised = self._quantised(source, depth + 1)
        else:
            quantised = self._weight(node.input[0], depth + 1)
        if quantised is None:
            return None
        zero = self.weight(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if zero is None or not np.any(zero.values):
            return quantised
        wide = quantised.values.astype(np.int32)
        shift = _along(node, zero.values.astype(np.int32), wide.shape)
        return Weight(quantised.initializer, wide - shift, quantised.precision)

    def _quantised(self, node: onnx.NodeProto, depth: int) -> Weight | None:
        """saturate(round(x / scale) + zero point), ties to even, in float32, as ONNX defines QuantizeLinear."""
        source, scale = self._weight(node.input[0], depth + 1), self.weight(node.input[1])
        if source is None or scale is None:
            return None
        kind = self.quantised_type(node)
        if kind not in _BOUNDS:
            raise ModelError(f"QuantizeLinear {label(node)!r}: quantises to {kind}, which is not supported")
        real = source.values.astype(np.float32)
        if not np.isfinite(real).all():
            raise ModelError(f"{source.initializer!r}: holds weights that are not finite")
        divisor = _along(node, scale.values.astype(np.float32), real.shape)
        with np.errstate(over="ignore"):  # beyond float32 it saturates like any large value
            ratio = real / divisor
        low, high = _BOUNDS[kind]
        if kind.startswith("float8"):
            saturated = np.clip(ratio, low, high)
        else:
            zero = self.weight(node.input[2]) if len(node.input) > 2 and node.input[2] else None
            shift = 0.0 if zero is None else _along(node, zero.values.astype(np.float32), real.shape)
            saturated = np.clip(np.rint(ratio) + shift, low, high)
        stored = np.int8 if kind == "int4" else np.uint8 if kind == "uint4" else None
        values = saturated.astype(stored or onnx.helper.tensor_dtype_to_np_dtype(_TYPES[kind]))
        return Weight(source.initializer, values, _PRECISION[kind])


_TYPES = {
    "int8": onnx.TensorProto.INT8,
    "uint8": onnx.TensorProto.UINT8,
    "int16": onnx.TensorProto.INT16,
    "uint16": onnx.TensorProto.UINT16,
    "float8_e4m3fn": onnx.TensorProto.FLOAT8E4M3FN,
    "float8_e5m2": onnx.TensorProto.FLOAT8E5M2,
}


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """The value of a node's attribute, or `default`."""
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def label(node: onnx.NodeProto) -> str:
    """A node's name, or its output where it has none."""
    return node.name or node.output[0]


def _constant(name: str, tensor: onnx.TensorProto) -> Weight:
    values = numpy_helper.to_array(tensor)
    return Weight(name, values, _PRECISION.get(values.dtype.name, values.dtype.name.upper()))


def _along(node: onnx.NodeProto, parameter: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """A scale or zero point shaped to broadcast over `shape`: one a tensor, one a slice of `axis`, or one a block.

    Raises:
        ModelError: its length fits none of the three.
    """
    if parameter.size == 1:
        return parameter.reshape(())
    axis = int(attribute(node, "axis", 1))
    axis += len(shape) if axis < 0 else 0
    block = int(attribute(node, "block_size", 0))
    if not 0 <= axis < len(shape):
        raise ModelError(f"{node.op_type} {label(node)!r}: axis {axis} does not exist in shape {shape}")
    if block:
        repeated = np.repeat(parameter, block, axis=axis)
        taken: NDArray[Any] = np.take(repeated, np.arange(shape[axis]), axis=axis)
        return taken
    if parameter.ndim != 1 or parameter.size != shape[axis]:
        raise ModelError(
            f"{node.op_type} {label(node)!r}: {parameter.size} scales for axis {axis} of length {shape[axis]}"
        )
    return parameter.reshape([-1 if i == axis else 1 for i in range(len(shape))])
