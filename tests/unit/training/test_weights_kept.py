"""Which weights a fit ends with: the average, the best by the validation split; and when it ends."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparsify_deploy.errors import Interrupted, UsageError
from sparsify_deploy.sparsity.mask import Mask
from sparsify_deploy.sparsity.nm import is_nm
from sparsify_deploy.training.averaging import Average
from sparsify_deploy.training.choosing import Choice
from sparsify_deploy.training.evaluation import evaluate
from sparsify_deploy.training.methods import gradual, imp, rigl, snfs, sr_ste, ste
from sparsify_deploy.training.methods import set as set_
from sparsify_deploy.training.settings import EMA, EarlyStop, Training, TrainingOverride
from sparsify_deploy.training.updater import Dense, HoldMask
from sparsify_deploy.types import Context

STEPS = 20
SLOW = EMA(decay=0.9, warmup=False)


class StopAfter:
    def __init__(self, steps):
        self.left = steps

    def __call__(self):
        self.left -= 1
        return self.left == 0


class Keeping(Dense):
    """Notes the weights after each optimizer step."""

    def __init__(self, trainer):
        self._trainer, self.weights = trainer, []

    def after_step(self, step):
        self.weights.append({k: v.detach().clone() for k, v in self._trainer.model.state_dict().items()})


def stops(**given):
    return EarlyStop(**({"patience": 2} | given))


def method_of(name, trainer, tiny):
    """The fit of a method on the tiny network; the mask it ends with."""
    moving = {"update_every": 3, "drop_fraction": 0.5, "end_fraction": 1.0}
    mask = tiny.mask()
    if name == "dense":
        trainer.fit(Dense())
        return None
    if name == "static":
        updater = HoldMask(trainer.model, trainer.optimizer, mask)
        trainer.fit(updater)
        return updater.mask
    if name == "rigl":
        return rigl.train(trainer, mask, rigl.Params(**moving))
    if name == "set":
        return set_.train(trainer, mask, set_.Params(**moving))
    if name == "snfs":
        return snfs.train(trainer, mask, snfs.Params(**moving))
    if name == "gradual":
        return gradual.train(trainer, None, gradual.Params(update_every=3), 0.4)
    if name == "ste":
        return ste.train(trainer, None, ste.Params(), 0.4)
    if name == "imp":
        return imp.train(trainer, None, imp.Params(rate=0.4, rewind_to=0.25), 0.4)
    return sr_ste.train(trainer, None, sr_ste.Params(pattern="2:4"))


METHODS = ("dense", "static", "rigl", "set", "snfs", "gradual", "ste", "imp", "sr_ste")


def run(tiny, folder, name, settings, stop_after=None, **given):
    stop = StopAfter(stop_after) if stop_after else lambda: False
    context = Context(progress=tiny.recorder(), stop_requested=stop, checkpoint_every_s=1e9)
    given = {"validation": tiny.images(30)} | given
    trainer = tiny.trainer(folder, settings, context=context, augment=("crop", "flip"), **given)
    try:
        return trainer, method_of(name, trainer, tiny)
    except Interrupted as error:
        return str(error), None


# -- the average ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.9, 0.5])
def test_the_average_is_the_one_torch_makes_of_the_weights_of_each_step(tiny, tmp_path, decay):
    trainer = tiny.trainer(tmp_path, tiny.settings(steps=STEPS, ema=EMA(decay=decay, warmup=False)))
    updater = Keeping(trainer)
    trainer.fit(updater)
    model = tiny.network()
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    for weights in updater.weights:
        model.load_state_dict(weights)
        theirs.update_parameters(model)
    expected = theirs.module.state_dict()
    for name, tensor in trainer.model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert tensor.item() == STEPS  # torch averages this too, and truncates it
        else:
            assert torch.equal(tensor, expected[name]), name
    assert not torch.equal(updater.weights[-1]["0.weight"], trainer.model.state_dict()["0.weight"])


def test_by_hand_the_warm_up_lets_the_first_updates_forget_the_start(tiny, tmp_path):
    trainer = tiny.trainer(tmp_path, tiny.settings(steps=4, ema=EMA(decay=0.999)))
    updater = Keeping(trainer)
    trainer.fit(updater)
    first, *rest = (weights["5.weight"].double() for weights in updater.weights)
    average = first
    for n, weight in enumerate(rest, 1):
        decay = min(0.999, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * weight
    assert torch.allclose(trainer.model.state_dict()["5.weight"].double(), average, atol=1e-6)


def test_whole_numbers_are_taken_over_and_not_truncated():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))
            self.register_buffer("ids", torch.arange(7))

    model = Positions()
    average = Average(model, SLOW)
    for _ in range(3):
        average.update()
    model.ids.zero_()
    average.put_()
    assert model.ids.tolist() == list(range(7))


@pytest.mark.parametrize("name", METHODS)
def test_pruned_weights_are_zero_in_the_average_whatever_moved_the_mask(tiny, tmp_path, name):
    trainer, mask = run(tiny, tmp_path, name, tiny.settings(steps=STEPS, ema=SLOW))
    plain, plain_mask = run(tiny, tmp_path / "plain", name, tiny.settings(steps=STEPS))
    assert tiny.differing(tiny.state(trainer), tiny.state(plain))
    if mask is None:
        return
    if name != "imp":  # whose later levels are pruned from the averages
        assert mask == plain_mask
    weights = dict(trainer.model.named_parameters())
    for layer, kept in mask.items():
        assert (weights[layer].detach()[~kept] == 0).all(), layer
        assert (weights[layer].detach()[kept] != 0).any(), layer
        if name == "sr_ste" and layer == "5.weight":
            assert is_nm(weights[layer].detach() != 0, 2, 4)


def test_each_fit_of_a_method_averages_anew(tiny, tmp_path):
    settings = tiny.settings(steps=STEPS, ema=EMA(decay=0.999, warmup=False))
    trainer, mask = run(tiny, tmp_path, "imp", settings)
    assert len(trainer.fits) > 2
    by_hand = tiny.trainer(tmp_path / "hand", settings, augment=("crop", "flip"), label="train.level-0")
    by_hand.fit(Dense(), keep_at=5)
    held = mask
    by_hand.rewind("train.level-0", 5)
    updater = HoldMask(by_hand.model, by_hand.optimizer, held)
    by_hand.fit(updater, "last", start=5)
    assert tiny.differing(tiny.state(trainer), tiny.state(by_hand)) == []


# -- the best, and the end -----------------------------------------------------------------------------------------


def choice(tiny, values, direction="higher", **settings):
    model = nn.Linear(1, 1)
    chosen = Choice(tiny.settings(steps=10, **settings), "metric", direction)
    for step, value in enumerate(values, 1):
        with torch.no_grad():
            model.weight.fill_(step)
        chosen.see(step, value, model, None)
        if chosen.stops:
            break
    return chosen


@pytest.mark.parametrize(
    ("values", "direction", "best"),
    [
        ([0.1, 0.3, 0.2], "higher", 2),
        ([0.1, 0.3, 0.2], "lower", 1),
        ([0.3, 0.3, 0.3], "higher", 1),
        ([0.1, 0.2, 0.3], "higher", 3),
    ],
)
def test_the_first_of_the_best_values_is_kept(tiny, values, direction, best):
    chosen = choice(tiny, values, direction, keep="best")
    assert chosen.best == (best, values[best - 1])
    assert chosen.kept[0]["weight"].item() == best


def test_what_is_measured_and_kept_is_the_average(tiny, tmp_path):
    settings = tiny.settings(steps=STEPS, keep="best", evaluate_every=0.5, ema=SLOW)
    trainer = tiny.trainer(tmp_path, settings, validation=tiny.images(30))
    updater = Keeping(trainer)
    history = trainer.fit(updater)
    step = max(history.curve, key=lambda point: (point[1], -point[0]))[0]
    model = tiny.network()
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for weights in updater.weights[:step]:
        model.load_state_dict(weights)
        theirs.update_parameters(model)
    assert torch.equal(trainer.model.state_dict()["5.weight"], theirs.module.state_dict()["5.weight"])


def test_patience_follows_the_direction_of_better(tiny):
    falling = [0.5, 0.4, 0.3, 0.2, 0.1]
    assert len(choice(tiny, falling, "lower", early_stop=stops(patience=2, min_delta=0.05)).curve) == 5
    assert len(choice(tiny, falling, "higher", early_stop=stops(patience=2)).curve) == 3


@pytest.mark.parametrize(
    ("values", "stop", "end"),
    [
        ([0.5, 0.4, 0.4, 0.9], stops(patience=2), 3),
        ([0.5, 0.4, 0.6, 0.5, 0.5, 0.9], stops(patience=2), 5),
        ([0.5, 0.51, 0.52, 0.53], stops(patience=2, min_delta=0.1), 3),
        # small gains that add up are a gain
        ([0.5, 0.54, 0.58, 0.62, 0.66], stops(patience=3, min_delta=0.1), 5),
        ([0.1, 0.2, 0.3], stops(patience=1), 3),
    ],
)
def test_patience_counts_measurements_without_a_better_one(tiny, values, stop, end):
    assert len(choice(tiny, values, early_stop=stop).curve) == end


@pytest.mark.parametrize("ema", [None, SLOW])
@pytest.mark.parametrize("name", ["dense", "static", "rigl", "set", "snfs"])
def test_the_best_network_comes_back_whole(tiny, tmp_path, name, ema):
    settings = tiny.settings(steps=STEPS, keep="best", evaluate_every=0.5, ema=ema)
    trainer, mask = run(tiny, tmp_path, name, settings)
    history = trainer.history
    best = max(value for _, value in history.curve)
    step = next(step for step, value in history.curve if value == best)
    measured = evaluate(trainer.model, trainer.task, trainer.validation, trainer.inputs)
    assert measured["accuracy"] == best
    assert history.steps == STEPS
    assert f"train: ends with the weights of step {step}, the best accuracy" in history.notes[-1]
    # the same run, cut where it was best: a schedule of as many steps, of which the rest is not taken
    again, its_mask = run(tiny, tmp_path / "cut", name, settings, stop_after=step if step < STEPS else None)
    if step < STEPS:
        again = tiny.trainer(tmp_path / "cut", settings, augment=("crop", "flip"), validation=tiny.images(30))
        state = torch.load(_payload(again.checkpoint("train")), weights_only=True)
        own = state["choice"]["tensors"]
        its_mask = Mask(state["choice"]["mask"]) if state["choice"]["mask"] is not None else None
        for key, tensor in own.items():
            assert torch.equal(dict(trainer.model.state_dict())[key], tensor), key
    assert mask == its_mask
    if mask is not None:
        assert mask.check_holds(trainer.model) == ()


def _payload(path):
    import io

    return io.BytesIO(path.read_bytes().partition(b"\n")[2])


def test_the_best_of_a_moving_mask_is_recorded_beside_what_really_happened(tiny, tmp_path):
    """The validation labels are such that the first measurement is the best: the mask of that step must come back."""
    settings = tiny.settings(steps=STEPS, keep="best", evaluate_every=0.5)
    validation = tiny.images(30)
    first = tiny.trainer(tmp_path / "first", settings.model_copy(update={"keep": "last"}), validation=validation)
    seen = []
    updater = rigl.RigL(
        HoldMask(first.model, first.optimizer, tiny.mask()),
        rigl.Params(update_every=3, drop_fraction=0.5, end_fraction=1.0),
        STEPS,
    )
    advance = first.advance

    def noting(updater, label="train"):
        loss = advance(updater, label)
        if first.step == 2:
            seen.append(updater.mask)
            with torch.no_grad():
                first.model.eval()
                seen.append(first.model(validation.fields["input"]).argmax(1))
                first.model.train()
        return loss

    first.advance = noting
    first.fit(updater)
    easy = tiny.split(input=validation.fields["input"], target=seen[1])
    trainer = tiny.trainer(tmp_path / "second", settings, validation=easy)
    second = rigl.RigL(
        HoldMask(trainer.model, trainer.optimizer, tiny.mask()),
        rigl.Params(update_every=3, drop_fraction=0.5, end_fraction=1.0),
        STEPS,
    )
    history = trainer.fit(second)
    assert history.curve[0] == (2, 1.0)
    assert second.mask == seen[0]
    assert second.mask.check_holds(trainer.model) == ()
    assert [u.step for u in history.updates] == [*(u.step for u in updater.updates), STEPS]
    assert history.updates[-1].densities == second.mask.densities()


def test_an_early_stop_tells_the_steps_that_were_really_run(tiny, tmp_path):
    settings = tiny.settings(steps=60, early_stop=stops(patience=2), evaluate_every=0.5)
    trainer, _ = run(tiny, tmp_path, "static", settings)
    history = trainer.history
    assert history.steps == trainer.step == history.curve[-1][0] == history.losses[-1][0] < 60
    values = [value for _, value in history.curve]
    assert max(values[-2:]) <= max(values[:-2])
    assert history.notes[-1].startswith(f"train: stopped early at step {history.steps} of 60: the accuracy")
    loaded, _ = run(tiny, tmp_path, "static", settings)
    assert f"train: finished before, {history.steps} steps loaded" in loaded.context.progress.said
    assert (loaded.history.curve, loaded.history.notes) == (history.curve, history.notes)
    assert tiny.differing(tiny.state(loaded), tiny.state(trainer)) == []


@pytest.mark.parametrize(("patience", "told"), [(5, True), (4, False)])
def test_a_patience_that_cannot_run_out_is_noted(tiny, tmp_path, patience, told):
    settings = tiny.settings(steps=STEPS, early_stop=stops(patience=patience, min_delta=0.0))
    trainer, _ = run(tiny, tmp_path, "dense", settings)
    assert trainer.history.steps == STEPS
    note = f"train: early_stop had no effect: there were 5 measurements, and patience {patience}"
    assert any(line.startswith(note) for line in trainer.history.notes) == told


def test_measuring_alone_changes_nothing_and_draws_the_curve(tiny, tmp_path):
    for name in ("rigl", "ste", "gradual", "imp"):
        plain, mask = run(tiny, tmp_path / name / "plain", name, tiny.settings(steps=STEPS))
        measured, same = run(tiny, tmp_path / name / "measured", name, tiny.settings(steps=STEPS, evaluate_every=1))
        assert tiny.differing(tiny.state(plain), tiny.state(measured)) == []
        assert mask == same
        last = evaluate(measured.model, measured.task, measured.validation, measured.inputs)["accuracy"]
        assert measured.history.curve[-1] == (measured.history.steps, last)
    assert [step for step, _ in measured.fits[0].curve] == [4, 8, 12, 16, 20]


@pytest.mark.parametrize("name", ["gradual", "ste", "sr_ste", "imp"])
@pytest.mark.parametrize("asked", [{"keep": "best"}, {"early_stop": stops()}])
def test_what_is_pruned_at_its_end_only_cannot_end_early(tiny, tmp_path, name, asked):
    with pytest.raises(UsageError, match="keep best and early_stop"):
        run(tiny, tmp_path, name, tiny.settings(**asked))


def test_without_a_validation_split_nothing_is_measured_in_its_place(tiny, tmp_path):
    with pytest.raises(UsageError, match="validation split"):
        run(tiny, tmp_path, "dense", tiny.settings(keep="best"), validation=None)


# -- resuming ------------------------------------------------------------------------------------------------------

QUALITY = {
    "ema": {"ema": SLOW},
    "ema warm": {"ema": EMA(decay=0.99), "precision": "bf16", "accumulate": 2},
    "channels last": {"channels_last": True},
    "best": {"keep": "best", "evaluate_every": 0.5, "ema": SLOW},
    "stop": {"early_stop": stops(patience=3), "evaluate_every": 0.5, "channels_last": True},
    "curve": {"evaluate_every": 0.7},
}


@pytest.mark.parametrize("name", ["dense", "rigl", "snfs"])
@pytest.mark.parametrize("quality", QUALITY)
def test_resuming_is_bit_exact(tiny, tmp_path, name, quality):
    settings = tiny.settings(steps=STEPS, **QUALITY[quality])
    whole, mask = run(tiny, tmp_path / "whole", name, settings)
    kill = random.Random(f"{name}{quality}").randrange(1, whole.step)
    message, _ = run(tiny, tmp_path / "cut", name, settings, stop_after=kill)
    assert message.startswith(f"train: stopped at step {kill} of {STEPS}")
    again, same = run(tiny, tmp_path / "cut", name, settings)
    assert tiny.differing(tiny.state(whole), tiny.state(again)) == []
    assert mask == same
    one, other = whole.history, again.history
    assert (one.losses, one.updates, one.curve, one.notes) == (other.losses, other.updates, other.curve, other.notes)
    assert other.resumed_from == kill


@pytest.mark.parametrize("name", ["ste", "sr_ste", "imp", "gradual"])
def test_resuming_with_an_average_is_bit_exact_for_masks_that_are_learned(tiny, tmp_path, name):
    settings = tiny.settings(steps=STEPS, ema=SLOW, channels_last=True)
    whole, mask = run(tiny, tmp_path / "whole", name, settings)
    kill = random.Random(name).randrange(1, STEPS)
    message, _ = run(tiny, tmp_path / "cut", name, settings, stop_after=kill)
    assert "stopped at step" in message
    again, same = run(tiny, tmp_path / "cut", name, settings)
    assert tiny.differing(tiny.state(whole), tiny.state(again)) == []
    assert mask == same


def test_a_checkpoint_of_other_settings_is_refused_by_name(tiny, tmp_path):
    run(tiny, tmp_path, "dense", tiny.settings(ema=SLOW), stop_after=3)
    with pytest.raises(UsageError, match=r"ema\.decay: 0\.9 -> 0\.8"):
        run(tiny, tmp_path, "dense", tiny.settings(ema=EMA(decay=0.8, warmup=False)))


# -- memory format -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_channels_last_trains_the_same_network(tiny, tmp_path, name):
    plain, mask = run(tiny, tmp_path / "plain", name, tiny.settings(steps=6))
    other, same = run(tiny, tmp_path / "other", name, tiny.settings(steps=6, channels_last=True))
    weight = dict(other.model.named_parameters())["0.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last)
    seen = []
    other.model.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    other.step = 0
    other.advance(Dense())
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    if name == "imp":  # which prunes by magnitudes that differ in the last bits
        return
    assert (mask is None) == (same is None)
    again, _ = run(tiny, tmp_path / "again", name, tiny.settings(steps=6, channels_last=True))
    for key, tensor in plain.model.state_dict().items():
        assert torch.allclose(tensor.float(), again.model.state_dict()[key].float(), atol=1e-4), key


# -- overrides -----------------------------------------------------------------------------------------------------


def test_a_stage_can_turn_each_of_them_on_and_off(tiny):
    base = tiny.settings(ema=SLOW, mixup=0.2, channels_last=True, early_stop=stops(), clip_norm=1.0)
    off = TrainingOverride(ema=None, mixup=None, channels_last=False, early_stop=None, clip_norm=None).over(base)
    assert (off.ema, off.mixup, off.channels_last, off.early_stop, off.clip_norm) == (None, None, False, None, None)
    assert TrainingOverride().over(base) == base
    assert TrainingOverride(precision=None, keep=None, channels_last=None, batch_size=None).over(base) == base
    assert TrainingOverride(ema=EMA(decay=0.5)).over(base).ema == EMA(decay=0.5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"steps": 10, "evaluate_every": 1}, [4, 8, 10]),
        ({"steps": 8, "evaluate_every": 1}, [4, 8]),
        ({"steps": 10, "evaluate_every": 0.5}, [2, 4, 6, 8, 10]),
        ({"steps": 5, "evaluate_every": 0.1}, [1, 2, 3, 4, 5]),
        ({"steps": 7, "accumulate": 3, "keep": "best"}, [2, 3, 4, 6, 7]),
        ({"steps": 7, "keep": "best", "evaluate_every": 100}, [7]),
    ],
)
def test_measurements_come_by_epochs_and_at_the_end(tiny, settings, expected):
    training = tiny.settings(**settings)
    assert [s for s in range(1, training.total_steps(37) + 1) if training.measured_after(s, 37)] == expected


def test_a_part_of_an_epoch_is_measured_at_its_own_step_and_not_at_the_next():
    for tenths in range(1, 40):
        for examples in range(10, 60, 10):
            training = Training(epochs=5, batch_size=1, evaluate_every=tenths / 10)
            found = [step for step in range(1, 5 * examples + 1) if training.measured_after(step, examples)]
            every = tenths * examples // 10
            assert found == sorted({*range(every, 5 * examples + 1, every), 5 * examples})
