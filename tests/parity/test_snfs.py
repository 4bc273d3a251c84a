"""SNFS: what is freed is shared out by mean |momentum|, a full layer passes on, and growth follows |momentum|."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from sparsify_deploy.sparsity.mask import Mask
from sparsify_deploy.training.methods import snfs
from sparsify_deploy.training.methods._dense_momentum import DenseMomentum
from sparsify_deploy.training.optimizer import build_optimizer
from sparsify_deploy.training.settings import Optimizer
from sparsify_deploy.training.updater import HoldMask


@pytest.mark.parametrize(
    ("freed", "room", "contribution", "expected"),
    [
        # 10 in all, by 1 : 1 : 2 -> 2.5, 2.5, 5; the remainder of 1 goes to the first of equal fractions
        ((5, 3, 2), (50, 50, 50), (1.0, 1.0, 2.0), (3, 2, 5)),
        # by 1 : 2 : 7 -> 1, 2, 7; c holds 3, and its 4 go in equal parts to a and b
        ((5, 3, 2), (50, 50, 3), (1.0, 2.0, 7.0), (3, 4, 3)),
        # c's 4 would give b 4, which holds 3: its 1 goes on to a
        ((5, 3, 2), (50, 3, 3), (1.0, 2.0, 7.0), (4, 3, 3)),
        # a layer without momentum gets nothing, unless what others cannot take comes to it
        ((5, 3, 2), (50, 50, 50), (0.0, 1.0, 1.0), (0, 5, 5)),
        ((5, 3, 2), (50, 4, 4), (0.0, 1.0, 1.0), (2, 4, 4)),
        # nobody has momentum: each its own
        ((5, 3, 2), (50, 50, 50), (0.0, 0.0, 0.0), (5, 3, 2)),
        ((0, 0, 0), (4, 4, 4), (1.0, 1.0, 1.0), (0, 0, 0)),
        # room for exactly what was freed
        ((5, 3, 2), (5, 3, 2), (1.0, 5.0, 9.0), (5, 3, 2)),
    ],
)
def test_redistribution_by_hand(freed, room, contribution, expected):
    names = "abc"
    shares = snfs.redistribute(*(dict(zip(names, part, strict=True)) for part in (freed, room, contribution)))
    assert tuple(shares[name] for name in names) == expected


@pytest.mark.parametrize("seed", range(200))
def test_the_total_is_constant_and_no_layer_overflows(seed):
    rng = random.Random(seed)
    names = [f"layer{i}" for i in range(rng.randrange(1, 7))]
    freed = {name: rng.randrange(30) for name in names}
    room = {name: freed[name] + rng.randrange(10) for name in names}
    contribution = {name: rng.choice([0.0, 1e-30, rng.random(), 1e6]) for name in names}
    shares = snfs.redistribute(freed, room, contribution)
    assert sum(shares.values()) == sum(freed.values())
    assert all(0 <= shares[name] <= room[name] for name in names)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 1, bias=False)
        self.b = nn.Linear(4, 1, bias=False)


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_one_update_by_hand(kind):
    """f = 0.5. a: 4 active, drops 2 (0.1 and 0.2); b: 2 active, drops 1 (0.3): 3 freed.

    Mean |momentum| of the active: a (1 + 2 + 3 + 2) / 4 = 2, b (4 + 4) / 2 = 4: a gets 1, b 2.
    a grows among 1 and 3 (just dropped, |m| 2 and 2) and 4, 5 (9 and 0): 4. b among 1, 2, 3 (|m| 4, 1, 5): 3 and 1.
    """
    model = Two()
    optimizer = build_optimizer(model, Optimizer(name=kind))
    slot = "momentum_buffer" if kind == "sgd" else "exp_avg"
    values = {
        "a.weight": ([[1, 1, 1, 1, 0, 0]], [[1.0, 0.1, -2.0, -0.2, 0, 0]], [[1.0, -2.0, 3.0, 2.0, -9.0, 0.0]]),
        "b.weight": ([[1, 1, 0, 0]], [[0.5, -0.3, 0, 0]], [[-4.0, 4.0, 1.0, 5.0]]),
    }
    for name, parameter in model.named_parameters():
        parameter.data = torch.tensor(values[name][1])
        parameter.grad = torch.ones_like(parameter)
        optimizer.state[parameter] = {slot: torch.tensor(values[name][2])}
    mask = Mask({name: torch.tensor(kept).bool() for name, (kept, _, _) in values.items()})
    held = DenseMomentum(model, optimizer, mask)
    updater = snfs.SNFS(held, snfs.Params(update_every=1), 4, optimizer)
    updater._move(1, 0.5, updater._next(1, 0.5))
    assert updater.mask["a.weight"].int().tolist() == [[1, 0, 1, 0, 1, 0]]
    assert updater.mask["b.weight"].int().tolist() == [[1, 1, 0, 1]]
    assert model.a.weight.tolist() == [[1.0, 0.0, -2.0, 0.0, 0.0, 0.0]]
    assert model.b.weight[0].tolist() == pytest.approx([0.5, -0.3, 0.0, 0.0])  # regrown: keeps its value
    # momentum is dense and untouched, that of grown and of dropped weights too
    for name, parameter in model.named_parameters():
        assert optimizer.state[parameter][slot].tolist() == values[name][2]
    assert updater.updates[0].densities == {"a.weight": 3 / 6, "b.weight": 3 / 4}
    assert updater.updates[0].changed == 2


def test_active_weights_train_as_under_a_masked_gradient():
    """Between two updates SNFS is static training: masking weights after the step is masking gradients before it."""
    ends = []
    for dense in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(6, 5)
        mask = Mask({"weight": torch.rand(5, 6) < 0.5})
        optimizer = build_optimizer(model, Optimizer(lr=0.05, weight_decay=0.01))
        held = (DenseMomentum if dense else HoldMask)(model, optimizer, mask)
        for step in range(5):
            optimizer.zero_grad()
            model(torch.randn(7, 6)).square().sum().backward()
            assert held.after_backward(step)
            optimizer.step()
            held.after_step(step)
        ends.append(model.weight.detach())
        momentum = optimizer.state[model.weight]["momentum_buffer"][~mask["weight"]]
        assert bool(momentum.any()) == dense
    assert torch.equal(*ends)
