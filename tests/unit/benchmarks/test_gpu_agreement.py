"""Predicted against measured gains, on made-up profiles whose answer is known."""

from __future__ import annotations

from typing import Any

import pytest
from gpu.agreement import Agreement, Group, Predicted, agreement, groups, noise_floor


def profile(**times: float) -> Any:
    """Engine layers called by the network layers they run, joined with `__`."""
    return {"layers": [{"name": n, "nodes": [*n.split("__"), "relu"], "kernel": "", "ms": t} for n, t in times.items()]}


def predicted(**gains: float) -> dict[str, Predicted]:
    return {name: Predicted(1.0, 1.0 / gain, 1.0 / (2 * gain - 1)) for name, gain in gains.items()}


def judged(found: tuple[Group, ...], noise: float) -> Agreement:
    return agreement([(group, noise) for group in found])


GAINS = {"a": 1.4, "b": 1.3, "c": 1.01, "d": 1.2, "e": 1.0}


def test_signs_are_counted_outside_the_noise_alone() -> None:
    dense = profile(a=1.0, b=1.0, c=1.0, d=1.0, e=1.0, head=9.0)
    again = profile(a=1.01, b=0.99, c=1.0, d=1.0, e=1.0, head=9.0)
    sparse = profile(a=0.7, b=1.2, c=1.1, d=0.99, e=1.5, head=9.0)
    found = groups(dense, again, sparse, predicted(**GAINS))
    assert [group.layers for group in found] == [("a",), ("b",), ("c",), ("d",), ("e",)]
    noise = noise_floor(found)
    assert noise == 0.02
    # a right, b wrong (predicted faster, is slower), c and e right (not predicted faster), d within the noise
    known = judged(found, noise)
    assert (known.groups, known.outside, known.right, known.faster) == (5, 4, 3, 1)
    assert known.accuracy == 0.75
    assert known.base_rate == 0.75
    assert known.balanced_accuracy == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert known.why_none == ""


def test_a_constant_answer_scores_the_base_rate_and_half() -> None:
    names = [f"l{i}" for i in range(10)]
    dense = profile(**dict.fromkeys(names, 1.0))
    sparse = profile(**{name: 0.5 if i else 2.0 for i, name in enumerate(names)})
    known = judged(groups(dense, dense, sparse, predicted(**dict.fromkeys(names, 1.3))), 0.02)
    assert known.accuracy == known.base_rate == 0.9
    assert known.balanced_accuracy == 0.5


def test_one_sign_alone_has_no_balanced_accuracy() -> None:
    dense, sparse = profile(a=1.0, b=1.0), profile(a=0.5, b=0.5)
    known = judged(groups(dense, dense, sparse, predicted(a=1.3, b=1.3)), 0.02)
    assert known.balanced_accuracy is None
    assert known.accuracy == 1.0
    assert known.why_none == "all 2 layers outside the noise floor are faster"
    known = judged(groups(dense, dense, dense, predicted(a=1.3, b=1.3)), 0.02)
    assert known.base_rate is None
    assert known.why_none == "no layer is outside the noise floor"


def test_layers_fused_in_any_plan_are_one_group() -> None:
    dense = profile(q=1.0, k=1.0, v=1.0, o=2.0)
    sparse = profile(q__k=1.2, k__v=0.6, o=2.5)
    found = groups(dense, dense, sparse, predicted(q=1.2, k=1.2, v=1.2, o=1.2))
    assert [group.layers for group in found] == [("q", "k", "v"), ("o",)]
    assert found[0].dense_ms == 3.0
    assert found[0].sparse_ms == pytest.approx(1.8)
    assert found[0].predicted.dense_ms == 3.0
    assert found[0].gain == pytest.approx(3.0 / 1.8)
    assert found[1].gain == 0.8


def test_time_around_a_layer_counts_to_it() -> None:
    dense = {"layers": [
        {"nodes": ["a"], "ms": 1.0}, {"nodes": ["a"], "ms": 0.5}, {"nodes": [], "ms": 7.0},
    ]}  # fmt: skip
    found = groups(dense, dense, profile(a=1.0), predicted(a=1.2))
    assert found[0].gain == 1.5


def test_a_layer_that_a_profile_does_not_name_is_left_out() -> None:
    dense = profile(a=1.0, b=1.0)
    assert [group.layers for group in groups(dense, dense, profile(a=0.5), predicted(a=1.2, b=1.2))] == [("a",)]
    assert groups(dense, dense, {"layers": []}, predicted(a=1.2)) == ()


def test_noisy_profiles_raise_the_floor() -> None:
    dense, again = profile(a=1.0, b=1.0, c=1.0), profile(a=1.0, b=1.3, c=1.0)
    found = groups(dense, again, profile(a=0.9, b=0.9, c=0.9), predicted(a=1.2, b=1.2, c=1.2))
    assert noise_floor(found) == pytest.approx(0.3 / 1.3)
    assert judged(found, noise_floor(found)).outside == 1  # b: (1 + 1.3) / 2 over 0.9
