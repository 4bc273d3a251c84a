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
    new = rigl.rewire(torch.tensor(weights), torch.tensor(mask), torch.tensor(gradients), count)
    assert new.tolist() == brute_rewire(weights, mask, gradients, count)
    assert int(new.sum()) == sum(mask)


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
