"""The teacher's part of the loss, by hand and by finite differences, and what it leaves alone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from sparsify_deploy.errors import Diverged, Interrupted, ModelError
from sparsify_deploy.training.distillation import distilling, matched, relative_square, softened_kl
from sparsify_deploy.training.settings import Distillation
from sparsify_deploy.training.updater import Dense, HoldMask
from sparsify_deploy.types import Context


def logits(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(network, seed: int, dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in network.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
    return network.to(dtype)


@pytest.fixture
def pair(tiny):
    """A teacher and a student of other weights, both in training mode, and a batch."""
    return seeded(tiny.network(), 1), seeded(tiny.network(), 2), tiny.images().take(torch.arange(6))


def settings(**changes) -> Distillation:
    return Distillation(**changes)


def open_(pair, output=None, **changes):
    teacher, student, batch = pair
    return distilling(teacher, student, settings(**changes), inputs=("input",), example=batch, output=output)


# -- the distances -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0, 0.5])
def test_the_softened_divergence_by_hand(temperature):
    student, teacher = logits(0, 3, 5), logits(1, 3, 5)
    total = 0.0
    for i in range(3):
        sums = [sum(math.exp(x / temperature) for x in row[i].tolist()) for row in (teacher, student)]
        for j in range(5):
            p, q = (
                math.exp(row[i, j].item() / temperature) / s for row, s in zip((teacher, student), sums, strict=True)
            )
            total += p * math.log(p / q)
    found = softened_kl(student, teacher, temperature)
    assert found.item() == pytest.approx(temperature**2 * total / 3, rel=1e-12)
    torchs = functional.kl_div(
        (student / temperature).log_softmax(1), (teacher / temperature).softmax(1), reduction="batchmean"
    )
    assert found.item() == pytest.approx(temperature**2 * torchs.item(), rel=1e-12)


def test_the_divergence_of_maps_is_the_mean_over_places():
    student, teacher = logits(0, 2, 5, 3), logits(1, 2, 5, 3)
    places = [softened_kl(student[:, :, k], teacher[:, :, k], 2.0) for k in range(3)]
    assert softened_kl(student, teacher, 2.0).item() == pytest.approx(sum(places).item() / 3)


def test_equal_logits_have_no_divergence_and_hot_ones_match_differences_of_logits():
    student, teacher = logits(0, 4, 6), logits(1, 4, 6)
    assert softened_kl(teacher, teacher.clone(), 4.0).item() == 0.0
    # Section 2.1 of the paper: at high temperature, half the squared difference of zero-mean logits over the classes.
    centred = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    hot = softened_kl(student, teacher, 1e4).item()
    assert hot == pytest.approx((centred**2).sum(1).mean().item() / (2 * 6), rel=1e-3)


def test_the_gradient_of_the_divergence_is_what_differences_say():
    teacher = logits(1, 3, 4)
    student = logits(0, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: softened_kl(s, teacher, 3.0), student)
    softened_kl(student, teacher, 3.0).backward()
    closed = 3.0 * ((student / 3.0).softmax(1) - (teacher / 3.0).softmax(1)).detach() / 3
    torch.testing.assert_close(student.grad, closed)


def test_a_features_distance_does_not_depend_on_its_size():
    student, teacher = logits(0, 2, 3, 4), logits(1, 2, 3, 4)
    expected = ((student - teacher) ** 2).sum() / (teacher**2).sum()
    assert relative_square(student, teacher, "a").item() == pytest.approx(expected.item())
    assert relative_square(100 * student, 100 * teacher, "a").item() == pytest.approx(expected.item())
    with pytest.raises(ModelError, match="feature 'a' is zero for a whole batch"):
        relative_square(student, torch.zeros_like(teacher), "a")


# -- the loss ------------------------------------------------------------------------------------------------------


def test_the_loss_weighs_the_tasks_own_and_the_teachers(pair):
    teacher, student, batch = pair
    outputs = {"output": student(batch["input"])}
    own = torch.tensor(1.75)
    with open_(pair, temperature=3.0, weight=0.3) as distiller:
        found = distiller.loss(own, outputs, batch)
    expected = 0.7 * 1.75 + 0.3 * softened_kl(outputs["output"], teacher.eval()(batch["input"]), 3.0)
    torch.testing.assert_close(found, expected)


def test_at_full_weight_the_tasks_own_loss_plays_no_part_not_even_when_it_is_infinite(pair):
    _, student, batch = pair
    outputs = {"output": student(batch["input"])}
    own = (student[5].weight.sum() * 7.0).requires_grad_()
    with open_(pair, weight=1.0) as distiller:
        loss = distiller.loss(own, outputs, batch)
        assert torch.equal(loss, distiller.loss(torch.tensor(math.inf), outputs, batch))
    assert torch.autograd.grad(loss, own, allow_unused=True) == (None,)


def test_the_gradient_of_the_whole_loss_is_what_differences_say(tiny):
    """In float64 for the network's last layer, the teacher's answer being a constant."""
    batch = {k: v.double() if v.is_floating_point() else v for k, v in tiny.images().take(torch.arange(5)).items()}
    teacher, student = (seeded(tiny.network(), seed, torch.float64).eval() for seed in (1, 2))

    def value():
        outputs = {"output": student(batch["input"])}
        own = functional.cross_entropy(outputs["output"], batch["target"])
        answer = teacher(batch["input"]).detach()
        return outputs, own, 0.4 * own + 0.6 * softened_kl(outputs["output"], answer, 2.0)

    with distilling(
        teacher, student, settings(temperature=2.0, weight=0.6), inputs=("input",), example=batch
    ) as distiller:
        outputs, own, _ = value()
        distiller.loss(own, outputs, batch).backward()
    weight = student[7].weight
    for index in [(0, 0), (1, 3), (3, 7)]:
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                weight[index] += step
                values.append(value()[2].item())
                weight[index] -= step
        assert weight.grad[index].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-3, abs=1e-6)


def test_real_targets_compare_values_by_their_squared_difference(pair):
    teacher, student, batch = pair
    batch = {"input": batch["input"], "target": torch.randn(6, 4, generator=torch.Generator().manual_seed(0))}
    outputs = {"output": student(batch["input"])}
    with open_(pair, weight=1.0, temperature=9.0) as distiller:
        found = distiller.loss(torch.tensor(0.0), outputs, batch)
    torch.testing.assert_close(found, ((outputs["output"] - teacher.eval()(batch["input"])) ** 2).mean())


class Two(nn.Module):
    """Hidden values beside the logits."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(3, 5), nn.Linear(5, 4)

    def forward(self, values):
        hidden = self.hidden(values)
        return {"hidden": hidden, "logits": self.head(hidden), "index": hidden.argmax(1)}


