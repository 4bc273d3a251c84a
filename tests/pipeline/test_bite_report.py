"""The end of a run: whose engines race, what noise may be called, and that a stop in a write spoils no report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsify_deploy.artifacts import durable
from sparsify_deploy.artifacts.digests import DigestCache
from sparsify_deploy.artifacts.fingerprint import file_digest
from sparsify_deploy.artifacts.store import Record
from sparsify_deploy.pipeline import Outcome
from sparsify_deploy.plan import Plan, Ref, plan
from sparsify_deploy.recipe import Recipe
from sparsify_deploy.reports import BenchmarkReport, ModelReport, Row, RunReport
from sparsify_deploy.stages.benchmark import BenchmarkEngines
from sparsify_deploy.stages.build_engine import BuildEngine
from sparsify_deploy.summary import publish
from sparsify_deploy.timing import Comparison, Race
from sparsify_deploy.verdict import Evidence, verdict


def a_plan() -> Plan:
    recipe = {
        "version": 1,
        "name": "tiny",
        "sparsity": 0.6,
        "model": {"source": "builtin", "params": {"name": "resnet8"}},
        "data": {"source": "digits"},
        "training": {"steps": 4},
        "init": {"criterion": "synflow"},
        "train": {"method": "rigl"},
        "nm": {"fine_tune": {}},
        "quantize": {},
        "deploy": [{"runtime": "openvino"}, {"runtime": "onnxruntime"}],
    }
    return plan(Recipe.model_validate(recipe))


def test_each_label_of_every_race_is_the_model_of_its_own_branch_and_row():
    found = a_plan()
    labels = {step.id: step.label for step in found.steps}
    races = [step for step in found.steps if isinstance(step.stage, BenchmarkEngines)]
    assert len(races) == 2
    for step in races:
        stage = step.stage
        assert isinstance(stage, BenchmarkEngines)
        came = {variant.label: step.inputs[variant.source] for variant in stage.variants}
        assert came.pop("dense INT8") == Ref(f"dense/build_engine.{stage.runtime}", "engine")
        assert came.pop("2:4 INT8") == Ref(f"sparse/build_engine.{stage.runtime}", "engine")
        assert "dense FP32" in came
        if stage.runtime == "openvino":
            assert came.pop("dense BF16") == Ref("dense/fine_tune.report", "measured_onnx")
        for label, ref in came.items():
            assert ref.output == "measured_onnx"
            assert labels[ref.step] == label


def test_engines_are_built_from_the_export_of_their_own_branch():
    steps = {step.id: step for step in a_plan().steps}
    for branch in ("dense", "sparse"):
        for runtime in ("openvino", "onnxruntime"):
            inputs = steps[f"{branch}/build_engine.{runtime}"].inputs
            step = f"{branch}/export_onnx" + (".onnxruntime" if runtime == "onnxruntime" else "")
            assert inputs == {"onnx": Ref(step, "onnx")}


def evidence(median: float, low: float, high: float, claim: Any) -> Evidence:
    """The sparse INT8 model against its dense twin, with these numbers; all else is equal."""
    labels = ("dense FP32", "dense INT8", "2:4 INT8")
    model = ModelReport({"accuracy": 0.9}, 10, None, "INT8", (), 1, (), "openvino")
    rows = [Row(label, "step", model) for label in labels]
    same = (1.0, 0.99, 1.01, "within the noise")
    found = {(a, b): same for a in labels for b in labels if a != b}
    found["2:4 INT8", "dense INT8"] = (median, low, high, claim)
    comparisons = tuple(Comparison(a, b, *numbers) for (a, b), numbers in found.items())
    control = Comparison(labels[0], labels[0], *same)
    race = Race(labels, "process CPU time", 5, 0, 1, 1, {}, {}, {}, {}, comparisons, control, 0.02)
    benchmark = BenchmarkReport("openvino", 1, None, (race,))
    return Evidence("accuracy", "higher", rows[0], rows[1], rows[2], (), (benchmark,))


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((1.015, 1.005, 1.018, "within the noise"), "sparsity adds no speed on this runtime (1.01x"),
        ((1.3, 0.9, 1.5, "within the noise"), "sparsity adds no speed on this runtime (1.30x"),
        ((0.8, 0.7, 0.9, "slower"), "sparsity adds no speed on this runtime (0.80x"),
        ((1.3, 1.2, 1.4, "faster"), "the sparse model against its dense twin is 1.30x [1.20, 1.40], faster"),
    ],
)
def test_sparsity_is_said_to_add_speed_only_where_the_race_claims_it(numbers, said):
    text = verdict(evidence(*numbers), None)
    assert said in text
    assert ("sparsity adds no speed" in text) is (numbers[-1] != "faster")


def published(tmp_path: Path) -> tuple[Path, Outcome, RunReport, Path]:
    """A run directory that holds a report and one engine, with what they were made from."""
    step = next(step for step in a_plan().steps if isinstance(step.stage, BuildEngine))
    engine = tmp_path / "store" / "engine"
    engine.mkdir(parents=True)
    (engine / "model.bin").write_bytes(b"first" * 9)
    (engine / "model.xml").write_bytes(b"first")
    record = outcome_record(engine)
    report = RunReport("tiny", "then", {}, "accuracy", "higher", (), (), (), (), (), "Verdict: first.")
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text("version: 1\n")
    outcome = Outcome(step, record, True, "first time")
    publish(tmp_path / "run", report, [outcome], recipe, DigestCache(tmp_path / "digests.json"))
    return tmp_path / "run", outcome, report, recipe


def outcome_record(engine: Path) -> Record:
    digests = {"engine": file_digest(engine)}
    return Record("build_engine", "f" * 64, {}, engine.parent, {"engine": engine}, digests, {}, {}, 1.0, "then")


@pytest.mark.parametrize("name", ["report.json", "report.md", "recipe.yaml"])
def test_a_disk_that_fills_up_in_a_report_leaves_the_old_one_whole(tmp_path, monkeypatch, name):
    run, outcome, _, recipe = published(tmp_path)
    before = (run / name).read_bytes()
    recipe.write_text("version: 1\nseed: 2\n")
    fresh = RunReport("tiny", "now", {}, "accuracy", "higher", (), (), (), (), (), "Verdict: second.")
    real = durable.write

    def fills_up(path: Path, pieces: Iterable[bytes]) -> None:
        if path.name != name:
            return real(path, pieces)
        whole = b"".join(pieces)

        def half() -> Iterator[bytes]:
            yield whole[: len(whole) // 2]
            raise OSError(28, "No space left on device")

        return real(path, half())

    with monkeypatch.context() as full:
        full.setattr(durable, "write", fills_up)
        with pytest.raises(OSError, match="No space"):
            publish(run, fresh, [outcome], recipe, DigestCache(tmp_path / "digests.json"))
    assert (run / name).read_bytes() == before
    publish(run, fresh, [outcome], recipe, DigestCache(tmp_path / "digests.json"))
    assert (run / name).read_bytes() != before
    assert not [path for path in run.rglob("*") if ".sparsify-" in path.name]


def test_a_disk_that_fills_up_in_a_copied_engine_leaves_the_old_one_whole(tmp_path, monkeypatch):
    run, outcome, report, recipe = published(tmp_path)
    (target,) = {path.parent for path in (run / "engines").rglob("model.xml")}
    before = file_digest(target)
    engine = outcome.record.outputs["engine"]
    (engine / "model.xml").write_bytes(b"second")
    changed = Outcome(outcome.step, outcome_record(engine), True, "again")
    real = durable.copy

    def fills_up(source: Path, copied: Path, sha256: str) -> None:
        if source.name == "model.xml":
            copied.write_bytes(b"se")
            raise OSError(28, "No space left on device")
        real(source, copied, sha256)

    with monkeypatch.context() as full:
        full.setattr(durable, "copy", fills_up)
        with pytest.raises(OSError, match="No space"):
            publish(run, report, [changed], recipe, DigestCache(tmp_path / "digests.json"))
    assert file_digest(target) == before
    publish(run, report, [changed], recipe, DigestCache(tmp_path / "digests.json"))
    assert file_digest(target) == file_digest(engine)
    assert not [path for path in run.rglob("*") if ".sparsify-" in path.name]
