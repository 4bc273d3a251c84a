from __future__ import annotations

import math

import pytest

from sparsify_deploy.training.schedule import lr_factor
from sparsify_deploy.training.settings import Schedule, Training


def test_cosine_is_its_closed_form():
    settings = Schedule(name="cosine", final_fraction=0.1)
    for step in range(20):
        assert lr_factor(settings, step, 20) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * step / 20)) / 2)
    assert lr_factor(settings, 10, 20) == pytest.approx(0.55)


def test_warm_up_rises_linearly_and_meets_the_schedule():
    settings = Schedule(name="constant", warmup_fraction=0.2)
    assert [lr_factor(settings, step, 20) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_cosine_starts_after_the_warm_up():
    settings = Schedule(name="cosine", warmup_fraction=0.2)
    assert lr_factor(settings, 4, 20) == 1.0
    assert lr_factor(settings, 12, 20) == pytest.approx(0.5)
    assert 0 < lr_factor(settings, 19, 20) == pytest.approx((1 + math.cos(math.pi * 15 / 16)) / 2)


def test_milestones_multiply_from_their_step_on():
    settings = Schedule(name="step", milestones=(0.5, 0.7), gamma=0.1)
    factors = [lr_factor(settings, step, 10) for step in range(10)]
    assert factors == pytest.approx([1] * 5 + [0.1] * 2 + [0.01] * 3)


def test_a_run_of_one_step_trains():
    for name in ("cosine", "step", "constant"):
        assert lr_factor(Schedule(name=name, milestones=(0.6,)), 0, 1) == 1.0
    assert lr_factor(Schedule(warmup_fraction=0.9), 0, 1) == 0.5


@pytest.mark.parametrize(
    ("examples", "changes", "expected"),
    [
        (37, {"epochs": 2.0, "batch_size": 8}, 8),
        (37, {"epochs": 2.0, "batch_size": 8, "accumulate": 3}, 3),
        (37, {"epochs": 0.01, "batch_size": 8}, 1),
        (5, {"epochs": 3.0, "batch_size": 8}, 3),
        (37, {"steps": 5, "batch_size": 8}, 5),
    ],
)
def test_total_steps(examples, changes, expected):
    assert Training(**changes).total_steps(examples) == expected
