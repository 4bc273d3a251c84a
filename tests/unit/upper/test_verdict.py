"""The verdict and the gates say what the numbers say, whichever model that favours."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from sparsify_deploy import menu
from sparsify_deploy.reporting.layer_verdict import Known, chain
from sparsify_deploy.reports import SAME_GRAPH, BenchmarkReport, EngineRow, Gate, Row
from sparsify_deploy.timing import LEAST_NOISE, Comparison, Race, claim
from sparsify_deploy.verdict import SPARSE_KERNELS, Evidence, choice, gates, value_of, verdict

Rows = Callable[..., Row]
Races = Callable[..., Race]
Engines = Callable[..., EngineRow]
MakeEvidence = Callable[..., Evidence]

NONE: dict[str, float | None] = {"max_drop": None, "min_speedup": None, "min_sparsity": None}


@pytest.fixture
def evidence(row: Rows, race: Races, engine: Engines) -> MakeEvidence:
    """Evidence from the ms and the metric of dense FP32, dense INT8 and the sparse model; None: not in the race."""

    def make(
        times: Mapping[str, float] | None,
        values: Mapping[str, float],
        *,
        metric: str = "accuracy",
        direction: str = "higher",
        runtime: str = "openvino",
        usable: bool = True,
        engines: tuple[EngineRow, ...] = (),
        spread: float = 0.01,
    ) -> Evidence:
        def line(label: str, step: str) -> Row | None:
            return row(label, step, {metric: values[label]}, usable=usable) if label in values else None

        races = (race(times, spread=spread),) if times else ()
        dense_start = line("dense FP32", "dense/train.report")
        report = BenchmarkReport(runtime, 1, None if times else "no GPU", races)
        return Evidence(
            metric=metric,
            direction=direction,  # type: ignore[arg-type]
            dense_start=dense_start,
            dense=line("dense INT8", "dense/quantize.report") or dense_start,
            sparse=line("2:4 INT8", "sparse/quantize.report"),
            engines=engines,
            benchmarks=(report,),
        )

    return make


EQUAL = {"dense FP32": 0.9, "dense INT8": 0.9, "2:4 INT8": 0.9}


@pytest.mark.parametrize(
    ("times", "shipped"),
    [
        ((3.0, 1.0, 1.0), "dense INT8"),
        ((3.0, 1.0, 0.5), "2:4 INT8"),
        ((1.0, 2.0, 3.0), "dense FP32"),
        ((1.0, 1.0, 1.0), "dense FP32"),
        ((1.0, 0.99, 0.985), "dense FP32"),
        ((3.0, 1.0, 2.0), "dense INT8"),
        ((3.0, 3.0, 1.0), "2:4 INT8"),
        ((1.0, 2.0, 0.5), "2:4 INT8"),
    ],
)
def test_it_ships_the_simplest_model_that_nothing_beats(
    evidence: MakeEvidence, times: tuple[float, ...], shipped: str
) -> None:
    text = verdict(evidence(dict(zip(EQUAL, times, strict=True)), EQUAL), None)
    assert text.startswith(f"Verdict: ship the {shipped} model; ")
    assert "\n" not in text


def test_an_interval_that_holds_one_is_not_faster(evidence: MakeEvidence) -> None:
    found = evidence({"dense FP32": 1.2, "dense INT8": 1.0}, {"dense FP32": 0.9, "dense INT8": 0.9}, spread=0.3)
    text = verdict(found, None)
    assert text.startswith("Verdict: ship the dense FP32 model; ")
    assert "1.20x [0.84, 1.56], within the noise here" in text
    assert "faster" not in text


def test_a_faster_model_below_the_accuracy_gate_is_not_shipped(evidence: MakeEvidence) -> None:
    times = {"dense FP32": 4.0, "dense INT8": 2.0, "2:4 INT8": 1.0}
    values = {"dense FP32": 0.9, "dense INT8": 0.89, "2:4 INT8": 0.8}
    found = evidence(times, values)
    assert verdict(found, 0.02).startswith("Verdict: ship the dense INT8 model")
    assert verdict(found, 0.005).startswith("Verdict: ship the dense FP32 model")
    assert verdict(found, 0.2).startswith("Verdict: ship the 2:4 INT8 model")
    assert verdict(found, None).startswith("Verdict: ship the 2:4 INT8 model")


def test_an_error_metric_is_better_when_it_is_lower(evidence: MakeEvidence) -> None:
    times = {"dense FP32": 4.0, "dense INT8": 2.0, "2:4 INT8": 1.0}
    values = {"dense FP32": 0.5, "dense INT8": 0.4, "2:4 INT8": 0.7}
    found = evidence(times, values, metric="rmse", direction="lower")
    assert verdict(found, 0.1).startswith("Verdict: ship the dense INT8 model")
    assert verdict(found, 0.3).startswith("Verdict: ship the 2:4 INT8 model")
    assert "rmse 0.7000 2:4 INT8, 0.4000 dense INT8, 0.5000 dense FP32." in verdict(found, 0.1)
    (gate,) = gates(found, {**NONE, "max_drop": 0.1})
    assert gate.value == pytest.approx(0.2)
    assert gate.met is False
    (better,) = gates(dataclasses.replace(found, sparse=None), {**NONE, "max_drop": 0.0})
    assert better.value == pytest.approx(-0.1)
    assert better.met is True


def test_the_engines_own_accuracy_decides_where_it_ran(evidence: MakeEvidence, engine: Engines) -> None:
    times = {"dense FP32": 4.0, "dense INT8": 2.0, "2:4 INT8": 1.0}
    engines = (
        engine("dense", None, "tensorrt_rtx"),
        engine("dense", {"accuracy": 0.88}),
        engine("dense", {"accuracy": 0.1}, "onnxruntime"),
        engine("sparse", {"accuracy": 0.7}),
    )
    found = evidence(times, EQUAL, engines=engines)
    assert verdict(found, 0.05).startswith("Verdict: ship the dense INT8 model")
    assert verdict(found, 0.01).startswith("Verdict: ship the dense FP32 model")
    assert "accuracy 0.7000 2:4 INT8, 0.8800 dense INT8, 0.9000 dense FP32." in verdict(found, 0.05)
    (gate,) = gates(found, {**NONE, "max_drop": 0.05})
    assert gate.value == pytest.approx(0.2)
    assert gate.met is False


def test_it_says_what_each_step_bought(evidence: MakeEvidence) -> None:
    text = verdict(evidence({"dense FP32": 3.0, "dense INT8": 1.0, "2:4 INT8": 1.0}, EQUAL), None)
    assert "dense INT8 against dense FP32 is 3.00x [2.97, 3.03], faster here (openvino, batch 1, process CPU time)" in (
        text
    )
    assert "sparsity adds no speed on this runtime (1.00x [0.99, 1.01], within the noise" in text
    assert "openvino has no sparse kernels)" in text
    assert "1 of 1 layers hold 2:4, what that gains on an Ampere or Hopper GPU was not measured here" in text


def test_slower_is_called_slower(evidence: MakeEvidence) -> None:
    text = verdict(evidence({"dense FP32": 1.0, "dense INT8": 2.0, "2:4 INT8": 4.0}, EQUAL), None)
    assert "dense INT8 against dense FP32 is 0.50x [0.49, 0.51], slower here" in text
    assert "sparsity adds no speed on this runtime (0.50x [0.49, 0.51], slower, openvino has" in text


def test_layers_that_hold_no_pattern_are_of_no_use_to_any_hardware(evidence: MakeEvidence) -> None:
    times = {"dense FP32": 3.0, "dense INT8": 1.0, "2:4 INT8": 0.5}
    assert "the sparse model against its dense twin is 2.00x" in verdict(evidence(times, EQUAL), None)
    assert "0 of 1 layers hold 2:4, so no hardware can use it" in verdict(evidence(times, EQUAL, usable=False), None)


def test_a_runtime_with_sparse_kernels_is_not_said_to_have_none(evidence: MakeEvidence) -> None:
    times = {"dense FP32": 3.0, "dense INT8": 1.0, "2:4 INT8": 1.0}
    assert "no sparse kernels" not in verdict(evidence(times, EQUAL, runtime="tensorrt"), None)
    assert set(SPARSE_KERNELS) == set(menu.names("runtimes"))


def test_other_batch_sizes_are_told_and_do_not_decide(evidence: MakeEvidence, race: Races) -> None:
    values = {"dense FP32": 0.9, "dense INT8": 0.9}
    found = evidence({"dense FP32": 3.0, "dense INT8": 1.0}, values)
    slow = race({"dense FP32": 1.0, "dense INT8": 2.0}, batch_size=32)
    (report,) = found.benchmarks
    both = dataclasses.replace(found, benchmarks=(dataclasses.replace(report, races=(*report.races, slow)),))
    text = verdict(both, None)
    assert text.startswith("Verdict: ship the dense INT8 model")
    assert ", 0.50x at batch 32)" in text


def test_without_a_race_there_is_no_verdict_on_latency_and_the_reason_is_told(evidence: MakeEvidence) -> None:
    found = evidence(None, EQUAL)
    assert verdict(found, None).rstrip(".") == (
        "Verdict: none on latency: openvino cannot run here (no GPU); "
        "accuracy 0.9000 2:4 INT8, 0.9000 dense INT8, 0.9000 dense FP32"
    )
    nothing = dataclasses.replace(found, benchmarks=())
    assert "deploys to no runtime, or the run stopped before the benchmark" in verdict(nothing, None)


def test_a_run_without_a_model_has_none() -> None:
    empty = Evidence("accuracy", "higher", None, None, None, (), ())
    assert verdict(empty, None) == "Verdict: none, the run stopped before a final model."
    assert [gate.met for gate in gates(empty, {"max_drop": 0.1, "min_speedup": 2.0, "min_sparsity": 0.5})] == [None] * 3


def test_the_sparse_branch_alone_has_no_twin(evidence: MakeEvidence) -> None:
    found = dataclasses.replace(evidence({"2:4 INT8": 1.0}, {"2:4 INT8": 0.9}), dense=None, dense_start=None)
    text = verdict(found, None)
    assert text == (
        "Verdict: no recommendation, for there is no dense twin whose accuracy is known (dense_branch is off); "
        "accuracy 0.9000 2:4 INT8."
    )
    (gate,) = gates(found, {**NONE, "min_speedup": 1.0})
    assert (gate.value, gate.met) == (None, None)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_drop": 0.02}, ("max_drop", 0.01, True)),
        ({"max_drop": 0.005}, ("max_drop", 0.01, False)),
        ({"max_drop": 0.0}, ("max_drop", 0.01, False)),
        ({"min_speedup": 1.5}, ("min_speedup", 2.0, True)),
        ({"min_speedup": 2.0}, ("min_speedup", 2.0, True)),
        ({"min_speedup": 2.5}, ("min_speedup", 2.0, False)),
        ({"min_sparsity": 0.5}, ("min_sparsity", 0.5, True)),
        ({"min_sparsity": 0.6}, ("min_sparsity", 0.5, False)),
    ],
)
def test_gates_stand_beside_what_was_measured(
    evidence: MakeEvidence, limits: dict[str, float], expected: tuple[Any, ...]
) -> None:
    times = {"dense FP32": 4.0, "dense INT8": 2.0, "2:4 INT8": 1.0}
    found = evidence(times, {"dense FP32": 0.9, "dense INT8": 0.9, "2:4 INT8": 0.89})
    (gate,) = gates(found, {**NONE, **limits})
    assert (gate.name, gate.met) == (expected[0], expected[2])
    assert gate.value == pytest.approx(expected[1])
    assert gate.limit == next(iter(limits.values()))


def test_gates_without_a_race_are_not_measured_and_none_is_left_out(evidence: MakeEvidence) -> None:
    found: dict[str, Gate] = {
        gate.name: gate
        for gate in gates(evidence(None, EQUAL), {"max_drop": 0.1, "min_speedup": 2.0, "min_sparsity": 0.5})
    }
    assert {name: gate.met for name, gate in found.items()} == {
        "max_drop": True,
        "min_speedup": None,
        "min_sparsity": True,
    }
    assert gates(evidence(None, EQUAL), NONE) == ()


def test_where_no_model_holds_the_gate_none_is_shipped(evidence: MakeEvidence) -> None:
    times, values = {"dense INT8": 1.0, "2:4 INT8": 0.5}, {"dense FP32": 0.9, "dense INT8": 0.5, "2:4 INT8": 0.5}
    assert verdict(evidence(times, values), 0.1).startswith("Verdict: no model holds the accuracy gate; ")


@pytest.mark.parametrize("times", [None, {"dense FP32": 1.0, "dense INT8": 1.0, "2:4 INT8": 1.0}])
def test_a_collapsed_layer_is_part_of_the_verdict(evidence: MakeEvidence, times: dict[str, float] | None) -> None:
    found = dataclasses.replace(evidence(times, EQUAL), collapsed=("conv1", "fc"))
    assert verdict(found, None).endswith("; layer collapse: no weight is left in conv1, fc.")


@pytest.mark.parametrize(
    ("times", "value", "max_drop", "shipped"),
    [
        ((3.0, 1.0, 1.0, 1.0), 0.9, None, "dense BF16"),
        ((3.0, 2.0, 1.0, 1.0), 0.9, None, "dense INT8"),
        ((3.0, 2.0, 1.0, 0.5), 0.9, None, "2:4 INT8"),
        ((1.0, 1.0, 1.0, 1.0), 0.9, None, "dense FP32"),
        ((3.0, 1.0, 2.0, 2.0), 0.8, 0.02, "dense INT8"),
        ((3.0, 1.0, 2.0, 2.0), 0.89, 0.02, "dense BF16"),
    ],
)
def test_a_lower_float_precision_is_shipped_where_it_is_the_simplest_that_nothing_beats(
    evidence: MakeEvidence, times: tuple[float, ...], value: float, max_drop: float | None, shipped: str
) -> None:
    labels = ("dense FP32", "dense BF16", "dense INT8", "2:4 INT8")
    found = evidence(dict(zip(labels, times, strict=True)), EQUAL)
    raced = dataclasses.replace(found.benchmarks[0], metrics={"dense BF16": {"accuracy": value}})
    found = dataclasses.replace(found, benchmarks=(raced,))
    assert verdict(found, max_drop).startswith(f"Verdict: ship the {shipped} model; ")
    assert choice(found, max_drop) == shipped


def test_nothing_is_chosen_without_a_race_or_a_twin_or_where_none_holds_the_gate(evidence: MakeEvidence) -> None:
    assert choice(evidence(None, EQUAL), None) is None
    alone = dataclasses.replace(evidence({"2:4 INT8": 1.0}, {"2:4 INT8": 0.9}), dense=None, dense_start=None)
    assert choice(alone, None) is None
    out = evidence({"dense INT8": 1.0}, {"dense FP32": 0.9, "dense INT8": 0.5})
    assert choice(out, 0.1) is None
    assert verdict(out, 0.1).startswith("Verdict: no model holds the accuracy gate")


def test_without_a_twin_the_same_graph_stands_in_and_its_accuracy_is_called_unknown(evidence: MakeEvidence) -> None:
    for ms, said in ((0.5, "against the same graph, dense weights (its accuracy is unknown) is 2.00x"), (1.0, "noise")):
        found = evidence({SAME_GRAPH: 1.0, "2:4 INT8": ms}, {"2:4 INT8": 0.9})
        found = dataclasses.replace(found, dense=None, dense_start=None)
        text = verdict(found, None)
        assert text.startswith("Verdict: no recommendation")
        assert said in text
        assert "its accuracy is unknown" in text
        (gate,) = gates(found, {**NONE, "min_speedup": 1.5})
        assert (gate.value, gate.met) == (pytest.approx(1 / ms), ms == 0.5)
        assert gate.how.startswith("median ratio to the same graph, dense weights")


def test_a_runtime_with_sparse_kernels_is_quoted_on_what_it_picked(evidence: MakeEvidence) -> None:
    times = {"dense FP32": 3.0, "dense INT8": 1.0, "2:4 INT8": 0.5}
    found = evidence(times, EQUAL, runtime="tensorrt")
    assert found.sparse is not None
    assert "the builder did not tell which of them run sparse" in verdict(found, None)
    facts = {"sparse_eligible": ["conv"], "sparse_picked": ["conv"]}
    told = chain("2:4 INT8", found.sparse.model.layers, Known(runtime="tensorrt", facts=facts))
    text = verdict(dataclasses.replace(found, chain=told), None)
    assert "1 of 1 layers hold 2:4, the builder picked sparse kernels for 1" in text
    assert "was not measured here" not in text


def test_where_a_candidates_metric_was_taken_is_said(evidence: MakeEvidence, engine: Engines) -> None:
    found = evidence({"dense FP32": 1.0}, EQUAL, engines=(engine("dense", {"accuracy": 0.7}),))
    raced = dataclasses.replace(found.benchmarks[0], metrics={"dense BF16": {"accuracy": 0.85}})
    found = dataclasses.replace(found, benchmarks=(raced,))
    assert value_of(found, "dense FP32") == (0.9, "all test examples, the same model in torch")
    assert value_of(found, "dense BF16") == (0.85, "all test examples, the engine itself")
    assert value_of(found, "dense INT8") == (0.7, "all test examples, the engine itself")
    assert value_of(found, "2:4 INT8") == (0.9, "all test examples, the same model in torch")


def raced(evidence: Evidence, medians: Mapping[tuple[str, str], tuple[float, float, float]]) -> Evidence:
    """The evidence with the medians and intervals of a real race in place of those that follow from the times."""
    (report,) = evidence.benchmarks
    ours = report.races[0]
    found = {(c.label, c.baseline): c for c in ours.comparisons}
    for (label, baseline), (median, low, high) in medians.items():
        found[label, baseline] = Comparison(label, baseline, median, low, high, claim(median, low, high, LEAST_NOISE))
    changed = dataclasses.replace(ours, comparisons=tuple(found.values()))
    return dataclasses.replace(evidence, benchmarks=(dataclasses.replace(report, races=(changed,)),))


NEAR = {
    ("dense INT8", "dense FP32"): (1.01, 1.00, 1.02),
    ("2:4 INT8", "dense FP32"): (1.025, 1.021, 1.04),
    ("2:4 INT8", "dense INT8"): (1.02, 0.99, 1.03),
}
"""Dense INT8 within the noise of dense FP32, the sparse model beyond that, and within the noise of its twin."""


def test_a_sparse_model_has_to_beat_its_dense_twin_and_not_a_third_model_alone(
    evidence: MakeEvidence,
) -> None:
    times = {"dense FP32": 1.0, "dense INT8": 0.99, "2:4 INT8": 0.975}
    values = {"dense FP32": 0.8278, "dense INT8": 0.8417, "2:4 INT8": 0.8333}
    found = raced(evidence(times, values), NEAR)
    assert found.race is not None
    assert found.race.compare("2:4 INT8", "dense FP32").claim == "faster"
    assert choice(found, 0.01) == choice(found, None) == "dense FP32"
    both = {**NEAR, ("2:4 INT8", "dense INT8"): (1.03, 1.021, 1.04)}
    assert choice(raced(found, both), 0.01) == "2:4 INT8"
    outside = raced(evidence(times, {**values, "dense INT8": 0.75}), NEAR)
    assert choice(outside, 0.05) == "2:4 INT8", "its twin does not hold the gate, and it beats what does"


@pytest.fixture
def tuned(row: Rows, evidence: MakeEvidence) -> MakeEvidence:
    """Evidence whose second dense FP32 model, the fine-tuned one, is as fast as the first."""

    def make(start: float, fine_tuned: float, times: tuple[float, ...], others: float, **keywords: Any) -> Evidence:
        labels = ("dense FP32", "dense FP32, fine-tuned", "dense INT8", "2:4 INT8")
        metric = keywords.get("metric", "accuracy")
        found = evidence(
            dict(zip(labels, times, strict=True)),
            {"dense FP32": start, "dense INT8": others, "2:4 INT8": others},
            **keywords,
        )
        return dataclasses.replace(found, fine_tuned=row(labels[1], "dense/fine_tune.report", {metric: fine_tuned}))

    return make


def test_of_the_two_dense_fp32_models_the_better_one_is_shipped_and_compared_with(tuned: MakeEvidence) -> None:
    slower = (1.0, 0.9, 1.1, 1.1)
    found = tuned(0.3125, 1.0, slower, 0.75)
    assert choice(found, None) == choice(found, 0.01) == "dense FP32, fine-tuned"
    text = verdict(found, None)
    assert text.startswith("Verdict: ship the dense FP32, fine-tuned model; ")
    assert "accuracy 0.7500 2:4 INT8, 0.7500 dense INT8, 1.0000 dense FP32, fine-tuned, 0.3125 dense FP32; " in text
    assert text.endswith("; accuracies are held against dense FP32, fine-tuned, the better of the two in FP32.")
    assert value_of(found, "dense FP32, fine-tuned") == (1.0, "all test examples, the same model in torch")
    (gate,) = gates(found, {**NONE, "max_drop": 0.1})
    assert (gate.value, gate.met) == (pytest.approx(0.25), False)
    assert "than dense FP32, fine-tuned's" in gate.how


@pytest.mark.parametrize(("start", "fine_tuned"), [(0.9, 0.9), (0.9, 0.8)])
def test_a_start_that_fine_tuning_does_not_improve_stays_the_one(
    tuned: MakeEvidence, start: float, fine_tuned: float
) -> None:
    """The fine-tuned one is not shipped for its speed either: a difference between the two is the race's."""
    found = tuned(start, fine_tuned, (1.0, 0.9, 1.1, 1.1), 0.9)
    assert choice(found, None) == "dense FP32"
    assert "held against" not in verdict(found, None)
    (gate,) = gates(found, {**NONE, "max_drop": 0.1})
    assert "than dense FP32's" in gate.how


