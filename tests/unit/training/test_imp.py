from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from sparsify_deploy.errors import CorruptArtifact, ModelError, UsageError
from sparsify_deploy.sparsity.layers import prunable
from sparsify_deploy.sparsity.mask import Mask
from sparsify_deploy.training.cost import training_cost
from sparsify_deploy.training.methods import imp
from sparsify_deploy.training.schedule import lr_factor
from sparsify_deploy.training.settings import Optimizer

MODES = ("weight_rewind", "learning_rate_rewind", "finetune")
TOTAL = 4 * 9 + 256 * 8 + 8 * 4


class Watch:
    """Writes down the trainer's state before each step, and the learning rate at it."""

    def __init__(self, tiny, trainer):
        self.states, self.rates, self.batches = [], [], []
        inner, batch = trainer.advance, trainer._batches.batch

        def advance(updater, label="train"):
            self.states.append((label, trainer.step, tiny.state(trainer)))
            loss = inner(updater, label)
            self.rates.append((label, trainer.step - 1, trainer.optimizer.param_groups[0]["lr"]))
            return loss

        def spied(k):
            self.batches.append((trainer.step, k))
            return batch(k)

        trainer.advance, trainer._batches.batch = advance, spied

    def before(self, level, step=None):
        """The state before the first step of a level, or before `step` of it."""
        found = [(s, state) for label, s, state in self.states if label == f"train.level-{level}"]
        return found[0] if step is None else dict(found)[step]


def run(tiny, folder, density=0.64, settings=None, **params):
    metrics = iter(range(100))
    trainer = tiny.trainer(folder, settings, evaluate=lambda: {"accuracy": float(next(metrics))})
    watch = Watch(tiny, trainer)
    mask = imp.train(trainer, None, imp.Params(**params), density)
    return trainer, mask, watch


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.37, 0.5, 0.9])
def test_a_density_that_is_a_power_takes_exactly_so_many_levels(rate):
    for levels in range(1, 31):
        goals = imp.densities((1 - rate) ** levels, rate)
        assert len(goals) == levels + 1
        assert goals == pytest.approx([(1 - rate) ** i for i in range(levels + 1)])


def test_other_densities_end_with_a_smaller_level():
    assert imp.densities(0.5, 0.2) == pytest.approx((1.0, 0.8, 0.64, 0.512, 0.5))
    assert imp.densities(0.45, 0.2) == pytest.approx((1.0, 0.8, 0.64, 0.512, 0.45))
    assert imp.densities(0.99, 0.2) == (1.0, 0.99)
    assert imp.densities(1.0, 0.2) == (1.0,)
    # 0.8 ** 10 is 0.10737: rounded in a recipe it is no eleventh level
    assert len(imp.densities(1 - 0.893, 0.2)) == 11
    assert imp.densities(1 - 0.893, 0.2)[-1] == 1 - 0.893


@pytest.mark.parametrize("mode", MODES)
def test_every_level_keeps_the_exact_count(tiny, tmp_path, mode):
    trainer, mask, _ = run(tiny, tmp_path, 0.8**5, retrain=mode, rewind_to=0.25)
    kept = [round(level.density * TOTAL) for level in trainer.history.levels]
    assert kept == [round(0.8**i * TOTAL) for i in range(6)]
    assert sum(int(m.sum()) for m in mask.values()) == round(0.8**5 * TOTAL)
    assert mask.check_holds(trainer.model) == ()
    zeros = {name: p == 0 for name, p in trainer.model.named_parameters() if name in mask}
    assert all(torch.equal(zeros[name], ~mask[name]) for name in mask)


@pytest.mark.parametrize("mode", MODES)
def test_masks_are_nested_and_hold_the_largest_of_what_was_trained(tiny, tmp_path, mode):
    trainer = tiny.trainer(tmp_path)
    masks, trained = [], []
    inner = trainer.fit

    def fit(updater, label=None, **options):
        done = inner(updater, label, **options)
        masks.append(updater.mask)
        trained.append({k: v.detach().clone() for k, v in trainer.model.named_parameters()})
        return done

    trainer.fit = fit
    imp.train(trainer, None, imp.Params(retrain=mode), 0.8**3)
    masks[0] = Mask.ones(prunable(trainer.model))
    for level in (1, 2, 3):
        order = sorted(
            (
                (abs(w), -i)
                for i, (w, m) in enumerate(zip(*flat(trained[level - 1], masks[level - 1]), strict=True))
                if m
            ),
            reverse=True,
        )
        expected = {-i for _, i in order[: round(0.8**level * TOTAL)]}
        assert {i for i, m in enumerate(flat(trained[0], masks[level])[1]) if m} == expected


