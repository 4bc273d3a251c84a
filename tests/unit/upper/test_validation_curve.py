"""What was measured on the validation split while a stage trained, from its facts to the page."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from sparsify_deploy import summary
from sparsify_deploy.reporting import page
from sparsify_deploy.reports import Curve, RunReport

HISTORY = {"losses": [[1, 2.5], [6, 1.0]], "metric": "accuracy", "curve": [[3, 0.25], [6, 0.75]]}


def outcome(history: dict[str, Any] | None) -> Any:
    record = SimpleNamespace(measured={} if history is None else {"history": history})
    return SimpleNamespace(step=SimpleNamespace(id="sparse/train"), record=record)


def test_facts_become_a_curve_of_losses_and_measurements() -> None:
    assert summary._curves(outcome(HISTORY)) == [
        Curve("sparse/train", ((1, 2.5), (6, 1.0)), "accuracy", ((3, 0.25), (6, 0.75)))
    ]
    # what was committed before there were measurements has none
    assert summary._curves(outcome({"losses": [[1, 2.5]]})) == [Curve("sparse/train", ((1, 2.5),))]
    assert summary._curves(outcome(None)) == []


@pytest.mark.parametrize("measured", [True, False])
def test_the_page_draws_each_training_and_beside_it_what_was_measured(report: RunReport, measured: bool) -> None:
    (curve,) = summary._curves(outcome(HISTORY if measured else {"losses": HISTORY["losses"]}))
    drawn = list(page.curves(dataclasses.replace(report, curves=(curve,))))
    assert [line.of for line in drawn] == ["training loss", *(["validation accuracy"] if measured else [])]
    assert (drawn[0].first, drawn[0].last) == ("2.5", "1")
    whole = dataclasses.replace(report, curves=(curve,))
    text = page.page(whole, page.fingerprint(whole))
    assert "Training loss 2.5 at first, 1 at last." in text
    assert ("Validation accuracy 0.25 at first, 0.75 at last." in text) == measured
