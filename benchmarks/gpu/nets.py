"""The networks that are measured, made on the spot: ResNet-50, a BERT-base encoder, and chains of equal layers.

They need numpy and onnx and no weights from anywhere. A trained net's accuracy is not the subject here: shapes,
formats and patterns are those of the real ones, the numbers are random.

    python -m gpu.nets --net resnet50 --precision int8 --sparse --batch 32 -o resnet50.onnx
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from gpu.graphs import LAYERS_ALONE, Builder, Placement, Value
from sparsify_deploy.graph import file
from sparsify_deploy.graph.constants import Graph
from sparsify_deploy.graph.int8_weights import store_int8_weights_


@dataclass(frozen=True)
class Spec:
    """One network. `placement` None is the float one; `integers` stores INT8 weights as such, with DQ alone;
    `batch` None leaves the batch axis free; `scale` "small" is for rehearsals."""

    net: str
    scale: str = "full"
    placement: Placement | None = None
    sparse: bool = False
    integers: bool = False
    batch: int | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """A file name without its suffix that tells specs apart."""
        parts = [self.net, "24" if self.sparse else "dense"]
        if self.placement is None:
            parts.append("float")
        else:
            parts += ["int8", *(kind for kind, set_ in asdict(self.placement).items() if set_)]
        parts += ["integers"] if self.integers else []
        parts += [f"b{self.batch}"] if self.batch is not None else ["dynamic"]
        parts += [self.scale] if self.scale != "full" else []
        return "-".join([*parts, f"s{self.seed}"] if self.seed else parts)


def build(spec: Spec) -> onnx.ModelProto:
    """The model of `spec`, judged by onnx's checker and strict shape inference."""
    builder = Builder(spec.placement, sparse=spec.sparse, seed=spec.seed)
    shape, output = NETS[spec.net](builder, spec.scale)
    model = builder.model(shape, spec.batch, output, spec.net)
    if spec.integers:
        store_int8_weights_(model)
    file.check(model, Path(spec.name))
    return model


def write(spec: Spec, folder: Path) -> Path:
    """`build` into `folder`, unless it is there already; weights are drawn once for all batch sizes."""
    path = folder / f"{spec.name}.onnx"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        if spec.batch is None:
            model = build(spec)
        else:
            model = onnx.load(write(replace(spec, batch=None), folder))
            for value in (*model.graph.input, *model.graph.output):
                value.type.tensor_type.shape.dim[0].dim_value = spec.batch
        partial = path.with_suffix(".partial")
        file.save(model, partial)
        partial.replace(path)
    return path


Shape = tuple[int, ...]


