"""A recipe becomes steps: which, in which order, wired to what."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sparsify_deploy.artifacts.fingerprint import canonical
from sparsify_deploy.plan import Plan, Ref, plan
from sparsify_deploy.recipe import Recipe
from sparsify_deploy.reports import SAME_GRAPH
from sparsify_deploy.stages.benchmark import BenchmarkEngines
from sparsify_deploy.stages.measure import Measure
from sparsify_deploy.stages.train import Train

Make = Callable[..., Recipe]

SHORT = {"init": None, "train": None, "nm": None, "quantize": None, "sparsity": None, "training": None}


def ids(found: Plan) -> list[str]:
    return [step.id for step in found.steps]


def wires(found: Plan, step: str) -> dict[str, str]:
    (inputs,) = [s.inputs for s in found.steps if s.id == step]
    return {name: f"{ref.step}:{ref.output}" for name, ref in inputs.items()}


def labels(found: Plan) -> dict[str, str]:
    by_id = {step.id: step.label for step in found.steps}
    return {row: by_id[row] for row in found.rows}


def variants(found: Plan, runtime: str = "openvino") -> list[tuple[str, str, str]]:
    (stage,) = [s.stage for s in found.steps if s.id == f"benchmark/{runtime}"]
    assert isinstance(stage, BenchmarkEngines)
    assert set(stage.inputs) == set(next(s.inputs for s in found.steps if s.stage is stage))
    return [(v.label, v.source, v.kind) for v in stage.variants]


def test_the_full_recipe_is_two_branches_and_a_race(recipe: Make) -> None:
    found = plan(recipe())
    assert ids(found) == [
        "sparse/init_mask",
        "dense/train",
        "dense/train.report",
        "dense/fine_tune",
        "dense/fine_tune.report",
        "dense/quantize",
        "dense/quantize.report",
        "dense/export_onnx",
        "dense/build_engine.openvino",
        "sparse/train",
        "sparse/train.report",
        "sparse/project_nm",
        "sparse/project_nm.report",
        "sparse/quantize",
        "sparse/quantize.report",
        "sparse/export_onnx",
        "sparse/build_engine.openvino",
        "benchmark/openvino",
    ]
    assert labels(found) == {
        "dense/train.report": "dense FP32",
        "dense/fine_tune.report": "dense FP32, fine-tuned",
        "dense/quantize.report": "dense INT8",
        "sparse/train.report": "sparse FP32",
        "sparse/project_nm.report": "2:4 FP32",
        "sparse/quantize.report": "2:4 INT8",
    }


def test_later_outputs_replace_earlier_ones_of_the_same_name(recipe: Make) -> None:
    found = plan(recipe())
    assert wires(found, "sparse/init_mask") == {}
    assert wires(found, "sparse/train") == {"mask": "sparse/init_mask:mask"}
    trained = {"weights": "sparse/train:weights", "mask": "sparse/train:mask"}
    assert wires(found, "sparse/train.report") == trained
    assert wires(found, "sparse/project_nm") == trained
    projected = {"weights": "sparse/project_nm:weights", "mask": "sparse/project_nm:mask"}
    assert wires(found, "sparse/project_nm.report") == projected
    assert wires(found, "sparse/quantize") == projected
    assert wires(found, "sparse/quantize.report") == {**projected, "quantized": "sparse/quantize:quantized"}
    assert wires(found, "sparse/export_onnx") == {**projected, "quantized": "sparse/quantize:quantized"}
    assert wires(found, "sparse/build_engine.openvino") == {"onnx": "sparse/export_onnx:onnx"}
    assert wires(found, "dense/train") == {}
    assert wires(found, "dense/fine_tune") == {"weights": "dense/train:weights"}
    assert wires(found, "dense/quantize") == {"weights": "dense/fine_tune:weights"}


def test_no_step_takes_what_is_made_after_it_or_is_not_made(recipe: Make) -> None:
    both = [{"runtime": "openvino"}, {"runtime": "onnxruntime"}]
    for changes in ({}, SHORT, {"dense_branch": False}, {"deploy": both}, {"quantize": None}, {"nm": None}):
        made: set[Ref] = set()
        found = plan(recipe(**changes))
        assert len(set(ids(found))) == len(ids(found))
        for step in found.steps:
            assert set(step.inputs.values()) <= made
            made |= {Ref(step.id, name) for name in step.stage.outputs}


def test_the_short_route_measures_exports_and_builds_the_checkpoint(recipe: Make) -> None:
    found = plan(recipe(**SHORT))
    assert ids(found) == [
        "dense/model.report",
        "dense/export_onnx",
        "dense/build_engine.openvino",
        "benchmark/openvino",
    ]
    assert labels(found) == {"dense/model.report": "dense FP32"}
    assert variants(found) == [
        ("dense FP32", "dense_engine", "engine"),
        ("dense BF16", "dense/model.report", "lower_precision"),
    ]
    assert wires(found, "benchmark/openvino") == {
        "dense_engine": "dense/build_engine.openvino:engine",
        "dense/model.report": "dense/model.report:measured_onnx",
    }


def test_nm_alone_projects_the_checkpoint_and_keeps_the_dense_twin(recipe: Make) -> None:
    found = plan(recipe(**{**SHORT, "nm": {"pattern": "1:4"}}))
    assert ids(found) == [
        "dense/model.report",
        "dense/export_onnx",
        "dense/build_engine.openvino",
        "sparse/project_nm",
        "sparse/project_nm.report",
        "sparse/export_onnx",
        "sparse/build_engine.openvino",
        "benchmark/openvino",
    ]
    assert labels(found)["sparse/project_nm.report"] == "1:4 FP32"
    assert wires(found, "sparse/project_nm") == {}
    assert [label for label, _, _ in variants(found)] == ["dense FP32", "dense BF16", "1:4 FP32"]


def test_quantisation_alone_has_no_sparse_branch(recipe: Make) -> None:
    found = plan(recipe(**{**SHORT, "quantize": {}}))
    assert ids(found) == [
        "dense/model.report",
        "dense/quantize",
        "dense/quantize.report",
        "dense/export_onnx",
        "dense/build_engine.openvino",
        "benchmark/openvino",
    ]
    assert variants(found) == [
        ("dense FP32", "dense/model.report", "onnx"),
        ("dense BF16", "dense/model.report", "lower_precision"),
        ("dense INT8", "dense_engine", "engine"),
    ]
    assert wires(found, "benchmark/openvino") == {
        "dense/model.report": "dense/model.report:measured_onnx",
        "dense_engine": "dense/build_engine.openvino:engine",
    }


def test_a_densely_trained_net_that_is_projected_is_trained_once(recipe: Make) -> None:
    found = plan(recipe(init=None, sparsity=None, train={"method": "dense"}))
    by_id = {step.id: step for step in found.steps}
    assert canonical(by_id["dense/train"].stage) == canonical(by_id["sparse/train"].stage)
    assert wires(found, "dense/train") == wires(found, "sparse/train") == {}
    assert "sparse/train.report" not in by_id
    assert wires(found, "sparse/project_nm") == {"weights": "sparse/train:weights"}


def test_without_the_dense_branch_only_the_sparse_one_is_left(recipe: Make) -> None:
    found = plan(recipe(dense_branch=False))
    assert {step.partition("/")[0] for step in ids(found)} == {"sparse", "benchmark"}
    assert [label for label, _, _ in variants(found)] == ["sparse FP32", "2:4 FP32", SAME_GRAPH, "2:4 INT8"]
    (stage,) = [step.stage for step in found.steps if isinstance(step.stage, BenchmarkEngines)]
    (twin,) = [variant for variant in stage.variants if variant.label == SAME_GRAPH]
    assert (twin.kind, twin.kept) == ("dense_weights", False)
    assert wires(found, "benchmark/openvino")[twin.source] == "sparse/export_onnx:onnx"
    densely = plan(recipe(dense_branch=False, init=None, sparsity=None, train={"method": "dense"}))
    assert labels(densely)["sparse/train.report"] == "dense FP32"
    alone = plan(recipe(**SHORT, dense_branch=False))
    assert "dense/model.report" in ids(alone), "a recipe that makes nothing sparse has the dense branch alone"


def test_the_first_runtime_races_every_row_the_others_the_ends(recipe: Make) -> None:
    found = plan(recipe(deploy=[{"runtime": "openvino"}, {"runtime": "onnxruntime"}]))
    assert [step for step in ids(found) if "build" in step or "benchmark" in step] == [
        "dense/build_engine.openvino",
        "dense/build_engine.onnxruntime",
        "sparse/build_engine.openvino",
        "sparse/build_engine.onnxruntime",
        "benchmark/openvino",
        "benchmark/onnxruntime",
    ]
    assert variants(found) == [
        ("dense FP32", "dense/train.report", "onnx"),
        ("dense FP32, fine-tuned", "dense/fine_tune.report", "onnx"),
        ("dense BF16", "dense/fine_tune.report", "lower_precision"),
        ("dense INT8", "dense_engine", "engine"),
        ("sparse FP32", "sparse/train.report", "onnx"),
        ("2:4 FP32", "sparse/project_nm.report", "onnx"),
        ("2:4 INT8", "sparse_engine", "engine"),
    ]
    assert variants(found, "onnxruntime") == [
        ("dense FP32", "dense/train.report", "onnx"),
        ("dense INT8", "dense_engine", "engine"),
        ("2:4 INT8", "sparse_engine", "engine"),
    ]
    assert wires(found, "benchmark/onnxruntime")["sparse_engine"] == "sparse/build_engine.onnxruntime:engine"
    measured = {step.stage.runtime for step in found.steps if isinstance(step.stage, Measure)}
    assert measured == {"openvino"}


@pytest.mark.parametrize(
    "changes", [SHORT, {"nm": None, "quantize": None, "init": None, "sparsity": None, "train": {"method": "dense"}}]
)
def test_each_label_takes_part_in_a_race_once(recipe: Make, changes: dict[str, object]) -> None:
    found = plan(recipe(**{**changes, "deploy": [{"runtime": "openvino"}, {"runtime": "onnxruntime"}]}))
    for runtime in ("openvino", "onnxruntime"):
        lower = ["dense BF16"] if runtime == "openvino" else []
        assert [label for label, _, _ in variants(found, runtime)] == ["dense FP32", *lower]


def test_no_deploy_means_no_export_no_engine_and_no_race(recipe: Make) -> None:
    found = plan(recipe(deploy=[]))
    assert not [step for step in ids(found) if "export" in step or "engine" in step or "benchmark" in step]
    assert {s.stage.runtime for s in found.steps if isinstance(s.stage, Measure)} == {None}


@pytest.mark.parametrize("fine_tune", [None, {"steps": 6}])
@pytest.mark.parametrize("qat", [None, {"epochs": 2.0}])
def test_both_branches_take_the_same_optimizer_steps(
    recipe: Make, fine_tune: dict[str, int] | None, qat: dict[str, float] | None
) -> None:
    found = plan(recipe(nm={"fine_tune": fine_tune}, quantize={"qat": qat}))
    steps = {"dense": 0, "sparse": 0}
    phases: dict[str, list[str]] = {"dense": [], "sparse": []}
    for step in found.steps:
        branch = step.id.partition("/")[0]
        training = step.stage.fit.training if isinstance(step.stage, Train) else getattr(step.stage, "training", None)
        if training is not None:
            steps[branch] += training.total_steps(1437)
        if isinstance(step.stage, Train):
            phases[branch].append(step.stage.fit.phase)
    assert steps["dense"] == steps["sparse"] == 12 + (6 if fine_tune else 0) + (178 if qat else 0)
    assert phases == {"dense": ["train", "fine_tune"] if fine_tune else ["train"], "sparse": ["train"]}
    assert ("dense/fine_tune" in ids(found)) == bool(fine_tune)


def test_the_dense_twin_is_quantised_exported_and_built_with_the_same_settings(recipe: Make) -> None:
    by_id = {step.id: canonical(step.stage) for step in plan(recipe()).steps}
    for stage in ("quantize", "build_engine.openvino"):
        assert by_id[f"dense/{stage}"] == by_id[f"sparse/{stage}"]
    differs = {k for k, v in by_id["dense/export_onnx"].items() if v != by_id["sparse/export_onnx"][k]}
    assert differs == {"nm"}


def test_a_name_selects_a_step_its_stage_or_its_step_in_both_branches(recipe: Make) -> None:
    found = plan(recipe())
    assert found.select("sparse/train") == ("sparse/train",)
    assert found.select("train") == ("dense/train", "dense/fine_tune", "sparse/train")
    assert found.select("fine_tune") == ("dense/fine_tune",)
    assert found.select("quantize.report") == ("dense/quantize.report", "sparse/quantize.report")
    assert found.select("build_engine") == ("dense/build_engine.openvino", "sparse/build_engine.openvino")
    assert len(found.select("measure")) == 6
    assert found.select("trian") == ()


def takes_teacher(found: Plan) -> dict[str, str]:
    return {step.id: wires(found, step.id)["teacher"] for step in found.steps if "teacher" in step.inputs}


def test_the_dense_baseline_teaches_the_fine_tuning_and_qat_of_both_branches(recipe: Make) -> None:
    found = plan(recipe(distillation={}))
    assert ids(found) == ids(plan(recipe()))
    assert takes_teacher(found) == dict.fromkeys(
        ("dense/fine_tune", "dense/quantize", "sparse/project_nm", "sparse/quantize"), "dense/train:weights"
    )
    assert wires(found, "sparse/quantize")["weights"] == "sparse/project_nm:weights"
    by_id = {step.id: canonical(step.stage) for step in found.steps}
    assert by_id["dense/quantize"] == by_id["sparse/quantize"]
    assert by_id["dense/fine_tune"]["distillation"] == by_id["sparse/project_nm"]["distillation"]


def test_only_the_phases_a_recipe_names_have_a_teacher(recipe: Make) -> None:
    plain = {step.id: canonical(step.stage) for step in plan(recipe()).steps}
    for phase, taught in (("fine_tune", {"dense/fine_tune", "sparse/project_nm"}), ("qat", {"dense/quantize"})):
        found = plan(recipe(distillation={"phases": [phase]}))
        assert set(takes_teacher(found)) >= taught
        others = {s.id: canonical(s.stage) for s in found.steps if s.id not in takes_teacher(found)}
        assert others == {step: plain[step] for step in others}


def test_a_named_teacher_is_a_file_and_no_input(recipe: Make, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher.safetensors"
    found = plan(recipe(distillation={"teacher": str(teacher)}))
    assert takes_teacher(found) == {}
    taught = {s.id for s in found.steps if s.stage.files().get("distillation.teacher") == teacher}
    assert taught == {"dense/fine_tune", "dense/quantize", "sparse/project_nm", "sparse/quantize"}


def test_without_training_the_networks_own_start_teaches_and_no_step_is_wired(recipe: Make) -> None:
    route = {**SHORT, "nm": {"fine_tune": {"steps": 6}}, "distillation": {"phases": ["fine_tune"]}}
    for dense_branch in (True, False):
        found = plan(recipe(**route, dense_branch=dense_branch))
        assert takes_teacher(found) == {}
        (stage,) = [step.stage for step in found.steps if step.id == "sparse/project_nm"]
        assert stage.inputs == ("weights", "mask", "teacher")


def test_the_patterns_on_the_way_are_one_step_and_the_twin_takes_as_many_optimizer_steps(recipe: Make) -> None:
    found = plan(recipe(nm={"via": ["4:8"], "fine_tune": {"steps": 6}}))
    assert ids(found) == ids(plan(recipe()))
    by_id = {step.id: step.stage for step in found.steps}
    assert by_id["sparse/project_nm"].training == by_id["dense/fine_tune"].fit.training


def test_both_dense_float_models_may_be_shipped_and_so_their_engines_are_kept(recipe: Make) -> None:
    (race,) = [step.stage for step in plan(recipe()).steps if isinstance(step.stage, BenchmarkEngines)]
    kept = {variant.label: variant.folder for variant in race.variants if variant.kept and variant.kind == "onnx"}
    assert kept == {"dense FP32": "dense-fp32", "dense FP32, fine-tuned": "dense-fp32-fine-tuned"}
