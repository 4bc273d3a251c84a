"""The verdict on an ONNX file that was given: what of it to ship, and what is not claimed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from sparsify_deploy.reporting.markdown import markdown
from sparsify_deploy.reporting.tables import tables, waterfall
from sparsify_deploy.reports import AS_GIVEN, IN_FLOAT, SAME_GRAPH, BenchmarkReport, RunReport
from sparsify_deploy.summary import _race_notes
from sparsify_deploy.verdict import Evidence, choice, gates, value_of, verdict

BF16 = f"{AS_GIVEN}, in BF16"


@pytest.fixture
def evidence(row: Any, engine: Any, race: Any) -> Any:
    """What is known of a file, by the ms of the race and the accuracy of its variants; None: there were no data."""

    def make(
        times: dict[str, float],
        *,
        accuracy: float | None = 0.9,
        variants: dict[str, float] | None = None,
        usable: bool = False,
        precision: str = "INT8",
    ) -> Evidence:
        known = {"accuracy": accuracy} if accuracy is not None else {}
        given = row(AS_GIVEN, "given/import_onnx", known, usable=usable, precision=precision)
        measured = {label: {"accuracy": value} for label, value in (variants or {}).items()}
        raced = BenchmarkReport("openvino", 1, None, (race(times),), metrics=measured)
        return Evidence(
            metric="accuracy",
            direction="higher",
            dense_start=None,
            dense=None,
            sparse=given if usable else None,
            engines=(engine("given", {"accuracy": accuracy - 0.01} if accuracy is not None else None),),
            benchmarks=(raced,),
            given=given,
        )

    return make


def test_int8_that_is_faster_is_shipped_and_2_4_is_said_to_gain_nothing_here(evidence: Any) -> None:
    found = evidence({IN_FLOAT: 3.0, AS_GIVEN: 1.0, SAME_GRAPH: 1.0}, variants={IN_FLOAT: 0.9}, usable=True)
    assert choice(found, None) == AS_GIVEN
    assert verdict(found, None) == (
        "Verdict: ship the file as given (INT8); as given against same graph without Q/DQ is 3.00x [2.97, 3.03], "
        "faster here (openvino, batch 1, process CPU time); sparsity adds no speed on this runtime (1.00x [0.99, "
        "1.01], within the noise, against the same graph, dense weights (its accuracy is unknown), "
        "openvino has no sparse kernels); 1 of 1 layers hold 2:4, what that gains on an Ampere or Hopper GPU was "
        "not measured here; accuracy 0.8900 as given, 0.9000 same graph without Q/DQ."
    )
    assert value_of(found, AS_GIVEN) == (pytest.approx(0.89), "all test examples, the engine itself")


def test_int8_that_is_slower_is_not_shipped(evidence: Any) -> None:
    found = evidence({IN_FLOAT: 1.0, AS_GIVEN: 4.0}, variants={IN_FLOAT: 0.91})
    assert choice(found, None) == IN_FLOAT
    text = verdict(found, None)
    assert text.startswith("Verdict: ship the same graph without Q/DQ; ")
    assert "0.25x [0.25, 0.25], slower" in text
    assert "0 of 1 layers hold 2:4, so no hardware can skip its zeros" in text


def test_a_lower_precision_has_to_hold_the_gate(evidence: Any) -> None:
    found = evidence({AS_GIVEN: 2.0, BF16: 1.0}, variants={BF16: 0.85}, precision="FP32")
    assert choice(found, None) == BF16
    assert choice(found, 0.02) == AS_GIVEN
    assert choice(found, 0.005) is None
    assert "nothing holds the accuracy gate" in verdict(found, 0.005)
    (gate,) = gates(found, {"max_drop": 0.02})
    assert (gate.value, gate.met) == (pytest.approx(0.01), True)
    assert "the file's in ONNX Runtime" in gate.how


def test_without_data_the_file_is_shipped_though_a_variant_is_faster(evidence: Any) -> None:
    found = evidence({AS_GIVEN: 2.0, BF16: 1.0}, accuracy=None, precision="FP32")
    assert choice(found, None) == AS_GIVEN
    text = verdict(found, None)
    assert text.startswith("Verdict: ship the file as given (FP32); as given, in BF16 against as given is 2.00x")
    assert text.endswith("accuracy was not measured, for the recipe has no data.")
    assert value_of(found, AS_GIVEN) == (None, "not measured: the recipe has no data")


def test_where_nothing_ran_there_is_no_word_on_latency(evidence: Any) -> None:
    found = dataclasses.replace(
        evidence({AS_GIVEN: 1.0}, usable=True), benchmarks=(BenchmarkReport("tensorrt_rtx", 1, "no GPU", ()),)
    )
    assert verdict(found, None) == (
        "Verdict: none on latency: tensorrt_rtx cannot run here (no GPU); 1 of 1 layers hold 2:4; "
        "accuracy 0.8900 as given."
    )
    assert choice(found, None) is None


def test_the_speed_up_gate_is_about_2_4(evidence: Any) -> None:
    sparse = evidence({AS_GIVEN: 1.0, SAME_GRAPH: 1.5}, usable=True)
    dense = evidence({IN_FLOAT: 2.0, AS_GIVEN: 1.0})
    assert [(g.value, g.met) for g in gates(sparse, {"min_speedup": 1.4})] == [(pytest.approx(1.5), True)]
    assert [(g.value, g.met) for g in gates(dense, {"min_speedup": 1.4})] == [(None, None)]


@pytest.fixture
def given_report(report: RunReport, evidence: Any) -> Any:
    def make(found: Evidence) -> RunReport:
        assert found.given is not None
        rows, shown = (found.given,), (found.engines, found.benchmarks)
        return dataclasses.replace(report, rows=rows, engines=shown[0], benchmarks=shown[1], gates=())

    return make


def test_the_table_has_the_file_and_its_variants_and_no_training(given_report: Any, evidence: Any) -> None:
    found = evidence({IN_FLOAT: 3.0, AS_GIVEN: 1.0}, variants={IN_FLOAT: 0.91})
    table = waterfall(given_report(found))
    assert [line[:3] for line in table.rows] == [("as given (INT8)", "0.9000", "0.8900"), (IN_FLOAT, "-", "0.9100")]
    assert [line[-1] for line in table.rows] == ["3.00x [2.97, 3.03]", "1"]
    assert not {"steps", "FLOPs", "train s"} & set(table.columns)
    assert "FLOPs" not in table.how


def test_the_tables_of_a_file_without_data_say_so(given_report: Any, evidence: Any) -> None:
    from sparsify_deploy.reporting.page import fingerprint, page

    found = given_report(evidence({AS_GIVEN: 1.0}, accuracy=None))
    assert [line[1:3] for line in waterfall(found).rows] == [("-", "-")]
    text = markdown(found)
    assert "not measured, the recipe has no data; inputs are drawn" in text
    assert "as given (INT8)" in page(found, fingerprint(found))
    assert tables(found)


def test_a_file_that_onnx_runtime_slows_down_gets_advice(evidence: Any) -> None:
    slow = evidence({IN_FLOAT: 1.0, AS_GIVEN: 4.0})
    (benchmark,) = slow.benchmarks
    engines = [dataclasses.replace(slow.engines[0], runtime="onnxruntime", flavour=AS_GIVEN)]
    (note,) = _race_notes([dataclasses.replace(benchmark, runtime="onnxruntime")], engines)
    assert "0.25x" in note
    assert "flavour onnxruntime on this target" in note
    (other,) = _race_notes([benchmark], engines)
    assert "flavour" not in other
    assert _race_notes(evidence({IN_FLOAT: 4.0, AS_GIVEN: 1.0}).benchmarks, engines) == []
