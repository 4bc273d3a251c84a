"""From the `tensorrt` flavour of Q/DQ to the `onnxruntime` one, with the same trained scales.

TensorRT and OpenVINO fuse a convolution with what follows it and want no Q on its output in front of a residual add.
ONNX Runtime replaces an operator by its integer kernel (QLinearConv, QLinearAdd, QLinearGlobalAveragePool...) only
where each of its inputs comes out of a DequantizeLinear, its bias is INT32, all activations have one 8-bit type, and
one QuantizeLinear alone reads its output, at most behind a Relu or Clip which that Q makes superfluous. So:

- Activations become UINT8. A value that can be negative keeps its scale, with zero point 128: the same numbers as in
  INT8, -128 besides. After a Relu the scale stays and the zero point is 0: the same numbers again, and where INT8
  stops at 127 steps, this goes on to 255. Only in front of a Clip the scale shrinks to 127 / 255 of itself, for ONNX
  Runtime drops a Clip that the Q's own range implies and no other.
- Outputs of Conv, Add, Concat and average pooling get Q/DQ where they had none. Where a trained scale lies behind
  reshaping or max pooling it is taken, else a range that was measured: `unranged` names those tensors.
- Several Q of one tensor with one scale become one. Biases become INT32, weights are stored as INT8, those of a
  MatMul the way round in which it reads them.

A Gemm or MatMul may keep a float output (QGemm, MatMulIntegerToFloat).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import numpy_helper

from sparsify_deploy.errors import ModelError
from sparsify_deploy.graph.constants import Graph, attribute, label
from sparsify_deploy.graph.int8_weights import store_int8_weights_

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MOVES = ("Identity", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "MaxPool")
"""Keep every value as it is."""

_VALUE_BY_VALUE = (*_MOVES, "DequantizeLinear", "Relu", "Clip")
_AVERAGES = ("GlobalAveragePool", "AveragePool")
_JOINS = ("Add", "Concat")
_STEPS = 255
_INT8_STEPS = 127


@dataclass(frozen=True)
class Rewritten:
    """What `to_onnxruntime_` did, by tensor or layer name.

    `trained`: outputs that got Q/DQ of a scale that was there. `measured`: those that got a measured range.
    `float_layers`: quantised layers that ONNX Runtime will compute in float, each with the reason.
    """

    trained: tuple[str, ...]
    measured: tuple[str, ...]
    float_layers: Mapping[str, str]


def unranged(model: onnx.ModelProto) -> tuple[str, ...]:
    """The tensors whose smallest and largest value `to_onnxruntime_` needs, in graph order.

    Raises:
        ModelError: an activation is quantised other than per tensor, in INT8, with zero point 0.
    """
    return tuple(name for name, scale in _planned(_Rewriting(model)).items() if scale is None)


def to_onnxruntime_(model: onnx.ModelProto, ranges: Mapping[str, tuple[float, float]]) -> Rewritten:
    """Rewrite `model` in place. `ranges`: smallest and largest value of each tensor that `unranged` names.

    Raises:
        ModelError: as `unranged`, a range is missing, or it is not finite.
    """
    store_int8_weights_(model)
    rewriting = _Rewriting(model)
    planned = _planned(rewriting)
    for name, scale in planned.items():
        if scale is None and name not in ranges:
            raise ModelError(f"{name!r}: its range was not measured, which the onnxruntime flavour needs")
        if scale is None and not all(np.isfinite(ranges[name])):
            raise ModelError(f"{name!r}: its measured range {ranges[name]} is not finite")
    grids = {name: rewriting.grid(name, scale, ranges.get(name)) for name, scale in planned.items()}
    grids = {**rewriting.trained_grids(), **grids}
    merged = _merge_quantizers_(model, grids)
    _insert_(model, {name: grids[name] for name in planned if name not in merged})
    _unsigned_(model, grids)
    _transpose_weights_(model)
    left = _int32_biases_(model)
    return Rewritten(
        trained=tuple(name for name, scale in planned.items() if scale is not None and name not in merged),
        measured=tuple(name for name, scale in planned.items() if scale is None),
        float_layers={**rewriting.float_layers, **left},
    )


def unsigned_(model: onnx.ModelProto) -> int:
    """Quantise what cannot be negative in UINT8 with the same scale and zero point 0; returns how many Q changed.

    For OpenVINO, which shifts signed activations by 128 and then neither fuses a residual add nor pads a convolution
    for free. Not one value changes: a Relu or Clip in front stops at 127 steps from then on, where INT8 does, and
    where no Q alone reads one, the activation stays in INT8. Around a concatenation all Q become UINT8 with zero point
    128, the same numbers: of signed ones OpenVINO 2026.4 computes something else.
    """
    rewriting = _Rewriting(model)
    graph = rewriting.graph
    around = [node for node in graph.nodes if _is_signed(graph, node) and _around_concat(graph, node)]
    chosen = [node for node in graph.nodes if node not in around and _non_negative(rewriting, node)]
    for node in (*around, *chosen):
        scale = graph.weight(node.input[1])
        assert scale is not None
        step = np.float32(scale.values.reshape(()))
        if node in chosen:
            _saturate_(model, rewriting, node.input[0], step)
        constants = _constants_(model, node.output[0], _Grid(step, 0 if node in chosen else 128))
        for each in (node, *graph.consumers.get(node.output[0], [])):
            del each.input[1:]
            each.input.extend(constants)
    return len(around) + len(chosen)


def _non_negative(rewriting: _Rewriting, node: onnx.NodeProto) -> bool:
    """Whether this Q makes INT8 of an activation that cannot be negative, and that stops at 127 steps."""
    graph = rewriting.graph
    if not _is_signed(graph, node) or rewriting.bounds(node.input[0])[0] < 0:
        return False
    scale = graph.weight(node.input[1])
    return scale is not None and _stops(graph, node.input[0], scale.values)


def _is_signed(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether this Q makes INT8 with zero point 0 of an activation, for DQ alone."""
    if node.op_type != "QuantizeLinear" or graph.weight(node.input[0]) is not None:
        return False
    scale, zero = graph.weight(node.input[1]), graph.weight(node.input[2]) if node.input[2:] else None
    if scale is None or scale.values.size != 1 or zero is None or zero.values.any():
        return False
    readers = graph.consumers.get(node.output[0], [])
    only_read = node.output[0] not in graph.outputs and all(r.op_type == "DequantizeLinear" for r in readers)
    return only_read and graph.quantised_type(node) == "int8"


