"""Each method that moves a mask, over whole runs: its densities, exact resuming, and divergence in one line."""

from __future__ import annotations

import random

import pytest
import torch

from sparsify_deploy.errors import Diverged, Interrupted, UsageError
from sparsify_deploy.sparsity.mask import Mask
from sparsify_deploy.training.methods import gradual, rigl, snfs
from sparsify_deploy.training.methods import set as set_
from sparsify_deploy.training.settings import Optimizer
from sparsify_deploy.types import Context

METHODS = {
    "rigl": (rigl, rigl.Params(update_every=3, drop_fraction=0.5, end_fraction=0.9)),
    "set": (set_, set_.Params(update_every=3, drop_fraction=0.5, end_fraction=0.9)),
    "snfs": (snfs, snfs.Params(update_every=3)),
    "gradual": (gradual, gradual.Params(update_every=3, end_fraction=0.8)),
}
OPTIMIZERS = {
    "sgd": Optimizer(lr=0.05),
    "adam": Optimizer(name="adam", lr=0.01, weight_decay=0.01),
    "adamw": Optimizer(name="adamw", lr=0.01, weight_decay=0.05),
}


def run(tiny, folder, name, optimizer="sgd", stop_after=None, **changes):
    left = iter(range((stop_after or 10**9) - 1))
    recorder = tiny.recorder()
    context = Context(progress=recorder, checkpoint_every_s=1e9, stop_requested=lambda: next(left, None) is None)
    trainer = tiny.trainer(
        folder, tiny.settings(**{"steps": 16, "optimizer": OPTIMIZERS[optimizer]} | changes), context=context
    )
    method, params = METHODS[name]
    mask = tiny.mask() if method.NEEDS_MASK else None
    try:
        final = method.train(trainer, mask, params, 0.3 if method.NEEDS_SPARSITY else None)
    except Interrupted:
        return None
    return trainer, final, recorder


def total(mask):
    return sum(kept for kept, _ in mask.counts().values())


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", METHODS)
def test_resuming_from_a_random_step_gives_identical_bytes(tiny, tmp_path, name, optimizer, accumulate):
    changes = {"accumulate": accumulate, "batch_size": 4}
    whole = run(tiny, tmp_path / "whole", name, optimizer, **changes)
    stop = random.Random(f"{name} {optimizer} {accumulate}").randrange(1, 16)
    assert run(tiny, tmp_path / "cut", name, optimizer, stop_after=stop, **changes) is None
    resumed = run(tiny, tmp_path / "cut", name, optimizer, **changes)
    assert resumed[0].history.resumed_from == stop
    states = [tiny.state(one[0]) for one in (whole, resumed)]
    assert tiny.differing(*states) == []
    for key, value in states[0].items():
        assert value.numpy().tobytes() == states[1][key].numpy().tobytes(), key
    assert whole[1] == resumed[1]
    assert whole[0].history.updates == resumed[0].history.updates
    assert whole[0].history.losses == resumed[0].history.losses
    assert len(whole[0].history.updates) >= 4


@pytest.mark.parametrize("name", ["rigl", "set", "snfs"])
def test_the_density_trace_of_a_run(tiny, tmp_path, name):
    trainer, final, _ = run(tiny, tmp_path, name)
    start, sizes = tiny.mask(), {n: size for n, (_, size) in tiny.mask().counts().items()}
    assert final != start
    steps = [update.step for update in trainer.history.updates]
    assert steps == [3, 6, 9, 12, *([15] if name == "snfs" else [])]
    for update in trainer.history.updates:
        assert update.changed > 0 or update.drop_fraction < 0.1
        counts = {layer: round(density * sizes[layer]) for layer, density in update.densities.items()}
        assert sum(counts.values()) == total(start)
        assert (update.densities == start.densities()) == (name != "snfs")
    assert total(final) == total(start)
    assert final.check_holds(trainer.model) == ()
    assert trainer.history.updates[-1].densities == final.densities()
    assert trainer.history.dense_gradient_every == {"rigl": 3, "set": None, "snfs": 0}[name]


