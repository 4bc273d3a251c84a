from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from sparsify_deploy.errors import Diverged, ModelError, UsageError
from sparsify_deploy.tasks import classification, regression
from sparsify_deploy.training.batches import Batches
from sparsify_deploy.training.evaluation import loss_of
from sparsify_deploy.training.loop import evaluate, predict
from sparsify_deploy.training.optimizer import build_optimizer
from sparsify_deploy.training.schedule import lr_factor
from sparsify_deploy.training.settings import Optimizer, Schedule
from sparsify_deploy.training.updater import Dense
from sparsify_deploy.types import Context


class Probe(Dense):
    """Records rates and gradients at each step."""

    def __init__(self, trainer):
        self.trainer, self.rates, self.gradients = trainer, [], []

    def after_backward(self, step):
        self.rates.append([group["lr"] for group in self.trainer.optimizer.param_groups])
        self.gradients.append([p.grad.clone() for p in self.trainer.model.parameters()])
        return True


def test_training_lowers_the_loss_and_tells_how_far_it_is(tiny, tmp_path):
    recorder = tiny.recorder()
    trainer = tiny.trainer(tmp_path, tiny.settings(steps=60), context=Context(progress=recorder))
    history = trainer.fit(Dense())
    assert history.losses[-1][1] < 0.5 * history.losses[0][1]
    assert history.steps == len(history.losses) == 60
    assert [update[:3] for update in recorder.updates] == [("train", k, 60) for k in range(1, 61)]
    assert trainer.history is history
    json.dumps(dataclasses.asdict(history))


def test_losses_are_means_over_equal_windows(tiny, tmp_path):
    recorder = tiny.recorder()
    trainer = tiny.trainer(tmp_path, tiny.settings(steps=403), context=Context(progress=recorder))
    history = trainer.fit(Dense())
    noted = [float(update[3].removeprefix("loss ")) for update in recorder.updates]
    assert [step for step, _ in history.losses] == [*range(3, 403, 3), 403]
    assert history.losses[10][1] == pytest.approx(sum(noted[30:33]) / 3, abs=1e-4)
    assert history.losses[-1][1] == pytest.approx(noted[-1], abs=1e-4)


def test_one_sgd_step_is_the_textbook_one(tiny, tmp_path):
    split = tiny.split(input=torch.randn(4, 3), target=torch.randn(4, 2))
    model = nn.Linear(3, 2)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    optimizer = Optimizer(lr=0.1, momentum=0.0, weight_decay=0.5)
    trainer = tiny.trainer(
        tmp_path,
        tiny.settings(steps=1, batch_size=4, optimizer=optimizer, schedule=Schedule(name="constant")),
        model=model,
        split=split,
        task=regression.create(regression.Params()),
    )
    trainer.fit(Dense())
    error = split.fields["input"] @ weight.T + bias - split.fields["target"]
    weight_gradient = 2 * error.T @ split.fields["input"] / 8
    assert torch.allclose(model.weight, weight - 0.1 * (weight_gradient + 0.5 * weight), atol=1e-6)
    assert torch.allclose(model.bias, bias - 0.1 * 2 * error.sum(0) / 8, atol=1e-6)


def test_rates_follow_the_schedule_in_every_group(tiny, tmp_path):
    settings = tiny.settings(steps=9)
    trainer = tiny.trainer(tmp_path, settings)
    probe = Probe(trainer)
    trainer.fit(probe)
    expected = [0.05 * lr_factor(settings.schedule, step, 9) for step in range(9)]
    assert probe.rates == [[rate, rate] for rate in expected]


def test_accumulation_averages_the_gradients_of_the_next_batches(tiny, tmp_path):
    def run(**changes):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
        with torch.no_grad():
            model[1].weight.fill_(0.01)
            model[1].bias.zero_()
        trainer = tiny.trainer(tmp_path / str(changes), tiny.settings(steps=1, **changes), model=model)
        trainer.model.eval()
        probe = Probe(trainer)
        trainer.fit(probe)
        return probe.gradients[0]

    for accumulated, whole in zip(run(batch_size=8, accumulate=4), run(batch_size=32), strict=True):
        assert torch.allclose(accumulated, whole, atol=1e-6)


