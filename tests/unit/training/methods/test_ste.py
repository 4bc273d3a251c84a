"""Learned masks as the loop runs them: what the forward pass sees, what is left at the end, and resuming."""

from __future__ import annotations

import importlib.util
import itertools
import random
import sys
from pathlib import Path

import pytest
import torch

from sparsify_deploy.errors import Diverged, Interrupted, ModelError, UsageError
from sparsify_deploy.sparsity.layers import prunable
from sparsify_deploy.training.methods import _straight_through, ste
from sparsify_deploy.training.settings import Optimizer
from sparsify_deploy.types import Context

OPTIMIZERS = {
    "sgd": Optimizer(lr=0.05, weight_decay=0.01),
    "adam": Optimizer(name="adam", lr=0.01),
    "adamw": Optimizer(name="adamw", lr=0.01, weight_decay=0.05),
}


def params(**changes):
    return ste.Params(**{"allocation": "global", "score_lr": 0.5, **changes})


def masked_of(trainer, updater):
    known = dict(trainer.model.named_parameters())
    return {name: known[name].detach().clone() for name in updater.mask}


@pytest.mark.parametrize("allocation", ["global", "uniform", "erk"])
def test_it_ends_with_the_density_asked_for_and_the_scores_have_learned(tiny, tmp_path, allocation):
    trainer = tiny.trainer(tmp_path)
    start = ste.Ste(trainer, params(allocation=allocation), 0.3).mask
    mask = ste.train(trainer, None, params(allocation=allocation), 0.3)
    counts = mask.counts()
    assert set(mask) == {"0.weight", "5.weight", "7.weight"}
    if allocation == "uniform":
        assert all(kept == round(0.3 * total) for kept, total in counts.values())
    total = sum(total for _, total in counts.values())
    assert abs(sum(kept for kept, _ in counts.values()) - round(0.3 * total)) <= (0 if allocation == "global" else 2)
    assert mask != start
    assert mask.check_holds(trainer.model) == ()
    last = trainer.history.updates[-1]
    assert (last.step, last.densities) == (12, mask.densities())
    assert last.changed == sum(int((mask[n] & ~start[n]).sum()) for n in mask) > 0
    assert trainer.history.densities == start.densities()
    assert trainer.history.dense_gradient_every == 0


def test_the_forward_pass_sees_the_masked_weights_and_the_optimizer_the_dense_ones(tiny, tmp_path):
    trainer = tiny.trainer(tmp_path, tiny.settings(accumulate=2))
    updater = ste.Ste(trainer, params(), 0.3)
    layer, seen = trainer.model[5], []
    layer.register_forward_pre_hook(lambda module, _: seen.append(module.weight.detach().clone()))
    for _ in range(6):
        before = layer.weight.detach().clone()
        trainer.model.train()
        trainer.advance(updater)
        expected = before.masked_fill(~updater.mask["5.weight"], 0.0)
        assert torch.equal(seen[-1], expected)
        assert torch.equal(seen[-2], expected)
    assert len(seen) == 12
    assert bool(layer.weight.detach().ne(0).all())  # between steps the dense weights are back
    assert updater.mask.density == pytest.approx(0.3, abs=1e-3)


def test_density_over_a_whole_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(_straight_through, "RECORD_EVERY", 3)
    trainer = tiny.trainer(tmp_path, tiny.settings(steps=20))
    mask = ste.train(trainer, None, params(), 0.25)
    weights = {layer.parameter: layer.weight.numel() for layer in prunable(trainer.model)}
    updates = trainer.history.updates
    assert [update.step for update in updates] == [3, 6, 9, 12, 15, 18, 20]
    for update in updates:
        kept = sum(update.densities[name] * count for name, count in weights.items())
        assert kept == pytest.approx(round(0.25 * sum(weights.values())))
    assert sum(update.changed for update in updates) > 0
    assert updates[-1].densities == mask.densities()


def test_after_end_fraction_the_mask_stands_still(tiny, tmp_path):
    trainer = tiny.trainer(tmp_path, tiny.settings(steps=20))
    updater = ste.Ste(trainer, params(end_fraction=0.5), 0.25)
    masks, original = [], updater.before_forward

    def watched(step):
        original(step)
        masks.append(updater.mask)

    updater.before_forward = watched
    trainer.fit(updater)
    moved = [one != other for one, other in itertools.pairwise(masks)]
    assert any(moved[:10])
    assert not any(moved[10:])
    assert masks[-1] == updater.mask


def test_frozen_weights_keep_their_start_values(tiny, tmp_path):
    trainer = tiny.trainer(tmp_path)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    mask = ste.train(trainer, None, params(freeze_weights=True), 0.5)
    known = dict(trainer.model.named_parameters())
    for name, kept in mask.items():
        assert torch.equal(known[name].detach(), start[name].masked_fill(~kept, 0.0))
    assert not torch.equal(known["1.weight"], start["1.weight"])  # normalisation still trains


