"""Training that stays N:M: every group has exactly N of M after every update, so projecting changes nothing."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from sparsify_deploy.errors import UsageError
from sparsify_deploy.params import n_and_m
from sparsify_deploy.sparsity.mask import Mask
from sparsify_deploy.sparsity.nm import is_nm, nm_mask
from sparsify_deploy.tasks import classification
from sparsify_deploy.training.loop import Trainer
from sparsify_deploy.training.methods import rigl
from sparsify_deploy.training.methods import set as set_
from sparsify_deploy.training.methods._rewiring import replaced
from sparsify_deploy.training.settings import Optimizer, Training
from sparsify_deploy.types import Context

METHODS = {"rigl": rigl, "set": set_}


class Split:
    def __init__(self, **fields):
        self.fields = fields

    def __len__(self):
        return len(self.fields["input"])

    def take(self, indices):
        return {name: value[indices] for name, value in self.fields.items()}


def exactly(mask, n, m):
    """Whether every group along axis 1 has n True, counted group by group."""
    rows = mask.movedim(1, -1).reshape(-1, m)
    return bool((rows.sum(1) == n).all())


def trainer_of(folder):
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(16, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.Flatten(), nn.Linear(144, 5)
    )
    split = Split(input=torch.randn(24, 16, 3, 3), target=torch.randint(5, (24,)))
    settings = Training(steps=14, batch_size=8, optimizer=Optimizer(lr=0.05))
    task = classification.create(classification.Params())
    return Trainer(model, task, split, ("input",), settings, seed=1, folder=folder, context=Context())


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "3:8", "5:16"])
@pytest.mark.parametrize("name", METHODS)
def test_every_update_keeps_the_pattern_and_projection_costs_nothing(tmp_path, monkeypatch, name, pattern):
    n, m = n_and_m(pattern)
    trainer, method = trainer_of(tmp_path), METHODS[name]
    wide = {k: p for k, p in trainer.model.named_parameters() if p.ndim > 1 and p.shape[1] % m == 0}
    start = {k: nm_mask(p, n, m) for k, p in wide.items()}
    dense = trainer.model[2].weight if m == 16 else trainer.model[4].weight
    key = "2.weight" if m == 16 else "4.weight"
    mask = Mask({**start, key: torch.ones_like(dense, dtype=torch.bool)})
    seen = []

    class Watched(method.RigL if name == "rigl" else method.SET):
        def _move(self, done, fraction, layers):
            super()._move(done, fraction, layers)
            assert layers
            for layer, kept in self.mask.items():
                if layer != key:
                    assert exactly(kept, n, m), (layer, done)
                    assert is_nm(kept, n, m)
            seen.append(self.updates[-1].changed)

    monkeypatch.setattr(method, "RigL" if name == "rigl" else "SET", Watched)
    params = method.Params(update_every=3, drop_fraction=0.6, end_fraction=1.0, pattern=pattern)
    final = method.train(trainer, mask, params)
    assert len(seen) == 4
    assert sum(seen) > 10
    assert final[key].all()
    assert final != mask
    for layer in start:
        if layer == key:
            continue
        weight = dict(trainer.model.named_parameters())[layer].detach()
        projected = nm_mask(weight, n, m, final[layer])
        assert torch.equal(projected, final[layer])
        assert (weight.abs() * projected).sum() == weight.abs().sum()


@pytest.mark.parametrize("seed", range(40))
def test_growth_within_groups_matches_brute_force(seed):
    """Dropped: the smallest of the whole layer. Grown: in each group as many as it lost, the best by score."""
    rng = random.Random(seed)
    n, m = rng.choice([(2, 4), (1, 4), (4, 8)])
    rows, groups = rng.randrange(1, 4), rng.randrange(1, 4)
    mask = [[False] * (groups * m) for _ in range(rows)]
    for r in range(rows):
        for g in range(groups):
            for i in rng.sample(range(m), n):
                mask[r][g * m + i] = True
    weight = [[float(rng.randrange(-3, 4)) * kept for kept in row] for row in mask]
    score = [[float(rng.randrange(-3, 4)) for _ in row] for row in mask]
    fraction = rng.random()
    places = [(r, c) for r in range(rows) for c in range(groups * m)]
    active = [p for p in places if mask[p[0]][p[1]]]
    count = int(fraction * len(active))
    left = set(sorted(active, key=lambda p: (-abs(weight[p[0]][p[1]]), p))[: len(active) - count])
    expected = set(left)
    for r in range(rows):
        for g in range(groups):
            group = [(r, g * m + i) for i in range(m)]
            free = sorted((p for p in group if p not in left), key=lambda p: (-abs(score[p[0]][p[1]]), p))
            expected |= set(free[: n - sum(p in left for p in group)])
    new = replaced(torch.tensor(weight), torch.tensor(mask), torch.tensor(score), fraction, f"{n}:{m}")
    assert {tuple(p) for p in new.nonzero().tolist()} == expected
    assert exactly(new, n, m)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("harm", ["one more", "one fewer", "moved", "random"])
def test_a_starting_mask_without_the_pattern_is_named(tmp_path, name, harm):
    trainer = trainer_of(tmp_path)
    good = {k: nm_mask(p, 2, 4) for k, p in trainer.model.named_parameters() if p.ndim > 1}
    bad = good["2.weight"][0, :, 0, 0]
    kept, gone = int(bad.nonzero()[0]), int((~bad).nonzero()[0])
    if harm in ("one more", "moved"):
        bad[gone] = True
    if harm == "one fewer":
        bad[kept] = False
    if harm == "moved":
        bad[4 + int(bad[4:].nonzero()[0])] = False
    if harm == "random":
        good["2.weight"] = torch.rand(16, 8, 1, 1) < 0.5
    method = METHODS[name]
    with pytest.raises(UsageError, match=r"2\.weight is neither dense nor exactly 2:4: start from init\.pattern 2:4"):
        method.train(trainer, Mask(good), method.Params(pattern="2:4"))


def test_a_partly_masked_layer_whose_channels_do_not_divide_is_named(tmp_path):
    trainer = trainer_of(tmp_path)
    with pytest.raises(UsageError, match=r"2\.weight is neither dense nor exactly 5:16"):
        rigl.train(trainer, Mask({"2.weight": torch.rand(16, 8, 1, 1) < 0.5}), rigl.Params(pattern="5:16"))
