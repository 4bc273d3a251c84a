"""Uniform and ERK densities on shapes small enough to solve by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify_deploy.sparsity.allocation import erk, uniform


def test_uniform() -> None:
    assert uniform({"a": (2, 3), "b": (5,)}, 0.3) == {"a": 0.3, "b": 0.3}
    with pytest.raises(ValueError, match="density"):
        uniform({"a": (2, 3)}, 1.5)


def test_erk_by_hand() -> None:
    # ε (20 + 30) = 0.1 · (100 + 200) = 30, so ε = 0.6: 0.6 · 20/100 and 0.6 · 30/200
    assert erk({"a": (10, 10), "b": (10, 20)}, 0.1) == pytest.approx({"a": 0.12, "b": 0.09})


def test_erk_counts_every_dimension_of_the_kernel() -> None:
    # Σ = 4 + 4 + 3 + 3 = 14 and 40, Π = 144 and 400; ε = 0.1 · 544 / 54
    epsilon = 54.4 / 54
    assert erk({"conv": (4, 4, 3, 3), "fc": (20, 20)}, 0.1) == pytest.approx(
        {"conv": epsilon * 14 / 144, "fc": epsilon * 40 / 400}
    )


def test_erk_solves_again_for_the_rest_of_a_dense_layer() -> None:
    # alone a = (2, 2) would have ε · 4/4 with ε = 0.5 · 404 / 44 > 1; then ε = (202 − 4) / 40
    assert erk({"a": (2, 2), "b": (20, 20)}, 0.5) == pytest.approx({"a": 1.0, "b": 198 / 400})


def test_erk_at_the_ends() -> None:
    shapes = {"a": (2, 2), "b": (20, 20), "c": (7, 3, 3, 3)}
    assert erk(shapes, 1.0) == pytest.approx(dict.fromkeys(shapes, 1.0))
    assert erk(shapes, 0.0) == dict.fromkeys(shapes, 0.0)
    assert erk({}, 0.5) == {}


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=4), min_size=1, max_size=6),
    st.floats(0.001, 1.0),
)
def test_erk_spends_the_budget_and_no_more(shapes: list[list[int]], density: float) -> None:
    named = {str(i): shape for i, shape in enumerate(shapes)}
    found = erk(named, density)
    assert all(0 <= value <= 1 for value in found.values())
    total = sum(math.prod(shape) for shape in shapes)
    kept = sum(found[name] * math.prod(shape) for name, shape in named.items())
    assert kept == pytest.approx(density * total)
    ratios = [found[n] * math.prod(s) / sum(s) for n, s in named.items() if found[n] < 1]
    assert ratios == pytest.approx([ratios[0]] * len(ratios)) if ratios else True
