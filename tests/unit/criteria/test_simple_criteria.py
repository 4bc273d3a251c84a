"""Magnitude and random: what they score, and the layer collapse that magnitude is known for."""

from __future__ import annotations

import torch
from torch import nn

from sparsify_deploy.criteria import magnitude, random
from sparsify_deploy.sparsity.layers import prunable
from sparsify_deploy.sparsity.prune import allocate, collapsed, prune_at_init


def score(module: object, model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    return module.score(model, [], None, module.Params(), inputs=("input",), seed=seed)  # type: ignore[attr-defined]


def lenet_300_100() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


def test_magnitude_is_the_absolute_weight() -> None:
    model = lenet_300_100()
    scores = score(magnitude, model)
    assert all(torch.equal(scores[layer.parameter], layer.weight.detach().abs()) for layer in prunable(model))


def test_magnitude_at_two_percent_empties_fc1_with_default_initialisation_and_not_with_glorot() -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        model = lenet_300_100()
        mask = allocate(score(magnitude, model), 0.02, "global")
        assert collapsed(mask) == ("1.weight",)
        assert collapsed(allocate(score(magnitude, model), 0.02, "uniform")) == ()
        for layer in prunable(model):
            nn.init.xavier_normal_(layer.weight)
        assert collapsed(allocate(score(magnitude, model), 0.02, "global")) == ()


def test_random_depends_on_the_seed_and_the_layers_name_alone() -> None:
    model = lenet_300_100()
    one, same, other = (score(random, model, seed) for seed in (5, 5, 6))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    alone = score(random, nn.Sequential(nn.Flatten(), nn.Linear(784, 300)), 5)
    assert torch.equal(alone["1.weight"], one["1.weight"])
    twins = score(random, nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 50)), 5)
    assert not torch.equal(twins["0.weight"], twins["1.weight"])


def test_random_is_uniform() -> None:
    values = score(random, lenet_300_100())["1.weight"].flatten()
    assert values.min() > 0
    assert values.max() <= 1
    quantiles = values.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    assert torch.allclose(quantiles, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), atol=0.005)
    left = values.view(300, 784)
    assert abs(float(torch.corrcoef(torch.stack([left[:, :-1].flatten(), left[:, 1:].flatten()]))[0, 1])) < 0.01


def test_random_with_erk_has_exact_counts() -> None:
    model = lenet_300_100()
    scorer = random.prepare(model, [], None, random.Params(), inputs=("input",), seed=0)  # type: ignore[arg-type]
    mask = prune_at_init(scorer, prunable(model), 0.1, allocation="erk", rounds=1)
    # ε (1084 + 400) = 26620 − 1000 after the last layer became dense
    epsilon = 25_620 / 1484
    assert mask.counts() == {
        "1.weight": (round(epsilon * 1084), 235_200),
        "3.weight": (round(epsilon * 400), 30_000),
        "5.weight": (1000, 1000),
    }