def _around_concat(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether this Q reads a concatenation, or one reads what it makes, through what computes value by value."""
    before = graph.producer.get(node.input[0])
    while before is not None and before.op_type in _VALUE_BY_VALUE:
        before = graph.producer.get(before.input[0])
    if before is not None and before.op_type == "Concat":
        return True
    waiting = list(node.output)
    while waiting:
        for reader in graph.consumers.get(waiting.pop(), []):
            if reader.op_type == "Concat":
                return True
            if reader.op_type in _VALUE_BY_VALUE:
                waiting.extend(reader.output)
    return False


def _stops(graph: Graph, name: str, scale: NDArray[Any]) -> bool:
    """Whether a tensor is at most 127 steps, or comes out of a Relu or Clip that may be made to stop there."""
    tensors = _moved(graph, name)
    source = graph.producer[tensors[-1]]
    if source.op_type == "DequantizeLinear":
        own = graph.weight(source.input[1])
        same = own is not None and bool(np.array_equal(own.values, scale))
        return same and graph.quantised_type(source) == "int8"
    alone = all(len(graph.consumers[each]) == 1 and each not in graph.outputs for each in tensors)
    return source.op_type in ("Relu", "Clip") and alone


def _moved(graph: Graph, name: str) -> list[str]:
    """A tensor and those before it that hold the same values, last to first."""
    tensors = [name]
    while (node := graph.producer.get(tensors[-1])) is not None and node.op_type in _MOVES:
        tensors.append(node.input[0])
    return tensors


def _saturate_(model: onnx.ModelProto, rewriting: _Rewriting, name: str, step: np.float32) -> None:
    """Let the Relu or Clip that makes a tensor stop at 127 steps, or before."""
    name = _moved(rewriting.graph, name)[-1]
    node = rewriting.graph.producer[name]
    if node.op_type not in ("Relu", "Clip"):
        return
    most = min(float(step) * _INT8_STEPS, rewriting.bounds(name)[1])
    bounds = (f"{name}/least", f"{name}/most")
    for bound, value in zip(bounds, (0.0, most), strict=True):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), bound))
    node.op_type = "Clip"
    del node.input[1:]
    node.input.extend(bounds)


@dataclass(frozen=True)
class _Grid:
    """How a tensor is quantised: value = scale * (integer - zero point), UINT8."""

    scale: np.float32
    zero_point: int


@dataclass
class _Rewriting:
    """The graph, and the layers found to stay in float."""

    model: onnx.ModelProto
    float_layers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.graph = Graph(self.model)
        self.graph.check_scales()

    def trained(self, name: str) -> np.float32 | None:
        """The scale of the Q that reads a tensor, looking through what keeps values; None where there is none."""
        readers = self.graph.consumers.get(name, [])
        for node in readers:
            if node.op_type == "QuantizeLinear" and node.input[0] == name:
                return self.scale_of(node)
        for node in readers:
            if node.op_type in _MOVES and (found := self.trained(node.output[0])) is not None:
                return found
        return None

    def scale_of(self, node: onnx.NodeProto) -> np.float32:
        """The scale of a symmetric INT8 activation."""
        scale, zero = self.graph.weight(node.input[1]), self.graph.weight(node.input[2]) if node.input[2:] else None
        kind = self.graph.quantised_type(node)
        if scale is None or scale.values.size != 1 or kind != "int8" or (zero is not None and zero.values.any()):
            raise ModelError(
                f"{node.op_type} {label(node)!r}: the tensorrt flavour quantises activations in INT8 with one constant "
                f"scale and zero point 0; this one is {kind or 'of an unknown type'}"
            )
        return np.float32(scale.values.reshape(()))

    def trained_grids(self) -> dict[str, _Grid]:
        """The grid of each activation that a Q reads."""
        quantizers = [n for n in self.graph.nodes if n.op_type == "QuantizeLinear" and not self.is_constant(n.input[0])]
        return {node.input[0]: self.grid(node.input[0], self.scale_of(node), None) for node in quantizers}

    def is_constant(self, name: str) -> bool:
        return self.graph.weight(name) is not None

    def grid(self, name: str, scale: np.float32 | None, measured: tuple[float, float] | None) -> _Grid:
        """The UINT8 grid of a tensor from its trained INT8 scale, else from its measured range."""
        low, high = self.bounds(name)
        if scale is None:
            assert measured is not None
            least, most = max(min(measured[0], 0.0), low), min(max(measured[1], 0.0), high)
            step = np.float32((most - least) / _STEPS) or np.float32(1.0)
            return _Grid(_within(step, high) if low == 0 else step, int(np.clip(np.rint(-least / step), 0, _STEPS)))
        if low < 0:
            return _Grid(scale, 128)
        if high < np.inf:
            return _Grid(_within(np.float32(min(float(scale) * _INT8_STEPS, high) / _STEPS), high), 0)
        return _Grid(scale, 0)

    def bounds(self, name: str) -> tuple[float, float]:
        """What a tensor cannot go below or above, 0 or -inf and a Clip's constant or inf."""
        node = self.graph.producer.get(name)
        if node is None:
            return -np.inf, np.inf
        if node.op_type in ("Relu", "Sigmoid", "Softmax"):
            return 0.0, np.inf
        if node.op_type == "Clip":
            return _clip_bounds(self.graph, node)
        if node.op_type in (*_MOVES, *_AVERAGES, "QuantizeLinear", "DequantizeLinear"):
            return self.bounds(node.input[0])
        if node.op_type in _JOINS and all(self.bounds(source)[0] == 0 for source in node.input):
            return 0.0, np.inf
        return -np.inf, np.inf

    def fused_output(self, node: onnx.NodeProto) -> str:
        """The tensor that a Q should read: the node's output, or that of the Relu or Clip which alone reads it."""
        name = str(node.output[0])
        readers = self.graph.consumers.get(name, [])
        if len(readers) != 1 or name in self.graph.outputs:
            return name
        follower = readers[0]
        if follower.op_type == "Relu" or (follower.op_type == "Clip" and self.bounds(follower.output[0])[0] == 0):
            return str(follower.output[0])
        return name


def _within(step: np.float32, high: float) -> np.float32:
    """The largest step not above `step` whose 255 steps do not pass `high`, in float32 as ONNX Runtime computes."""
    while np.float32(step * np.float32(_STEPS)) > high:
        step = np.nextafter(step, np.float32(0))
    return step


def _clip_bounds(graph: Graph, node: onnx.NodeProto) -> tuple[float, float]:
    sides = [graph.weight(name) if name else None for name in (*node.input[1:3], "", "")[:2]]
    low, high = (float(side.values.reshape(())) if side is not None else None for side in sides)
    return (0.0, high if high is not None else np.inf) if low == 0 else (-np.inf, np.inf)


def _planned(rewriting: _Rewriting) -> dict[str, np.float32 | None]:
    """The tensors that need one Q of their own, with the trained scale, or None where there is none."""
    graph = rewriting.graph
    int8: set[str] = set()
    planned: dict[str, np.float32 | None] = {}
    for node in graph.nodes:
        if node.op_type == "DequantizeLinear":
            int8.update(node.output)
        elif node.op_type in _MOVES and node.input[0] in int8 and node.input[0] not in graph.initializers:
            int8.add(node.output[0])
        elif _fuses(graph, node, int8):
            name = rewriting.fused_output(node)
            if name in graph.outputs:
                rewriting.float_layers[label(node)] = "it is an output of the network, which stays in float"
                continue
            planned[name] = rewriting.trained(name)
            int8.add(name)
    return planned


def _fuses(graph: Graph, node: onnx.NodeProto, int8: set[str]) -> bool:
    """Whether ONNX Runtime has an integer kernel for this node that needs a Q on the output."""
    if node.op_type == "Conv":
        return node.input[0] in int8 and node.input[1] in int8
    if node.op_type in _AVERAGES:
        return node.input[0] in int8
    return node.op_type in _JOINS and all(name in int8 and graph.weight(name) is None for name in node.input)


def _merge_quantizers_(model: onnx.ModelProto, grids: Mapping[str, _Grid]) -> set[str]:
    """Let one Q stand for all of a tensor with one scale; returns the tensors that nothing but this Q reads."""
    graph = Graph(model)
    done = set()
    for name in grids:
        readers = graph.consumers.get(name, [])
        quantizers = [node for node in readers if node.op_type == "QuantizeLinear"]
        if not quantizers:
            continue
        first, *others = quantizers
        scale = graph.weight(first.input[1])
        for other in others:
            twin = graph.weight(other.input[1])
            assert scale is not None
            assert twin is not None
            if twin.values != scale.values or other.output[0] in graph.outputs:
                continue
            for reader in graph.consumers.get(other.output[0], []):
                reader.input[0] = first.output[0]
            model.graph.node.remove(other)
        if len(Graph(model).consumers[name]) == 1 and name not in graph.outputs:
            done.add(name)
    return done


def _insert_(model: onnx.ModelProto, grids: Mapping[str, _Grid]) -> None:
    """Put Q/DQ on tensors, and let all their readers read what comes out of it."""
    graph = Graph(model)
    nodes: list[onnx.NodeProto] = []
    for node in list(model.graph.node):
        nodes.append(node)
        for name in node.output:
            if name not in grids:
                continue
            quantised, real = f"{name}/onnxruntime_q", f"{name}/onnxruntime_dq"
            for reader in graph.consumers.get(name, []):
                for i, source in enumerate(reader.input):
                    if source == name:
                        reader.input[i] = real
            constants = _constants_(model, f"{name}/onnxruntime", grids[name])
            nodes.append(onnx.helper.make_node("QuantizeLinear", [name, *constants], [quantised], name=quantised))
            nodes.append(onnx.helper.make_node("DequantizeLinear", [quantised, *constants], [real], name=real))
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _constants_(model: onnx.ModelProto, name: str, grid: _Grid) -> tuple[str, str]:
    """Initializers for a scale and a zero point, both scalars: ONNX Runtime drops no Clip in front of others."""
    scale, zero = f"{name}_scale", f"{name}_zero_point"
    model.graph.initializer.append(numpy_helper.from_array(np.array(grid.scale, np.float32), scale))
    model.graph.initializer.append(numpy_helper.from_array(np.array(grid.zero_point, np.uint8), zero))
    return scale, zero


def _unsigned_(model: onnx.ModelProto, grids: Mapping[str, _Grid]) -> None:
    """Give every activation's Q, and the DQ that read it, the tensor's UINT8 grid."""
    graph = Graph(model)
    for node in graph.nodes:
        if node.op_type != "QuantizeLinear" or node.name.endswith("/onnxruntime_q"):
            continue
        origin = node.input[0].removesuffix("/onnxruntime_dq")
        if origin not in grids:
            continue
        constants = _constants_(model, node.output[0], grids[origin])
        for each in (node, *graph.consumers.get(node.output[0], [])):
            del each.input[1:]
            each.input.extend(constants)
    used = {name for node in model.graph.node for name in node.input} | graph.outputs
    for node in [n for n in model.graph.node if n.op_type == "Constant" and n.output[0] not in used]:
        model.graph.node.remove(node)


def _transpose_weights_(model: onnx.ModelProto) -> None:
    """`INT8 weight -> DQ -> Transpose -> MatMul` with the transposition done: only a DQ may stand before the MatMul."""
    graph = Graph(model)
    for node in graph.nodes:
        source = graph.producer.get(node.input[0]) if node.op_type == "Transpose" else None
        if source is None or source.op_type != "DequantizeLinear" or source.input[0] not in graph.initializers:
            continue
        stored = graph.initializers[source.input[0]]
        alone = len(graph.consumers[source.output[0]]) == 1 and len(graph.consumers[source.input[0]]) == 1
        if not alone or len(stored.dims) != 2 or list(attribute(node, "perm", [1, 0])) != [1, 0]:
            continue
        axis = int(attribute(source, "axis", 1))
        stored.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(stored).T.copy(), stored.name))
        source.output[0] = node.output[0]
        kept = [each for each in source.attribute if each.name != "axis"]
        del source.attribute[:]
        source.attribute.extend([*kept, onnx.helper.make_attribute("axis", 1 - axis % 2)])
        model.graph.node.remove(node)


