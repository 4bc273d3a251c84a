"""INT8 layers counted in the exported files of known networks, with the ones that are not INT8 in and out by name."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from sparsify_deploy.export.onnx import export
from sparsify_deploy.graph import file
from sparsify_deploy.graph.layers import weight_layers
from sparsify_deploy.models._attention import unpack_attention_
from sparsify_deploy.quantization import int8
from sparsify_deploy.quantization.int8 import Int8Settings
from sparsify_deploy.runtimes import tensorrt_rtx

OUTPUT = "the output of the network"


class Bert(nn.Module):
    """Two layers of BERT's shape: post-norm, GELU, learnt positions, a classifier on the first position."""

    def __init__(self, depth=2, norm_first=False):
        super().__init__()
        self.word, self.position = nn.Embedding(50, 32), nn.Parameter(torch.randn(8, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, activation="gelu", batch_first=True, norm_first=norm_first)
        last = nn.LayerNorm(32) if norm_first else None
        self.encoder = nn.TransformerEncoder(layer, depth, norm=last, enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.encoder(self.word(x) + self.position)[:, 0])


def resnet18(torchvision):
    models = torchvision.models.resnet
    return models.ResNet(models.BasicBlock, [2, 2, 2, 2], num_classes=10)


def resnet50(torchvision):
    """One block a stage and narrow bottlenecks; every kind of add of the whole one is there."""
    models = torchvision.models.resnet
    return models.ResNet(models.Bottleneck, [2, 1, 1, 1], width_per_group=16, num_classes=10)


def mobilenet_v2(torchvision):
    return torchvision.models.mobilenet_v2(width_mult=0.25, num_classes=10)


def efficientnet_lite0(torchvision):
    efficientnet = pytest.importorskip("timm.models.efficientnet")
    return efficientnet._gen_efficientnet_lite(
        "tf_efficientnet_lite0", channel_multiplier=0.25, pad_type="same", num_classes=10
    )


def vit(torchvision):
    model = torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10)
    nn.init.normal_(model.heads.head.weight)  # it starts at 0
    return model


def bert(torchvision):
    return Bert()


def encoder_floats(prefix, attention, mlp):
    """Layers whose output a float residual stream takes, two a block."""
    return {f"{prefix}{i}.{name}": "Add" for i in range(2) for name in (attention, mlp)}


NETS = {
    "resnet18": (resnet18, 21, {"fc": OUTPUT}),
    "resnet50": (resnet50, 21, {"fc": OUTPUT}),
    "mobilenet_v2": (mobilenet_v2, 53, {"classifier.1": OUTPUT}),
    "efficientnet_lite0": (efficientnet_lite0, 50, {"classifier": OUTPUT}),
    "vit": (
        vit,
        14,
        {
            "conv_proj": "LayerNormalization",
            "heads.head": OUTPUT,
            **encoder_floats("encoder.layers.encoder_layer_", "self_attention.out_proj", "mlp.3"),
        },
    ),
    "bert": (bert, 13, {"head": OUTPUT, **encoder_floats("encoder.layers.", "self_attn.out_proj", "linear2")}),
}
"""The network, its weighted layers, and those that are not INT8 in and out with what reads them in float."""


def batches_for(name):
    generator = torch.Generator().manual_seed(3)
    if name == "bert":
        return [{"x": torch.randint(0, 50, (16, 8), generator=generator)} for _ in range(2)]
    return [{"x": torch.randn(16, 3, 32, 32, generator=generator)} for _ in range(2)]


@pytest.mark.parametrize("name", NETS)
def test_layers_with_int8_in_and_out(name, torchvision, tmp_path):
    make, count, floats = NETS[name]
    batches = batches_for(name)
    model = make(torchvision)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # statistics of the data, or the activations of a random network die out
    with torch.no_grad():
        model(batches[0]["x"])
    quantized = int8.prepare(unpack_attention_(model.eval()), Int8Settings())
    int8.calibrate_(quantized, batches, ("x",))
    path = tmp_path / "net.onnx"
    export(quantized.module, {"x": batches[1]["x"]}, ("x",), path, dynamic_batch=False)
    written = file.load(path)
    onnx.checker.check_model(written, full_check=True)
    layers = weight_layers(written)
    assert len(layers) == count
    assert {layer.name for layer in layers if not layer.int8_in} == set()
    assert {layer.precision for layer in layers} == {"INT8"}
    found = {layer.name: layer.float_reader for layer in layers if not layer.int8_out}
    assert found.keys() == floats.keys()
    assert all(found[layer].startswith(reader) for layer, reader in floats.items()), found

    with torch.no_grad():
        expected = quantized.module(batches[1]["x"]).numpy()
        full = model(batches[1]["x"]).numpy()
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": batches[1]["x"].numpy()})[0]
    error = np.linalg.norm(expected - full)
    # in a deep network of random weights one rounding flip grows as the rounding itself does
    limit = 1e-3 if name in {"vit", "bert"} else 1.0
    assert np.linalg.norm(found - expected) < limit * error
    assert 0 < error < 0.9 * np.linalg.norm(full)
    assert (found.argmax(-1) == expected.argmax(-1)).mean() >= (1.0 if limit < 1 else 0.5)
    if tensorrt_rtx.unavailable_reason() is None:
        notes = tensorrt_rtx.build(path, tmp_path / "net.rtx.engine", tensorrt_rtx.Params())
        assert notes.files == ("net.rtx.engine",)