def flat(weights, mask):
    names = ["0.weight", "5.weight", "7.weight"]
    return tuple(torch.cat([part[n].flatten() for n in names]).tolist() for part in (weights, mask))


def test_uniform_allocation_prunes_each_layer_alike_and_dense_layers_stay(tiny, tmp_path):
    trainer, mask, _ = run(tiny, tmp_path, 0.64, allocation="uniform", keep_dense=["7"])
    assert {n: int(m.sum()) for n, m in mask.items()} == {"0.weight": round(0.64 * 36), "5.weight": round(0.64 * 2048)}
    assert bool((trainer.model[7].weight != 0).all())


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("step", [0, 5])
def test_weight_rewinding_restores_everything_of_step_k(tiny, tmp_path, optimizer, step):
    settings = tiny.settings(optimizer=Optimizer(name=optimizer, lr=0.02))
    _, _, watch = run(tiny, tmp_path, settings=settings, rewind_step=step)
    ticket = watch.before(0, step)
    assert any(name.startswith("slot") for name in ticket) == (step > 0)
    for level in (1, 2):
        at, state = watch.before(level)
        assert at == step
        assert state.keys() == ticket.keys()
        moved = tiny.differing(state, ticket)
        zeros = state["model.5.weight"] == 0
        assert 0 < int(zeros.sum()) < zeros.numel()
        assert {"model.0.weight", "model.5.weight"} & set(moved)
        for name in moved:  # what differs is masked, and nothing else
            kept = state[name] != 0
            assert torch.equal(state[name][kept], ticket[name][kept])
            assert name.startswith("slot") or name.endswith("weight")
        assert not [n for n in moved if "running" in n or "bias" in n or "num_batches" in n or n.endswith("step")]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("mode", ["learning_rate_rewind", "finetune"])
def test_the_other_modes_keep_weights_and_buffers_and_reset_the_slots(tiny, tmp_path, optimizer, mode):
    settings = tiny.settings(optimizer=Optimizer(name=optimizer, lr=0.02))
    trained = []
    trainer = tiny.trainer(tmp_path, settings, evaluate=lambda: trained.append(tiny.state(trainer)) or {})
    watch = Watch(tiny, trainer)
    imp.train(trainer, None, imp.Params(retrain=mode, rewind_to=0.5), 0.64)
    for level in (1, 2):
        at, state = watch.before(level)
        assert at == 6
        assert not [name for name in state if name.startswith("slot")]
        before = {name: value for name, value in trained[level - 1].items() if name.startswith("model")}
        for name in tiny.differing(state, before):
            kept = state[name] != 0
            assert name in ("model.0.weight", "model.5.weight", "model.7.weight")
            assert torch.equal(state[name][kept], before[name][kept])
    assert not torch.equal(watch.before(1)[1]["model.1.running_mean"], watch.before(0)[1]["model.1.running_mean"])


@pytest.mark.parametrize(
    ("mode", "step"), [("weight_rewind", 4), ("learning_rate_rewind", 0), ("learning_rate_rewind", 7)]
)
def test_a_retraining_runs_the_schedule_and_the_batches_from_step_k_on(tiny, tmp_path, mode, step):
    settings = tiny.settings(accumulate=2)
    _, _, watch = run(tiny, tmp_path, settings=settings, retrain=mode, rewind_step=step)
    expected = [0.05 * lr_factor(settings.schedule, s, 12) for s in range(12)]
    first, rest = watch.rates[:12], watch.rates[12:]
    assert [rate for *_, rate in first] == expected
    assert rest == [(f"train.level-{n}", s, expected[s]) for n in (1, 2) for s in range(step, 12)]
    assert watch.batches == [(s, k) for begin in (0, step, step) for s in range(begin, 12) for k in (2 * s, 2 * s + 1)]
    if step == 0:
        assert rest[0][2] < rest[1][2] < rest[2][2]  # the warm-up again


def test_finetuning_runs_at_one_low_rate(tiny, tmp_path):
    _, _, watch = run(tiny, tmp_path, retrain="finetune", rewind_to=0.5, finetune_fraction=0.02)
    assert watch.rates[12:] == [(f"train.level-{n}", s, 0.05 * 0.02) for n in (1, 2) for s in range(6, 12)]