def test_of_an_error_the_lower_one_is_the_better_dense_fp32(tuned: MakeEvidence) -> None:
    found = tuned(0.6, 0.5, (1.0, 1.0, 1.1, 1.1), 0.55, metric="rmse", direction="lower")
    assert choice(found, None) == "dense FP32, fine-tuned"
    assert choice(tuned(0.5, 0.6, (1.0, 1.0, 1.1, 1.1), 0.55, metric="rmse", direction="lower"), None) == "dense FP32"


def test_the_fine_tuned_model_has_to_be_beaten_by_int8(tuned: MakeEvidence) -> None:
    assert choice(tuned(0.8, 0.9, (1.0, 1.0, 0.5, 0.5), 0.9), 0.01) == "dense INT8"
    assert choice(tuned(0.8, 0.9, (1.0, 1.0, 0.5, 0.5), 0.85), 0.01) == "dense FP32, fine-tuned"


def test_a_network_without_trained_weights_is_not_shipped_beside_its_trained_int8(evidence: MakeEvidence) -> None:
    values = {"dense FP32": 0.3125, "dense INT8": 0.75, "2:4 INT8": 0.7}
    found = evidence({"dense FP32": 1.0, "dense INT8": 1.1, "2:4 INT8": 1.1}, values)
    floats = dataclasses.replace(found.benchmarks[0], metrics={"dense BF16": {"accuracy": 0.3}})
    found = dataclasses.replace(found, benchmarks=(floats,))
    assert choice(found, None) == choice(found, 0.01) == "dense INT8"
    text = verdict(found, None)
    assert "accuracies are held against dense INT8 and nothing in float is shipped" in text
    assert "for dense FP32 was not trained to the end: model.checkpoint, train or nm.fine_tune would train it" in text
    (gate,) = gates(found, {**NONE, "max_drop": 0.01})
    assert (gate.value, gate.met) == (pytest.approx(0.05), False)
    trained = evidence({"dense FP32": 1.0, "dense INT8": 1.1}, {"dense FP32": 0.7, "dense INT8": 0.75})
    assert choice(trained, None) == "dense FP32"
    assert "not trained" not in verdict(trained, None)


def test_a_fine_tuned_model_that_is_the_final_one_is_not_shipped_for_a_speed_it_cannot_have(
    tuned: MakeEvidence,
) -> None:
    found = tuned(0.9, 0.8, (1.0, 0.9, 1.1, 1.1), 0.9)
    found = dataclasses.replace(found, dense=found.fine_tuned, sparse=None)
    assert choice(found, None) == "dense FP32"
    assert choice(dataclasses.replace(found, fine_tuned=None), None) == "dense FP32, fine-tuned"
