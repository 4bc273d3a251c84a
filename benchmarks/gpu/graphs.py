"""An ONNX graph under construction: layers with random weights, dense or 2:4, and Q/DQ where the package puts it.

Nothing is calibrated. Every value carries its power, the mean of its squares: weights are drawn so that a layer's
output has power 1, and a quantizer's range is five times the root of it. That keeps the INT8 net close to the float
one, which the tests check, and gives the GPU data that toggle as a trained net's do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from sparsify_deploy.graph.eligibility import rule_of_thumb

OPSET, IR_VERSION = 17, 8
"""TensorRT 8.6 reads no newer ones."""

RANGE = 5.0
"""A quantizer reaches to so many roots of its value's power."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Placement:
    """Where Q/DQ stands; the defaults are the package's.

    `layers`: on every layer's input and weight, per tensor and per output channel; `residual`: on the side of a
    residual add that a layer does not make; `pooling`: in front of global average pooling; `attention`: on both inputs
    of both products; `stream`: on what a layer adds to the sum that a LayerNorm reads, which is float else; `outputs`:
    straight on every layer's output.
    """

    layers: bool = True
    residual: bool = True
    pooling: bool = True
    attention: bool = True
    stream: bool = False
    outputs: bool = False


FLOAT = Placement(layers=False, residual=False, pooling=False, attention=False)
LAYERS_ALONE = Placement(residual=False, pooling=False, attention=False)


@dataclass(frozen=True)
class Value:
    """A tensor of the graph, its channels, and the mean of its squares."""

    name: str
    channels: int
    power: float