def test_the_history_is_the_lottery_tickets_curve(tiny, tmp_path):
    trainer, mask, _ = run(tiny, tmp_path, 0.8**3, rewind_to=0.25)
    history = trainer.history
    assert [level.steps for level in history.levels] == [12, 9, 9, 9]
    assert history.steps == 39
    assert [level.label for level in history.levels] == [f"train.level-{i}" for i in range(4)]
    assert [level.metrics for level in history.levels] == [{"accuracy": float(i)} for i in range(4)]
    assert history.levels[3].densities == mask.densities()
    assert [step for step, _ in history.losses] == list(range(1, 40))
    trace = [(u.step, u.densities) for u in history.updates]
    assert trace == [(12 + 9 * i, level.densities) for i, level in enumerate(history.levels[1:])]
    assert [u.drop_fraction for u in history.updates] == pytest.approx([0.2] * 3, abs=1e-3)
    assert history.levels[0].densities == {}
    assert min(level.train_s for level in history.levels) > 0
    assert history.train_s == pytest.approx(sum(level.train_s for level in history.levels))
    json.dumps(dataclasses.asdict(history))


@pytest.mark.parametrize(("mode", "k"), [("weight_rewind", 0), ("learning_rate_rewind", 3), ("finetune", 3)])
def test_the_cost_is_all_levels_over_one_dense_training(tiny, tmp_path, mode, k):
    trainer, _, _ = run(tiny, tmp_path, 0.64, retrain=mode, rewind_step=k)
    cost = training_cost(trainer.model, tiny.images().take(torch.arange(1)), ("input",), trainer.history)
    dense = 2 * (64 * 4 * 9 + 256 * 8 + 8 * 4)
    sparse = [
        2
        * (
            64 * 4 * 9 * level.densities["0.weight"]
            + 2048 * level.densities["5.weight"]
            + 32 * level.densities["7.weight"]
        )
        for level in trainer.history.levels[1:]
    ]
    by_hand = (12 * 3 * dense + (12 - k) * 3 * sparse[0] + (12 - k) * 3 * sparse[1]) / (12 * 3 * dense)
    assert cost["relative_training_flops"] == pytest.approx(by_hand)
    assert cost["sparse_forward_flops"] == pytest.approx(sparse[-1])
    assert cost["train_s"] == trainer.history.train_s
    assert cost["relative_training_flops"] > 1.0


def test_steps_are_known_before(tiny, tmp_path):
    params = imp.Params(rewind_to=0.25)
    assert imp.optimizer_steps(params, 12, 0.8**3) == 12 + 3 * 9
    assert imp.optimizer_steps(imp.Params(rewind_step=5), 12, 0.8**21) == 12 + 21 * 7
    assert imp.optimizer_steps(params, 12, 1.0) == 12


def test_no_sparsity_is_one_dense_training(tiny, tmp_path):
    trainer, mask, _ = run(tiny, tmp_path, 1.0)
    assert mask.density == 1.0
    assert trainer.history.steps == 12


def test_a_layer_that_is_emptied_is_named(tiny, tmp_path):
    recorder = tiny.recorder()
    model = tiny.network()
    with torch.no_grad():
        model[7].weight.mul_(1e-6)
    settings = tiny.settings(steps=1, optimizer=Optimizer(lr=1e-9))
    trainer = tiny.trainer(tmp_path, settings, model=model)
    trainer.context = dataclasses.replace(trainer.context, progress=recorder)
    imp.train(trainer, None, imp.Params(rate=0.5), 0.5)
    told = "layer collapse: no weight is left in 7.weight"
    assert f"train.level-1: {told}" in recorder.said
    assert told in trainer.history.notes


def test_mistakes_are_one_line(tiny, tmp_path):
    trainer = tiny.trainer(tmp_path)
    with pytest.raises(UsageError, match="starts dense"):
        imp.train(trainer, tiny.mask(), imp.Params(), 0.5)
    with pytest.raises(UsageError, match="set sparsity"):
        imp.train(trainer, None, imp.Params())
    with pytest.raises(UsageError, match="rewind_step 12 leaves nothing to retrain: training has 12 steps"):
        imp.train(trainer, None, imp.Params(rewind_step=12), 0.5)
    with pytest.raises(ModelError, match="keep_dense names them all"):
        imp.train(trainer, None, imp.Params(keep_dense=["*"]), 0.5)
    with pytest.raises(ValueError, match="rewind_to or rewind_step"):
        imp.Params(rewind_to=0.1, rewind_step=3)
    assert math.isclose(imp.Params().rate, 0.2)


def test_a_lost_rewind_point_is_said(tiny, tmp_path):
    trainer = tiny.trainer(tmp_path)
    with pytest.raises(CorruptArtifact, match=r"train\.level-0\.rewind\.checkpoint is gone, which held step 3"):
        trainer.rewind("train.level-0", 3)
