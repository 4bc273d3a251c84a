"""SR-STE as the loop runs it: always N:M in the forward pass and at the end, and resuming."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from sparsify_deploy.errors import Diverged, Interrupted, UsageError
from sparsify_deploy.sparsity.nm import is_nm, nm_mask
from sparsify_deploy.training.methods import _straight_through, sr_ste
from sparsify_deploy.training.settings import Optimizer
from sparsify_deploy.types import Context

OPTIMIZERS = {
    "sgd": Optimizer(lr=0.05, weight_decay=0.01),
    "adam": Optimizer(name="adam", lr=0.01),
    "adamw": Optimizer(name="adamw", lr=0.01, weight_decay=0.05),
}


def network(groups=1):
    """Prunable: 0 (1 channel: no pattern), 2 (4 channels), 5 and 7 (linear)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 3, padding=1, groups=groups),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, 8),
            nn.ReLU(),
            nn.Linear(8, 4),
        )


@pytest.mark.parametrize(
    ("pattern", "n", "m", "names"), [("2:4", 2, 4, "257"), ("1:4", 1, 4, "257"), ("4:8", 4, 8, "57")]
)
def test_forward_and_result_are_exactly_n_of_m(tiny, tmp_path, pattern, n, m, names):
    trainer = tiny.trainer(tmp_path, tiny.settings(accumulate=2), model=network())
    seen = {name: [] for name in names}
    for name in names:
        trainer.model[int(name)].register_forward_pre_hook(
            lambda module, _, name=name: seen[name].append(module.weight.detach().clone())
        )
    mask = sr_ste.train(trainer, None, sr_ste.Params(pattern=pattern), None)
    assert set(mask) == {f"{name}.weight" for name in names}
    assert mask.density == n / m
    assert mask.check_holds(trainer.model) == ()
    for name in names:
        weight = trainer.model[int(name)].weight.detach()
        assert is_nm(weight, n, m)
        assert int(weight.count_nonzero()) == weight.numel() * n // m
        assert len(seen[name]) == 24
        for forward in seen[name]:
            assert is_nm(forward, n, m)
            assert int(forward.count_nonzero()) == forward.numel() * n // m
    assert trainer.history.dense_gradient_every == 0


def test_density_trace_and_a_mask_that_moves(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(_straight_through, "RECORD_EVERY", 4)
    trainer = tiny.trainer(tmp_path, tiny.settings(steps=18, optimizer=Optimizer(lr=0.3)), model=network())
    start = {name: nm_mask(trainer.model.get_parameter(name), 2, 4) for name in ("2.weight", "5.weight", "7.weight")}
    mask = sr_ste.train(trainer, None, sr_ste.Params(), None)
    updates = trainer.history.updates
    assert [update.step for update in updates] == [4, 8, 12, 16, 18]
    assert all(set(update.densities.values()) == {0.5} for update in updates)
    assert sum(update.changed for update in updates) > 0
    assert any(not torch.equal(mask[name], kept) for name, kept in start.items())
    assert set(trainer.history.densities.values()) == {0.5}


def test_layers_without_the_pattern_stay_dense_and_are_named(tiny, tmp_path):
    recorder = tiny.recorder()
    context = Context(progress=recorder, checkpoint_every_s=1e9)
    trainer = tiny.trainer(tmp_path, model=network(groups=4), context=context)
    mask = sr_ste.train(trainer, None, sr_ste.Params(keep_dense=("7",)), None)
    assert set(mask) == {"5.weight"}
    notes = (
        "sr_ste: 0 stays dense: C_in 1 is not a multiple of 4",
        "sr_ste: 2 stays dense: grouped convolution (4 groups): sparse kernels take ungrouped ones only",
    )
    assert trainer.history.notes == notes
    assert set(notes) <= set(recorder.said)
    assert bool(trainer.model[7].weight.ne(0).all())


def test_mistakes_of_a_recipe_are_told(tiny, tmp_path):
    trainer = tiny.trainer(tmp_path, model=network())
    with pytest.raises(UsageError, match="takes none"):
        sr_ste.train(trainer, tiny.mask(), sr_ste.Params(), None)
    with pytest.raises(UsageError, match=r"no layer for 3:7: sr_ste: 0 stays dense: C_in 1 is not a multiple of 7"):
        sr_ste.train(trainer, None, sr_ste.Params(pattern="3:7"), None)


def test_weights_that_are_nan_are_a_diverged_run(tiny, tmp_path):
    trainer = tiny.trainer(tmp_path, model=network())
    updater = sr_ste.SrSte(trainer.model, sr_ste.Params(), 12)
    trainer.model[5].weight.data[0, 0] = float("nan")
    with pytest.raises(Diverged, match=r"sr_ste: 5\.weight at step 3: .*NaN"):
        updater.before_forward(3)


def test_a_frozen_layer_is_masked_and_does_not_move(tiny, tmp_path):
    model = network()
    model[5].weight.requires_grad_(False)
    start = model[5].weight.detach().clone()
    trainer = tiny.trainer(tmp_path, model=model)
    sr_ste.train(trainer, None, sr_ste.Params(), None)
    assert torch.equal(model[5].weight, start * nm_mask(start, 2, 4))


class StopAfter:
    def __init__(self, steps):
        self.left = steps

    def __call__(self):
        self.left -= 1
        return self.left == 0


def run(tiny, folder, settings, stop_after=None):
    stop = StopAfter(stop_after) if stop_after else lambda: False
    context = Context(checkpoint_every_s=1e9, stop_requested=stop)
    trainer = tiny.trainer(folder, settings, model=network(), augment=("crop", "flip"), context=context)
    updater = sr_ste.SrSte(trainer.model, sr_ste.Params(decay=0.01), trainer.total_steps)
    if stop_after:
        with pytest.raises(Interrupted):
            trainer.fit(updater)
        return None
    trainer.fit(updater)
    return trainer, updater


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("accumulate", "precision"), [(1, "fp32"), (2, "fp32"), (2, "bf16")])
def test_resuming_sr_ste_is_bit_exact(tiny, tmp_path, monkeypatch, optimizer, accumulate, precision):
    monkeypatch.setattr(_straight_through, "RECORD_EVERY", 4)
    settings = tiny.settings(
        steps=14, optimizer=OPTIMIZERS[optimizer], accumulate=accumulate, precision=precision, clip_norm=1.0
    )
    whole = run(tiny, tmp_path / "whole", settings)
    first = random.Random(f"{optimizer}{accumulate}{precision}").randrange(1, 13)
    run(tiny, tmp_path / "cut", settings, stop_after=first)
    run(tiny, tmp_path / "cut", settings, stop_after=1)
    resumed = run(tiny, tmp_path / "cut", settings)
    assert resumed[0].history.resumed_from == first + 1
    again = run(tiny, tmp_path / "cut", settings)  # loaded, not repeated
    for other in (resumed, again):
        assert tiny.differing(tiny.state(whole[0]), tiny.state(other[0])) == []
        assert whole[1].mask == other[1].mask
        assert whole[0].history.updates == other[0].history.updates
