"""Amdahl's law over measured layers, by hand."""

from __future__ import annotations

import pytest

from sparsify_deploy.prediction.measured import weigh
from sparsify_deploy.types import EngineProfile, LayerTime

PROFILE = EngineProfile(
    (
        LayerTime("a + relu", ("a", "relu"), "k", 3.0),
        LayerTime("b || c", ("b", "c"), "k", 3.0),
        LayerTime("softmax", ("softmax",), "k", 4.0),
    ),
    30,
)


def test_the_measured_share_of_eligible_layers_is_divided_and_the_rest_stays() -> None:
    found = weigh(PROFILE, ["a"])
    assert found is not None
    assert found.share == pytest.approx(0.3)
    assert found.realistic == pytest.approx(10 / (7 + 3 / 1.3))
    assert found.ideal == pytest.approx(10 / 8.5)


def test_an_engine_layer_of_two_eligible_nodes_counts_once() -> None:
    found = weigh(PROFILE, ["a", "b", "c"])
    assert found is not None
    assert [found.share, found.ideal] == pytest.approx([0.6, 10 / 7])


def test_nothing_eligible_gains_nothing_and_what_cannot_be_known_is_not_said() -> None:
    found = weigh(PROFILE, [])
    assert found is not None
    assert (found.share, found.realistic, found.ideal) == (0, 1, 1)
    assert weigh(PROFILE, ["a", "in a compiled part"]) is None
    assert weigh(EngineProfile((), 0, "no profiler"), ["a"]) is None