@pytest.mark.parametrize("name", METHODS)
def test_weights_that_stay_pruned_never_move(tiny, tmp_path, name):
    trainer, final, _ = run(tiny, tmp_path, name)
    for layer, kept in final.items():
        weight = dict(trainer.model.named_parameters())[layer].detach()
        assert not torch.signbit(weight[~kept]).any()
        assert not weight[~kept].any()
        assert weight[kept].ne(0).float().mean() > 0.5


@pytest.mark.parametrize("name", METHODS)
def test_a_gradient_that_is_not_a_number_is_divergence_in_one_line(tiny, tmp_path, name):
    trainer = tiny.trainer(tmp_path, tiny.settings(steps=16))
    weight = trainer.model[5].weight
    seen = []

    def poison(gradient):
        seen.append(0)
        return gradient * torch.nan if len(seen) == 4 else gradient

    weight.register_hook(poison)
    method, params = METHODS[name]
    mask = tiny.mask() if method.NEEDS_MASK else None
    with pytest.raises(Diverged) as raised:
        method.train(trainer, mask, params, 0.3 if method.NEEDS_SPARSITY else None)
    assert len(raised.value.lines) == 1


@pytest.mark.parametrize("method", [rigl, set_, snfs])
def test_a_run_too_short_to_rewire_says_so_and_needs_no_dense_gradient(tiny, tmp_path, method):
    recorder = tiny.recorder()
    trainer = tiny.trainer(tmp_path, context=Context(progress=recorder))
    assert method.train(trainer, tiny.mask(), method.Params(update_every=12)) == tiny.mask()
    assert "the mask never moves: update_every 12" in recorder.said[0]
    assert trainer.history.notes == tuple(recorder.said)
    assert trainer.history.dense_gradient_every is None


@pytest.mark.parametrize("method", [rigl, set_, snfs])
def test_a_frozen_layer_is_never_rewired(tiny, tmp_path, method):
    model = tiny.network()
    model[5].weight.requires_grad_(False)
    trainer = tiny.trainer(tmp_path, tiny.settings(steps=9), model=model)
    final = method.train(trainer, tiny.mask(), method.Params(update_every=2, drop_fraction=0.5, end_fraction=1.0))
    assert torch.equal(final["5.weight"], tiny.mask()["5.weight"])
    assert not torch.equal(final["0.weight"], tiny.mask()["0.weight"])


def test_snfs_needs_momentum(tiny, tmp_path):
    trainer = tiny.trainer(tmp_path, tiny.settings(optimizer=Optimizer(momentum=0.0)))
    with pytest.raises(UsageError, match=r"optimizer\.momentum is 0"):
        snfs.train(trainer, tiny.mask(), snfs.Params())


def test_snfs_momentum_of_pruned_weights_is_dense_and_survives_a_checkpoint(tiny, tmp_path):
    assert run(tiny, tmp_path, "snfs", stop_after=7) is None
    from sparsify_deploy.training import checkpoint

    content = checkpoint.read(tmp_path / "train.checkpoint")
    pruned = ~content["updater"]["mask"]["5.weight"]
    assert not content["model"]["5.weight"][pruned].any()
    slots = [s["momentum_buffer"] for s in content["optimizer"]["state"].values()]
    (slot,) = [s for s in slots if s.shape == pruned.shape]
    assert slot[pruned].ne(0).float().mean() > 0.5


def test_an_emptied_layer_is_named(tiny, tmp_path):
    recorder = tiny.recorder()
    trainer = tiny.trainer(tmp_path, context=Context(progress=recorder))
    with torch.no_grad():
        trainer.model[7].weight.mul_(1e-6)
    gradual.train(trainer, None, gradual.Params(allocation="global", update_every=1, end_fraction=0.1), 0.1)
    assert [line for line in recorder.said if "layer collapse: no weight is left in 7.weight" in line]


def test_masks_other_than_the_start_come_from_the_seed(tiny, tmp_path):
    finals = []
    for number, seed in enumerate((7, 7, 8)):
        trainer = tiny.trainer(tmp_path / str(number), seed=seed)
        finals.append(set_.train(trainer, tiny.mask(), set_.Params(update_every=3)))
    assert finals[0] == finals[1]
    assert finals[0] != finals[2]
    assert isinstance(finals[0], Mask)