class Builder:
    """Collects nodes and initializers; the methods add one operator each and return its output."""

    def __init__(self, placement: Placement | None, *, sparse: bool, seed: int = 0) -> None:
        self.placement = placement or FLOAT
        self._sparse = sparse
        self._random = np.random.default_rng(seed)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._count = 0

    def node(self, op: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """Add a node with one output; returns that."""
        output = f"{name}/out"
        self._nodes.append(helper.make_node(op, list(inputs), [output], name=name, **attributes))
        return output

    def constant(self, name: str, values: Any, dtype: Any = np.float32) -> str:
        """Add an initializer."""
        self._constants.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def quantised(self, value: Value, name: str) -> str:
        """`value` through a QuantizeLinear and a DequantizeLinear of its own, symmetric INT8."""
        scale = RANGE * math.sqrt(value.power) / 127
        return self._pair(value.name, name, np.float32(scale), np.int8(0))

    def layer_input(self, value: Value, name: str) -> str:
        """What the layer `name` reads."""
        return self.quantised(value, f"{name}.input_quantizer") if self.placement.layers else value.name

    def weight(self, name: str, shape: tuple[int, ...], power: float) -> str:
        """A random weight `(K, C, ...)` behind its Q/DQ where layers are quantised."""
        values = self._random.standard_normal(shape, dtype=np.float32)
        if self._sparse and rule_of_thumb(shape, 1, 4).ok:
            values = two_of_four(values)
        fan_in = math.prod(shape[1:])
        values *= np.float32(1 / math.sqrt(fan_in * power * float(np.mean(np.square(values)))))
        stored = self.constant(f"{name}.weight", values)
        if not self.placement.layers:
            return stored
        scales = np.abs(values).reshape(len(values), -1).max(axis=1) / 127
        zeros = np.zeros(len(values), np.int8)
        return self._pair(stored, f"{name}.weight_quantizer", scales, zeros, axis=0)

    def convolution(self, value: Value, name: str, outputs: int, kernel: int, stride: int = 1) -> Value:
        """Conv with a bias, padded to keep the size at stride 1."""
        source = self.layer_input(value, name)
        shape = (outputs, value.channels, kernel, kernel)
        weight = self.weight(name, shape, value.power)
        pads = [kernel // 2] * 4
        made = self.node(
            "Conv",
            [source, weight, self._bias(name, outputs)],
            name,
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=pads,
        )
        return self._output(Value(made, outputs, 1.01), name)

    def linear(self, value: Value, name: str, outputs: int, *, rows: bool = False) -> Value:
        """A Linear as the TorchScript exporter writes it: Gemm on `rows` `(B, C)`, else Transpose, MatMul, Add."""
        source = self.layer_input(value, name)
        weight = self.weight(name, (outputs, value.channels), value.power)
        bias = self._bias(name, outputs)
        if rows:
            made = self.node("Gemm", [source, weight, bias], name, transB=1)
        else:
            turned = self.node("Transpose", [weight], f"{name}/Transpose", perm=[1, 0])
            product = self.node("MatMul", [source, turned], name)
            made = self.node("Add", [bias, product], f"{name}/Add")
        return self._output(Value(made, outputs, 1.01), name)

    def relu(self, value: Value, name: str) -> Value:
        """Half the power of something symmetric; taken for any input."""
        return Value(self.node("Relu", [value.name], name), value.channels, value.power / 2)

    def residual(self, made: Value, other: Value, name: str) -> Value:
        """`made + other`: `made` is straight from a layer, which fuses with the add if `other` is quantised."""
        right = self.quantised(other, f"{name}.quantizer") if self.placement.residual else other.name
        return Value(self.node("Add", [made.name, right], name), made.channels, made.power + other.power)

    def stream(self, made: Value, other: Value, name: str) -> Value:
        """`made + other` where a LayerNorm reads the sum."""
        left = self.quantised(made, f"{name}.quantizer") if self.placement.stream else made.name
        return Value(self.node("Add", [left, other.name], name), made.channels, made.power + other.power)

    def product(self, one: Value, other: Value, name: str) -> str:
        """A product of attention."""
        sides = (one, other)
        if self.placement.attention:
            names = [self.quantised(side, f"{name}.quantizer_{i}") for i, side in enumerate(sides)]
        else:
            names = [side.name for side in sides]
        return self.node("MatMul", names, name)

    def norm(self, value: Value, name: str) -> Value:
        """LayerNormalization over the last axis."""
        scale = self.constant(f"{name}.weight", np.ones(value.channels))
        bias = self.constant(f"{name}.bias", np.zeros(value.channels))
        made = self.node("LayerNormalization", [value.name, scale, bias], name, axis=-1, epsilon=1e-5)
        return Value(made, value.channels, 1.0)

    def gelu(self, value: Value, name: str) -> Value:
        """The exact one, in the five operators that exporters write."""
        halved = self.node("Div", [value.name, self._scalar(math.sqrt(2.0))], f"{name}/Div")
        erf = self.node("Erf", [halved], f"{name}/Erf")
        one = self.node("Add", [erf, self._scalar(1.0)], f"{name}/Add")
        product = self.node("Mul", [value.name, one], f"{name}/Mul")
        return Value(self.node("Mul", [product, self._scalar(0.5)], name), value.channels, 0.43 * value.power)

    def model(self, shape: Sequence[int], batch: int | None, output: Value, name: str) -> onnx.ModelProto:
        """The finished model: `input` of `(batch, *shape)`, `output`; `batch` None leaves that axis free."""
        first: int | str = batch if batch is not None else "batch"
        self._nodes.append(helper.make_node("Identity", [output.name], ["output"], name="output"))
        graph = helper.make_graph(
            self._nodes,
            name,
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, [first, *shape])],
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
            self._constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        return with_output_shape(model)

    def _output(self, value: Value, name: str) -> Value:
        if not self.placement.outputs:
            return value
        return Value(self.quantised(value, f"{name}.output_quantizer"), value.channels, value.power)

    def _pair(self, source: str, name: str, scale: Any, zero: Any, **axis: int) -> str:
        parameters = [self.constant(f"{name}.scale", scale), self.constant(f"{name}.zero", zero, np.int8)]
        quantised = self.node("QuantizeLinear", [source, *parameters], f"{name}/Q", **axis)
        return self.node("DequantizeLinear", [quantised, *parameters], f"{name}/DQ", **axis)

    def _bias(self, name: str, outputs: int) -> str:
        return self.constant(f"{name}.bias", 0.1 * self._random.standard_normal(outputs))

    def _scalar(self, value: float) -> str:
        self._count += 1
        return self.constant(f"scalar_{self._count}", value)


def two_of_four(values: Floats) -> Floats:
    """`(K, C, ...)` with the two smaller of every four consecutive input channels set to zero."""
    groups = values.reshape(len(values), -1, 4, math.prod(values.shape[2:]))
    sizes = np.abs(groups)
    larger = np.zeros(groups.shape, np.int8)
    for i in range(4):
        for j in range(i):  # of equals the first is kept
            bigger = sizes[:, :, i] > sizes[:, :, j]
            larger[:, :, j] += bigger
            larger[:, :, i] += ~bigger
    result: Floats = np.where(larger < 2, groups, np.float32(0)).reshape(values.shape)
    return result


def with_output_shape(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with the inferred shape of its one output; intermediate shapes are left out.

    Inference copies the whole model more than once, so weights go in as inputs of their shape.
    """
    bare = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    bare.graph.name = model.graph.name
    bare.graph.node.extend(model.graph.node)
    bare.graph.input.extend(model.graph.input)
    bare.graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) > 1024:
            bare.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            bare.graph.initializer.append(tensor)
    inferred = onnx.shape_inference.infer_shapes(bare, strict_mode=True)
    model.graph.output[0].CopyFrom(inferred.graph.output[0])
    return model
