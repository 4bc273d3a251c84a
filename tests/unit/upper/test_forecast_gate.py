"""The gate on what is predicted: a recipe's mistakes about it, what it says, and that nothing runs behind it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparsify_deploy import pipeline, workspace
from sparsify_deploy.errors import CheckFailed
from sparsify_deploy.graph.workload import Workload
from sparsify_deploy.prediction.gpus import chosen
from sparsify_deploy.prediction.roofline import Layer
from sparsify_deploy.recipe import Recipe
from sparsify_deploy.recipe_checks import mistakes
from sparsify_deploy.stages import predictions
from sparsify_deploy.types import Silent

Make = Callable[..., Recipe]
NET = (
    Layer(Workload("big", "Linear", 4096 * 4096 * 64, 4096 * 64, 4096 * 64, (4096, 4096)), True, True, "fits"),
    Layer(Workload("rest", "Softmax", 0, 10**6, 10**6), False, False, "no weight"),
)


@pytest.mark.parametrize(
    ("changes", "path", "says"),
    [
        ({"prediction": {"gpus": ["h10O"]}}, ("prediction", "gpus", 0), "unknown GPU 'h10O'"),
        ({"prediction": {"gpus": ["h100", "h100"]}}, ("prediction", "gpus", 1), "twice"),
        ({"prediction": {"batch_sizes": [1, 1]}}, ("prediction", "batch_sizes"), "twice"),
        (
            {"prediction": {"batch_sizes": [1, 16]}, "gates": {"min_predicted_speedup": 1.1}},
            ("prediction", "batch_sizes"),
            "at least 32",
        ),
        ({"prediction": {"gpus": []}, "gates": {"min_predicted_speedup": 1.1}}, ("prediction", "gpus"), "name one"),
        (
            {"nm": None, "gates": {"min_predicted_speedup": 1.1}},
            ("gates", "min_predicted_speedup"),
            "add an nm section",
        ),
    ],
)
def test_mistakes_about_predictions_name_their_field(
    recipe: Make, changes: dict[str, Any], path: tuple[str | int, ...], says: str
) -> None:
    found = dict(mistakes(recipe(**changes)))
    assert says in found[path]


def test_small_batches_and_no_gpus_are_no_mistake_without_the_gate(recipe: Make) -> None:
    assert not mistakes(recipe(prediction={"gpus": [], "batch_sizes": [1]}))
    assert not mistakes(recipe(gates={"min_predicted_speedup": 1.1}))


def test_the_gate_looks_at_the_ideal_gain_on_the_first_gpu_at_the_largest_batch(recipe: Make) -> None:
    given = recipe(gates={"min_predicted_speedup": 1.1}, prediction={"gpus": ["a10", "h100"], "batch_sizes": [64, 8]})
    found = predictions.gate(given, NET)
    (expected,) = predictions.forecasts(NET, chosen(["a10"]), [64])
    assert found is not None
    assert found.value == expected.gain("ideal") > expected.gain("realistic")
    assert found.met
    assert "a10 at batch 64" in found.how
    predictions.check_gate(given, NET)
    assert predictions.gate(recipe(), NET) is None


def test_a_gate_not_met_says_in_one_line_what_was_predicted_where_and_what_to_do(recipe: Make) -> None:
    given = recipe(gates={"min_predicted_speedup": 3.0})
    with pytest.raises(CheckFailed, match=r"predicted 1\.\d+x < 3x .*on a100 at batch 32.*limited by") as caught:
        predictions.check_gate(given, NET)
    (line,) = caught.value.lines
    assert "rest (" in line
    assert "no weight" in line
    assert "nothing was run: ship dense INT8" in line
    assert caught.value.exit_code == 4


def opened(recipe_file: Path, folder: Path, *changes: str) -> workspace.Workspace:
    return workspace.open_run(recipe_file, ("nm={}", *changes), folder)


def test_a_gate_not_met_stops_a_run_before_its_first_stage_and_leaves_no_folder(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(pipeline, "run", lambda *_, **__: pytest.fail("a stage ran"))
    space = opened(recipe_file, tmp_path / "run", "gates.min_predicted_speedup=1.9")
    with pytest.raises(CheckFailed, match="min_predicted_speedup"):
        space.run(Silent(), device="cpu", checkpoint_every_s=30)
    assert not (tmp_path / "run").exists()


def test_a_finished_export_is_judged_by_its_facts_without_torch(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = opened(recipe_file, tmp_path / "run", "deploy=[{runtime: openvino}]", "gates.min_predicted_speedup=3.0")
    exported = next(step for step in space.plan.steps if step.id == "sparse/export_onnx")

    known: Any = SimpleNamespace(measured={"workloads": [dataclasses.asdict(one) for one in NET]})
    monkeypatch.setattr(pipeline, "survey", lambda *_: [pipeline.Status(exported, "cached", "", known)])
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CheckFailed, match=r"predicted 1\.\d+x < 3x.*rest \("):
        space._check_predicted()


def test_without_the_gate_nothing_is_predicted_before_a_run(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "survey", lambda *_: pytest.fail("the store was read"))
    opened(recipe_file, tmp_path / "run")._check_predicted()
