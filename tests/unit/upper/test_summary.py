"""Outcomes become the report, and the run directory's files."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sparsify_deploy.artifacts.digests import DigestCache
from sparsify_deploy.artifacts.fingerprint import file_digest
from sparsify_deploy.artifacts.store import Record
from sparsify_deploy.errors import DataError
from sparsify_deploy.pipeline import Outcome
from sparsify_deploy.plan import Plan, plan
from sparsify_deploy.recipe import Recipe
from sparsify_deploy.reports import (
    SAME_GRAPH,
    BenchmarkReport,
    Gate,
    LayerSensitivity,
    Level,
    Row,
    RunReport,
    Score,
    SensitivityReport,
    dump,
)
from sparsify_deploy.summary import publish, summarise
from sparsify_deploy.timing import Race
from sparsify_deploy.types import EngineProfile, LayerTime
from sparsify_deploy.workspace import exit_code, read_report

Make = Callable[..., Recipe]
Races = Callable[..., Race]
LEFT_OUT = ("benchmark/openvino: x not raced: no BF16",)
TRAINED = {"history": {"steps": 12}, "cost": {"relative_training_flops": 0.5, "train_s": 2.25}}


@pytest.fixture
def outcomes(tmp_path: Path, row: Callable[..., Row], race: Races) -> Callable[..., list[Outcome]]:
    """The outcomes of a plan as if each step had run: reports, races and engines are there as files."""

    def make(
        found: Plan, times: Mapping[str, float] | None = None, facts: Mapping[str, Mapping[str, Any]] | None = None
    ) -> list[Outcome]:
        made = []
        for step in found.steps:
            folder = tmp_path / "store" / step.id.replace("/", ".")
            folder.mkdir(parents=True, exist_ok=True)
            outputs = {name: folder / file for name, file in step.stage.outputs.items()}
            measured: dict[str, Any] = dict((facts or {}).get(step.id, {}))
            if step.stage.name == "measure":
                outputs["report"].write_text(dump(row(step.label, step.id, {"accuracy": 0.9, "loss": 0.5}).model))
                outputs["measured_onnx"].write_text(f"onnx of {step.id}")
            elif step.stage.name == "benchmark":
                variants = step.stage.variants  # type: ignore[attr-defined]
                labels = [variant.label for variant in variants]
                taken = race({label: (times or {}).get(label, 1.0) for label in labels})
                found_metrics = {v.label: {"accuracy": 0.895} for v in variants if v.kind == "lower_precision"}
                layer = LayerTime("conv + relu", ("conv",), "jit", 0.25)
                profiles = {v.label: EngineProfile((layer,), 60) for v in variants if v.kind != "onnx"}
                report = BenchmarkReport(
                    step.id.partition("/")[2], 1, None, (taken,), found_metrics, {"x": "no BF16"}, profiles
                )
                outputs["benchmark"].write_text(dump(report))
                for variant in variants:
                    if variant.kept:
                        folder_of = outputs["raced"] / variant.folder
                        folder_of.mkdir(parents=True, exist_ok=True)
                        (folder_of / "model.xml").write_text(f"<net>{variant.label}</net>")
            elif step.stage.name.startswith("export_onnx"):
                outputs["onnx"].write_text(f"onnx of {step.id}")
            elif step.stage.name == "build_engine":
                outputs["engine"].mkdir(exist_ok=True)
                outputs["preprocessing"].mkdir(exist_ok=True)
                (outputs["engine"] / "model.xml").write_text(f"<net>{step.id}</net>")
                built = {"version": "1.0", "label": "", "files": ["model.xml"], "facts": {}}
                layers = [dataclasses.asdict(one) for one in row("x INT8", "s", {}, usable=True).model.layers]
                measured |= {"bytes": 7, "build": built, "metrics": {"accuracy": 0.88}, "file_layers": layers}
                measured["preprocessing"] = {"own": "nobody says how"}
            digests = {n: file_digest(p) if p.exists() else "0" * 64 for n, p in outputs.items()}
            record = Record(step.stage.name, "f" * 64, {}, folder, outputs, digests, {}, measured, 1.5, "now")
            made.append(Outcome(step, record, True, "first time"))
        return made

    return make


def test_rows_take_their_cost_from_the_step_they_follow(recipe: Make, outcomes: Callable[..., list[Outcome]]) -> None:
    found = plan(recipe())
    report = summarise(found, outcomes(found, facts={"sparse/train": TRAINED}), None)
    assert [r.step for r in report.rows] == list(found.rows)
    by_label = {r.label: r for r in report.rows}
    trained = by_label["sparse FP32"]
    assert (trained.optimizer_steps, trained.flops, trained.train_s) == (12, 0.5, 2.25)
    assert (by_label["dense FP32"].flops, by_label["dense FP32"].train_s) == (None, None)
    assert (report.metric, report.direction) == ("accuracy", "higher")
    assert {(e.branch, e.runtime) for e in report.engines} == {("dense", "openvino"), ("sparse", "openvino")}
    assert report.engines[0].file == "engines/dense/openvino/model.xml"
    assert [s.state for s in report.steps] == ["ran"] * len(found.steps)
    assert report.verdict.startswith("Verdict: ship the dense FP32 model")


def test_the_short_routes_row_has_no_training(recipe: Make, outcomes: Callable[..., list[Outcome]]) -> None:
    found = plan(recipe(init=None, train=None, nm=None, quantize=None, sparsity=None))
    (only,) = summarise(found, outcomes(found), None).rows
    assert (only.optimizer_steps, only.flops, only.train_s) == (None, None, None)


def test_gates_are_judged_at_the_end_of_a_whole_run_alone(recipe: Make, outcomes: Callable[..., list[Outcome]]) -> None:
    found = plan(recipe(gates={"metric": "accuracy", "max_drop": 0.1, "min_sparsity": 0.9}))
    made = outcomes(found)
    stopped = summarise(found, made, "sparse/train")
    assert (stopped.gates, exit_code(stopped)) == ((), 0)
    whole = summarise(found, made, None)
    assert [(gate.name, gate.met) for gate in whole.gates] == [("max_drop", True), ("min_sparsity", False)]
    assert exit_code(whole) == 4


@pytest.mark.parametrize(("met", "code"), [((True, True), 0), ((True, False), 4), ((None, True), 4), ((), 0)])
def test_a_gate_not_met_or_not_measured_is_exit_4(report: RunReport, met: tuple[bool | None, ...], code: int) -> None:
    import dataclasses

    gates = tuple(Gate("g", 1.0, None, one, "how") for one in met)
    assert exit_code(dataclasses.replace(report, gates=gates)) == code


def test_what_was_left_out_is_noted_with_its_reason(recipe: Make, outcomes: Callable[..., list[Outcome]]) -> None:
    found = plan(recipe())
    facts = {
        "sparse/init_mask": {"collapsed": ["fc"], "kept_dense": ["conv1"]},
        "sparse/project_nm": {
            "pattern": "2:4",
            "projected": 1,
            "layers": [
                {"layer": "a", "projected": True, "reason": ""},
                {"layer": "b", "projected": False, "reason": "C_in 3"},
            ],
        },
        "sparse/quantize": {"placement": [{"name": "fc", "quantised": False, "rule": "kept float"}]},
        "sparse/build_engine.openvino": {"not_run": "no GPU"},
    }
    notes = summarise(found, outcomes(found, facts=facts), None).notes
    assert notes == (
        "sparse/init_mask: layer collapse, no weight is left in fc",
        "sparse/init_mask: kept dense by the recipe: conv1",
        "sparse/project_nm: 1 of 2 layers projected on 2:4",
        "sparse/project_nm: b not projected: C_in 3",
        "sparse/quantize: fc not quantised: kept float",
        "sparse/build_engine.openvino: not run here: no GPU",
        *LEFT_OUT,
    )


def test_the_sensitivity_of_the_layers_is_in_the_report_where_it_was_measured(
    recipe: Make, outcomes: Callable[..., list[Outcome]]
) -> None:
    asked = plan(recipe(), sensitivity=True)
    made = outcomes(asked)
    (step,) = [o for o in made if o.step.stage.name == "sensitivity"]
    row = LayerSensitivity("fc", "fc.weight", (8, 16), Score(0.5, 0.25, 1.0), 1, "", None, "why")
    found = SensitivityReport("accuracy", "higher", "train", 40, "2:4", 0.75, 0.5, None, None, "why", (row,))
    step.record.outputs["sensitivity"].write_text(dump(found))
    assert summarise(asked, made, None).sensitivity == found
    assert summarise(asked, [o for o in made if o is not step], None).sensitivity is None


def test_what_permuting_won_is_noted_with_the_layers_it_left(
    recipe: Make, outcomes: Callable[..., list[Outcome]]
) -> None:
    found = plan(recipe())
    rows = [
        {"layer": "a", "permuted": True, "reason": ""},
        {"layer": "b", "permuted": False, "reason": "its input is read by a view"},
    ]
    won = {"permuted": 1, "whole": 200.0, "kept_before": 150.0, "kept_after": 155.5, "max_difference": 2e-15}
    facts = {"pattern": "2:4", "permutation": {**won, "layers": rows, "groups": []}}
    assert summarise(found, outcomes(found, facts={"sparse/project_nm": facts}), None).notes == (
        "sparse/project_nm: channels of 1 of 2 layers permuted: 2:4 keeps 77.75% of their L1 magnitude, without "
        "75.00%; outputs differ by 2.0e-15 in float64",
        "sparse/project_nm: b not permuted: its input is read by a view",
        *LEFT_OUT,
    )


LEVELS = [
    {"label": "train.level-0", "density": 1.0, "metrics": {"accuracy": 0.9}, "start": 0, "steps": 12, "train_s": 2.5},
    {"label": "train.level-1", "density": 0.8, "metrics": {"accuracy": 0.8}, "start": 3, "steps": 9, "train_s": 1.5},
]


def test_the_levels_of_a_step_that_trains_several_times_are_in_the_report(
    recipe: Make, outcomes: Callable[..., list[Outcome]]
) -> None:
    found = plan(recipe())
    cost = {"relative_training_flops": 1.6, "train_s": 4.25, "cpu_s": 4.0}
    facts = {"sparse/train": {"history": {"steps": 21, "levels": LEVELS}, "cost": cost}}
    report = summarise(found, outcomes(found, facts=facts), None)
    assert report.levels == (
        Level("sparse/train", "0", 1.0, {"accuracy": 0.9}, 0, 12, 2.5),
        Level("sparse/train", "1", 0.8, {"accuracy": 0.8}, 3, 9, 1.5),
    )
    (trained,) = [r for r in report.rows if r.label == "sparse FP32"]
    assert (trained.optimizer_steps, trained.flops, trained.train_s) == (21, 1.6, 4.25)
    facts = {"sparse/project_nm": {"via": [{"pattern": "4:8"}], "pattern": "2:4", "history": {"levels": LEVELS}}}
    facts["sparse/project_nm"]["history"]["steps"] = 21
    report = summarise(found, outcomes(found, facts=facts), None)
    assert [(level.step, level.name) for level in report.levels] == [
        ("sparse/project_nm", "4:8"),
        ("sparse/project_nm", "2:4"),
    ]


def test_a_layer_that_training_emptied_is_named_in_the_notes_and_in_the_verdict(
    recipe: Make, outcomes: Callable[..., list[Outcome]]
) -> None:
    found = plan(recipe())
    before = {"conv1.weight": 0.5, "fc.weight": 0.5, "gone.weight": 0.0}
    first = {"step": 3, "densities": {**before, "conv1.weight": 0.0}}
    last = {"step": 6, "densities": {**before, "fc.weight": 0.0}}
    history = {"steps": 12, "densities": before, "updates": [first, last]}
    report = summarise(found, outcomes(found, facts={"sparse/train": {"history": history}}), None)
    assert report.notes == ("sparse/train: layer collapse, no weight is left in fc", *LEFT_OUT)
    assert "fc" in report.verdict
    history["updates"] = [first, {**last, "densities": before}]
    assert summarise(found, outcomes(found, facts={"sparse/train": {"history": history}}), None).notes == LEFT_OUT


def test_a_teacher_a_pattern_that_does_not_fit_and_a_fits_own_words_are_noted(
    recipe: Make, outcomes: Callable[..., list[Outcome]]
) -> None:
    found = plan(recipe())
    taught = {"temperature": 4.0, "weight": 0.9, "features": [], "relative_flops": 1 / 3}
    facts = {
        "sparse/init_mask": {"no_pattern": {"conv1": "C_in 1 is not a multiple of 4"}},
        "sparse/project_nm": {"distillation": taught},
        "sparse/quantize": {
            "distillation": {**taught, "features": ["layer1", "layer2"]},
            "history": {"steps": 4, "notes": ["fp16: gradients overflowed"]},
        },
    }
    assert summarise(found, outcomes(found, facts=facts), None).notes == (
        "sparse/init_mask: conv1 stays dense: C_in 1 is not a multiple of 4",
        "sparse/project_nm: distilled from a dense teacher by logits, temperature 4, weight 0.9; its forward pass adds "
        "33% of a dense step, which the FLOPs leave out",
        "sparse/quantize: distilled from a dense teacher by the features of layer1, layer2, weight 0.9; "
        "its forward pass adds 33% of a dense step, which the FLOPs leave out",
        "sparse/quantize: fp16: gradients overflowed",
        *LEFT_OUT,
    )


def test_int8_that_is_slower_is_noted(recipe: Make, outcomes: Callable[..., list[Outcome]]) -> None:
    foreign = {"runtime": "onnxruntime", "flavour": "tensorrt"}
    found = plan(recipe(deploy=[{"runtime": "openvino"}, foreign]))
    times, facts = {"dense INT8": 2.0, "2:4 INT8": 0.5}, {"dense/export_onnx": {"flavour": "tensorrt"}}
    report = summarise(found, outcomes(found, times, facts=facts), None)
    assert {(e.branch, e.flavour) for e in report.engines} == {("dense", "tensorrt"), ("sparse", "none")}
    notes = report.notes
    assert notes == (
        *LEFT_OUT,
        "benchmark/openvino: dense INT8 is slower than dense FP32 at batch 1 (0.50x)",
        "benchmark/onnxruntime: x not raced: no BF16",
        "benchmark/onnxruntime: dense INT8 is 0.50x of dense FP32 at batch 1, slower: this file's Q/DQ is placed for "
        "TensorRT and OpenVINO",
    )


def test_a_slow_engine_of_onnx_runtimes_own_flavour_is_not_put_down_to_the_other(
    recipe: Make, outcomes: Callable[..., list[Outcome]]
) -> None:
    found = plan(recipe(deploy=[{"runtime": "onnxruntime"}]))
    facts = {"dense/export_onnx.onnxruntime": {"flavour": "onnxruntime"}}
    report = summarise(found, outcomes(found, {"dense INT8": 2.0}, facts=facts), None)
    assert [e.flavour for e in report.engines if e.branch == "dense"] == ["onnxruntime"]
    assert "benchmark/onnxruntime: dense INT8 is slower than dense FP32 at batch 1 (0.50x)" in report.notes
    assert "TensorRT and OpenVINO" not in " ".join(report.notes)


def test_without_a_dense_branch_the_race_is_against_the_same_graph(
    recipe: Make, outcomes: Callable[..., list[Outcome]]
) -> None:
    found = plan(recipe(dense_branch=False, deploy=[{"runtime": "openvino"}, {"runtime": "onnxruntime"}]))
    report = summarise(found, outcomes(found, {"2:4 INT8": 2.0, SAME_GRAPH: 1.0}), None)
    assert report.benchmarks[1].races[0].labels == (SAME_GRAPH, "2:4 INT8")
    assert "x of dense" not in " ".join(report.notes)
    assert "against the same graph, dense weights (its accuracy is unknown)" in report.verdict
    assert report.shipped is None
    assert [chain.twin for chain in report.chains] == [SAME_GRAPH, SAME_GRAPH]


def test_publishing_writes_reports_recipe_and_engines_and_leaves_what_is_the_same(
    recipe: Make, outcomes: Callable[..., list[Outcome]], recipe_file: Path, tmp_path: Path
) -> None:
    found = plan(recipe())
    made = outcomes(found)
    report = summarise(found, made, None)
    run, digests = tmp_path / "run", DigestCache(tmp_path / "digests.json")
    publish(run, report, made, recipe_file, digests)
    assert read_report(run) == report
    assert report.verdict in (run / "report.md").read_text()
    assert (run / "recipe.yaml").read_text() == recipe_file.read_text()
    engine = run / "engines" / "dense" / "openvino" / "model.xml"
    assert engine.read_text() == "<net>dense/build_engine.openvino</net>"
    onnx = run / "onnx" / "sparse" / "model.onnx"
    assert onnx.read_text() == "onnx of sparse/export_onnx"
    inode = engine.stat().st_ino
    publish(run, report, made, recipe_file, digests)
    assert engine.stat().st_ino == inode
    engine.write_text("tampered")
    onnx.write_text("tampered")
    (engine.parent / "stale").write_text("x")
    publish(run, report, made, recipe_file, digests)
    assert engine.read_text() == "<net>dense/build_engine.openvino</net>"
    assert onnx.read_text() == "onnx of sparse/export_onnx"
    assert not (engine.parent / "stale").exists()
    assert not list(run.rglob("*.partial"))


def test_what_another_recipe_left_goes(
    recipe: Make, outcomes: Callable[..., list[Outcome]], recipe_file: Path, tmp_path: Path
) -> None:
    found = plan(recipe())
    made = outcomes(found)
    run, digests = tmp_path / "run", DigestCache(tmp_path / "digests.json")
    for stale in ("engines/dense/onnxruntime/model.onnx", "onnx/sparse/model.onnxruntime.onnx", "deploy.discarded/x"):
        (run / stale).parent.mkdir(parents=True)
        (run / stale).write_text("of another recipe, or of a run that was killed")
    (run / "deploy.partial").mkdir()
    publish(run, summarise(found, made, None), made, recipe_file, digests)
    assert {path.name for path in run.glob("engines/*/*")} == {"openvino"}
    assert {path.name for path in run.glob("onnx/*/*")} == {"model.onnx"}
    assert not [*run.glob("deploy.*")]
    publish(run, summarise(found, [], "sparse/train"), [], recipe_file, digests)
    assert not [path for path in run.glob("*/**/*") if path.is_file()]


def test_a_folder_without_a_report_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"report\.json: no report: name a run directory"):
        read_report(tmp_path)


def test_the_report_is_strict_json(recipe: Make, outcomes: Callable[..., list[Outcome]]) -> None:
    found = plan(recipe())
    text = dump(summarise(found, outcomes(found), None))
    assert json.loads(text, parse_constant=pytest.fail)["recipe"] == "full"


def shipped(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "deploy" / "deploy.json").read_text())
    return found


@pytest.mark.parametrize(
    ("times", "label", "engine", "onnx", "value"),
    [
        ({"dense FP32": 1.0, "dense BF16": 1.0}, "dense FP32", "dense FP32", "dense/train.report", 0.9),
        ({"dense FP32": 3.0, "dense BF16": 1.0}, "dense BF16", "dense BF16", "dense/fine_tune.report", 0.895),
        (
            {"dense FP32": 3.0, "dense INT8": 0.5},
            "dense INT8",
            "dense/build_engine.openvino",
            "dense/export_onnx",
            0.88,
        ),
        ({"dense FP32": 3.0, "2:4 INT8": 0.5}, "2:4 INT8", "sparse/build_engine.openvino", "sparse/export_onnx", 0.88),
    ],
)
def test_deploy_holds_the_engine_the_verdict_ships_and_the_file_it_was_built_from(
    recipe: Make,
    outcomes: Callable[..., list[Outcome]],
    recipe_file: Path,
    tmp_path: Path,
    times: Mapping[str, float],
    label: str,
    engine: str,
    onnx: str,
    value: float,
) -> None:
    found = plan(recipe())
    made = outcomes(found, times)
    report = summarise(found, made, None)
    assert report.verdict.startswith(f"Verdict: ship the {label} model")
    assert report.shipped is not None
    run, digests = tmp_path / "run", DigestCache(tmp_path / "digests.json")
    publish(run, report, made, recipe_file, digests)
    assert (run / "deploy" / "model.xml").read_text() == f"<net>{engine}</net>"
    assert (run / "deploy" / "model.onnx").read_text() == f"onnx of {onnx}"
    note = shipped(run)
    assert (note["model"], note["runtime"], note["why"]) == (label, "openvino", report.verdict)
    assert note["accuracy"]["value"] == value
    assert ("torch" in note["accuracy"]["how"]) == (label == "dense FP32")
    assert note["latency"][0]["p50_ms"] == times[label]
    assert note["sha256"]["model.xml"] == file_digest(run / "deploy" / "model.xml")
    assert sorted(report.shipped.files) == sorted(p.name for p in (run / "deploy").iterdir())


def test_deploy_holds_the_fine_tuned_model_where_that_is_the_better_one_in_fp32(
    recipe: Make,
    outcomes: Callable[..., list[Outcome]],
    row: Callable[..., Row],
    recipe_file: Path,
    tmp_path: Path,
) -> None:
    found, label = plan(recipe()), "dense FP32, fine-tuned"
    made = outcomes(found, {"dense FP32": 1.0, label: 1.0})
    (measured,) = [o.record.outputs["report"] for o in made if o.step.id == "dense/fine_tune.report"]
    measured.write_text(dump(row(label, "dense/fine_tune.report", {"accuracy": 0.95, "loss": 0.4}).model))
    report = summarise(found, made, None)
    assert report.verdict.startswith(f"Verdict: ship the {label} model")
    publish(tmp_path / "run", report, made, recipe_file, DigestCache(tmp_path / "digests.json"))
    assert (tmp_path / "run" / "deploy" / "model.xml").read_text() == f"<net>{label}</net>"
    assert (tmp_path / "run" / "deploy" / "model.onnx").read_text() == "onnx of dense/fine_tune.report"
    assert shipped(tmp_path / "run")["accuracy"]["value"] == 0.95


def test_the_layers_that_the_projection_chose_from_are_told_from_other_weights(
    recipe: Make, outcomes: Callable[..., list[Outcome]], row: Callable[..., Row]
) -> None:
    found = plan(recipe(quantize=None))
    layers = [{"layer": name, "projected": False, "reason": "r"} for name in ("conv", "fc")]
    facts = {"layers": layers, "projected": 0, "pattern": "2:4"}
    for weight, advice in (("conv.weight", "project it: nm.keep_dense"), ("w1", "make it an nn.Linear or nn.Conv")):
        made = outcomes(found, facts={"sparse/project_nm": facts})
        for outcome in made:
            for layer in outcome.record.measured.get("file_layers", ()):
                layer |= {"weight": weight, "violations": 1, "pattern_held": False}
        (chain, *_) = summarise(found, made, None).chains
        assert chain.layers[0].advice.startswith(advice)


def test_deploy_follows_the_verdict_and_goes_with_it(
    recipe: Make, outcomes: Callable[..., list[Outcome]], recipe_file: Path, tmp_path: Path
) -> None:
    found = plan(recipe())
    run, digests = tmp_path / "run", DigestCache(tmp_path / "digests.json")

    def published(made: list[Outcome]) -> RunReport:
        report = summarise(found, made, None)
        publish(run, report, made, recipe_file, digests)
        return report

    fast = outcomes(found, {"dense FP32": 3.0, "dense BF16": 3.0, "dense INT8": 0.5})
    published(fast)
    inode = (run / "deploy" / "model.xml").stat().st_ino
    published(fast)
    assert (run / "deploy" / "model.xml").stat().st_ino == inode, "what is the same stays"
    (run / "deploy" / "model.xml").write_text("tampered")
    (run / "deploy" / "stale").write_text("x")
    published(fast)
    assert (run / "deploy" / "model.xml").read_text() == "<net>dense/build_engine.openvino</net>"
    assert not (run / "deploy" / "stale").exists()
    published(outcomes(found, {"dense FP32": 1.0}))
    assert shipped(run)["model"] == "dense FP32"
    assert (run / "deploy" / "model.xml").read_text() == "<net>dense FP32</net>"
    stopped = [o for o in fast if o.step.stage.name != "benchmark"]
    assert published(stopped).shipped is None
    assert not (run / "deploy").exists()
    assert not list(run.glob("deploy*"))


def test_an_onnx_runtime_engine_is_its_onnx_file_and_lies_in_deploy_once(
    recipe: Make, outcomes: Callable[..., list[Outcome]], recipe_file: Path, tmp_path: Path
) -> None:
    found = plan(recipe(deploy=[{"runtime": "onnxruntime"}]))
    made = outcomes(found, {"dense FP32": 3.0, "dense INT8": 0.5})
    (built,) = [o.record.outputs["engine"] for o in made if o.step.id == "dense/build_engine.onnxruntime"]
    shutil.rmtree(built)
    built.mkdir()
    (built / "model.onnx").write_text("the engine")
    report = summarise(found, made, None)
    publish(tmp_path / "run", report, made, recipe_file, DigestCache(tmp_path / "digests.json"))
    assert sorted(p.name for p in (tmp_path / "run" / "deploy").iterdir()) == ["deploy.json", "model.onnx"]
    assert (tmp_path / "run" / "deploy" / "model.onnx").read_text() == "the engine"


def test_a_model_below_the_accuracy_gate_is_not_deployed(recipe: Make, outcomes: Callable[..., list[Outcome]]) -> None:
    found = plan(recipe(gates={"max_drop": 0.01}))
    report = summarise(found, outcomes(found, {"dense FP32": 3.0, "dense BF16": 2.0, "2:4 INT8": 0.1}), None)
    assert report.shipped is not None
    assert report.shipped.model == "dense BF16", "0.895 on its own engine; the INT8 engines have 0.88"


def test_the_chain_of_each_runtime_has_the_builds_facts_and_both_profiles(
    recipe: Make, outcomes: Callable[..., list[Outcome]]
) -> None:
    found = plan(recipe(deploy=[{"runtime": "openvino"}, {"runtime": "tensorrt_rtx"}]))
    made = outcomes(found)
    for outcome in made:
        if outcome.step.id == "sparse/build_engine.tensorrt_rtx":
            outcome.record.measured["build"]["facts"] = {"sparse_verdict": "no verdict"}  # type: ignore[index]
    first, second = summarise(found, made, None).chains
    assert (first.model, first.runtime, first.twin, first.batch_size) == ("2:4 INT8", "openvino", "dense INT8", 1)
    (row,) = first.layers
    assert (row.layer, row.dense_ms, row.sparse_ms, row.kernel, row.picked) == ("conv", 0.25, 0.25, "jit", False)
    assert (second.runtime, second.layers[0].picked, second.notes) == ("tensorrt_rtx", None, ("no verdict",))


def test_a_run_without_engines_still_says_what_the_file_tells(
    recipe: Make, outcomes: Callable[..., list[Outcome]]
) -> None:
    found = plan(recipe(deploy=[]))
    report = summarise(found, outcomes(found), None)
    (chain,) = report.chains
    assert (chain.model, chain.runtime, chain.batch_size) == ("2:4 INT8", "", None)
    assert report.shipped is None
