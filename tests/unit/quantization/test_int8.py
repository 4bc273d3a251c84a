"""INT8 preparation, calibration, training with a mask held, and state."""

from __future__ import annotations

import importlib
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparsify_deploy.errors import MissingExtra, ModelError
from sparsify_deploy.export.onnx import export
from sparsify_deploy.graph import file
from sparsify_deploy.graph.layers import weight_layers
from sparsify_deploy.graph.nm import density, violations
from sparsify_deploy.quantization import int8
from sparsify_deploy.quantization.int8 import Int8Settings


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.output = nn.Linear(16, 5)
        self.head = nn.Linear(16, 1)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.layer1(x) + x).mean((2, 3))
        return self.output(x), self.head(x)


def two_of_four(weight):
    """True for the two largest of four neighbours along axis 1."""
    k, c = weight.shape[:2]
    groups = weight.abs().reshape(k, c // 4, 4, -1)
    rank = groups.argsort(dim=2, descending=True).argsort(dim=2)
    return (rank < 2).reshape(weight.shape)


@pytest.fixture
def net(lively):
    return lively(Net())


def row_of(quantized, name):
    return next(row for row in quantized.placement if row.name == name)


def test_placement_names_the_rule(net):
    quantized = int8.prepare(net, Int8Settings(keep_float=("head",)))
    assert row_of(quantized, "layer1.0").quantised
    assert row_of(quantized, "output").rule == "float: nvidia-modelopt's default rule 'output.*'"
    assert row_of(quantized, "head").rule == "float: keep_float 'head'"
    assert row_of(quantized, "add").quantised
    enabled = {name.rpartition(".")[0] for name, _ in int8._quantizers(quantized.module) if "quantizer" in name}
    assert enabled == {"conv1", "layer1.0", ""}


def test_a_pattern_that_matches_nothing(net):
    with pytest.raises(ModelError, match=r"keep_float: 'layer1\.3' matches no layer; did you mean 'layer1\.0'"):
        int8.prepare(net, Int8Settings(keep_float=("layer1.3",)))


def test_nothing_left(net):
    with pytest.raises(ModelError, match="left to quantise"):
        int8.prepare(net, Int8Settings(keep_float=("*",)))


def test_names_are_kept_and_the_original_is_untouched(net):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    quantized = int8.prepare(net, Int8Settings())
    names = {name for name, _ in quantized.module.named_parameters()}
    assert {name for name, p in net.named_parameters() if p.dim() > 1} <= names
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(type(p) is nn.Parameter for p in quantized.module.parameters())


def test_nothing_is_printed_or_warned(net, batches, capfd):
    int8.calibrate_(int8.prepare(net, Int8Settings()), batches, ("x",))
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def scale_behind(model, layer, position):
    """The scale of the DequantizeLinear on input `position` of the node named `layer`."""
    node = next(n for n in model.graph.node if n.name == layer)
    return scale_of(model, node.input[position])


def scale_of(model, name):
    made = {output: n for n in model.graph.node for output in n.output}
    dequantise = made[name]
    assert dequantise.op_type == "DequantizeLinear"
    from onnx import numpy_helper

    return numpy_helper.to_array(made[dequantise.input[1]].attribute[0].t)


def test_exported_scales_are_the_largest_magnitudes_over_127(net, batches, tmp_path):
    quantized = int8.prepare(net, Int8Settings())
    int8.calibrate_(quantized, batches, ("x",))
    path = tmp_path / "net.onnx"
    export(quantized.module, batches[0], ("x",), path)
    model = file.load(path)
    net.eval()
    x = torch.cat([batch["x"] for batch in batches])
    with torch.no_grad():
        inside = F.relu(net.bn1(net.conv1(x)))
        pooled = F.relu(net.layer1(inside) + inside).mean((2, 3))
        for layer, conv, bn in (("conv1", net.conv1, net.bn1), ("layer1.0", net.layer1[0], net.layer1[1])):
            gain = bn.weight / torch.sqrt(bn.running_var + bn.eps)
            expected = (conv.weight * gain.view(-1, 1, 1, 1)).abs().amax((1, 2, 3)) / 127
            np.testing.assert_allclose(scale_behind(model, layer, 1), expected.numpy(), rtol=1e-5)
    for layer, seen in (("conv1", x), ("layer1.0", inside), ("head", pooled)):
        np.testing.assert_allclose(scale_behind(model, layer, 0), seen.abs().max() / 127, rtol=1e-4)
    add = next(n for n in model.graph.node if n.op_type == "Add")
    np.testing.assert_allclose(scale_of(model, add.input[1]), inside.abs().max() / 127, rtol=1e-4)
    assert scale_of(model, add.input[1]) == scale_behind(model, "layer1.0", 0)
    int8_out = {layer.name: layer.int8_out for layer in weight_layers(model)}
    assert int8_out == {"conv1": True, "layer1.0": True, "output": False, "head": False}


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_torch_and_runtimes_agree(runtime, net, batches, tmp_path):
    engine = pytest.importorskip(runtime)
    quantized = int8.prepare(net, Int8Settings())
    int8.calibrate_(quantized, batches, ("x",))
    path = tmp_path / "net.onnx"
    export(quantized.module, batches[0], ("x",), path)
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = [value.numpy() for value in quantized.module(x)]
        full = [value.numpy() for value in net.eval()(x)]
    if runtime == "onnxruntime":
        found = engine.InferenceSession(str(path)).run(None, {"x": x.numpy()})
    else:
        compiled = engine.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        found = list(compiled({"x": x.numpy()}).values())
    for a, b, unquantised in zip(expected, found, full, strict=True):
        largest = np.abs(a).max()
        assert (np.abs(a - b) < 1e-5 * largest).mean() > 0.8
        assert np.abs(a - b).max() < 0.03 * largest
        assert 1e-4 * largest < np.abs(a - unquantised).max() < 0.2 * largest


def test_training_holds_mask_ranges_and_2_of_4_down_to_the_final_integers(net, batches, tmp_path):
    with torch.no_grad():
        net.layer1[0].weight *= two_of_four(net.layer1[0].weight)
    mask = net.layer1[0].weight != 0
    quantized = int8.prepare(net, Int8Settings())
    int8.calibrate_(quantized, batches, ("x",))
    module = quantized.module
    ranges = {k: v.clone() for k, v in module.state_dict().items() if k.endswith("_amax")}
    before = module.get_parameter("layer1.0.weight").detach().clone()
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        a, b = module(batches[0]["x"])
        loss = (a - 1).square().mean() + b.square().mean()
        loss.backward()
        module.get_parameter("layer1.0.weight").grad *= mask
        optimizer.step()
        losses.append(float(loss.detach()))
    after = module.get_parameter("layer1.0.weight")
    assert losses[-1] < losses[0]
    assert not torch.equal(before, after)
    assert (after[~mask] == 0).all()
    assert all(torch.equal(ranges[k], module.state_dict()[k]) for k in ranges)
    path = tmp_path / "net.onnx"
    export(module, batches[0], ("x",), path)
    layer = next(x for x in weight_layers(file.load(path)) if x.weight == "layer1.0.weight")
    assert layer.precision == "INT8"
    assert layer.values.dtype == np.int8
    assert violations(layer.values, 2, 4) == 0
    assert 0.4 < density(layer.values) <= 0.5
    assert violations(layer.values, 1, 4) > 0


def test_state_fills_a_fresh_module_bit_for_bit(net, batches):
    quantized = int8.prepare(net, Int8Settings())
    int8.calibrate_(quantized, batches, ("x",))
    saved = int8.state(quantized)
    assert "layer1.0.input_quantizer._amax" in saved
    other = int8.prepare(Net(), Int8Settings())
    int8.load_(other, saved)
    for a, b in zip(quantized.module(batches[0]["x"]), other.module(batches[0]["x"]), strict=True):
        assert torch.equal(a, b)
    again = int8.state(other)
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[k], saved[k]) for k in saved)