def test_each_step_takes_the_next_batches(tiny, tmp_path):
    taken = []

    class Spy(type(tiny.images())):
        def take(self, indices):
            taken.append(indices.tolist())
            return super().take(indices)

    split = Spy(**tiny.images().fields)
    tiny.trainer(tmp_path, tiny.settings(steps=4, accumulate=3), split=split).fit(Dense())
    batches = Batches(split, seed=7, batch_size=8)
    assert taken == [batches.indices(k).tolist() for k in range(12)]


def test_clipping_bounds_the_norm(tiny, tmp_path):
    optimizer = Optimizer(lr=1.0, momentum=0.0, weight_decay=0.0)
    settings = tiny.settings(steps=1, clip_norm=1e-3, optimizer=optimizer, schedule=Schedule(name="constant"))
    trainer = tiny.trainer(tmp_path, settings)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.fit(Dense())
    moved = sum(((p - q) ** 2).sum().item() for p, q in zip(trainer.model.parameters(), before, strict=True))
    assert math.sqrt(moved) == pytest.approx(1e-3, rel=1e-3)


def test_the_callers_random_state_and_module_modes_are_left_as_found(tiny, tmp_path):
    trainer = tiny.trainer(tmp_path, augment=("crop", "flip"))
    trainer.model.eval()
    trainer.model[4].train()
    state = torch.get_rng_state()
    trainer.fit(Dense())
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in trainer.model] == [False] * 4 + [True] + [False] * 3


def test_the_same_seed_gives_the_same_run_whatever_the_global_random_state(tiny, tmp_path):
    results = []
    for folder, noise, seed in (("a", 1, 7), ("b", 2, 7), ("c", 1, 8)):
        torch.manual_seed(noise)
        trainer = tiny.trainer(tmp_path / folder, augment=("crop", "flip"), seed=seed)
        trainer.fit(Dense())
        results.append(tiny.state(trainer))
    assert tiny.differing(results[0], results[1]) == []
    assert tiny.differing(results[0], results[2])


def test_dropout_differs_from_step_to_step(tiny, tmp_path):
    seen = []

    class Spy(nn.Dropout):
        def forward(self, x):
            out = super().forward(torch.ones_like(x))
            seen.append(out[0].clone())
            return out

    model = nn.Sequential(nn.Flatten(), Spy(0.5), nn.Linear(64, 4))
    tiny.trainer(tmp_path, tiny.settings(steps=2), model=model).fit(Dense())
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_divergence_names_the_step_the_rate_and_the_way_out(tiny, tmp_path, accumulate):
    optimizer = Optimizer(lr=1e30)
    settings = tiny.settings(optimizer=optimizer, schedule=Schedule(name="constant"), accumulate=accumulate)
    with pytest.raises(Diverged, match=r"train: .* at step \d+ of 12 \(learning rate 1e\+30\): lower optimizer.lr"):
        tiny.trainer(tmp_path, settings).fit(Dense())


def test_weights_that_overflow_on_the_last_step_are_divergence_too(tiny, tmp_path):
    class Poison(Dense):
        def after_step(self, step):
            if step == 11:
                with torch.no_grad():
                    trainer.model[0].weight[0] = math.inf

    trainer = tiny.trainer(tmp_path)
    with pytest.raises(Diverged, match=r"0\.weight is not finite"):
        trainer.fit(Poison())
    assert not (tmp_path / "train.checkpoint").exists()


def test_a_gradient_that_is_not_finite_is_caught_when_clipping(tiny, tmp_path):
    class Poison(Dense):
        def after_backward(self, step):
            trainer.model[0].weight.grad.fill_(math.nan)
            return True

    trainer = tiny.trainer(tmp_path, tiny.settings(clip_norm=1.0))
    with pytest.raises(Diverged, match="gradient norm is nan at step 0"):
        trainer.fit(Poison())


def test_an_updater_can_skip_the_optimizer(tiny, tmp_path):
    class Skip(Dense):
        def after_backward(self, step):
            return False

    trainer = tiny.trainer(tmp_path)
    before = {k: v.clone() for k, v in trainer.model.named_parameters()}
    trainer.fit(Skip())
    assert trainer.step == 12
    assert all(torch.equal(p, before[k]) for k, p in trainer.model.named_parameters())
    assert not trainer.optimizer.state


