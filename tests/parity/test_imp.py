"""Iterative magnitude pruning against a plain torch loop that holds the mask in the forward pass."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from sparsify_deploy.sparsity.mask import Mask
from sparsify_deploy.tasks import classification
from sparsify_deploy.training.batches import Batches
from sparsify_deploy.training.loop import Trainer
from sparsify_deploy.training.methods import imp
from sparsify_deploy.training.settings import Optimizer, Schedule, Training

STEPS, K, LR, MOMENTUM, LOW = 20, 6, 0.1, 0.9, 0.05
WEIGHTS = ("0.weight", "3.weight")


class Points:
    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(64, 6, generator=generator)
        self.y = (self.x[:, 0] * self.x[:, 1] > 0).long() + (self.x[:, 2] > 0).long()

    def __len__(self):
        return len(self.x)

    def take(self, indices):
        return {"input": self.x[indices], "target": self.y[indices]}


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))


def cosine(step):
    return LR * 0.5 * (1 + math.cos(math.pi * step / STEPS))


def plain(model, velocity, masks, begin, rate):
    """Textbook SGD with momentum from step `begin`, gradients masked; a copy of all state at step K."""
    batches = Batches(Points(), seed=9, batch_size=16)
    model.train()
    kept = None
    for step in range(begin, STEPS):
        if step == K:
            kept = copy.deepcopy((model.state_dict(), velocity))
        batch = batches.batch(step)
        model.zero_grad()
        functional.cross_entropy(model(batch["input"]), batch["target"]).backward()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                gradient = parameter.grad * masks.get(name, 1.0)
                velocity[name] = MOMENTUM * velocity[name] + gradient if name in velocity else gradient
                parameter.sub_(rate(step) * velocity[name])
    return kept


def lottery(mode, levels):
    model, velocity, masks = (
        network(),
        {},
        {name: torch.ones(p) for name, p in (("0.weight", (12, 6)), ("3.weight", (3, 12)))},
    )
    ticket = plain(model, velocity, masks, 0, cosine)
    for level in range(1, levels + 1):
        trained = dict(model.named_parameters())
        live = torch.cat([trained[n].detach()[masks[n] > 0].abs() for n in WEIGHTS])
        total = sum(m.numel() for m in masks.values())
        threshold = live.sort(descending=True).values[round(0.8**level * total) - 1]
        masks = {n: ((trained[n].detach().abs() >= threshold) & (masks[n] > 0)).float() for n in WEIGHTS}
        if mode == "weight_rewind":
            state, velocity = copy.deepcopy(ticket)
            model.load_state_dict(state)
            velocity = {n: v * masks.get(n, 1.0) for n, v in velocity.items()}
        else:
            velocity = {}
        with torch.no_grad():
            for name in WEIGHTS:
                model.get_parameter(name).mul_(masks[name])
        plain(model, velocity, masks, K, (lambda _: LOW * LR) if mode == "finetune" else cosine)
    return model, masks


@pytest.mark.parametrize("mode", ["weight_rewind", "learning_rate_rewind", "finetune"])
def test_imp_is_the_plain_loop(tmp_path, mode):
    from sparsify_deploy.types import Context

    optimizer = Optimizer(lr=LR, momentum=MOMENTUM, weight_decay=0.0)
    trainer = Trainer(
        network(),
        classification.create(classification.Params()),
        Points(),
        ("input",),
        Training(steps=STEPS, batch_size=16, optimizer=optimizer, schedule=Schedule()),
        seed=9,
        folder=tmp_path,
        context=Context(checkpoint_every_s=1e9),
    )
    low = {"finetune_fraction": LOW} if mode == "finetune" else {}
    params = imp.Params(retrain=mode, rewind_step=K, **low)
    mask = imp.train(trainer, None, params, 0.8**4)
    model, masks = lottery(mode, 4)
    assert mask == Mask({name: m.bool() for name, m in masks.items()})
    expected = model.state_dict()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.allclose(tensor, expected[name], atol=1e-5), name