def counted(settings, model, batches, tmp_path):
    quantized = int8.prepare(model, settings)
    int8.calibrate_(quantized, batches, ("x",))
    path = tmp_path / "net.onnx"
    export(quantized.module, {"x": batches[0]["x"]}, ("x",), path)
    written = file.load(path)
    layers = weight_layers(written)
    products = [
        node
        for node in written.graph.node
        if node.op_type == "MatMul" and node.name not in {layer.name for layer in layers}
    ]
    made = {name: node.op_type for node in written.graph.node for name in node.output}
    sides = [tuple(made[name] == "DequantizeLinear" for name in node.input) for node in products]
    return quantized, {layer.name for layer in layers if layer.int8_in and layer.int8_out}, sides


@pytest.mark.parametrize("norm_first", [False, True])
def test_products_of_attention_and_the_residual_stream(norm_first, tmp_path):
    batches = batches_for("bert")
    model = unpack_attention_(Bert(1, norm_first).eval())
    projections = {f"encoder.layers.0.self_attn.{part}_proj" for part in "qkv"}
    quantized, found, sides = counted(Int8Settings(), model, batches, tmp_path)
    assert sides == [(True, True)] * 2
    assert found == {*projections, "encoder.layers.0.linear1"}
    rows = {row.name: row for row in quantized.placement}
    assert "query and key" in rows["encoder.layers.0.self_attn.matmul"].rule
    assert "softmax" in rows["encoder.layers.0.self_attn.matmul_1"].rule
    adds = [row for row in rows.values() if row.kind == "residual add"]
    assert [row.quantised for row in adds] == [False, False]
    assert all("LayerNorm" in row.rule for row in adds)

    quantized, found, sides = counted(Int8Settings(attention=False), model, batches, tmp_path)
    assert sides == [(False, False)] * 2
    assert found == {"encoder.layers.0.linear1"}
    assert [row.kind for row in quantized.placement if "scaled_dot" in row.name] == ["scaled_dot_product_attention"]

    quantized, found, _ = counted(Int8Settings(stream=True), model, batches, tmp_path)
    added = {"encoder.layers.0.self_attn.out_proj", "encoder.layers.0.linear2"}
    assert found == {*projections, "encoder.layers.0.linear1", *added}
    adds = [row for row in quantized.placement if row.kind == "residual add"]
    assert [row.rule.split()[1] for row in adds] == sorted(added, reverse=True)


def test_the_ranges_of_the_two_products_are_those_of_what_they_multiply():
    model = unpack_attention_(Bert(1).eval())
    quantized = int8.prepare(model, Int8Settings())
    batches = batches_for("bert")
    int8.calibrate_(quantized, batches, ("x",))
    x = torch.cat([batch["x"] for batch in batches])
    attention = model.encoder.layers[0].self_attn
    with torch.no_grad():
        inside = model.word(x) + model.position
        heads = [layer(inside).unflatten(-1, (4, 8)).transpose(1, 2) for layer in (attention.q_proj, attention.k_proj)]
        weights = torch.softmax(heads[0] @ heads[1].transpose(-2, -1) / np.sqrt(8), -1)
    state = int8.state(quantized)
    product = "encoder.layers.0.self_attn.matmul"
    for name, value in ((f"{product}_quantizer_0", heads[0]), (f"{product}_1_quantizer_0", weights)):
        assert torch.allclose(state[f"{name}._amax"], value.abs().max(), rtol=1e-5)
    assert state[f"{product}_1_quantizer_0._amax"] <= 1