def resnet50(g: Builder, scale: str) -> tuple[Shape, Value]:
    """torchvision's ResNet-50 with BatchNorm folded, 224 x 224; small: two stages of width 16 and 32, 32 x 32."""
    full = scale == "full"
    stages = ((64, 3), (128, 4), (256, 6), (512, 3)) if full else ((16, 2), (32, 1))
    side, classes = (224, 1000) if full else (32, 16)
    x = g.relu(g.convolution(Value("input", 3, 1.0), "conv1", stages[0][0], 7, 2), "relu")
    pooled = g.node("MaxPool", [x.name], "maxpool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    x = Value(pooled, x.channels, 2 * x.power)  # the largest of nine
    for stage, (width, blocks) in enumerate(stages, 1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            stride = 2 if block == 0 and stage > 1 else 1
            other = g.convolution(x, f"{name}.downsample.0", 4 * width, 1, stride) if block == 0 else x
            y = g.relu(g.convolution(x, f"{name}.conv1", width, 1), f"{name}.relu1")
            y = g.relu(g.convolution(y, f"{name}.conv2", width, 3, stride), f"{name}.relu2")
            y = g.convolution(y, f"{name}.conv3", 4 * width, 1)
            x = g.relu(g.residual(y, other, f"{name}.add"), f"{name}.relu3")
    pooled = g.quantised(x, "avgpool.quantizer") if g.placement.pooling else x.name
    averaged = g.node("GlobalAveragePool", [pooled], "avgpool")
    flat = g.node("Flatten", [averaged], "flatten", axis=1)
    return (3, side, side), g.linear(Value(flat, x.channels, x.power), "fc", classes, rows=True)


def bert(g: Builder, scale: str) -> tuple[Shape, Value]:
    """BERT-base's encoder on embedded tokens `(128, 768)`; small: 2 layers, 64 wide, 4 heads, 16 tokens."""
    layers, width, heads, tokens = (12, 768, 12, 128) if scale == "full" else (2, 64, 4, 16)
    x = Value("input", width, 1.0)
    for index in range(layers):
        name = f"layer.{index}"
        x = g.norm(g.stream(attention(g, x, f"{name}.attention", heads, tokens), x, f"{name}.add1"), f"{name}.norm1")
        y = g.gelu(g.linear(x, f"{name}.intermediate", 4 * width), f"{name}.gelu")
        x = g.norm(g.stream(g.linear(y, f"{name}.output", width), x, f"{name}.add2"), f"{name}.norm2")
    return (tokens, width), x


def attention(g: Builder, x: Value, name: str, heads: int, tokens: int) -> Value:
    """Three Linears, softmax(q k / sqrt(d)) v, and the Linear that joins the heads."""
    width, each = x.channels, x.channels // heads
    split = g.constant(f"{name}.split", [0, tokens, heads, each], np.int64)
    turned = {}
    for part, perm in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3])):
        made = g.linear(x, f"{name}.{part}", width)
        shaped = g.node("Reshape", [made.name, split], f"{name}.{part}/Reshape")
        heads_first = g.node("Transpose", [shaped], f"{name}.{part}/heads", perm=perm)
        turned[part] = Value(heads_first, each, made.power)
    scores = g.product(turned["query"], turned["key"], f"{name}.scores")
    root = g.constant(f"{name}.root", math.sqrt(each))
    scaled = g.node("Div", [scores, root], f"{name}.scaled")
    softmax = g.node("Softmax", [scaled], f"{name}.softmax", axis=-1)
    # of unit normal scores: sum p^2 is about e / tokens, so the mean of p^2 is that over tokens once more
    weights = Value(softmax, tokens, math.e / tokens**2)
    mixed = g.product(weights, turned["value"], f"{name}.mixed")
    back = g.node("Transpose", [mixed], f"{name}.mixed/heads", perm=[0, 2, 1, 3])
    whole = g.constant(f"{name}.join", [0, tokens, width], np.int64)
    joined = g.node("Reshape", [back, whole], f"{name}.joined")
    return g.linear(Value(joined, width, math.e / tokens), f"{name}.output", width)


def conv_chain(g: Builder, scale: str) -> tuple[Shape, Value]:
    """Six 3 x 3 convolutions of 256 channels at 28 x 28, each with a ReLU: no residual, nothing else."""
    channels, side, depth = (256, 28, 6) if scale == "full" else (32, 8, 3)
    x = Value("input", channels, 1.0)
    for index in range(depth):
        x = g.relu(g.convolution(x, f"conv{index}", channels, 3), f"relu{index}")
    return (channels, side, side), x


def linear_chain(g: Builder, scale: str) -> tuple[Shape, Value]:
    """Six Linears, 1024 wide on 128 tokens, each with a ReLU."""
    width, tokens, depth = (1024, 128, 6) if scale == "full" else (64, 16, 3)
    x = Value("input", width, 1.0)
    for index in range(depth):
        x = g.relu(g.linear(x, f"fc{index}", width), f"relu{index}")
    return (tokens, width), x


NETS: dict[str, Callable[[Builder, str], tuple[Shape, Value]]] = {
    "resnet50": resnet50,
    "bert": bert,
    "conv_chain": conv_chain,
    "linear_chain": linear_chain,
}


