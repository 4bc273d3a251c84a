"""Reports as text: every number in its cell, and nothing in a cell breaks the table it stands in."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsify_deploy.errors import CorruptArtifact
from sparsify_deploy.reporting.layer_tables import advice, layer_table, layers, sensitivity
from sparsify_deploy.reporting.layer_verdict import Known, chain
from sparsify_deploy.reporting.markdown import markdown
from sparsify_deploy.reporting.table import Table
from sparsify_deploy.reporting.tables import engines, kib, levels, race_table, tables, waterfall
from sparsify_deploy.reports import (
    Gate,
    LayerSensitivity,
    Level,
    Row,
    RunReport,
    Score,
    SensitivityReport,
    Shipped,
    StepRow,
    dump,
    load,
    to_json,
)
from sparsify_deploy.timing import Race
from sparsify_deploy.types import EngineProfile, LayerTime


def cells(table: Table, first: str) -> dict[str, str]:
    (row,) = [row for row in table.rows if row[0] == first]
    return dict(zip(table.columns, row, strict=True))


def test_the_waterfall_shows_what_was_measured(report: RunReport) -> None:
    table = waterfall(report)
    assert cells(table, "dense FP32") == {
        "model": "dense FP32",
        "accuracy": "0.9000",
        "sparsity asked/measured/usable": "- / 0.0% / 0.0%",
        "ONNX": "2 KiB",
        "weights": "36 KiB",
        "p50 / p90 / p99 ms": "3.000 / 3.300 / 3.900",
        "speed-up over dense FP32": "1",
        "steps": "12",
        "FLOPs": "1.00x",
        "train s": "2.0",
    }
    last = cells(table, "2:4 INT8")
    assert last["sparsity asked/measured/usable"] == "60% / 50.0% / 50.0%"
    assert last["weights"] == "22 KiB"
    assert last["speed-up over dense FP32"] == "2.99x [2.96, 3.01]"
    assert (last["steps"], last["FLOPs"], last["train s"]) == ("-", "-", "-")
    assert "Latency: openvino, batch 1, wall time, all models interleaved" in table.how
    assert "all 360 test examples" in table.how


def test_noise_is_called_noise_and_a_model_out_of_the_race_keeps_its_own_latency(
    report: RunReport, race: Callable[..., Race]
) -> None:
    raced = race({"dense FP32": 1.0, "dense INT8": 0.995})
    benchmarks = (dataclasses.replace(report.benchmarks[0], races=(raced,)),)
    table = waterfall(dataclasses.replace(report, benchmarks=benchmarks))
    assert cells(table, "dense INT8")["speed-up over dense FP32"] == "1.01x [0.99, 1.02] (noise)"
    left = cells(table, "2:4 INT8")
    assert (left["speed-up over dense FP32"], left["p50 / p90 / p99 ms"]) == ("-", "1.500 / 1.650 / 1.950")
    alone = waterfall(dataclasses.replace(report, benchmarks=()))
    assert "each model timed alone after its stage" in alone.how
    assert "interleaved" not in alone.how


def test_a_run_without_the_dense_branch_names_no_baseline_that_is_not_there(report: RunReport) -> None:
    assert "None" not in str(waterfall(dataclasses.replace(report, rows=report.rows[2:])))


def test_a_run_without_rows_or_races_still_has_a_report(report: RunReport) -> None:
    empty = dataclasses.replace(report, rows=(), engines=(), benchmarks=(), gates=())
    assert tables(empty) == ()
    assert "Verdict: ship it." in markdown(empty)


def test_gates_say_met_not_met_and_not_measured(report: RunReport) -> None:
    table = tables(report)[-1]
    assert table.title == "Gates"
    assert [row[:4] for row in table.rows] == [
        ("max_drop", "0.05", "0.0200", "met"),
        ("min_speedup", "1.5", "1.0000", "NOT MET"),
        ("min_sparsity", "0.4", "-", "NOT MEASURED"),
    ]


def test_a_race_is_shown_against_its_first_with_the_noise_floor(race: Callable[..., Race]) -> None:
    table = race_table("openvino", race({"slow": 4.0, "fast": 1.0, "same": 4.01}, batch_size=8))
    assert table.title == "openvino, batch 8, 1 thread"
    assert [row[-1] for row in table.rows] == [
        "1",
        "4.00x [3.96, 4.04] faster",
        "1.00x [0.99, 1.01] within the noise",
    ]
    assert cells(table, "fast")["examples/s"] == "8000"
    assert "nothing within 2.0% of 1 is claimed" in table.how


def test_a_floor_beyond_everything_claims_nothing_in_words(race: Callable[..., Race]) -> None:
    loud = dataclasses.replace(race({"a": 1.0, "b": 1.0}), noise=3.663)
    assert race_table("openvino", loud).how.endswith("too loud to claim anything.")


def test_sizes_are_kib_below_a_mib() -> None:
    assert (kib(1536), kib((1 << 20) - 1), kib(1 << 20), kib(5 << 19)) == ("2 KiB", "1024 KiB", "1.00 MiB", "2.50 MiB")


def markdown_tables(text: str) -> list[list[str]]:
    """The lines of each table, cut at the bars that are not escaped."""
    lines = [re.split(r"(?<!\\)\|", line) for line in text.splitlines() if line.startswith("|")]
    found: list[list[list[str]]] = []
    for line in lines:
        if found and len(found[-1]) > 1 and set("".join(line)) <= set("- "):
            last = found[-1].pop()
            found.append([last])
        if not found:
            found.append([])
        found[-1].append(line)
    return [[str(len(line)) for line in table] for table in found]


def test_markdown_rows_have_as_many_cells_as_their_head_whatever_stands_in_them(report: RunReport) -> None:
    odd = dataclasses.replace(report.rows[0], label="a | b")
    bars = dataclasses.replace(report, rows=(odd, *report.rows[1:]), gates=(Gate("a|b", 1.0, None, None, "x | y"),))
    text = markdown(bars)
    assert "| a \\| b |" in text
    assert "| x \\| y |" in text
    for widths in markdown_tables(text):
        assert len(set(widths)) == 1


def test_the_reason_of_a_step_does_not_break_the_table_of_steps(report: RunReport) -> None:
    why = 'settings.data.params.train: "a|b" -> "c|d"'
    text = markdown(dataclasses.replace(report, steps=(StepRow("dense/train", "ran", 2.0, "f" * 64, why),)))
    (line,) = [line for line in text.splitlines() if line.startswith("| dense/train |")]
    assert len(re.split(r"(?<!\\)\|", line)) == 7


def test_markdown_holds_verdict_tables_notes_steps_and_machine(report: RunReport) -> None:
    text = markdown(report)
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings[0] == "# full"
    assert headings[-3:] == ["## Notes", "## Steps", "## Machine"]
    assert "- a note" in text
    assert "- packages: torch 2, onnx 1" in text
    assert "| dense/train | ran | 2.0 | ffffffffffff | first time |" in text


def test_a_report_survives_json_and_a_broken_one_is_said_to_be(report: RunReport, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(dump(report), encoding="utf-8")
    assert load(RunReport, path) == report
    assert '"usable_sparsity": 0.5' in path.read_text(encoding="utf-8")
    path.write_text(dump(report)[:-20], encoding="utf-8")
    with pytest.raises(CorruptArtifact, match=r"report\.json: cannot be read \(Invalid JSON: EOF"):
        load(RunReport, path)
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(CorruptArtifact, match=r"\(recipe: Field required\): `run` writes it again"):
        load(RunReport, path)


def test_sparsity_weighs_layers_by_their_weights(row: Callable[..., Row]) -> None:
    first = row("x INT8", "s", {"accuracy": 1.0}, usable=True).model
    (layer,) = first.layers
    small = dataclasses.replace(layer, weights=36864 // 3, zeros=0, usable=False, bytes_compressed=100)
    model = dataclasses.replace(first, layers=(layer, small))
    assert model.sparsity == pytest.approx(18432 / (36864 * 4 / 3))
    assert model.usable_sparsity == pytest.approx(0.5 * 3 / 4)
    assert model.bytes_compressed == 23140
    assert dataclasses.replace(model, layers=()).sparsity == 0.0


def lost(layer: str, rank: int | None, projected: float | None, quantized: float | None = 0.0) -> LayerSensitivity:
    """A layer that loses so much of the metric, and ten times as much in loss, projected and quantised."""
    scores = [None if d is None else Score(0.9 - d, d, 10 * d) for d in (projected, quantized)]
    return LayerSensitivity(layer, f"{layer}.weight", (8, 16), scores[0], rank, "a|reason", scores[1], "rule")


@pytest.fixture
def measured() -> SensitivityReport:
    """Four layers in module order: one that is not projected, the second worst, the worst, one that loses nothing."""
    layers = (lost("a", None, None, 0.3), lost("b", 2, 0.1), lost("c", 1, 0.25, 0.4), lost("d", 3, 0.0, None))
    whole = Score(0.5, 0.4, 1.0)
    return SensitivityReport("accuracy", "higher", "train", 40, "2:4", 0.9, 0.5, 0.875, whole, "", layers)


def test_layers_are_shown_worst_first_with_both_losses(measured: SensitivityReport) -> None:
    table = sensitivity(measured)
    assert [row[:3] for row in table.rows] == [
        ("1", "c", "8x16"),
        ("2", "b", "8x16"),
        ("3", "d", "8x16"),
        ("-", "a", "8x16"),
    ]
    assert cells(table, "1") == {
        "rank": "1",
        "layer": "c",
        "shape": "8x16",
        "accuracy, 2:4 alone": "0.6500",
        "drop / loss up": "+0.2500 / +2.5000",
        "accuracy, INT8 alone": "0.5000",
        "INT8 drop / loss up": "+0.4000 / +4.0000",
        "note": "",
    }
    assert table.rows[-1][3:5] == ("-", "-")
    assert table.rows[-1][-1] == "not projected: a|reason"
    assert table.rows[2][5:7] == ("-", "-")
    for text in (
        "accuracy 0.9000",
        "40 train examples without augmentation",
        "no refill",
        "(0.8750)",
        "at once: 0.5000",
    ):
        assert text in table.how
    assert table.how.endswith(" ".join(advice(measured)))


def test_advice_names_the_layers_that_lose_and_no_others(measured: SensitivityReport) -> None:
    assert advice(measured)[:2] == (
        "To keep the worst dense: nm.keep_worst_dense: 2, or nm.keep_dense: [c, b].",
        "To keep the worst in float: quantize.keep_float: [c, a].",
    )
    assert advice(measured, most=1)[0] == "To keep the worst dense: nm.keep_worst_dense: 1, or nm.keep_dense: [c]."
    calm = dataclasses.replace(measured, layers=(lost("b", 2, -0.1), lost("c", 1, 0.0)))
    assert advice(calm)[:2] == (
        "No layer alone loses by projection, so none asks to be kept dense.",
        "No layer alone loses by INT8.",
    )
    # One example more or less that leaves the loss where it was is no reason to keep a layer dense.
    noise = dataclasses.replace(calm.layers[1], projected=Score(0.899, 0.001, 0.004))
    assert "nm.keep_worst_dense" not in str(advice(dataclasses.replace(calm, layers=(noise,))))


def test_a_network_without_int8_says_why_in_the_place_of_its_numbers(measured: SensitivityReport) -> None:
    layers = tuple(dataclasses.replace(row, quantized=None) for row in measured.layers)
    none = dataclasses.replace(
        measured, int8_all=None, baseline_float=None, not_quantized="cannot be traced", layers=layers
    )
    table = sensitivity(none)
    assert "INT8 was not measured: cannot be traced." in table.how
    assert "None" not in str(table)
    assert "quantize.keep_float" not in table.how


def test_a_report_with_a_sensitivity_has_its_table_and_survives_json(
    report: RunReport, measured: SensitivityReport, tmp_path: Path
) -> None:
    assert "Sensitivity of the layers" not in [table.title for table in tables(report)]
    whole = dataclasses.replace(report, sensitivity=measured)
    assert [table.title for table in tables(whole)][-2:] == ["Sensitivity of the layers", "Gates"]
    assert "not projected: a\\|reason" in markdown(whole)
    path = tmp_path / "report.json"
    path.write_text(dump(whole), encoding="utf-8")
    assert load(RunReport, path) == whole
    older = to_json(whole)
    del older["sensitivity"]
    path.write_text(json.dumps(older), encoding="utf-8")
    assert load(RunReport, path) == report


def test_levels_are_a_table_a_step_with_a_row_a_level(report: RunReport) -> None:
    fits = (
        Level("sparse/train", "0", 1.0, {"accuracy": 0.9}, 0, 12, 2.5),
        Level("sparse/train", "1", 0.8, {"accuracy": 0.85}, 3, 9, 1.5),
        Level("sparse/project_nm", "2:4", 0.5, {}, 0, 3, 0.25),
    )
    tickets, way = levels(dataclasses.replace(report, levels=fits))
    assert tickets.title == "Levels of sparse/train"
    assert tickets.rows == (("0", "1.0000", "0.9000", "0", "12", "2.5"), ("1", "0.8000", "0.8500", "3", "9", "1.5"))
    assert way.columns == ("level", "density", "from step", "steps", "train s")
    assert way.rows == (("2:4", "0.5000", "0", "3", "0.2"),)
    assert levels(report) == ()
    assert "Levels of sparse/train" in [t.title for t in tables(dataclasses.replace(report, levels=fits))]


def test_the_waterfall_says_what_a_flop_is(report: RunReport) -> None:
    how = waterfall(report).how
    assert "FLOPs (2 x MACs" in how
    assert "train s is the time it took" in how


def chained(report: RunReport, **known: object) -> Table:
    return layer_table(chain("2:4 INT8", report.rows[-1].model.layers, Known(**known), "dense INT8"))  # type: ignore[arg-type]


def test_a_layer_shows_the_whole_chain_and_both_times(report: RunReport) -> None:
    times = EngineProfile((LayerTime("conv", ("conv",), "brgconv", 0.5),), 60, "how it was averaged")
    table = chained(report, runtime="openvino", dense=times, sparse=times, batch_size=8)
    assert cells(table, "conv") == {
        "layer": "conv",
        "shape": "64x64x3x3",
        "2:4": "held",
        "shape rule": "yes",
        "INT8 in / out": "yes / no",
        "eligible / picked": "not told / no",
        "kernel": "brgconv",
        "dense / sparse ms": "0.5000 / 0.5000",
        "why": "output is not quantised: it is read in FP16 or FP32",
        "advice": "put Q/DQ behind it",
    }
    assert table.title == "What ran sparse, layer by layer: 2:4 INT8 in OpenVINO: 0 of 1; 1 of 1 hold 2:4"
    for text in (
        "whether hardware could use it",
        "for it has none",
        "dense INT8 / 2:4 INT8, profiler on, wall time, batch 8, mean over 60 runs",
        "no speed-up is claimed",
        "how it was averaged",
    ):
        assert text in table.how


def test_what_nobody_told_is_not_told_and_what_was_not_timed_has_no_column(report: RunReport) -> None:
    table = chained(report, runtime="tensorrt_rtx", facts={"sparse_verdict": "no verdict from this build"})
    assert cells(table, "conv")["eligible / picked"] == "not told / not told"
    assert "TensorRT-RTX: not told;" in table.title
    assert not [column for column in table.columns if "ms" in column]
    assert "no verdict from this build" in table.how
    assert "profiler" not in table.how
    assert "for it has none" not in table.how
    alone = chained(report)
    assert not {"eligible / picked", "kernel"} & {*alone.columns}
    assert "builder" not in alone.how


def test_a_builder_that_picked_is_counted(report: RunReport) -> None:
    facts = {"sparse_eligible": ["conv"], "sparse_picked": ["conv"]}
    table = chained(report, runtime="tensorrt", facts=facts)
    assert cells(table, "conv")["eligible / picked"] == "yes / yes"
    assert "TensorRT: 1 of 1; 1 of 1 hold 2:4" in table.title
    assert "the word of TensorRT's builder" in table.how


def test_the_first_runtimes_chain_is_shown_and_those_of_runtimes_with_sparse_kernels(report: RunReport) -> None:
    rows = report.rows[-1].model.layers
    chains = tuple(chain("m", rows, Known(runtime=name)) for name in ("openvino", "onnxruntime", "tensorrt"))
    found = layers(dataclasses.replace(report, chains=chains))
    assert [table.title.split(" in ")[1].split(":")[0] for table in found] == ["OpenVINO", "TensorRT"]
    assert found[-1].how.endswith("The same for ONNX Runtime stands in report.json.")


def test_the_chain_survives_json_and_is_in_the_markdown(report: RunReport, tmp_path: Path) -> None:
    whole = dataclasses.replace(
        report,
        chains=(chain("2:4 INT8", report.rows[-1].model.layers, Known(runtime="openvino")),),
        shipped=Shipped("dense INT8", "openvino", ("model.xml",), 0.89, "how"),
    )
    path = tmp_path / "report.json"
    path.write_text(dump(whole), encoding="utf-8")
    assert load(RunReport, path) == whole
    assert "## What ran sparse, layer by layer" in markdown(whole)


def test_the_engines_say_what_deploy_holds(report: RunReport) -> None:
    assert "there is no deploy/, for the verdict recommends no model" in engines(report).how
    shipped = Shipped("dense INT8", "openvino", ("model.xml",), 0.89, "how")
    assert (
        "deploy/ holds what the verdict ships: dense INT8 for openvino."
        in engines(dataclasses.replace(report, shipped=shipped)).how
    )
