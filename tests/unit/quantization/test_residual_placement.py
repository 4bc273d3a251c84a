"""Which input of each residual add carries Q/DQ, read off the exported ONNX file."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparsify_deploy.export.onnx import export
from sparsify_deploy.graph import file
from sparsify_deploy.quantization import int8
from sparsify_deploy.quantization.int8 import Int8Settings

ADDS = {
    "operator": lambda a, b: a + b,
    "in place operator": operator.iadd,
    "torch.add": torch.add,
    "torch.add keyword": lambda a, b: torch.add(a, other=b),
    "method": lambda a, b: a.add(b),
    "in place method": lambda a, b: a.add_(b),
}


def conv(inputs=8, outputs=8, size=3):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2)


class Net(nn.Module):
    """A stem, one block that `join` adds up, and a reader."""

    def __init__(self, join, **layers):
        super().__init__()
        self.stem, self.reader = conv(3), conv()
        self.join = join
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.reader(F.relu(self.join(self, F.relu(self.stem(x)))))


def dequantised_sides(model, batches, tmp_path, settings=None):
    """For each Add of the file: does its first, its second input come out of DequantizeLinear."""
    quantized = int8.prepare(model, settings or Int8Settings())
    int8.calibrate_(quantized, batches, ("x",))
    path = tmp_path / "net.onnx"
    export(quantized.module, batches[0], ("x",), path)
    graph = file.load(path).graph
    made = {name: node.op_type for node in graph.node for name in node.output}
    sides = [
        tuple(made.get(name) == "DequantizeLinear" for name in node.input)
        for node in graph.node
        if node.op_type == "Add"
    ]
    rows = [row for row in quantized.placement if row.kind == "residual add"]
    assert [row.quantised for row in rows] == [any(pair) for pair in sides]
    return sides


@pytest.mark.parametrize("how", ADDS)
@pytest.mark.parametrize("identity_first", [False, True])
def test_identity_branch_only(how, identity_first, batches, tmp_path):
    def join(net, x):
        y = net.b(F.relu(net.a(x)))
        return ADDS[how](x, y) if identity_first else ADDS[how](y, x)

    sides = dequantised_sides(Net(join, a=conv(), b=conv()), batches, tmp_path)
    assert sides == [(True, False) if identity_first else (False, True)]


@pytest.mark.parametrize("downsample_first", [False, True])
@pytest.mark.parametrize("downsample_runs_first", [False, True])
def test_downsample_branch_only(downsample_first, downsample_runs_first, batches, tmp_path):
    def join(net, x):
        identity = net.down(x) if downsample_runs_first else None
        y = net.b(F.relu(net.a(x)))
        identity = net.down(x) if identity is None else identity
        return identity + y if downsample_first else y + identity

    net = Net(join, a=conv(), b=conv(), down=nn.Sequential(nn.AvgPool2d(1), conv(size=1), nn.BatchNorm2d(8)))
    assert dequantised_sides(net, batches, tmp_path) == [(True, False) if downsample_first else (False, True)]


def test_branches_of_one_length_quantise_the_side_computed_first(batches, tmp_path):
    def join(net, x):
        first, last = net.a(x), net.b(x)
        return last + first

    assert dequantised_sides(Net(join, a=conv(), b=conv()), batches, tmp_path) == [(False, True)]


def test_a_layer_that_is_its_own_identity_branch(batches, tmp_path):
    def join(net, x):
        x = net.a(x)
        return x + net.b(F.relu(x))

    assert dequantised_sides(Net(join, a=conv(), b=conv()), batches, tmp_path) == [(True, False)]


def test_dropout_between_layer_and_add_is_looked_through(batches, tmp_path):
    def join(net, x):
        return net.drop(F.dropout(net.a(x), training=net.training)) + x

    assert dequantised_sides(Net(join, a=conv(), drop=nn.Dropout()), batches, tmp_path) == [(False, True)]


def test_two_identity_inputs_are_both_quantised_where_a_layer_reads_the_sum(batches, tmp_path):
    def join(net, x):
        return F.relu(net.a(x)) + x

    assert dequantised_sides(Net(join, a=conv()), batches, tmp_path) == [(True, True)]


class Loose(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = conv(3)

    def forward(self, x):
        x = F.relu(self.a(x))
        return torch.sigmoid(torch.tanh(x) + x)


def test_two_identity_inputs_stay_float_where_no_layer_reads_the_sum(batches, tmp_path):
    assert dequantised_sides(Loose(), batches, tmp_path) == [(False, False)]


class Constants(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3), conv()
        self.position = nn.Parameter(torch.randn(8, 8, 8))

    def forward(self, x):
        x = self.a(x) + self.position
        x = x + 1
        return self.b(x).mean((2, 3)).repeat(1, x.size(2) + x.shape[3])


def test_adds_with_a_constant_are_not_residual(batches):
    rows = int8.prepare(Constants(), Int8Settings()).placement
    assert not [row for row in rows if row.kind == "residual add"]


class Products(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        x = self.a(x)
        return F.linear(x @ x.transpose(1, 2), self.a.weight).matmul(x)


def test_products_outside_layers_are_listed():
    rows = {row.name: row for row in int8.prepare(Products(), Int8Settings()).placement}
    assert {name for name, row in rows.items() if not row.quantised} == {"matmul", "linear", "matmul_1"}


class Overwritten(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3), conv()

    def forward(self, x):
        x = F.relu(self.a(x))
        x.add_(self.b(x))
        return x * 2


def test_a_value_overwritten_and_read_again_stays_float(batches, tmp_path):
    model = Overwritten().eval()
    expected = model(batches[0]["x"])
    quantized = int8.prepare(model, Int8Settings())
    row = next(row for row in quantized.placement if row.kind == "residual add")
    assert not row.quantised
    assert "read again" in row.rule
    int8.calibrate_(quantized, batches, ("x",))
    found = quantized.module(batches[0]["x"])
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_residual_false_and_keep_float_leave_the_add_alone(batches, tmp_path):
    def join(net, x):
        return net.b(F.relu(net.a(x))) + x

    net = Net(join, a=conv(), b=conv())
    assert dequantised_sides(net, batches, tmp_path, Int8Settings(residual=False)) == [(False, False)]
    assert dequantised_sides(net, batches, tmp_path, Int8Settings(keep_float=("add",))) == [(False, False)]


def test_a_layer_kept_in_float_does_not_count_as_one(batches, tmp_path):
    def join(net, x):
        return net.b(F.relu(net.a(x))) + x

    net = Net(join, a=conv(), b=conv())
    assert dequantised_sides(net, batches, tmp_path, Int8Settings(keep_float=("b",))) == [(True, True)]
