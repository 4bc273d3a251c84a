"""Schedules at points worked out by hand."""

from __future__ import annotations

import pytest

from sparsify_deploy.sparsity.schedules import cosine_drop_fraction, cubic_sparsity, exponential_density


def test_cosine_drop_fraction() -> None:
    values = [cosine_drop_fraction(step, 300, 0.3) for step in (0, 100, 150, 200, 299, 300, 301)]
    assert values[:4] == pytest.approx([0.3, 0.225, 0.15, 0.075])
    assert 0 < values[4] < 1e-4
    assert values[5:] == [0.0, 0.0]


def test_exponential_density() -> None:
    assert [exponential_density(0.01, e, 4) for e in range(4)] == pytest.approx([0.01**0.25, 0.1, 0.01**0.75, 0.01])
    assert exponential_density(0.3, 0, 1) == 0.3
    with pytest.raises(ValueError, match="round 4"):
        exponential_density(0.01, 4, 4)


def test_cubic_sparsity() -> None:
    values = [cubic_sparsity(t, begin=10, end=20, initial=0.1, final=0.9) for t in (0, 10, 15, 20, 99)]
    assert values == pytest.approx([0.1, 0.1, 0.9 - 0.8 / 8, 0.9, 0.9])
