"""Work that a counter overlooks: fused attention in evaluation mode, and layers that share a weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsify_deploy.training.cost import forward_flops, training_cost
from sparsify_deploy.training.history import History


def test_an_encoder_layer_counts_its_projections_its_attention_and_its_mlp():
    tokens, width, hidden = 4, 8, 16
    layer = nn.TransformerEncoderLayer(width, 2, hidden, batch_first=True)
    fused = torch.backends.mha.get_fastpath_enabled()
    flops = forward_flops(layer, {"input": torch.ones(1, tokens, width)}, ("input",))
    projections = 2 * tokens * width * 4 * width
    scores_and_values = 2 * (2 * tokens * tokens * width)
    mlp = 2 * tokens * width * hidden
    assert flops == {"linear1": mlp, "linear2": mlp, "self_attn": projections + scores_and_values}
    assert torch.backends.mha.get_fastpath_enabled() == fused


class Tied(nn.Module):
    """Two layers with one weight, and a third."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(self.first(x)))


def test_a_shared_weight_is_sparse_in_every_layer_that_has_it():
    history = History(10, (), densities={"first.weight": 0.25, "head.weight": 0.5}, density=0.3)
    cost = training_cost(Tied(), {"input": torch.ones(1, 8)}, ("input",), history)
    assert cost["dense_forward_flops"] == 2 * 128 + 64
    assert cost["sparse_forward_flops"] == pytest.approx(2 * 128 * 0.25 + 64 * 0.5)
    assert cost["relative_training_flops"] == pytest.approx((2 * 128 * 0.25 + 64 * 0.5) / (2 * 128 + 64))