def test_kept_dense_and_frozen_layers_are_left_out_and_named(tiny, tmp_path):
    model = tiny.network()
    model[0].weight.requires_grad_(False)
    recorder = tiny.recorder()
    trainer = tiny.trainer(tmp_path, model=model, context=Context(progress=recorder, checkpoint_every_s=1e9))
    mask = ste.train(trainer, None, params(keep_dense=("7",)), 0.5)
    assert set(mask) == {"5.weight"}
    assert "ste: 0 stays dense: frozen weights give scores no gradient" in recorder.said
    assert trainer.history.notes == ("ste: 0 stays dense: frozen weights give scores no gradient",)


def test_an_emptied_layer_is_named(tiny, tmp_path):
    model = tiny.network()
    with torch.no_grad():
        model[7].weight.mul_(1e-6)
    trainer = tiny.trainer(tmp_path, tiny.settings(steps=1), model=model)
    ste.train(trainer, None, params(score_lr=1e-6), 0.1)
    assert trainer.history.notes == ("layer collapse: no weight is left in 7.weight",)


def test_mistakes_are_told(tiny, tmp_path):
    trainer = tiny.trainer(tmp_path)
    with pytest.raises(UsageError, match="takes none"):
        ste.train(trainer, tiny.mask(), params(), 0.5)
    with pytest.raises(UsageError, match="sparsity"):
        ste.train(trainer, None, params())
    with pytest.raises(UsageError, match="no layer to prune"):
        ste.train(trainer, None, params(keep_dense=("*",)), 0.5)
    with pytest.raises(ModelError, match="matches no"):
        ste.train(trainer, None, params(keep_dense=("convolution",)), 0.5)


def test_scores_that_overflow_are_a_diverged_run(tiny, tmp_path):
    trainer = tiny.trainer(tmp_path)
    updater = ste.Ste(trainer, params(), 0.5)
    trainer.model.train()
    trainer.advance(updater)
    updater._scores["5.weight"].data[0, 0] = float("nan")
    with pytest.raises(Diverged, match=r"ste: at step 1: 1 of 2048 scores of 5\.weight"):
        trainer.advance(updater)


def test_a_step_that_fails_half_way_loses_no_dense_weight(tiny, tmp_path):
    trainer = tiny.trainer(tmp_path)
    updater = ste.Ste(trainer, params(), 0.3)
    before = masked_of(trainer, updater)
    updater.before_forward(0)
    assert not all(torch.equal(before[n], p) for n, p in masked_of(trainer, updater).items())
    updater.before_forward(0)  # no after_backward in between, as after an exception
    updater.after_step(0)  # as after a skipped step
    assert all(torch.equal(before[n], p) for n, p in masked_of(trainer, updater).items())


class StopAfter:
    def __init__(self, steps):
        self.left = steps

    def __call__(self):
        self.left -= 1
        return self.left == 0


def run(tiny, folder, settings, stop_after=None, **changes):
    stop = StopAfter(stop_after) if stop_after else lambda: False
    trainer = tiny.trainer(
        folder, settings, augment=("crop", "flip"), context=Context(checkpoint_every_s=1e9, stop_requested=stop)
    )
    updater = ste.Ste(trainer, params(**changes), 0.3)
    if stop_after:
        with pytest.raises(Interrupted):
            trainer.fit(updater)
        return None
    trainer.fit(updater)
    return trainer, updater


def bytes_of(tiny, ran):
    trainer, updater = ran
    state = updater.state_dict()
    slots = {f"{i}.{k}": v for i, s in state["optimizer"]["state"].items() for k, v in s.items()}
    scores = {f"score.{name}": value for name, value in state["scores"].items()}
    return {**tiny.state(trainer), **scores, **{f"score.slot.{k}": torch.as_tensor(v) for k, v in slots.items()}}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("end_fraction", [1.0, 0.6])
def test_resuming_ste_is_bit_exact(tiny, tmp_path, monkeypatch, optimizer, accumulate, end_fraction):
    monkeypatch.setattr(_straight_through, "RECORD_EVERY", 4)
    settings = tiny.settings(steps=14, optimizer=OPTIMIZERS[optimizer], accumulate=accumulate, clip_norm=1.0)
    whole = run(tiny, tmp_path / "whole", settings, end_fraction=end_fraction)
    first = random.Random(f"{optimizer}{accumulate}{end_fraction}").randrange(1, 13)
    run(tiny, tmp_path / "cut", settings, stop_after=first, end_fraction=end_fraction)
    run(tiny, tmp_path / "cut", settings, stop_after=1, end_fraction=end_fraction)
    resumed = run(tiny, tmp_path / "cut", settings, end_fraction=end_fraction)
    assert resumed[0].history.resumed_from == first + 1
    assert tiny.differing(bytes_of(tiny, whole), bytes_of(tiny, resumed)) == []
    assert whole[1].mask == resumed[1].mask
    assert whole[0].history.updates == resumed[0].history.updates
    again = run(tiny, tmp_path / "cut", settings, end_fraction=end_fraction)  # loaded, not repeated
    assert tiny.differing(bytes_of(tiny, whole), bytes_of(tiny, again)) == []
    assert again[1].mask == whole[1].mask
    assert again[1].updates == whole[1].updates


def test_it_loads_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "numpy", None)
    spec = importlib.util.spec_from_file_location("bare_ste", Path(ste.__file__))
    bare = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bare_ste", bare)
    spec.loader.exec_module(bare)
    assert bare.optimizer_steps(bare.Params(), 12, 0.1) == 12
