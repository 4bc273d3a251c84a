"""Gradients outside training, of networks whose backward pass depends on the mode of a layer or does not exist."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsify_deploy.criteria import grasp, snip
from sparsify_deploy.errors import ModelError
from sparsify_deploy.tasks import classification
from sparsify_deploy.training.evaluation import loss_of
from sparsify_deploy.training.gradients import dense_gradients

TASK = classification.create(classification.Params())
BATCH = {"input": torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0)), "target": torch.arange(6) % 4}


class Recurrent(nn.Module):
    """Notes the mode its recurrent layer runs in."""

    def __init__(self, kind, dropout):
        super().__init__()
        self.layers = kind(8, 8, 2, batch_first=True, dropout=dropout)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)
        self.seen = set()

    def forward(self, x):
        self.seen.add((self.layers.training, self.drop.training))
        return self.head(self.drop(self.layers(x)[0][:, -1]))


def gradients(model):
    return dense_gradients(model, TASK, [BATCH], ("input",), ["head.weight"])["head.weight"]


def scores(criterion):
    def score(model):
        found = criterion.score(model, [BATCH], loss_of(TASK, ("input",)), criterion.Params(), inputs=("input",))
        return found["head.weight"]

    return score


@pytest.mark.parametrize("measure", [gradients, scores(snip), scores(grasp)], ids=["refill", "snip", "grasp"])
@pytest.mark.parametrize(("dropout", "trains"), [(0.0, True), (0.4, False)])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_layers_keep_a_backward_pass_under_cudnn_and_no_dropout_acts(measure, dropout, trains, kind):
    model = Recurrent(kind, dropout).eval()
    first = measure(model)
    assert model.seen == {(trains, False)}
    assert torch.equal(first, measure(model))
    assert not any(module.training for module in model.modules())


class Overwriting(nn.Module):
    """ReLU needs its own result for the backward pass, and it is gone."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return torch.relu(self.head(x[:, 0])).mul_(2.0)


@pytest.mark.parametrize(("criterion", "name"), [(snip, "SNIP"), (grasp, "GraSP")])
def test_a_network_without_a_backward_pass_is_one_line(criterion, name):
    with pytest.raises(ModelError, match=f"{name} differentiates the network, which failed: .*choose init.criterion"):
        scores(criterion)(Overwriting())
