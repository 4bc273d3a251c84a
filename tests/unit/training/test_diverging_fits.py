"""Training that breaks at any step, in the loss, the weights, the statistics, the average or the optimizer's slots."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import nn

from sparsify_deploy.errors import Diverged, Interrupted
from sparsify_deploy.training import checkpoint
from sparsify_deploy.training.divergence import EXPLODED, LossWatch
from sparsify_deploy.training.settings import EMA, Optimizer, Schedule, Training
from sparsify_deploy.training.updater import Dense, HoldMask
from sparsify_deploy.types import Context

STEPS = 12


class Bad(Dense):
    """Calls `spoil` before or after the step `at`, once."""

    def __init__(self, at: int, spoil, *, before: bool = False) -> None:
        self.at, self.spoil, self.before = at, spoil, before

    def before_forward(self, step: int) -> None:
        if self.before and step == self.at:
            self.spoil()

    def after_step(self, step: int) -> None:
        if not self.before and step == self.at:
            self.spoil()


class SpoiltTask:
    """The task, whose loss is `loss` from call `at` on."""

    def __init__(self, task, at: int, loss: float) -> None:
        self._task, self._at, self._loss, self._calls = task, at, loss, -1

    def __getattr__(self, name):
        return getattr(self._task, name)

    def loss(self, outputs, batch):
        self._calls += 1
        own = self._task.loss(outputs, batch)
        return (
            own if self._calls < self._at else own * 0 + self._loss if math.isfinite(self._loss) else own * self._loss
        )


def every_step(**changes):
    return Context(checkpoint_every_s=0.0, **changes)


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors(part)


def all_finite(path) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors(checkpoint.read(path)) if t.is_floating_point())


def healthy(tiny, folder, settings=None):
    trainer = tiny.trainer(folder, settings)
    trainer.fit(Dense())
    return tiny.state(trainer)


RANDOM = random.Random(8)
CASES = [(RANDOM.randrange(STEPS), loss) for loss in (math.nan, math.inf, -math.inf) for _ in range(7)]


@pytest.mark.parametrize(("at", "loss"), CASES[:20])
def test_a_loss_that_is_not_finite_stops_at_once_and_the_run_goes_on_from_the_last_checkpoint(tiny, tmp_path, at, loss):
    trainer = tiny.trainer(tmp_path / "bad", context=every_step())
    trainer.task = SpoiltTask(trainer.task, at, loss)
    with pytest.raises(Diverged) as raised:
        trainer.fit(Dense())
    (line,) = raised.value.lines
    assert f"at step {at} of {STEPS}" in line
    assert "lower optimizer.lr, add schedule.warmup_fraction, or set clip_norm" in line
    path = trainer.checkpoint("train")
    if at == 0:
        assert not path.exists()
        assert "had no checkpoint yet" in line
    else:
        assert f"the checkpoint of step {at}, the last finite one, is kept" in line
        assert checkpoint.read(path)["step"] == at
        assert all_finite(path)
    again = tiny.trainer(tmp_path / "bad")
    assert again.fit(Dense()).resumed_from == (at or None)
    assert tiny.differing(tiny.state(again), healthy(tiny, tmp_path / "healthy")) == []


def spoiled(trainer, what: str):
    """Puts a NaN or an infinity where the next loss does not show it."""

    def spoil() -> None:
        model = trainer.model
        if what == "statistics":
            model[1].running_var[0] = math.inf
        elif what == "slot":
            trainer.optimizer.state[model[5].weight]["momentum_buffer"][0, 0] = math.nan
        elif what == "average":
            trainer._average._tensors["5.weight"][0, 0] = math.nan
        else:
            with torch.no_grad():
                model[5].weight[0, 0] = math.nan

    return spoil


@pytest.mark.parametrize("at", [3, STEPS - 1])
@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("statistics", "1.running_var is not finite"),
        ("slot", "the optimizer's momentum_buffer of 5.weight is not finite"),
        ("average", "5.weight is not finite"),
        ("weight", "5.weight is not finite"),
    ],
)
def test_no_checkpoint_is_written_of_a_state_that_is_not_finite(tiny, tmp_path, what, named, at):
    settings = tiny.settings(ema=EMA(decay=0.9) if what == "average" else None)
    trainer = tiny.trainer(tmp_path, settings, context=every_step())
    with pytest.raises(Diverged, match=named) as raised:
        trainer.fit(Bad(at, spoiled(trainer, what)))
    path = trainer.checkpoint("train")
    assert f"checkpoint of step {at}, the last finite" in str(raised.value)
    assert checkpoint.read(path)["step"] == at
    assert all_finite(path)


@pytest.mark.parametrize("what", ["statistics", "slot", "weight"])
def test_what_breaks_between_two_checkpoints_is_noticed_at_the_latest_where_it_ends(tiny, tmp_path, what):
    trainer = tiny.trainer(tmp_path)
    with pytest.raises(Diverged):
        trainer.fit(Bad(4, spoiled(trainer, what)))
    assert not list(tmp_path.iterdir())


def test_a_stop_that_was_asked_for_saves_no_broken_state(tiny, tmp_path):
    trainer = tiny.trainer(tmp_path, context=Context(checkpoint_every_s=1e9, stop_requested=lambda: trainer.step == 5))
    with pytest.raises(Diverged, match=r"1\.running_var is not finite at step 4"):
        trainer.fit(Bad(4, spoiled(trainer, "statistics")))
    assert not list(tmp_path.iterdir())
    sound = tiny.trainer(tmp_path, context=Context(checkpoint_every_s=1e9, stop_requested=lambda: sound.step == 5))
    with pytest.raises(Interrupted):
        sound.fit(Dense())
    assert sound.checkpoint("train").exists()


def test_a_rewind_point_is_never_broken(tiny, tmp_path):
    trainer = tiny.trainer(tmp_path)
    with pytest.raises(Diverged):
        trainer.fit(Bad(3, spoiled(trainer, "weight")), keep_at=4)
    assert not list(tmp_path.iterdir())


def test_what_was_infinite_by_design_may_stay_so(tiny, tmp_path):
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny.network()
            self.register_buffer("causal", torch.full((2, 2), -math.inf).triu(1))

        def forward(self, x):
            return self.inner(x)

    tiny.trainer(tmp_path, model=Masked(), context=every_step()).fit(Dense())


@pytest.mark.parametrize("at", [0, 5, STEPS - 5])
@pytest.mark.parametrize("held", [False, True])
def test_a_loss_that_grows_without_end_stops_after_five_steps_of_it(tiny, tmp_path, at, held):
    trainer = tiny.trainer(tmp_path, context=every_step())
    trainer.task = SpoiltTask(trainer.task, max(at, 1), 3 * EXPLODED)
    updater = HoldMask(trainer.model, trainer.optimizer, tiny.mask()) if held else Dense()
    with pytest.raises(Diverged, match=r"the loss was above .* for 5 steps, and 1\.\d+ at first"):
        trainer.fit(updater)
    assert trainer.step == max(at, 1) + 5
    assert all_finite(trainer.checkpoint("train"))


def test_an_explosion_is_counted_over_a_resumption(tiny, tmp_path):
    asked = {"at": 4}
    stop = Context(checkpoint_every_s=1e9, stop_requested=lambda: trainer.step == asked["at"])
    trainer = tiny.trainer(tmp_path, context=stop)
    trainer.task = SpoiltTask(trainer.task, 1, 3 * EXPLODED)
    with pytest.raises(Interrupted):
        trainer.fit(Dense())
    again = tiny.trainer(tmp_path)
    again.task = SpoiltTask(again.task, 0, 3 * EXPLODED)
    with pytest.raises(Diverged, match="for 5 steps, and 1"):
        again.fit(Dense())
    assert again.step == 6


def watched(losses, *, last=False):
    watch = LossWatch()
    for loss in losses:
        watch.see(loss)
    return watch.exploded(last=last)


@pytest.mark.parametrize(
    "losses",
    [
        pytest.param([2.3, 1e9, 2.2, 1e9, 1e9, 1e9, 1e9, 2.0], id="outliers that come and go"),
        pytest.param([2.3] + [2e6] * 9, id="large, and below a million times the first"),
        pytest.param([1e-7] + [9e5] * 9, id="a first loss that was almost nothing"),
        pytest.param([1e13] * 9, id="a regression in large units"),
        pytest.param([-3.0, -40.0, -5e5], id="a loss below zero"),
        pytest.param([2.3, 1e9], id="one bad batch at the end"),
        pytest.param([], id="nothing yet"),
    ],
)
def test_these_losses_are_no_explosion(losses):
    assert watched(losses) is None
    assert watched(losses, last=True) is None


@pytest.mark.parametrize("losses", [[2.3, *[1e7] * 5], [0.0, *[1.1e6] * 5], [-2.0, *[-1e9] * 5], [1e13, *[1e20] * 5]])
def test_these_losses_are(losses):
    assert watched(losses)
    assert watched(losses[:-1]) is None
    assert watched(losses[:3], last=True)


@pytest.mark.parametrize("optimizer", [Optimizer(lr=1e10), Optimizer(name="adamw", lr=1e10)])
@pytest.mark.parametrize("steps", [4, 12, 60])
def test_a_learning_rate_of_1e10_never_passes(tiny, tmp_path, optimizer, steps):
    settings = tiny.settings(steps=steps, optimizer=optimizer, schedule=Schedule(name="constant"))
    trainer = tiny.trainer(tmp_path, settings, context=every_step())
    with pytest.raises(Diverged, match=r"learning rate 1e\+10\): lower optimizer.lr"):
        trainer.fit(Dense())
    path = trainer.checkpoint("train")
    assert not path.exists() or all_finite(path)


def test_the_data_are_named_where_they_are_to_blame(tiny, tmp_path):
    split = tiny.images()
    split.fields["input"][7] = math.inf
    with pytest.raises(Diverged, match=r"the loss is nan at step \d+ .*: the field input of this batch is not finite"):
        tiny.trainer(tmp_path, split=split).fit(Dense())


def test_the_weights_are_named_where_they_were_broken_before(tiny, tmp_path):
    model = tiny.network()
    with torch.no_grad():
        model[5].weight[1, 1] = math.nan
    with pytest.raises(Diverged, match=r"at step 0 .*: 5\.weight was not finite before training: correct the weights"):
        tiny.trainer(tmp_path, model=model).fit(Dense())


def test_steps_that_fp16_skips_are_no_divergence(tiny, tmp_path):
    """Ten gradients in a row that overflow lower the loss scale; the training goes on, and it is told."""

    class Overflows(Dense):
        def before_forward(self, step: int) -> None:
            trainer.overflow = step < 10

    trainer = tiny.trainer(tmp_path, Training(steps=30, batch_size=8, precision="fp16"), context=every_step())
    for parameter in trainer.model.parameters():
        parameter.register_hook(lambda grad: grad * math.inf if trainer.overflow else grad)
    history = trainer.fit(Overflows())
    assert "overflowed in 10 steps, which were skipped" in " ".join(history.notes)
    assert all_finite(trainer.checkpoint("train"))


def test_fp16_that_diverges_is_told_of_bf16(tiny, tmp_path):
    trainer = tiny.trainer(tmp_path, Training(steps=8, batch_size=8, precision="fp16"))
    trainer.task = SpoiltTask(trainer.task, 3, math.nan)
    with pytest.raises(Diverged, match="precision: bf16"):
        trainer.fit(Dense())