def without_qdq(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without Q/DQ: weights are the floats that the integers stand for. For the float twin of an INT8 file."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    graph = Graph(copied)
    constants = {tensor.name: tensor for tensor in copied.graph.initializer}
    instead: dict[str, str] = {}
    for node in list(copied.graph.node):
        for i, name in enumerate(node.input):
            node.input[i] = instead.get(name, name)
        if node.op_type == "QuantizeLinear" and node.input[0] not in constants:
            instead[node.output[0]] = node.input[0]
        elif node.op_type == "DequantizeLinear" and (floats := _floats(graph, node)) is not None:
            name = f"{node.output[0]}.floats"
            copied.graph.initializer.append(numpy_helper.from_array(floats, name))
            instead[node.output[0]] = name
        elif node.op_type == "DequantizeLinear":
            instead[node.output[0]] = node.input[0]
        elif node.op_type != "QuantizeLinear":
            continue
        copied.graph.node.remove(node)
    used = {name for node in copied.graph.node for name in node.input}
    for tensor in list(copied.graph.initializer):
        if tensor.name not in used:
            copied.graph.initializer.remove(tensor)
    return copied


def store_float_weights_(model: onnx.ModelProto) -> int:
    """Put FP32 weights and a QuantizeLinear in front of each DequantizeLinear of stored integers, in place; TensorRT
    8.6 may want that. The integers an engine gets are the same. Returns how many."""
    graph = Graph(model)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes, changed = [], 0
    for node in model.graph.node:
        name = node.input[0] if node.input else ""
        stored = node.op_type == "DequantizeLinear" and name in constants and len(graph.consumers[name]) == 1
        if stored and (floats := _floats(graph, node)) is not None:
            quantise = onnx.NodeProto()
            quantise.CopyFrom(node)
            quantise.op_type, quantise.name = "QuantizeLinear", f"{node.name or name}/Q"
            quantise.output[0] = f"{name}.integers"
            constants[name].CopyFrom(numpy_helper.from_array(floats, name))
            node.input[0] = quantise.output[0]
            nodes.append(quantise)
            changed += 1
        nodes.append(node)
    model.graph.ClearField("node")
    model.graph.node.extend(nodes)
    return changed


def _floats(graph: Graph, node: onnx.NodeProto) -> Any:
    """What a DequantizeLinear of a constant gives; None where it reads an activation."""
    stored = graph.weight(node.output[0])
    if stored is None or stored.precision != "INT8":
        return None
    scale = graph.weight(node.input[1])
    assert scale is not None
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    shape = [1] * stored.values.ndim
    if scale.values.size > 1:
        shape[axis] = -1
    return (stored.values.astype(np.float32) * scale.values.reshape(shape)).astype(np.float32)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write one network."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--net", choices=NETS, default="resnet50")
    parser.add_argument("--scale", choices=("full", "small"), default="full")
    parser.add_argument("--precision", choices=("float", "int8"), default="float")
    parser.add_argument("--layers-alone", action="store_true", help="Q/DQ on the layers' inputs and weights only")
    parser.add_argument("--outputs", action="store_true", help="Q/DQ on every layer's output too")
    parser.add_argument("--integers", action="store_true", help="INT8 weights stored as integers")
    parser.add_argument(
        "--sparse", action="store_true", help="2:4 along input channels, where the rule of thumb says so"
    )
    parser.add_argument("--batch", type=int, help="default: a dynamic batch axis")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True)
    asked = parser.parse_args(arguments)
    placement = None
    if asked.precision == "int8":
        placement = replace(LAYERS_ALONE if asked.layers_alone else Placement(), outputs=asked.outputs)
    spec = Spec(asked.net, asked.scale, placement, asked.sparse, asked.integers, asked.batch, asked.seed)
    file.save(build(spec), asked.output)
    print(f"{asked.output}: {asked.output.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