def test_bf16_keeps_float_weights_and_trains(tiny, tmp_path):
    dtypes = []

    class Spy(nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            dtypes.append(out.dtype)
            return out

    model = nn.Sequential(nn.Flatten(), Spy(64, 4))
    trainer = tiny.trainer(tmp_path, tiny.settings(steps=30, precision="bf16"), model=model)
    history = trainer.fit(Dense())
    assert set(dtypes) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert history.losses[-1][1] < history.losses[0][1]


def test_fp16_scales_the_loss_and_updaters_see_the_gradient_itself(tiny, tmp_path):
    found = {}
    for precision in ("fp32", "fp16"):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
        with torch.no_grad():
            model[1].weight.fill_(0.01)
            model[1].bias.zero_()
        settings = tiny.settings(steps=1, precision=precision, accumulate=3)
        trainer = tiny.trainer(tmp_path / precision, settings, model=model)
        probe = Probe(trainer)
        trainer.fit(probe)
        found[precision] = probe.gradients[0]
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    for half, single in zip(found["fp16"], found["fp32"], strict=True):
        assert half.abs().max() < 10  # the scale starts at 65536
        assert torch.allclose(half, single, atol=2e-3)
        assert not torch.equal(half, single)


class Overflow(nn.Module):
    """Lets everything through but makes the gradient infinite in the passes of `bad`, counted from 0."""

    def __init__(self, bad):
        super().__init__()
        self.bad, self.passes = bad, 0

    def forward(self, x):
        if self.passes in self.bad:
            x.register_hook(lambda gradient: gradient * math.inf)
        self.passes += 1
        return x


class Recording(Dense):
    def __init__(self):
        self.calls = []

    def before_forward(self, step):
        self.calls.append(("before", step))

    def after_backward(self, step):
        self.calls.append(("backward", step))
        return True

    def after_step(self, step):
        self.calls.append(("after", step))


def test_a_step_whose_fp16_gradients_overflow_is_skipped_whole(tiny, tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), Overflow({3, 4}), nn.Linear(8, 4))
    trainer = tiny.trainer(tmp_path, tiny.settings(steps=4, accumulate=2, precision="fp16", clip_norm=1.0), model=model)
    weights = []
    inner = trainer.advance

    def advance(*arguments):
        loss = inner(*arguments)
        weights.append(model[1].weight.detach().clone())
        return loss

    trainer.advance = advance
    recording = Recording()
    history = trainer.fit(recording)
    expected = [("before", 0), ("backward", 0), ("after", 0)]
    expected += [("before", 1), ("after", 1), ("before", 2), ("after", 2)]
    assert recording.calls == [*expected, ("before", 3), ("backward", 3), ("after", 3)]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[2], weights[3])
    assert history.steps == 4
    assert history.notes == ("train: fp16: gradients overflowed in 2 steps, which were skipped",)
    assert trainer._scale.state_dict()["scaler"]["scale"] == 65536 / 4


def test_gradients_that_always_overflow_are_divergence(tiny, tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), Overflow(set(range(1000))))
    trainer = tiny.trainer(tmp_path, tiny.settings(steps=100, precision="fp16"), model=model)
    with pytest.raises(Diverged, match="overflow fp16 at any loss scale at step 26 of 100"):
        trainer.fit(Dense())


def test_updaters_see_the_accumulated_gradient_of_all_slices_once(tiny, tmp_path):
    recording = Recording()
    tiny.trainer(tmp_path, tiny.settings(steps=2, accumulate=3)).fit(recording)
    assert [call for call in recording.calls if call[0] == "backward"] == [("backward", 0), ("backward", 1)]


def test_a_teacher_has_the_last_word_on_the_loss(tiny, tmp_path):
    seen = []

    class Teacher:
        def loss(self, own, outputs, batch):
            seen.append((own.item(), outputs["output"].dtype, batch["input"].shape))
            return own * 0.0 + outputs["output"].square().mean()

    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    expected = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    expected.load_state_dict(model.state_dict())
    settings = tiny.settings(steps=1, precision="bf16")
    trainer = tiny.trainer(tmp_path, settings, model=model, distillation=Teacher())
    probe = Probe(trainer)
    trainer.fit(probe)
    assert [entry[1:] for entry in seen] == [(torch.float32, (8, 1, 8, 8))]
    batch = Batches(tiny.images(), seed=7, batch_size=8).batch(0)
    expected(batch["input"]).square().mean().backward()
    for own, parameter in zip(probe.gradients[0], expected.parameters(), strict=True):
        assert torch.allclose(own, parameter.grad, atol=1e-2)