def test_state_is_a_copy(net, batches):
    quantized = int8.prepare(net, Int8Settings())
    int8.calibrate_(quantized, batches, ("x",))
    saved = int8.state(quantized)
    with torch.no_grad():
        quantized.module.get_parameter("conv1.weight").zero_()
    assert saved["conv1.weight"].abs().sum() > 0


def test_state_of_other_settings_is_refused(net, batches):
    quantized = int8.prepare(net, Int8Settings())
    int8.calibrate_(quantized, batches, ("x",))
    with pytest.raises(ModelError, match=r"also hold '.*quantizer.*' *: they belong|also hold"):
        int8.load_(int8.prepare(net, Int8Settings(residual=False)), int8.state(quantized))
    with pytest.raises(ModelError, match="lack"):
        int8.load_(quantized, {})
    wrong = {**int8.state(quantized), "head.weight": torch.zeros(2, 16)}
    with pytest.raises(ModelError, match=r"'head\.weight' \(2, 16\), the model \(1, 16\)"):
        int8.load_(quantized, wrong)


@pytest.mark.parametrize(("weight", "bias"), [(1e-9, 2.0), (1e-9, -2.0), (0.0, 2.0)])
def test_a_channel_of_next_to_no_weights_keeps_its_bias_in_integers(batches, tmp_path, weight, bias):
    """ONNX Runtime makes INT32 of a bias, in steps of both scales: 2.0 is 5e13 steps of a channel switched off."""
    onnxruntime = pytest.importorskip("onnxruntime")
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 6), nn.Flatten())
    with torch.no_grad():
        net[1].weight[[3, 4]] *= 1e-9
        net[1].weight[3] = weight
        net[1].bias[[3, 4]] = torch.tensor([bias, 0.0])
    quantized = int8.prepare(net, Int8Settings())
    before = net[1].weight.abs().amax((1, 2, 3))
    notes = int8.calibrate_(quantized, batches, ("x",))
    ranges = int8.state(quantized)["1.weight_quantizer._amax"].flatten()
    assert torch.equal(ranges[[0, 1, 2, 4, 5, 6, 7]], before[[0, 1, 2, 4, 5, 6, 7]])
    path = tmp_path / "net.onnx"
    export(quantized.module, batches[0], ("x",), path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = batches[0]["x"]
    with torch.no_grad():
        wanted, plain = quantized.module(x).numpy(), net(x).numpy()
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], wanted, atol=0.02 * np.abs(wanted).max())
    np.testing.assert_allclose(wanted, plain, atol=0.1 * np.abs(plain).max())
    assert notes.faint_channels == {"1": 1}


