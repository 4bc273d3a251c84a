"""Concatenations, pooling and what breaks a chain of INT8, read off the exported ONNX file."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparsify_deploy.errors import ModelError
from sparsify_deploy.export.onnx import export
from sparsify_deploy.graph import file
from sparsify_deploy.graph.layers import weight_layers
from sparsify_deploy.quantization import int8
from sparsify_deploy.quantization.int8 import Int8Settings


def conv(inputs=8, outputs=8, size=3, **arguments):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **arguments)


class Net(nn.Module):
    """Two branches of one stem, of which the second is four times as large, and what `join` makes of them."""

    def __init__(self, join, channels=16):
        super().__init__()
        self.stem, self.a, self.b, self.own = conv(3), conv(), conv(), conv()
        self.reader = conv(channels)
        self.join = join

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.reader(self.join(self, F.relu(self.a(x)), 4 * F.relu(self.b(x)))).flatten(1)


JOINS = {
    "cat": lambda net, a, b: torch.cat([a, b], 1),
    "keyword": lambda net, a, b: torch.cat(tensors=(a, b), dim=1),
    "concat": lambda net, a, b: torch.concat((a, b), dim=1),
    "pooled": lambda net, a, b: F.max_pool2d(torch.cat([a, b], 1), 2),
    "upsampled": lambda net, a, b: torch.cat([a, F.interpolate(F.max_pool2d(b, 2), scale_factor=2.0)], 1),
}


def exported(model, batches, tmp_path, settings=None):
    quantized = int8.prepare(model, settings or Int8Settings())
    int8.calibrate_(quantized, batches, ("x",))
    path = tmp_path / "net.onnx"
    export(quantized.module, batches[0], ("x",), path)
    written = file.load(path)
    return quantized, written, {layer.name: layer for layer in weight_layers(written)}


def sides(written, op):
    """Whether each input of the first `op` comes out of DequantizeLinear."""
    made = {name: node.op_type for node in written.graph.node for name in node.output}
    node = next(node for node in written.graph.node if node.op_type == op and node.attribute[0].i == 1)  # not of shapes
    return [made.get(name) == "DequantizeLinear" for name in node.input]


@pytest.mark.parametrize("how", JOINS)
def test_all_that_is_joined_has_one_scale(how, batches, tmp_path):
    quantized, written, layers = exported(Net(JOINS[how]), batches, tmp_path)
    assert sides(written, "Concat") == [True, True]
    state = int8.state(quantized)
    shared = state["cat_quantizer._amax" if how != "concat" else "concat_quantizer._amax"]
    assert len([name for name in state if name.startswith(("cat", "concat"))]) == 1
    assert torch.isclose(state["reader.input_quantizer._amax"], shared, rtol=1e-6)
    assert layers["reader"].int8_in
    assert [name for name, layer in layers.items() if layer.int8_out] == ["stem", "a"]  # 4 * b is a float product
    row = next(row for row in quantized.placement if row.kind == "concatenation")
    assert row.quantised
    assert row.rule == "all 2 inputs, with one scale"


def test_who_else_reads_a_branch_gets_the_same_range(batches, tmp_path):
    def join(net, a, b):
        return torch.cat([net.own(a), a, b], 1)

    quantized, _, _ = exported(Net(join, 24), batches, tmp_path)
    assert quantized.tied == (("cat_quantizer", "own.input_quantizer", "reader.input_quantizer"),)
    state = int8.state(quantized)
    assert len({float(state[f"{name}._amax"]) for name in quantized.tied[0]}) == 1
    alone, _, _ = exported(Net(join, 24), batches, tmp_path, Int8Settings(concat=False))
    assert alone.tied == ()
    again = int8.state(alone)
    assert float(again["own.input_quantizer._amax"]) < 0.8 * float(again["reader.input_quantizer._amax"])


def test_chained_concatenations_share_one_range(batches, tmp_path):
    def join(net, a, b):
        inner = torch.cat([a, b], 1)
        return torch.cat([inner, net.own(a)], 1)

    quantized, _, _ = exported(Net(join, 24), batches, tmp_path)
    assert quantized.tied == (("cat_1_quantizer", "cat_quantizer", "own.input_quantizer", "reader.input_quantizer"),)


FLOATS = {
    "sigmoid": lambda net, a, b: torch.sigmoid(torch.cat([a, b], 1)),
    "batch norm": lambda net, a, b: net.norm(torch.cat([a, b], 1)),
    "bilinear": lambda net, a, b: F.interpolate(torch.cat([a, b], 1), scale_factor=2.0, mode="bilinear"),
}


@pytest.mark.parametrize("how", FLOATS)
def test_a_concatenation_read_in_float_stays_float(how, batches, tmp_path):
    net = Net(FLOATS[how])
    net.norm = nn.BatchNorm2d(16)
    quantized, written, _ = exported(net.eval(), batches, tmp_path)
    assert sides(written, "Concat") == [False, False]
    row = next(row for row in quantized.placement if row.kind == "concatenation")
    assert "no quantised layer reads it" in row.rule


def test_settings_and_patterns_turn_it_off(batches, tmp_path):
    for settings in (Int8Settings(concat=False), Int8Settings(keep_float=("cat",))):
        quantized, written, _ = exported(Net(JOINS["cat"]), batches, tmp_path, settings)
        assert sides(written, "Concat") == [False, False]
        row = next(row for row in quantized.placement if row.kind == "concatenation")
        assert not row.quantised
        assert "quantize.concat" in row.rule or "keep_float" in row.rule


def test_tied_ranges_survive_saving(batches, tmp_path):
    first, _, _ = exported(Net(JOINS["cat"]), batches, tmp_path)
    other = int8.prepare(Net(JOINS["cat"]), Int8Settings())
    int8.load_(other, int8.state(first))
    x = batches[0]["x"]
    assert torch.equal(first.module(x), other.module(x))
    with pytest.raises(ModelError, match="they belong to another model or other settings"):
        int8.load_(int8.prepare(Net(JOINS["cat"]), Int8Settings(concat=False)), int8.state(first))


class Pooled(nn.Module):
    def __init__(self, pool):
        super().__init__()
        self.stem, self.fc = conv(3), nn.Linear(8, 4)
        self.pool = pool

    def forward(self, x):
        return self.fc(torch.flatten(self.pool(F.relu(self.stem(x))), 1))


POOLS = {
    "module": nn.AdaptiveAvgPool2d(1),
    "function": lambda x: F.adaptive_avg_pool2d(x, (1, 1)),
    "mean": lambda x: x.mean((2, 3)),
    "torch.mean": lambda x: torch.mean(x, dim=[2, 3], keepdim=True),
}


@pytest.mark.parametrize("how", POOLS)
def test_the_layer_before_global_pooling_writes_int8(how, batches, tmp_path):
    _, _, layers = exported(Pooled(POOLS[how]), batches, tmp_path)
    assert layers["stem"].int8_out
    _, _, layers = exported(Pooled(POOLS[how]), batches, tmp_path, Int8Settings(pooling=False))
    assert not layers["stem"].int8_out


class Excited(nn.Module):
    """A depthwise block with squeeze-excite, swish and a linear bottleneck."""

    def __init__(self):
        super().__init__()
        self.stem, self.pw, self.dw = conv(3), conv(8, 16, 1), conv(16, 16, groups=16)
        self.squeeze, self.excite, self.linear = conv(16, 4, 1), conv(4, 16, 1), conv(16, 8, 1)
        self.act, self.head = nn.SiLU(), nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.act(self.dw(F.relu6(self.pw(x))))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        x = x + self.linear(y * gate)
        return self.head(x.mean((2, 3)))


def test_what_breaks_a_chain_is_named(batches, tmp_path):
    quantized, _, layers = exported(Excited(), batches, tmp_path)
    assert {name for name, layer in layers.items() if not layer.int8_out} == {"dw", "excite", "head"}
    rows = {row.name: row for row in quantized.placement if not row.quantised}
    assert "what dw writes" in rows["act.act"].rule
    assert "what excite writes" in rows["sigmoid"].rule
    assert "squeeze-excite" in rows["mul"].rule
    assert rows["mean"].rule == "float: its input is read elsewhere too"


def test_timms_padding_stands_in_front_of_q(torchvision, batches, tmp_path):
    same = pytest.importorskip("timm.layers").Conv2dSame
    for size in (7, 8):
        model = nn.Sequential(conv(3), nn.ReLU(), same(8, 8, 3, stride=2), nn.ReLU(), nn.Flatten()).eval()
        cut = [{"x": batch["x"][:, :, :size, :size].contiguous()} for batch in batches]
        quantized, written, layers = exported(model, cut, tmp_path)
        assert len(layers) == 2
        assert layers["0"].int8_out
        assert layers["2"].int8_in
        assert len([node for node in written.graph.node if node.op_type == "Pad"]) == 1
        assert "Slice" not in {node.op_type for node in written.graph.node}
        expected, found = model(cut[0]["x"]), quantized.module(cut[0]["x"])
        assert expected.shape == found.shape
        assert (expected - found).abs().max() < 0.05 * expected.abs().max()
        found.sum().backward()
        assert quantized.module.get_parameter("0.weight").grad.abs().sum() > 0
