from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsify_deploy.errors import ModelError
from sparsify_deploy.training.cost import forward_flops, relative_training_flops, training_cost
from sparsify_deploy.training.methods import rigl


class Residual(nn.Module):
    """Two uses of submodules and one matrix product of its own."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.Sequential(nn.Conv2d(4, 4, 1)))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        y = self.body(x).mean((2, 3))
        return self.head(y) @ torch.ones(3, 5)


def test_each_module_counts_its_own_work_and_the_sum_is_the_whole():
    flops = forward_flops(Residual().train(), {"input": torch.zeros(2, 2, 6, 6)}, ("input",))
    assert flops == {
        "": 2 * 2 * 3 * 5,
        "body.0": 2 * 2 * 36 * 4 * 2 * 9,
        "body.1.0": 2 * 2 * 36 * 4 * 4,
        "head": 2 * 2 * 4 * 3,
    }


def test_a_model_that_is_one_layer():
    assert forward_flops(nn.Linear(4, 3), {"input": torch.zeros(1, 4)}, ("input",)) == {"": 24}
    assert relative_training_flops({"": 24}, {"weight": 0.5}, 10) == 0.5


def test_fixed_masks_cost_their_share_of_the_flops():
    flops = {"a": 100, "b": 300, "": 100}
    assert relative_training_flops(flops, {}, 10) == 1.0
    assert relative_training_flops(flops, {"a.weight": 0.5, "b.weight": 0.1}, 10) == pytest.approx(180 / 500)


def test_rigl_costs_what_the_paper_says():
    # ResNet-50, ERK, 80 and 90 %: forward 0.414x and 0.242x; the paper's table has 0.42x and 0.25x for training.
    for sparse, expected in ((0.414, 0.42), (0.242, 0.25)):
        value = relative_training_flops({"a": 1000}, {"a.weight": sparse}, 50, dense_gradient_every=100)
        assert value == pytest.approx((3 * sparse * 100 + 2 * sparse + 1) / 101 / 3)
        assert abs(value - expected) < 0.006


def test_densities_count_from_their_step_on():
    updates = [(4, {"a.weight": 0.25})]
    assert relative_training_flops({"a": 8}, {"a.weight": 0.5}, 10, updates=updates) == pytest.approx(
        0.4 * 0.5 + 0.6 * 0.25
    )


def test_each_convention_by_hand():
    """f_D = 1000, f_S = 100 * 0.5 + 900 * 0.2 = 230; ten steps."""
    flops, densities = {"a": 100, "b": 900}, {"a.weight": 0.5, "b.weight": 0.2}
    assert relative_training_flops(flops, densities, 10) == pytest.approx(230 / 1000)  # static, SET
    every_step = relative_training_flops(flops, densities, 10, dense_gradient_every=0)  # SNFS, STE, SR-STE
    assert every_step == pytest.approx((2 * 230 + 1000) / 3000)
    rigl = relative_training_flops(flops, densities, 10, dense_gradient_every=4)
    assert rigl == pytest.approx((4 * 3 * 230 + 2 * 230 + 1000) / 5 / 3000)
    halves = [(6, {"a.weight": 1.0, "b.weight": 0.5}), (8, densities)]
    gradual = relative_training_flops(flops, {}, 10, updates=halves)
    assert gradual == pytest.approx((6 * 1000 + 2 * 550 + 2 * 230) / 10000)
    tickets = relative_training_flops(
        flops, {}, 10 + 8 + 8, updates=[(10, halves[0][1]), (18, densities)], dense_steps=10
    )
    assert tickets == pytest.approx((10 * 1000 + 8 * 550 + 8 * 230) / 10000)


def test_nothing_to_count_is_a_model_error():
    with pytest.raises(ModelError, match="no convolution"):
        relative_training_flops({}, {}, 10)


def test_the_cost_of_a_fit(tiny, tmp_path):
    trainer = tiny.trainer(tmp_path)
    assert rigl.optimizer_steps(rigl.Params(), 12, None) == 12
    rigl.train(trainer, tiny.mask(), rigl.Params(update_every=4))
    example = tiny.images().take(torch.arange(1))
    cost = training_cost(trainer.model, example, ("input",), trainer.history)
    dense = 2 * (64 * 4 * 9 + 256 * 8 + 8 * 4)
    densities = tiny.mask().densities()
    sparse = 2 * (64 * 4 * 9 * densities["0.weight"] + 256 * 8 * densities["5.weight"] + 8 * 4 * densities["7.weight"])
    assert cost["dense_forward_flops"] == dense
    assert cost["sparse_forward_flops"] == pytest.approx(sparse)
    assert cost["relative_training_flops"] == pytest.approx((14 * sparse + dense) / 5 / 3 / dense)
    assert cost["train_s"] == trainer.history.train_s > 0
    assert cost["cpu_s"] == trainer.history.cpu_s > 0