@pytest.mark.parametrize(("output", "compared"), [(None, "logits"), ("logits", "logits"), ("hidden", "hidden")])
def test_of_several_outputs_the_tasks_own_is_compared(output, compared):
    teacher, student = seeded(Two(), 1), seeded(Two(), 2)
    batch = {"input": torch.randn(6, 3), "target": torch.arange(6) % 4}
    outputs = student(batch["input"])
    with distilling(
        teacher, student, settings(weight=1.0), inputs=("input",), example=batch, output=output
    ) as distiller:
        found = distiller.loss(torch.tensor(0.0), outputs, batch)
    torch.testing.assert_close(found, softened_kl(outputs[compared], teacher(batch["input"])[compared], 4.0))


def test_the_features_distance_by_hand(pair):
    teacher, student, batch = pair
    drawn = torch.get_rng_state()
    with open_(pair, weight=1.0, features=("0", "5")) as distiller:
        found = distiller.loss(torch.tensor(0.0), {"output": student(batch["input"])}, batch)
        assert distiller.facts["features"] == ["0", "5"]
    teacher.eval()
    torch.set_rng_state(drawn)  # the same dropout once more, by hand
    one, other = ((network[0](batch["input"]), network[:6](batch["input"])) for network in (student, teacher))
    parts = [((x - y) ** 2).mean() / (y**2).mean() for x, y in zip(one, other, strict=True)]
    torch.testing.assert_close(found, sum(parts) / 2)
    assert torch.autograd.grad(found, student[7].weight, allow_unused=True) == (None,), "logits play no part"


