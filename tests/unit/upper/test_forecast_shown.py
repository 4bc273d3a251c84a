"""What `plan` and the report show of predictions: labelled, beside what was measured, whole in JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsify_deploy import cli, console, workspace
from sparsify_deploy.errors import UsageError
from sparsify_deploy.graph.workload import Workload
from sparsify_deploy.prediction.gpus import chosen
from sparsify_deploy.prediction.roofline import LABEL, Layer
from sparsify_deploy.recipe import NM, Quantize, Recipe
from sparsify_deploy.reporting import forecast_tables, tables
from sparsify_deploy.reports import BenchmarkReport, RunReport, dump, load
from sparsify_deploy.stages import predictions
from sparsify_deploy.timing import Race
from sparsify_deploy.types import EngineProfile, LayerTime

Make = Callable[..., Recipe]
Capture = pytest.CaptureFixture[str]
NET = tuple(
    Layer(Workload(f"l{i}", "Linear", 512**2 * 64, 512 * 64, 512 * 64, (512, 512)), True, i % 2 == 0, "why")
    for i in range(12)
)
H100 = "NVIDIA H100 80GB HBM3 sm90"
LABELS = ("2:4 INT8", "dense INT8")


def raced(runtime: str, race: Race) -> BenchmarkReport:
    return BenchmarkReport(runtime, 1, None, (race,))


def test_a_race_on_the_same_gpu_and_batch_stands_beside_its_prediction_alone(
    recipe: Make, race: Callable[..., Race]
) -> None:
    given = recipe(prediction={"gpus": ["a100", "h100"], "batch_sizes": [1, 32]})
    found = raced("tensorrt", race({"dense INT8": 1.2, "2:4 INT8": 1.0}, batch_size=32))
    rows = predictions.rows(given, NET, [found], H100, LABELS)
    measured = {(row.target, row.batch_size): row.measured for row in rows}
    assert measured[("h100", 32)] == pytest.approx((1.2, 1.2 * 0.99, 1.2 * 1.01))
    assert [key for key, value in measured.items() if value is not None] == [("h100", 32)]
    elsewhere = predictions.rows(given, NET, [found], "none", LABELS)
    assert all(row.measured is None for row in elsewhere)


def profiled(found: BenchmarkReport) -> BenchmarkReport:
    layers = tuple(LayerTime(f"fused {i}", (f"/n{i}",), "k", 1.0) for i in range(12))
    return dataclasses.replace(found, profiles={"dense INT8": EngineProfile(layers, 30)})


def test_the_measured_dense_twin_makes_a_row_of_its_own(recipe: Make, race: Callable[..., Race]) -> None:
    net = tuple(
        dataclasses.replace(x, work=dataclasses.replace(x.work, parameter=f"{x.work.name}.weight")) for x in NET
    )
    nodes = {f"l{i}.weight": f"/n{i}" for i in range(12)}
    times = race({"dense INT8": 1.2, "2:4 INT8": 1.0}, batch_size=8)
    found = profiled(raced("tensorrt", times))
    last = predictions.rows(recipe(), net, [found], H100, LABELS, nodes=nodes)[-1]
    assert (last.target, last.batch_size, last.eligible, last.weighted) == (H100, 8, 6, 12)
    assert last.how.startswith(f"from the measured dense engine on {H100}")
    assert (last.share, last.realistic, last.ideal) == pytest.approx((0.5, 1 / (0.5 + 0.5 / 1.3), 1 / 0.75))
    assert last.measured is not None
    assert last.measured[0] == pytest.approx(1.2)
    for other in (raced("tensorrt", times), profiled(raced("openvino", times))):
        rows = predictions.rows(recipe(), net, [other], H100, LABELS, nodes=nodes)
        assert not any("measured dense engine" in row.how for row in rows)
    assert len(predictions.rows(recipe(), net, [found], H100, LABELS)) == len(
        predictions.rows(recipe(), net, [raced("tensorrt", times)], H100, LABELS)
    )


def test_a_runtime_without_sparse_kernels_is_predicted_to_gain_nothing(recipe: Make, race: Callable[..., Race]) -> None:
    found = raced("openvino", race({"dense INT8": 1.0, "2:4 INT8": 1.01}))
    *_, last = predictions.rows(recipe(), NET, [found], H100, LABELS)
    assert (last.target, last.realistic, last.ideal, last.eligible) == ("this CPU, openvino", 1.0, 1.0, None)
    assert "no kernels that skip zeros" in last.how
    assert last.measured is not None
    assert last.measured[0] == pytest.approx(1 / 1.01)
    assert predictions.unskipped(recipe()) == (
        "openvino: 2:4 gains exactly 1.00x over dense INT8: it has no kernels that skip zeros (stated, not measured)",
    )
    assert predictions.unskipped(recipe(deploy=[{"runtime": "tensorrt"}])) == ()
    [untold] = predictions.unskipped(recipe(deploy=[{"runtime": "tensorrt_rtx"}]))
    assert untold == "tensorrt_rtx: does not tell which kernels skip zeros, so nothing is predicted for it"


def test_the_report_keeps_predictions_and_its_table_says_what_was_not_measured(
    report: RunReport, recipe: Make, tmp_path: Path
) -> None:
    whole = dataclasses.replace(report, predictions=predictions.rows(recipe(), NET, report.benchmarks, "none", LABELS))
    path = tmp_path / "report.json"
    path.write_text(dump(whole))
    assert load(RunReport, path).predictions == whole.predictions
    table = forecast_tables.predictions(whole)
    assert [row[:2] for row in table.rows] == [
        ("a100", "1"),
        ("a100", "32"),
        ("h100", "1"),
        ("h100", "32"),
        ("this CPU, openvino", "1"),
    ]
    assert {row[6] for row in table.rows[:4]} == {"not measured here"}
    assert {row[7] for row in table.rows[:4]} == {LABEL}
    assert table.rows[4][4:7] == ("1.00x", "-", "1.00x [0.99, 1.00]")
    assert table.title in [t.title for t in tables.tables(whole)]
    assert not forecast_tables.predictions(report).rows


def forecast_of() -> workspace.Forecast:
    found = predictions.forecasts(NET, chosen(["a10"]), [1, 32])
    return workspace.Forecast((), (), (), 0, found, ("openvino: nothing",), ("mind this",))


def test_a_plan_shows_the_slowest_layers_and_one_line_for_the_rest(capsys: Capture) -> None:
    console.forecast(forecast_of(), as_json=False)
    out = capsys.readouterr().out
    assert f"Slowest layers on a10 at batch 32, {LABEL}" in out
    assert "at batch 1," not in out
    assert "4 more" in out
    assert "6 of 12" in out
    assert "warning: mind this" in out
    assert "openvino: nothing" in out


def test_json_holds_every_layer_of_every_gpu_and_batch(capsys: Capture) -> None:
    console.forecast(forecast_of(), as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["warnings"] == ["mind this"]
    assert found["unskipped"] == ["openvino: nothing"]
    assert found["predicted_gate"] is None
    assert [(one["gpu"], one["batch_size"], len(one["layers"])) for one in found["predicted"]] == [
        ("a10", 1, 12),
        ("a10", 32, 12),
    ]
    one: dict[str, Any] = found["predicted"][1]
    assert one["how"] == LABEL
    assert one["us"].keys() == {"fp32", "fp16", "int8", "realistic", "ideal"}
    assert one["ideal"] == pytest.approx(one["us"]["int8"] / one["us"]["ideal"])
    assert one["realistic_over_fp16"] == pytest.approx(one["us"]["fp16"] / one["us"]["realistic"])
    assert one["layers"][0].keys() == {
        *("name", "op", "shape", "eligible", "reason", "bound", "us", "share", "realistic", "ideal")
    }


def test_gpus_and_batches_of_the_command_line_stand_in_for_the_recipes(recipe_file: Path, capsys: Capture) -> None:
    pytest.importorskip("torch")
    given = ["plan", str(recipe_file), "--run-dir", str(recipe_file.parent / "run"), "--json"]
    assert cli.call([*given, "--gpu", "l4", "--gpu", "h200", "--batch", "8,64"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["gpu"], one["batch_size"]) for one in found["predicted"]] == [
        *(("l4", 8), ("l4", 64), ("h200", 8), ("h200", 64))
    ]
    assert [line.partition(":")[0] for line in found["warnings"][:2]] == ["no nm section", "no quantize section"]
    assert cli.call(given) == 0
    found = json.loads(capsys.readouterr().out)
    assert {one["gpu"] for one in found["predicted"]} == {"a100", "h100"}
    with pytest.raises(UsageError, match="unknown GPU 'h20'"):
        cli.call([*given, "--gpu", "h20"])


def test_predictions_of_a_report_need_neither_torch_nor_onnx_nor_numpy(
    recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"workloads": json.loads(json.dumps([dataclasses.asdict(one) for one in NET]))}
    for name in ("torch", "onnx", "numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    layers = predictions.restored(facts)
    assert layers == NET
    assert len(predictions.rows(recipe(), layers, (), "none", LABELS)) == 4
    assert predictions.restored({}) is None


# -- what a recipe makes of a network ------------------------------------------------------------------------------


def recipe_layers(given: Recipe) -> dict[str, Layer]:
    pytest.importorskip("torch")
    from sparsify_deploy.plan import plan
    from sparsify_deploy.stages.workloads import recipe_layers

    return {one.work.name: one for one in recipe_layers(plan(given).subject, given.nm, given.quantize)}


def test_layers_that_the_recipe_keeps_dense_or_in_float_are_not_counted(recipe: Make) -> None:
    found = recipe_layers(
        recipe(nm={"keep_dense": ["layer1.*"]}, quantize={"keep_float": ["layer2.0.conv1", "fc"]}),
    )
    assert (found["layer1.0.conv1"].int8, found["layer1.0.conv1"].sparse) == (True, False)
    assert "nm.keep_dense" in found["layer1.0.conv1"].reason
    assert (found["layer2.0.conv1"].int8, found["layer2.0.conv1"].sparse) == (False, False)
    assert "keep_float" in found["layer2.0.conv1"].reason
    assert (found["layer3.0.conv1"].int8, found["layer3.0.conv1"].sparse) == (True, True)
    assert found["conv1"].sparse is False
    assert found["conv1"].reason == "C_in 1 is not a multiple of 4"


def test_a_pattern_that_hardware_does_not_skip_gains_nothing(recipe: Make) -> None:
    found = recipe_layers(recipe(nm=NM(pattern="4:8").model_dump(), quantize=Quantize().model_dump()))
    assert not any(one.sparse for one in found.values())
    assert "4:8 is not within 2:4" in found["layer3.0.conv1"].reason
