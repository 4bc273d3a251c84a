"""Which layers count as prunable, and how patterns choose among them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from sparsify_deploy.errors import ModelError
from sparsify_deploy.sparsity.layers import prunable, select


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 4)
        self.conv1 = nn.Conv1d(4, 8, 3, groups=2)
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.norm = nn.BatchNorm2d(4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Conv2d(4, 4, 1), nn.Conv3d(4, 4, 1)])
        self.again = self.blocks[0]
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.blocks[0].weight  # type: ignore[assignment]
        self.head = nn.Linear(4, 7)
        self.head.weight = self.emb.weight


def test_conv_and_linear_once_each_in_module_order() -> None:
    model = Mixed()
    layers = prunable(model)
    assert [(layer.parameter, layer.kind, layer.groups, layer.shape) for layer in layers] == [
        ("conv1.weight", "conv", 2, (8, 2, 3)),
        ("blocks.0.weight", "linear", 1, (4, 4)),
        ("blocks.1.weight", "conv", 1, (4, 4, 1, 1)),
        ("blocks.2.weight", "conv", 1, (4, 4, 1, 1, 1)),
    ]
    assert all(layer.weight is model.get_parameter(layer.parameter) for layer in layers)


def test_a_bare_layer_is_a_model_too() -> None:
    (layer,) = prunable(nn.Linear(2, 3))
    assert (layer.name, layer.parameter) == ("", "weight")


def test_weights_that_are_not_there_are_named() -> None:
    with pytest.raises(ModelError, match="1 computes its weight"):
        prunable(nn.Sequential(nn.ReLU(), weight_norm(nn.Linear(2, 2))))
    with pytest.raises(ModelError, match="0 is lazy"):
        prunable(nn.Sequential(nn.LazyLinear(2)))


def test_select_by_shell_pattern() -> None:
    layers = prunable(Mixed())
    assert select(layers, ()) == set()
    assert select(layers, ("blocks.*", "conv1")) == {"blocks.0", "blocks.1", "blocks.2", "conv1"}
    with pytest.raises(ModelError, match=r"'conv2' matches no prunable layer; did you mean 'conv1'\?"):
        select(layers, ("blocks.0", "conv2"))
    with pytest.raises(ModelError, match=r"'zzz' matches no prunable layer; layers are conv1, blocks\.0"):
        select(layers, ("zzz",))


def test_looking_changes_nothing() -> None:
    model = Mixed()
    state = torch.get_rng_state()
    prunable(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