def test_a_feature_is_compared_as_it_was_before_an_activation_in_place():
    def network():
        return nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))

    teacher, student = seeded(network(), 1), seeded(network(), 2)
    batch = {"input": torch.randn(5, 3), "target": torch.arange(5) % 2}
    with distilling(
        teacher, student, settings(weight=1.0, features=("0",)), inputs=("input",), example=batch
    ) as distiller:
        outputs = {"output": student(batch["input"])}
        found = distiller.loss(torch.tensor(0.0), outputs, batch)
    one, other = student[0](batch["input"]), teacher[0](batch["input"])
    assert bool((one < 0).any())
    torch.testing.assert_close(found, ((one - other) ** 2).mean() / (other**2).mean())


# -- what it leaves alone ------------------------------------------------------------------------------------------


def test_the_teacher_is_asked_in_evaluation_mode_and_left_as_it_was(pair):
    teacher, student, batch = pair
    teacher[4].eval()
    before, modes = copy.deepcopy(teacher.state_dict()), [m.training for m in teacher.modules()]
    outputs = {"output": student(batch["input"])}
    with open_(pair) as distiller:
        drawn = torch.get_rng_state()
        first = distiller.loss(torch.tensor(1.0), outputs, batch)
        assert torch.equal(torch.get_rng_state(), drawn)
        assert torch.equal(first, distiller.loss(torch.tensor(1.0), outputs, batch)), "dropout is off"
        first.backward()
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert [m.training for m in teacher.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert student[7].weight.grad is not None


def test_no_hook_is_left_and_opening_changes_nothing(pair):
    teacher, student, _ = pair
    before = copy.deepcopy(student.state_dict())
    drawn = torch.get_rng_state()
    with open_(pair, features=("*",)):
        assert any(m._forward_hooks for m in student.modules())
    assert torch.equal(torch.get_rng_state(), drawn)
    for network in (teacher, student):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
        assert network.training
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


class Noisy(nn.Module):
    """Draws in evaluation mode too, as functional dropout with its default does."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, values):
        return functional.dropout(self.layer(values), 0.5)


def test_a_teacher_that_draws_does_not_move_the_random_state_of_the_student():
    teacher, student = seeded(Noisy(), 1), seeded(Noisy(), 2)
    batch = {"input": torch.randn(5, 3), "target": torch.arange(5) % 4}
    with distilling(teacher, student, settings(), inputs=("input",), example=batch) as distiller:
        outputs = {"output": student(batch["input"])}
        drawn = torch.get_rng_state()
        distiller.loss(torch.tensor(1.0), outputs, batch)
        assert torch.equal(torch.get_rng_state(), drawn)


def test_under_autocast_the_teacher_answers_in_full_precision(pair):
    _, student, batch = pair
    outputs = {"output": student(batch["input"])}
    with open_(pair, weight=1.0) as distiller:
        plain = distiller.loss(torch.tensor(1.0), outputs, batch)
        with torch.autocast("cpu", torch.bfloat16):
            cast = distiller.loss(torch.tensor(1.0), outputs, batch)
    assert torch.equal(plain, cast)


# -- mistakes ------------------------------------------------------------------------------------------------------


def test_a_teacher_that_is_not_finite_is_named(pair):
    teacher, student, batch = pair
    outputs = {"output": student(batch["input"])}
    with torch.no_grad():
        teacher[5].bias.fill_(math.inf)
    with (
        open_(pair) as distiller,
        pytest.raises(Diverged, match=r"the teacher's output 'output' is not finite.*distillation\.teacher"),
    ):
        distiller.loss(torch.tensor(1.0), outputs, batch)
    with open_(pair, features=("5",)) as distiller:
        student(batch["input"])
        with pytest.raises(Diverged, match="the teacher's feature '5' is not finite"):
            distiller.loss(torch.tensor(1.0), outputs, batch)


def test_patterns_name_modules_in_the_order_they_run(pair):
    teacher, student, batch = pair
    assert matched(teacher, student, ("7", "[01]"), ("input",), batch) == ("0", "1", "7")
    assert matched(teacher, student, (), ("input",), batch) == ()
    with pytest.raises(ModelError, match=r"'conv1' matches no module .*one of 0, 1, 2"):
        matched(teacher, student, ("0", "conv1"), ("input",), batch)


def test_a_block_that_tracing_took_apart_is_no_feature_and_the_message_says_why():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
            self.head = nn.Linear(4, 2)

        def forward(self, values):
            return self.head(self.block[1](self.block[0](values)))

    teacher = Block()
    student = fx.symbolic_trace(copy.deepcopy(teacher))
    batch = {"input": torch.randn(2, 3)}
    assert matched(teacher, student, ("block.*",), ("input",), batch) == ("block.0", "block.1")
    with pytest.raises(ModelError, match=r"'block' matches no module .*BatchNorm is folded.*did you mean 'block\.1'"):
        matched(teacher, student, ("block",), ("input",), batch)


def test_networks_of_other_widths_do_not_teach_each_other():
    teacher, student = nn.Sequential(nn.Linear(3, 5)), nn.Sequential(nn.Linear(3, 4))
    batch = {"input": torch.randn(2, 3), "target": torch.tensor([0, 1])}
    with pytest.raises(ModelError, match=r"'0' returns \[\(2, 4\)\] in the student and \[\(2, 5\)\] in the teacher"):
        matched(teacher, student, ("0",), ("input",), batch)
    with (
        distilling(teacher, student, settings(), inputs=("input",), example=batch) as distiller,
        pytest.raises(ModelError, match=r"output 'output' has shape \(2, 4\) in the student and \(2, 5\)"),
    ):
        distiller.loss(torch.tensor(1.0), {"output": student(batch["input"])}, batch)
    with (
        distilling(teacher, student, settings(), inputs=("input",), example=batch, output="x") as distiller,
        pytest.raises(ModelError, match="share no floating-point output"),
    ):
        distiller.loss(torch.tensor(1.0), {"output": student(batch["input"])}, batch)


# -- in the loop ---------------------------------------------------------------------------------------------------


class StopAfter:
    def __init__(self, steps):
        self.left = steps

    def __call__(self):
        self.left -= 1
        return self.left == 0


def trained(tiny, folder, distillation, stop_after=None, *, held=True, **training):
    stop = StopAfter(stop_after) if stop_after else lambda: False
    context = Context(progress=tiny.recorder(), stop_requested=stop, checkpoint_every_s=1e9)
    student = tiny.network()
    teacher = seeded(tiny.network(), 1)
    example = tiny.images().take(torch.arange(1))
    with distilling(teacher, student, distillation, inputs=("input",), example=example) as distiller:
        trainer = tiny.trainer(
            folder,
            tiny.settings(**training),
            model=student,
            context=context,
            augment=("crop", "flip"),
            distillation=distiller,
        )
        updater = HoldMask(student, trainer.optimizer, tiny.mask()) if held else Dense()
        try:
            history = trainer.fit(updater)
        except Interrupted:
            return None
    return tiny.state(trainer), history


@pytest.mark.parametrize("features", [(), ("0", "5")])
@pytest.mark.parametrize(("accumulate", "precision"), [(1, "fp32"), (3, "fp32"), (2, "bf16")])
def test_resuming_with_a_teacher_is_bit_exact(tiny, tmp_path, features, accumulate, precision):
    chosen = settings(temperature=2.0, weight=0.5, features=features)
    training = {"steps": 7, "accumulate": accumulate, "precision": precision}
    whole, history = trained(tiny, tmp_path / "whole", chosen, **training)
    for kill in (1, 4):
        assert trained(tiny, tmp_path / "cut", chosen, kill, **training) is None
    resumed, other = trained(tiny, tmp_path / "cut", chosen, **training)
    assert tiny.differing(whole, resumed) == []
    assert history.losses == other.losses
    assert other.resumed_from == 5


def test_the_teacher_changes_what_is_learnt_and_the_student_comes_nearer_to_it(tiny, tmp_path):
    """Without dropout and augmentation, at full weight, the training loss is the distance to the teacher."""
    chosen = settings(weight=1.0, temperature=2.0)
    taught, history = trained(tiny, tmp_path / "taught", chosen, steps=60)
    assert history.losses[-1][1] < 0.5 * history.losses[0][1]
    other, _ = trained(tiny, tmp_path / "half", settings(weight=0.5, temperature=2.0), steps=60)
    assert tiny.differing(taught, other)
