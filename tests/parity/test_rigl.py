"""RigL against a plain-Python rewriting of its rules, over a whole run in float64."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from sparsify_deploy.sparsity.mask import Mask
from sparsify_deploy.tasks import regression
from sparsify_deploy.training.loop import Trainer, training_batches
from sparsify_deploy.training.methods import rigl
from sparsify_deploy.training.methods._selection import drop, grow_
from sparsify_deploy.training.settings import Optimizer, Schedule, Training
from sparsify_deploy.types import Context


class Split:
    def __init__(self, **fields):
        self.fields = fields

    def __len__(self):
        return len(self.fields["input"])

    def take(self, indices):
        return {name: value[indices] for name, value in self.fields.items()}


def brute_rewire(weights, mask, gradients, count):
    active = [i for i, kept in enumerate(mask) if kept]
    survivors = set(sorted(active, key=lambda i: (-abs(weights[i]), i))[: len(active) - count])
    others = [i for i in range(len(mask)) if i not in survivors]
    grown = set(sorted(others, key=lambda i: (-abs(gradients[i]), i))[:count])
    return [i in survivors or i in grown for i in range(len(mask))]


@pytest.mark.parametrize("seed", range(40))
def test_rewiring_matches_brute_force_with_many_ties(seed):
    rng = random.Random(seed)
    size = rng.randrange(1, 40)
    mask = [rng.random() < 0.5 for _ in range(size)]
    weights = [float(rng.randrange(-3, 4)) * kept for kept in mask]
    gradients = [float(rng.randrange(-3, 4)) for _ in range(size)]
    count = rng.randrange(0, sum(mask) + 1)
    left = drop(torch.tensor(weights), torch.tensor(mask), count)
    new = grow_(left.clone(), torch.tensor(gradients), count)
    assert new.tolist() == brute_rewire(weights, mask, gradients, count)
    assert int(new.sum()) == sum(mask)


def sorted_update(weight, mask, score, count):
    """The mask after an update by two stable sorts of the whole layer."""
    flat = mask.flatten()
    new = torch.zeros_like(flat)
    order = weight.abs().flatten().masked_fill(~flat, -1.0).argsort(descending=True, stable=True)
    new[order[: int(flat.sum()) - count]] = True
    order = score.abs().flatten().masked_fill(new, -1.0).argsort(descending=True, stable=True)
    new[order[:count]] = True
    return new.view_as(mask)


LARGE = {
    "gaussian": lambda *shape, generator: torch.randn(*shape, generator=generator),
    "many ties": lambda *shape, generator: torch.randn(*shape, generator=generator).mul(2).round(),
    "mostly zero": lambda *shape, generator: (
        torch.randn(*shape, generator=generator) * (torch.rand(*shape, generator=generator) < 0.001)
    ),
    "all zero": lambda *shape, **_: torch.zeros(*shape),
    "the sample sees only large ones": lambda *shape, generator: torch.randn(*shape, generator=generator).index_fill_(
        1, torch.arange(0, shape[1], 2), 1e3
    ),
    "the sample sees only small ones": lambda *shape, generator: (
        torch.full(shape, 5.0)
        .view(-1)
        .index_fill_(0, torch.arange(0, 300 * 700, (300 * 700 // 8192) | 1), 0.0)
        .view(shape)
    ),
}


@pytest.mark.parametrize("kind", LARGE)
@pytest.mark.parametrize(("density", "fraction"), [(0.1, 0.3), (0.2, 0.02), (0.9, 0.11), (0.5, 1.0), (0.001, 0.5)])
def test_a_large_layer_is_rewired_as_by_sorting(kind, density, fraction):
    generator = torch.Generator().manual_seed(8)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        weight, score = (LARGE[kind](300, 700, generator=generator).to(dtype) for _ in range(2))
        mask = torch.rand(300, 700, generator=generator) < density
        weight = weight * mask
        count = min(int(fraction * mask.sum()), int((~mask).sum()))
        before = mask.clone(), weight.clone(), score.clone()
        left = drop(weight, mask, count)
        assert int(left.sum()) == int(mask.sum()) - count
        assert torch.equal(grow_(left.clone(), score, count), sorted_update(weight, mask, score, count))
        assert all(map(torch.equal, before, (mask, weight, score)))


def reference(weight, mask, batches, *, lr, momentum, decay, every, alpha, end):
    """Linear regression by SGD with momentum under RigL: final weight, final mask."""
    weight, mask = weight * mask, mask.copy()
    slot = None
    for step, (inputs, target) in enumerate(batches):
        gradient = 2 * (inputs @ weight.T - target).T @ inputs / target.size
        if step > 0 and step % every == 0 and step < end:
            fraction = alpha / 2 * (1 + math.cos(math.pi * step / end))
            count = math.floor(fraction * mask.sum())
            flat = brute_rewire(weight.ravel(), mask.ravel(), gradient.ravel(), count)
            new = np.array(flat).reshape(mask.shape)
            weight, slot = weight * (new & mask), slot * (new & mask)
            mask = new
            continue
        gradient = gradient * mask + decay * weight
        slot = gradient if slot is None else momentum * slot + gradient
        weight = weight - lr * slot
    return weight, mask


def test_a_whole_run_matches_the_rewriting(tmp_path):
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(60, 12, generator=generator, dtype=torch.float64)
    truth = torch.randn(5, 12, generator=generator, dtype=torch.float64) ** 3
    split = Split(input=inputs, target=inputs @ truth.T)
    mask = torch.rand(5, 12, generator=generator) < 0.3
    model = nn.Linear(12, 5, bias=False, dtype=torch.float64)
    start = model.weight.detach().numpy().copy()
    settings = Training(
        steps=70,
        batch_size=10,
        optimizer=Optimizer(lr=0.02, momentum=0.9, weight_decay=0.01),
        schedule=Schedule(name="constant"),
    )
    task = regression.create(regression.Params())
    trainer = Trainer(model, task, split, ("input",), settings, seed=1, folder=tmp_path, context=Context())
    final = rigl.train(trainer, Mask({"weight": mask}), rigl.Params(update_every=5, drop_fraction=0.5))
    batches = [
        (batch["input"].numpy(), batch["target"].numpy())
        for batch in training_batches(split, seed=1, batch_size=10, count=70)
    ]
    weight, expected = reference(
        start, mask.numpy(), batches, lr=0.02, momentum=0.9, decay=0.01, every=5, alpha=0.5, end=52
    )
    assert np.array_equal(final["weight"].numpy(), expected)
    assert not np.array_equal(expected, mask.numpy())
    assert np.abs(model.weight.detach().numpy() - weight).max() < 1e-10