def test_a_wholly_pruned_channel_gets_a_scale_and_keeps_its_zeros(net, batches, tmp_path):
    with torch.no_grad():
        net.layer1[0].weight[[2, 5]] = 0
        net.head.weight.zero_()
    quantized = int8.prepare(net, Int8Settings())
    notes = int8.calibrate_(quantized, batches, ("x",))
    assert notes.dead_channels == {"layer1.0": 2, "head": 1}
    assert notes.batches == 3
    amax = int8.state(quantized)["layer1.0.weight_quantizer._amax"].flatten()
    assert amax[2] == amax[5] == amax.min()
    assert amax.min() > 0
    path = tmp_path / "net.onnx"
    export(quantized.module, batches[0], ("x",), path)
    layers = {layer.name: layer for layer in weight_layers(file.load(path))}
    assert not layers["layer1.0"].values[[2, 5]].any()
    assert layers["layer1.0"].values[0].any()
    assert not layers["head"].values.any()


def test_an_activation_that_is_always_zero_is_named(batches):
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 1))
    nn.init.zeros_(model[0].weight)
    with pytest.raises(ModelError, match=r"2\.input_quantizer: saw only zeros"):
        int8.calibrate_(int8.prepare(model, Int8Settings()), batches, ("x",))


def test_values_that_are_not_finite_are_named(batches):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    batches[1]["x"][0, 0, 0, 0] = float("inf")
    with pytest.raises(ModelError, match=r"0\.input_quantizer: met values that are not finite"):
        int8.calibrate_(int8.prepare(model, Int8Settings()), batches, ("x",))
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"2\.weight: holds values that are not finite"):
        int8.calibrate_(int8.prepare(model, Int8Settings()), batches, ("x",))


def test_no_batch(net):
    with pytest.raises(ModelError, match="no batch"):
        int8.calibrate_(int8.prepare(net, Int8Settings()), [], ("x",))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.encoder(self.patch(x).flatten(2).transpose(1, 2)))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_an_encoder_layer_runs_quantised_with_and_without_gradients(batches):
    model = Encoder().eval()
    quantized = int8.prepare(model, Int8Settings())
    int8.calibrate_(quantized, batches, ("x",))
    assert torch.backends.mha.get_fastpath_enabled()
    assert row_of(quantized, "encoder.layers.0.linear1").quantised
    attention = row_of(quantized, "encoder.layers.0.self_attn.out_proj")
    assert not attention.quantised
    assert "MultiheadAttention" in attention.rule
    x = batches[0]["x"]
    with_gradient = quantized.module(x).detach()
    with torch.no_grad():
        without = quantized.module(x)
        quantized.module.get_submodule("encoder.layers.0.linear1").input_quantizer.amax = torch.tensor(1e-3)
        broken = quantized.module(x)
    assert (with_gradient - without).abs().max() < 1e-5
    assert (broken - without).abs().max() > 1e-3


def test_missing_modelopt(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelopt", None)
    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization", None)
    with pytest.raises(MissingExtra, match=r"INT8 quantisation needs nvidia-modelopt.*sparsify-deploy\[train\]"):
        int8._modelopt.__wrapped__()


def test_the_same_model_and_settings_give_the_same_names(net):
    names = [set(int8.prepare(net, Int8Settings()).module.state_dict()) for _ in range(2)]
    assert names[0] == names[1]
    assert importlib.import_module("modelopt").__version__.startswith("0.47")
