"""What a report says of collapsed layers, features and a sparsity near 1, and a dry run of the worst layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsify_deploy import console
from sparsify_deploy.artifacts.store import Record
from sparsify_deploy.pipeline import Outcome
from sparsify_deploy.plan import plan
from sparsify_deploy.recipe import Recipe
from sparsify_deploy.reporting.layer_tables import sensitivity
from sparsify_deploy.reporting.tables import waterfall
from sparsify_deploy.reports import LayerSensitivity, RunReport, Score, SensitivityReport
from sparsify_deploy.stages.project_nm import LayerForecast
from sparsify_deploy.summary import _notes
from sparsify_deploy.workspace import Forecast


def notes(recipe: Callable[..., Recipe], tmp_path: Path, step: str, facts: dict[str, Any]) -> list[str]:
    """What the report says of one step that measured `facts`."""
    (planned,) = [s for s in plan(recipe()).steps if s.id == step]
    record = Record(planned.stage.name, "f" * 64, {}, tmp_path, {}, {}, {}, facts, 1.5, "now")
    return _notes(Outcome(planned, record, True, "first time"))


def test_a_collapse_is_told_once_a_step_and_by_layer(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    before = {"a.weight": 1.0, "b.weight": 1.0}
    levels = [{"step": 3, "densities": {**before, "b.weight": 0.0}}, {"step": 6, "densities": dict.fromkeys(before, 0)}]
    said = [
        "layer collapse: no weight is left in b.weight",
        "layer collapse: no weight is left in a.weight, b.weight",
        "layer collapse: no weight is left in c.weight",
        "another word",
    ]
    history = {"steps": 9, "densities": before, "updates": levels, "notes": said}
    assert notes(recipe, tmp_path, "sparse/train", {"history": history}) == [
        "sparse/train: layer collapse, no weight is left in a, b",
        "sparse/train: layer collapse: no weight is left in c.weight",
        "sparse/train: another word",
    ]
    assert notes(recipe, tmp_path, "sparse/init_mask", {"collapsed": ["spare.weight"]}) == [
        "sparse/init_mask: layer collapse, no weight is left in spare"
    ]


def test_features_have_no_temperature(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    taught = {"temperature": 4.0, "weight": 0.5, "features": ["a", "b"], "relative_flops": 1 / 3}
    (line,) = notes(recipe, tmp_path, "sparse/quantize", {"distillation": taught})
    assert "by the features of a, b, weight 0.5; its forward pass adds 33%" in line


def test_no_magnitude_is_told_where_nothing_was_to_be_permuted(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    facts = {"permuted": 0, "layers": [], "whole": 0.0, "kept_before": 0.0, "kept_after": 0.0, "max_difference": 0.0}
    told = notes(recipe, tmp_path, "sparse/project_nm", {"permutation": facts, "pattern": "2:4"})
    assert told == ["sparse/project_nm: no channels permuted: no layer is to be projected on 2:4"]


def test_a_dry_run_says_that_the_worst_layers_are_not_projected(capsys: pytest.CaptureFixture[str]) -> None:
    layers = (LayerForecast("a", (8, 16), True, "ok"), LayerForecast("b", (8, 16), True, "ok"))
    console.forecast(Forecast((), layers, (), keep_worst_dense=1), as_json=False)
    assert "2 of 2 layers would be projected, less the 1 that lose most when projected alone" in capsys.readouterr().out


@pytest.mark.parametrize(("asked", "shown"), [(0.8, "80%"), (0.9908, "99.08%"), (1 - 0.8**7, "79.03%")])
def test_a_sparsity_asked_is_not_rounded_to_whole_percent(report: RunReport, asked: float, shown: str) -> None:
    rows = tuple(
        dataclasses.replace(row, model=dataclasses.replace(row.model, sparsity_asked=asked)) for row in report.rows
    )
    table = waterfall(dataclasses.replace(report, rows=rows))
    column = table.columns.index("sparsity asked/measured/usable")
    assert {row[column].split(" / ")[0] for row in table.rows} == {shown}


def test_a_layer_not_tried_in_int8_says_why() -> None:
    layers = (
        LayerSensitivity("a", "a.weight", (8, 16), Score(0.8, 0.1, 0.1), 1, "ok", None, "float: kept by the recipe"),
        LayerSensitivity("b", "b.weight", (8, 3), None, None, "C_in 3", Score(0.9, 0.0, 0.0), "Linear"),
    )
    report = SensitivityReport(
        "accuracy", "higher", "train", 40, "2:4", 0.9, 0.5, 0.9, Score(0.9, 0.0, 0.0), "", layers
    )
    assert [row[-1] for row in sensitivity(report).rows] == [
        "not INT8: float: kept by the recipe",
        "not projected: C_in 3",
    ]
    nowhere = dataclasses.replace(report, int8_all=None, baseline_float=None, not_quantized="no tracing")
    assert [row[-1] for row in sensitivity(nowhere).rows] == ["", "not projected: C_in 3"]
