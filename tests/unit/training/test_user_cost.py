"""The FLOPs of networks whose layers share a weight, or are recurrent."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsify_deploy.training.cost import forward_flops, training_cost
from sparsify_deploy.training.history import History


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


def test_a_weight_that_two_layers_share_counts_by_its_density_in_both():
    history = History(steps=4, losses=(), densities={"first.weight": 0.25})
    cost = training_cost(Tied(), {"input": torch.zeros(1, 8)}, ("input",), history)
    assert cost["dense_forward_flops"] == 2 * 2 * 64
    assert cost["sparse_forward_flops"] == 64
    assert cost["relative_training_flops"] == pytest.approx(0.25)


@pytest.mark.parametrize(("layer", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_the_matrix_products_inside_a_recurrent_layer_count(layer, gates):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = layer(3, 8, batch_first=True), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.cell(x)[0][:, -1])

    before = (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled)
    flops = forward_flops(Net(), {"input": torch.zeros(2, 5, 3)}, ("input",))
    assert flops == {"cell": 2 * 2 * 5 * gates * 8 * (3 + 8), "head": 2 * 2 * 8 * 2}
    assert (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled) == before