def _int32_biases_(model: onnx.ModelProto) -> dict[str, str]:
    """Biases of Conv and Gemm as INT32 behind DQ, the product of the two scales a step; those that cannot be."""
    graph = Graph(model)
    left: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    for node in list(model.graph.node):
        bias = graph.weight(node.input[2]) if node.op_type in ("Conv", "Gemm") and node.input[2:] else None
        sources = [graph.producer.get(name) for name in node.input[:2]]
        if bias is not None and all(each is not None and each.op_type == "DequantizeLinear" for each in sources):
            step = _bias_step(graph, node)
            values = np.rint(bias.values.astype(np.float64) / step)
            if np.abs(values).max(initial=0) >= 2**31:
                left[label(node)] = "its bias is beyond 2^31 steps of the product of its scales"
            else:
                name = f"{label(node)}/onnxruntime_bias"
                scale = step.astype(np.float32)
                model.graph.initializer.append(numpy_helper.from_array(values.astype(np.int32), name))
                model.graph.initializer.append(numpy_helper.from_array(scale, f"{name}_scale"))
                inputs = [name, f"{name}_scale"]
                nodes.append(onnx.helper.make_node("DequantizeLinear", inputs, [f"{name}_dq"], f"{name}_dq", axis=0))
                node.input[2] = f"{name}_dq"
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    used = {name for node in model.graph.node for name in node.input} | graph.outputs
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name not in used]:
        model.graph.initializer.remove(tensor)
    return left


def _bias_step(graph: Graph, node: onnx.NodeProto) -> NDArray[np.float64]:
    """What one integer of a layer's accumulator stands for, one or `(K,)`."""
    scales = []
    for name in node.input[:2]:
        scale = graph.weight(graph.producer[name].input[1])
        assert scale is not None
        scales.append(scale.values.astype(np.float64))
    product: NDArray[np.float64] = scales[0].reshape(()) * scales[1]
    return product.reshape(()) if product.size == 1 else product
