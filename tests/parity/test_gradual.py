"""Gradual magnitude pruning: every density of a run is the formula's, and what goes is what is smallest."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from sparsify_deploy.errors import ModelError, UsageError
from sparsify_deploy.sparsity.allocation import erk
from sparsify_deploy.sparsity.mask import Mask
from sparsify_deploy.tasks import regression
from sparsify_deploy.training.loop import Trainer
from sparsify_deploy.training.methods import gradual
from sparsify_deploy.training.settings import Optimizer, Schedule, Training
from sparsify_deploy.types import Context

SIZES = {"0.weight": 20 * 12, "2.weight": 10 * 20, "4.weight": 3 * 10}


class Split:
    def __init__(self, **fields):
        self.fields = fields

    def __len__(self):
        return len(self.fields["input"])

    def take(self, indices):
        return {name: value[indices] for name, value in self.fields.items()}


def trainer_of(folder, steps):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 3))
    inputs = torch.randn(40, 12)
    split = Split(input=inputs, target=inputs[:, :3].square())
    settings = Training(steps=steps, batch_size=8, optimizer=Optimizer(lr=0.02), schedule=Schedule(name="constant"))
    task = regression.create(regression.Params())
    return Trainer(model, task, split, ("input",), settings, seed=1, folder=folder, context=Context())


def sparsity(step, begin, end, initial, final):
    return final + (initial - final) * (1 - (step - begin) / (end - begin)) ** 3


@pytest.mark.parametrize(
    ("begin", "end", "every", "initial", "steps", "expected_steps"),
    [
        (0.0, 0.75, 10, 0.0, 40, [10, 20, 30]),
        (0.0, 0.75, 7, 0.0, 40, [7, 14, 21, 28, 30]),
        (0.25, 1.0, 8, 0.3, 40, [10, 18, 26, 34, 40]),
        (0.5, 0.55, 100, 0.0, 40, [20, 22]),
        (0.0, 0.01, 100, 0.0, 40, [1]),
    ],
)
def test_the_uniform_trace_is_the_formula(tmp_path, begin, end, every, initial, steps, expected_steps):
    trainer = trainer_of(tmp_path, steps)
    params = gradual.Params(begin_fraction=begin, end_fraction=end, update_every=every, initial_sparsity=initial)
    final = gradual.train(trainer, None, params, 0.17)
    updates = trainer.history.updates
    assert [update.step for update in updates] == expected_steps
    for update in updates:
        t1 = max(1, round(end * steps))
        s = sparsity(update.step, round(begin * steps), t1, initial, 0.83) if update.step < t1 else 0.83
        expected = {name: round((1 - s) * size) / size for name, size in SIZES.items()}
        assert update.densities == pytest.approx(expected, abs=0)
    assert final.counts() == {name: (round(0.17 * size), size) for name, size in SIZES.items()}
    assert final.check_holds(trainer.model) == ()
    assert trainer.history.densities == dict.fromkeys(SIZES, 1.0)
    assert bool(trainer.history.notes) == (expected_steps == [1])


@pytest.mark.parametrize("allocation", ["global", "erk"])
def test_the_other_allocations_end_at_the_density_asked_for(tmp_path, allocation):
    trainer = trainer_of(tmp_path, 30)
    final = gradual.train(trainer, None, gradual.Params(allocation=allocation, update_every=4), 0.3)
    counts = {name: kept for name, (kept, _) in final.counts().items()}
    if allocation == "global":
        assert sum(counts.values()) == round(0.3 * sum(SIZES.values()))
        assert len(set(final.densities().values())) > 1
        for update in trainer.history.updates[:-1]:
            kept = sum(round(update.densities[name] * SIZES[name]) for name in SIZES)
            share = 1 - sparsity(update.step, 0, round(0.75 * 30), 0.0, 0.7)
            assert kept == round(share * sum(SIZES.values()))
    else:
        asked = erk({"0.weight": (20, 12), "2.weight": (10, 20), "4.weight": (3, 10)}, 0.3)
        assert counts == {name: round(asked[name] * SIZES[name]) for name in SIZES}


def test_masks_only_shrink_and_the_smallest_go(tmp_path):
    trainer = trainer_of(tmp_path, 24)
    seen = []

    class Watched(gradual.Gradual):
        def after_step(self, step):
            before = self.mask
            weights = {n: p.detach().clone() for n, p in self._held.parameters.items()}
            super().after_step(step)
            for name, new in self.mask.items():
                assert not (new & ~before[name]).any()
                gone = before[name] & ~new
                seen.append(int(gone.sum()))
                if gone.any() and new.any():
                    assert weights[name].abs()[gone].max() <= weights[name].abs()[new].min()

    params = gradual.Params(update_every=3)
    held = gradual.Gradual(_held(trainer), params, 24, 0.2)
    trainer.fit(Watched(_held(trainer), params, 24, 0.2))
    assert sum(seen) == sum(SIZES.values()) - sum(round(0.2 * size) for size in SIZES.values())
    assert held.dense_gradient_every is None


def _held(trainer):
    from sparsify_deploy.training.updater import HoldMask

    ones = {name: torch.ones_like(p).bool() for name, p in trainer.model.named_parameters() if p.ndim > 1}
    return HoldMask(trainer.model, trainer.optimizer, Mask(ones))


def test_a_pruned_weight_never_comes_back_among_kept_zeros():
    """Kept weights that happen to be 0 tie with pruned ones, which have the lower index."""
    model = nn.Linear(6, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    from sparsify_deploy.training.updater import HoldMask

    held = HoldMask(model, optimizer, Mask({"weight": torch.tensor([[0, 0, 1, 1, 1, 1]]).bool()}))
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0, 0, 0.0, 0.0, 5.0, 0.0]]))
    updater = gradual.Gradual(held, gradual.Params(update_every=1, end_fraction=0.5), 4, 0.5)
    updater.after_step(1)
    assert updater.mask["weight"].int().tolist() == [[0, 0, 1, 1, 1, 0]]


def test_sparsity_from_the_first_step_on(tmp_path):
    trainer = trainer_of(tmp_path, 20)
    gradual.train(trainer, None, gradual.Params(initial_sparsity=0.5, update_every=5), 0.2)
    assert trainer.history.densities == dict.fromkeys(SIZES, 0.5)


def test_layers_kept_dense_are_not_counted(tmp_path):
    trainer = trainer_of(tmp_path, 20)
    final = gradual.train(trainer, None, gradual.Params(keep_dense=("4",), update_every=5), 0.2)
    assert set(final) == {"0.weight", "2.weight"}
    assert (trainer.model[4].weight != 0).all()
    assert final.density == pytest.approx(0.2)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValidationError, match="begin_fraction must be below"):
        gradual.Params(begin_fraction=0.8)
    trainer = trainer_of(tmp_path, 4)
    for params, density, what in (
        (gradual.Params(), None, "give sparsity"),
        (gradual.Params(initial_sparsity=0.9), 0.2, "initial_sparsity 0.9 is above"),
        (gradual.Params(keep_dense=("*",)), 0.2, "no layer to prune"),
    ):
        with pytest.raises(UsageError, match=what):
            gradual.train(trainer, None, params, density)
    with pytest.raises(ModelError, match="matches no prunable layer"):
        gradual.train(trainer, None, gradual.Params(keep_dense=("9",)), 0.2)