def test_a_fit_can_start_later_at_a_rate_of_its_own_and_be_measured(tiny, tmp_path):
    trainer = tiny.trainer(tmp_path, evaluate=lambda: {"accuracy": 0.5})
    probe = Probe(trainer)
    assert trainer.fit(probe, "one").metrics == {}
    history = trainer.fit(probe, "two", start=9, constant_rate=0.003, measured=True)
    assert (history.steps, history.start, history.metrics) == (3, 9, {"accuracy": 0.5})
    assert [step for step, _ in history.losses] == [10, 11, 12]
    assert probe.rates[12:] == [[0.003, 0.003]] * 3
    assert [fit.label for fit in trainer.fits] == ["one", "two"]
    assert trainer.history.steps == 15


def test_weight_decay_spares_biases_and_normalisation(tiny):
    optimizer = build_optimizer(tiny.network(), Optimizer(weight_decay=0.1))
    decayed, spared = optimizer.param_groups
    assert decayed["weight_decay"] == 0.1
    assert {p.ndim for p in decayed["params"]} == {2, 4}
    assert spared["weight_decay"] == 0.0
    assert {p.ndim for p in spared["params"]} == {1}
    assert len(decayed["params"]) + len(spared["params"]) == len(list(tiny.network().parameters()))


@pytest.mark.parametrize(("name", "kind"), [("sgd", "SGD"), ("adam", "Adam"), ("adamw", "AdamW")])
def test_optimizer_settings_arrive(tiny, name, kind):
    settings = Optimizer(name=name, lr=0.3, momentum=0.8, nesterov=True, betas=(0.7, 0.8), eps=1e-5)
    optimizer = build_optimizer(tiny.network(), settings)
    assert type(optimizer).__name__ == kind
    expected = {"momentum": 0.8, "nesterov": True} if name == "sgd" else {"betas": (0.7, 0.8), "eps": 1e-5}
    assert {key: optimizer.param_groups[0][key] for key in expected} == expected


def test_impossible_optimizers_are_one_line_mistakes(tiny):
    with pytest.raises(UsageError, match="nesterov"):
        build_optimizer(tiny.network(), Optimizer(momentum=0.0, nesterov=True))
    with pytest.raises(ModelError, match="no parameter to train"):
        build_optimizer(nn.Flatten(), Optimizer())


def test_evaluate_covers_every_example_in_evaluation_mode(tiny):
    model, split = tiny.network(), tiny.images(37)
    task = classification.create(classification.Params())
    model.train()
    model[4].eval()
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    metrics = evaluate(model, task, split, ("input",), batch_size=10)
    assert [m.training for m in model] == [True] * 4 + [False] + [True] * 3
    assert all(torch.equal(v, buffers[k]) for k, v in model.named_buffers())
    model.eval()
    with torch.no_grad():
        logits = model(split.fields["input"])
    right = (logits.argmax(1) == split.fields["target"]).float().mean().item()
    assert metrics["accuracy"] == pytest.approx(right)
    assert metrics["loss"] == pytest.approx(
        nn.functional.cross_entropy(logits, split.fields["target"]).item(), rel=1e-5
    )


def test_predict_gives_outputs_and_fields_of_the_asked_examples(tiny):
    model, split = tiny.network(), tiny.images(37)
    outputs, batch = predict(model, split, ("input",), torch.tensor([30, 2, 5]), batch_size=2)
    assert outputs["output"].shape == (3, 4)
    assert torch.equal(torch.from_numpy(batch["input"]), split.fields["input"][[30, 2, 5]])
    assert torch.equal(torch.from_numpy(batch["target"]), split.fields["target"][[30, 2, 5]])
    alone, _ = predict(model, split, ("input",), torch.tensor([5]))
    assert alone["output"][0] == pytest.approx(outputs["output"][2], abs=1e-6)


def test_loss_of_a_batch(tiny):
    model = tiny.network().eval()
    batch = tiny.images().take(torch.arange(6))
    loss = loss_of(classification.create(classification.Params()), ("input",))(model, batch)
    assert loss.item() == pytest.approx(nn.functional.cross_entropy(model(batch["input"]), batch["target"]).item())
