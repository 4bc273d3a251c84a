"""Every setting that may change a result changes the fingerprint of the stage it belongs to: fields are walked, not
listed, so that a new field, stage or menu entry is covered the day it is written."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import BaseModel

from sparsify_deploy import menu, pipeline, stages
from sparsify_deploy.artifacts.digests import DigestCache
from sparsify_deploy.artifacts.environment import FACTS, PACKAGES
from sparsify_deploy.artifacts.fingerprint import digest
from sparsify_deploy.artifacts.store import Record
from sparsify_deploy.pipeline import Fingerprints
from sparsify_deploy.plan import PlannedStep, plan
from sparsify_deploy.recipe import MENU_SECTIONS, CalibrationData, Recipe
from sparsify_deploy.stages.base import Stage

Make = Callable[..., Recipe]

# -- values of the same type, but others ---------------------------------------------------------------------------


def others(value: Any, hint: Any, folder: Path) -> Iterator[tuple[str, Any]]:
    """Every value that differs from `value` in one leaf, with the leaf's path; `hint` is the type it may have."""
    kinds = union(hint)
    if value is not None and type(None) in kinds:
        yield "=None", None
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value), include_extras=False)
        for f in dataclasses.fields(value):
            for path, other in others(getattr(value, f.name), hints[f.name], folder):
                yield f".{f.name}{path}", dataclasses.replace(value, **{f.name: other})  # type: ignore[type-var]
    elif isinstance(value, BaseModel):
        for name, info in type(value).model_fields.items():
            for path, other in others(getattr(value, name), info.annotation, folder):
                yield f".{name}{path}", value.model_copy(update={name: other})
    elif isinstance(value, tuple):
        yield from other_tuples(value, kinds, folder)
    elif isinstance(value, dict):
        yield "+key", {**value, "another": "x"}
        for key in value:
            yield f"[{key}]", {**value, key: f"{value[key]}x"}
    elif value is None:
        kind = next(kind for kind in kinds if kind is not type(None))
        start = something(kind, folder)
        if isinstance(start, BaseModel):
            yield "={}", start
            yield from others(start, kind, folder)
        else:
            yield "", start
    else:
        yield "", other_scalar(value, kinds, folder)


def union(hint: Any) -> tuple[Any, ...]:
    """The members of a union, `Annotated` and aliases taken off."""
    while hasattr(hint, "__metadata__"):
        hint = hint.__origin__
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(kind for arg in get_args(hint) for kind in union(arg))
    return (hint,)


def other_tuples(value: tuple[Any, ...], kinds: tuple[Any, ...], folder: Path) -> Iterator[tuple[str, Any]]:
    args = next(get_args(kind) for kind in kinds if get_origin(kind) is tuple)
    for i, item in enumerate(value):
        for path, other in others(item, args[0] if args[-1] is ... else args[i], folder):
            yield f"[{i}]{path}", (*value[:i], other, *value[i + 1 :])
    if args[-1] is ...:
        yield "+1", (*value, value[-1] if value else something(args[0], folder))
    if len(value) > 1 and value != value[::-1]:
        yield "reversed", value[::-1]


def other_scalar(value: Any, kinds: tuple[Any, ...], folder: Path) -> Any:
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if choices:
        return next((choice for choice in choices if choice != value), f"{value}x")
    if isinstance(value, bool):
        return not value
    if isinstance(value, Path):
        return other_folder(value, folder) if value.is_dir() else something(Path, folder)
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 if value else 0.125
    assert isinstance(value, str), f"{type(value)} has no other value here: teach this test one"
    return f"x{value}" if value.endswith("*") else f"{value}x"


def other_folder(value: Path, folder: Path) -> Path:
    """A copy of a folder in which each file has one byte more."""
    copy = folder / f"another-{value.name}"
    copy.mkdir(exist_ok=True)
    for file in (file for file in value.rglob("*") if file.is_file()):
        target = copy / file.relative_to(value)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes() + b"x")
    return copy


def something(kind: Any, folder: Path) -> Any:
    """A value of that type that is no default."""
    (kind, *_) = union(kind)
    if get_origin(kind) is Literal:
        return get_args(kind)[-1]
    if get_origin(kind) is tuple:
        args = get_args(kind)
        return tuple(something(arg, folder) for arg in args if arg is not ...)
    if kind is CalibrationData:
        return CalibrationData.model_validate({"source": "npz", "params": {"path": folder / "data.npz"}})
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind.model_construct()
    if kind is Path:
        path = folder / "another"
        path.write_text("another content", encoding="utf-8")
        return path
    made = {bool: True, int: 7, float: 0.375, str: "else"}
    assert kind in made, f"{kind} has no value here: teach this test one"
    return made[kind]


# -- subjects ------------------------------------------------------------------------------------------------------


def examples_of(which: str, name: str, folder: Path) -> dict[str, Any]:
    """Parameters of an entry that has some without a default."""
    needed: dict[tuple[str, str], dict[str, Any]] = {
        ("models", "builtin"): {"name": "resnet8"},
        ("models", "file"): {"path": folder / "model.py", "arguments": {"width": 3}},
        ("models", "onnx"): {"path": folder / "model.py", "shapes": {"tokens": (3,)}},
        ("models", "transformers"): {"path": folder / "encoder", "arguments": {"width": 3}},
        ("models", "timm"): {"name": "resnet18", "arguments": {"drop_rate": 3}},
        ("models", "torchvision"): {"name": "resnet18", "arguments": {"width_per_group": 3}},
        ("datasets", "file"): {"path": folder / "data.py", "arguments": {"width": 3}},
        ("tasks", "file"): {"path": folder / "model.py", "arguments": {"width": 3}},
        ("datasets", "folder"): {"path": folder / "images"},
        ("datasets", "huggingface"): {"path": folder / "parquet"},
        ("datasets", "npz"): {"path": folder / "data.npz"},
        ("datasets", "parquet"): {"path": folder / "parquet"},
        ("datasets", "text"): {"path": folder / "texts", "tokenizer": folder / "encoder", "validation": "val*"},
        ("datasets", "torchvision"): {"name": "MNIST", "path": folder / "torchvision"},
    }
    return needed.get((which, name), {})


ENTRIES = [(which, name) for which in menu.MENUS for name in menu.names(which)]


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files for the entries that read some; a name no menu has stands for an entry without files."""
    for name in ("model.py", "data.py", "data.npz", "start.safetensors"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    (tmp_path / "parquet").mkdir()
    for name in ("train-0.parquet", "test-0.parquet", "train-0.parquetx", "test-0.parquetx", "else"):
        (tmp_path / "parquet" / name).write_text(name, encoding="utf-8")
    (tmp_path / "texts").mkdir()
    for name in ("train.csv", "test.csv", "val.csv", "xtrain.csv", "xtest.csv", "xval.csv"):
        (tmp_path / "texts" / name).write_text(name, encoding="utf-8")
    (tmp_path / "encoder").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "encoder" / name).write_text(name, encoding="utf-8")
    sets = menu.entry("datasets", "torchvision").SETS
    monkeypatch.setitem(sets, "MNISTx", sets["MNIST"])
    (tmp_path / "torchvision" / "MNIST" / "raw").mkdir(parents=True)
    (tmp_path / "torchvision" / "MNIST" / "raw" / "file").write_text("bytes", encoding="utf-8")
    for name in ("train", "trainx", "test", "else"):
        (tmp_path / "images" / name / "a").mkdir(parents=True)
        (tmp_path / "images" / name / "a" / "0.png").write_text(name, encoding="utf-8")
    real = menu.entry

    def entry(which: str, name: str) -> Any:
        if name in menu.names(which):
            return real(which, name)
        method = {"NEEDS_MASK": True, "NEEDS_SPARSITY": False, "LEAVES_MASK": True}
        return SimpleNamespace(VERSION=1, files=lambda params: {}, SUFFIX=".x", FLAVOUR="tensorrt", **method)

    monkeypatch.setattr(menu, "entry", entry)
    monkeypatch.setattr(pipeline, "fact", lambda name: f"{name} 1")


def with_entry(make: Make, which: str, name: str, folder: Path) -> Recipe:
    """A recipe with every stage that uses one entry of a menu, all its parameters given or default."""
    params = examples_of(which, name, folder)
    sections: dict[str, dict[str, Any]] = {
        "models": {"model": {"source": name, "params": params, "checkpoint": folder / "start.safetensors"}},
        "datasets": {"data": {"source": name, "params": params}},
        "tasks": {"task": {"name": name, "params": params}},
        "criteria": {"init": {"criterion": name, "params": params}},
        "methods": {"train": {"method": name, "params": params}},
        "runtimes": {"deploy": [{"runtime": name, "params": params}, {"runtime": _second(name)}]},
    }
    changes = sections[which]
    if (which, name) == ("methods", "dense"):
        changes |= {"init": None, "sparsity": None}
    return make(**changes)


def _second(runtime: str) -> str:
    return next(name for name in menu.names("runtimes") if name != runtime)


def records_for(steps: tuple[PlannedStep, ...]) -> dict[str, Record]:
    """Records of all steps, as if each had run."""
    return {
        step.id: Record(
            stage=step.stage.name,
            fingerprint="0" * 64,
            parts={},
            folder=Path(),
            outputs={},
            digests={name: hashlib.sha256(f"{step.id}:{name}".encode()).hexdigest() for name in step.stage.outputs},
            bytes={},
            measured={},
            seconds=0.0,
            created="",
        )
        for step in steps
    }


class Prints:
    """The fingerprints of the steps of a recipe, with files read anew each time."""

    def __init__(self, folder: Path) -> None:
        self._cache = DigestCache(folder / "digests.json")

    def parts(self, step: PlannedStep, records: Mapping[str, Record]) -> dict[str, Any]:
        return Fingerprints(self._cache).parts(step, records)

    def all(self, recipe: Recipe) -> dict[str, str]:
        steps = plan(recipe).steps
        records = records_for(steps)
        return {step.id: digest(self.parts(step, records)) for step in steps}


@pytest.fixture
def prints(tmp_path: Path) -> Prints:
    return Prints(tmp_path)


# -- the tests -----------------------------------------------------------------------------------------------------


def stage_classes() -> set[type]:
    """All classes of the stages package that are stages."""
    modules = [importlib.import_module(f"{stages.__name__}.{m.name}") for m in pkgutil.iter_modules(stages.__path__)]
    found = {cls for module in modules for _, cls in inspect.getmembers(module, inspect.isclass)}
    return {cls for cls in found if cls.__module__.startswith(stages.__name__) and cls is not Stage and _runs(cls)}


def _runs(cls: type) -> bool:
    return all(hasattr(cls, name) for name in ("name", "version", "inputs", "outputs", "run"))


BOTH_FLAVOURS = [{"runtime": "openvino"}, {"runtime": "onnxruntime"}]


def test_the_recipe_with_every_section_reaches_every_stage_class(recipe: Make) -> None:
    given = {"source": "onnx", "params": {"path": "model.onnx"}}
    flavoured = [{"runtime": "onnxruntime", "flavour": "onnxruntime"}]
    plans = plan(recipe(deploy=BOTH_FLAVOURS), sensitivity=True), plan(recipe(model=given, deploy=flavoured))
    assert {type(step.stage) for found in plans for step in found.steps} == stage_classes()


def test_stages_are_frozen_dataclasses_whose_environment_is_known(recipe: Make) -> None:
    for step in plan(recipe()).steps:
        assert isinstance(step.stage, Stage)
        assert dataclasses.is_dataclass(step.stage)
        assert type(step.stage).__dataclass_params__.frozen
        assert set(step.stage.environment) <= {*FACTS, *PACKAGES}


def check_leaves(steps: tuple[PlannedStep, ...], prints: Prints, folder: Path, only: str = "") -> list[str]:
    """Change one leaf after the other of all stages and see that the fingerprint moves; the leaves tried."""
    records = records_for(steps)
    seen: set[str] = set()
    tried = []
    for step in steps:
        before = prints.parts(step, records)
        if digest(before) in seen:
            continue
        seen.add(digest(before))
        for path, changed in others(step.stage, type(step.stage), folder):
            if only not in path:
                continue
            where = f"{step.id}{path}"
            after = prints.parts(dataclasses.replace(step, stage=changed), records)
            assert digest(after) != digest(before), where
            differs = {part for part in before if after[part] != before[part]}
            assert differs & {"settings", "files"}, f"{where} shows in {differs} alone"
            tried.append(where)
    return tried


def test_every_leaf_of_every_stages_settings_changes_its_fingerprint(
    recipe: Make, prints: Prints, tmp_path: Path
) -> None:
    steps = plan(recipe(deploy=BOTH_FLAVOURS), sensitivity=True).steps
    assert len(check_leaves(steps, prints, tmp_path)) > 500


@pytest.mark.parametrize(("which", "name"), [pytest.param(*entry, id="-".join(entry)) for entry in ENTRIES])
def test_every_parameter_of_every_menu_entry_changes_the_fingerprints_of_the_stages_that_hold_it(
    recipe: Make, prints: Prints, tmp_path: Path, which: str, name: str
) -> None:
    steps = plan(with_entry(recipe, which, name, tmp_path)).steps
    tried = check_leaves(steps, prints, tmp_path, only="params")
    for field in menu.entry(which, name).Params.model_fields:
        assert any(f".params.{field}" in where for where in tried), field


def test_walking_finds_the_deepest_fields_of_each_kind(recipe: Make, tmp_path: Path) -> None:
    found = {
        f"{step.id}{path}"
        for step in plan(with_entry(recipe, "models", "file", tmp_path)).steps
        for path, _ in others(step.stage, type(step.stage), tmp_path)
    }
    assert {
        "dense/train.subject.model.checkpoint",
        "dense/train.subject.model.params.path",
        "dense/train.subject.model.params.arguments[width]",
        "dense/train.subject.task.params.label_smoothing",
        "dense/train.subject.seed",
        "sparse/train.fit.params.drop_fraction",
        "sparse/train.fit.training.optimizer.betas[1]",
        "sparse/train.fit.training.schedule.milestones[0]",
        "sparse/train.fit.phase",
        "sparse/init_mask.init.params.rounds",
        "sparse/project_nm.nm.pattern",
        "sparse/quantize.training.optimizer.lr",
        "sparse/export_onnx.quantize=None",
        "dense/export_onnx.nm={}",
        "sparse/build_engine.openvino.params.precision",
        "benchmark/openvino.benchmark.batch_sizes[0]",
        "benchmark/openvino.variants[0].kind",
    } <= found


NO_RESULT_DEPENDS_ON = {
    *(".version", ".name", ".name=None", ".threads", ".store"),
    *(".gates.metric", ".gates.max_drop", ".gates.min_speedup", ".gates.min_sparsity"),
    ".gates.min_predicted_speedup",
    *(f".prediction.{field}{how}" for field in ("gpus", "batch_sizes") for how in ("[0]", "[1]", "+1", "reversed")),
    *(".train.training.optimizer={}", ".train.training.schedule={}"),
    ".deploy[0].triton",
}
"""Fields of a recipe that no step's fingerprint holds: gates are judged and Triton's files written after the run,
`{}` overrides nothing."""


def test_every_field_of_a_recipe_reaches_the_fingerprint_of_some_step(
    recipe: Make, prints: Prints, tmp_path: Path
) -> None:
    start = recipe(data={"source": "npz", "params": {"path": tmp_path / "data.npz"}})
    before = prints.all(start)
    tried = dict(others(start, Recipe, tmp_path))
    assert len(tried) > 80
    assert {path for path, changed in tried.items() if prints.all(changed) == before} == NO_RESULT_DEPENDS_ON


def test_a_stage_of_another_version_has_another_fingerprint(
    recipe: Make, prints: Prints, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = prints.all(recipe())
    for cls in stage_classes():
        with monkeypatch.context() as patch:
            patch.setattr(cls, "version", cls.version + 1)  # type: ignore[attr-defined]
            after = prints.all(recipe())
        changed = {step for step in before if after[step] != before[step]}
        assert changed == {s.id for s in plan(recipe()).steps if type(s.stage) is cls}


TRAINING_AND_AFTER = {"sparse/train", "sparse/project_nm", "sparse/quantize", "dense/train", "dense/quantize"}


@pytest.mark.parametrize(
    ("which", "name", "expected"),
    [
        ("models", "builtin", None),
        ("datasets", "digits", None),
        ("tasks", "classification", None),
        ("criteria", "synflow", {"sparse/init_mask"}),
        ("criteria", "random", set()),
        ("methods", "rigl", {"sparse/train"}),
        ("methods", "static", {"sparse/project_nm", "sparse/quantize"}),
        ("methods", "dense", {"dense/train", "dense/fine_tune", "dense/quantize"}),
        ("runtimes", "openvino", {"dense/build_engine.openvino", "sparse/build_engine.openvino", "benchmark/openvino"}),
        ("runtimes", "onnxruntime", set()),
    ],
)
def test_an_entry_of_another_version_runs_the_steps_that_use_it_again(
    recipe: Make, prints: Prints, monkeypatch: pytest.MonkeyPatch, which: str, name: str, expected: set[str] | None
) -> None:
    before = prints.all(recipe())
    entry = menu.entry(which, name)
    monkeypatch.setattr(entry, "VERSION", entry.VERSION + 1)
    after = prints.all(recipe())
    changed = {step for step in before if after[step] != before[step]}
    assert changed >= (set(before) if expected is None else expected)
    if not expected and expected is not None:
        assert not changed - {f"{branch}/export_onnx" for branch in ("dense", "sparse")}


def test_measured_latencies_depend_on_the_version_of_the_runtime_that_measures_them(
    recipe: Make, prints: Prints, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = prints.all(recipe())
    entry = menu.entry("runtimes", "openvino")
    monkeypatch.setattr(entry, "VERSION", entry.VERSION + 1)
    after = prints.all(recipe())
    assert all(after[step] != before[step] for step in before if step.endswith(".report"))


def test_every_input_enters_by_its_digest_and_its_name(recipe: Make, prints: Prints) -> None:
    steps = plan(recipe()).steps
    records = records_for(steps)
    for step in steps:
        before = digest(prints.parts(step, records))
        for ref in set(step.inputs.values()):
            record = records[ref.step]
            other = dataclasses.replace(record, digests={**record.digests, ref.output: "f" * 64})
            assert digest(prints.parts(step, {**records, ref.step: other})) != before, (step.id, ref)
        for name in step.inputs:
            fewer = {k: v for k, v in step.inputs.items() if k != name}
            assert digest(prints.parts(dataclasses.replace(step, inputs=fewer), records)) != before


def test_what_no_step_takes_in_does_not_matter(recipe: Make, prints: Prints) -> None:
    steps = plan(recipe()).steps
    records = records_for(steps)
    elsewhere = {
        k: dataclasses.replace(r, folder=Path("/elsewhere"), created="later", seconds=9.0) for k, r in records.items()
    }
    for step in steps:
        assert prints.parts(step, records) == prints.parts(step, elsewhere)


def test_every_fact_of_the_machine_a_stage_names_is_in_its_fingerprint(
    recipe: Make, prints: Prints, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = prints.all(recipe())
    steps = plan(recipe()).steps
    for name in {fact for step in steps for fact in step.stage.environment}:
        monkeypatch.setattr(pipeline, "fact", lambda asked, name=name: f"{asked} {2 if asked == name else 1}")
        after = prints.all(recipe())
        changed = {step for step in before if after[step] != before[step]}
        assert changed == {step.id for step in steps if name in step.stage.environment}


@pytest.mark.parametrize(
    ("fact", "stage"),
    [
        ("modelopt", "quantize"),
        ("onnx", "export_onnx"),
        ("torch", "export_onnx"),
        ("openvino", "build_engine.openvino"),
        ("openvino", "quantize.report"),
        ("cpu", "quantize.report"),
        ("gpu", "build_engine.openvino"),
    ],
)
def test_results_that_depend_on_the_machine_say_so(recipe: Make, fact: str, stage: str) -> None:
    by_id = {step.id: step.stage for step in plan(recipe()).steps}
    assert fact in by_id[f"sparse/{stage}"].environment
    if fact in ("openvino", "cpu", "gpu"):
        assert fact in by_id["benchmark/openvino"].environment
        assert "driver" in by_id["benchmark/openvino"].environment


@pytest.mark.parametrize(
    ("which", "name", "file"),
    [
        ("models", "file", "model.py"),
        ("models", "builtin", "start.safetensors"),
        ("datasets", "file", "data.py"),
        ("tasks", "file", "model.py"),
        ("datasets", "folder", "images/test/a/0.png"),
        ("datasets", "npz", "data.npz"),
        ("datasets", "parquet", "parquet/train-0.parquet"),
        ("datasets", "parquet", "parquet/test-0.parquet"),
    ],
)
def test_files_enter_by_content_and_not_by_place(
    recipe: Make, prints: Prints, tmp_path: Path, which: str, name: str, file: str
) -> None:
    start = with_entry(recipe, which, name, tmp_path)
    before = prints.all(start)
    original = (tmp_path / file).read_text(encoding="utf-8")
    (tmp_path / file).write_text("changed", encoding="utf-8")
    after = prints.all(start)
    assert all(after[step] != before[step] for step in before)
    (tmp_path / file).write_text(original, encoding="utf-8")
    assert prints.all(start) == before
    moved = tmp_path / "moved"
    moved.mkdir()
    for kept in ("model.py", "data.py", "data.npz", "start.safetensors", "parquet", "images"):
        (tmp_path / kept).rename(moved / kept)
    assert prints.all(with_entry(recipe, which, name, moved)) == before


def test_a_file_that_is_gone_is_a_line_that_names_it(recipe: Make, prints: Prints, tmp_path: Path) -> None:
    from sparsify_deploy.errors import DataError

    start = with_entry(recipe, "datasets", "npz", tmp_path)
    (tmp_path / "data.npz").unlink()
    with pytest.raises(DataError, match=r"^data\.\w+: .*data\.npz does not exist; correct"):
        prints.all(start)


def test_each_section_that_names_an_entry_is_in_the_table_this_test_walks() -> None:
    assert {which for which, _ in MENU_SECTIONS.values()} == set(menu.MENUS)


# -- which steps run again -----------------------------------------------------------------------------------------

LINES = {
    "dense": ("train", "train.report", "fine_tune", "fine_tune.report", "quantize", "quantize.report", "export_onnx"),
    "sparse": (
        *("init_mask", "train", "train.report", "project_nm", "project_nm.report", "quantize", "quantize.report"),
        "export_onnx",
    ),
}
ENGINE, RACE = "build_engine.openvino", "benchmark/openvino"


def since(dense: str | None, sparse: str | None, *more: str) -> set[str]:
    """The steps of each branch from one on, None: none of it, and the race of their engines; with `more`."""
    found = {RACE, *more}
    for branch, first in (("dense", dense), ("sparse", sparse)):
        if first is not None:
            line = (*LINES[branch], ENGINE)
            found |= {f"{branch}/{step}" for step in line[line.index(first) :]}
    return found


REPORTS = {f"{branch}/{step}" for branch, line in LINES.items() for step in line if step.endswith(".report")}
ENGINES = since(ENGINE, ENGINE)
EVERY = since("train", "init_mask")
TRAINED = since("train", "train")
NOTHING: set[str] = set()

RUNS_AGAIN: dict[str, set[str]] = {
    **dict.fromkeys(("version", "name", "threads", "store"), NOTHING),
    **{f"gates.{x}": NOTHING for x in ("metric", "max_drop", "min_speedup", "min_sparsity", "min_predicted_speedup")},
    **{f"prediction.{field}": NOTHING for field in ("gpus", "batch_sizes")},
    **dict.fromkeys(("seed", "training"), EVERY),
    **{f"model.{x}": EVERY for x in ("source", "params", "checkpoint", "checkpoint_match", "checkpoint_partial")},
    **{f"data.{field}": EVERY for field in ("source", "params", "augment")},
    **{f"task.{field}": EVERY for field in ("name", "params")},
    "sparsity": since(None, "init_mask"),
    "dense_branch": {RACE},
    "training.batch_size": EVERY,
    **{f"training.{field}": TRAINED for field in ("epochs", "steps", "accumulate", "optimizer", "schedule")},
    **{f"training.{field}": TRAINED for field in ("clip_norm", "precision", "ema", "channels_last", "compile")},
    **{f"training.{field}": TRAINED for field in ("mixup", "cutmix", "keep", "early_stop", "evaluate_every")},
    "init": since(None, "train"),
    **{f"init.{field}": since(None, "init_mask") for field in ("criterion", "params", "allocation", "keep_dense")},
    **{f"init.{field}": since(None, "init_mask") for field in ("pattern", "batches", "samples_per_class")},
    "train": since("fine_tune", "project_nm", "dense/model.report"),
    **{f"train.{field}": since(None, "train") for field in ("method", "params")},
    "train.training": TRAINED,
    "nm": since("quantize", "quantize"),
    **{f"nm.{x}": since(None, "project_nm") for x in ("pattern", "via", "permute", "fill", "fill_batches", "layers")},
    "nm.keep_dense": since(None, "project_nm"),
    "nm.keep_worst_dense": since(None, "project_nm", "sparse/sensitivity"),
    "nm.fine_tune": since("fine_tune", "project_nm"),
    "quantize": since("export_onnx", "export_onnx"),
    **{f"quantize.{x}": since("quantize", "quantize") for x in ("calibration_batches", "calibration_data", "qat")},
    **{f"quantize.{x}": since("quantize", "quantize") for x in ("keep_float", "residual", "concat", "pooling")},
    **{f"quantize.{field}": since("quantize", "quantize") for field in ("attention", "stream")},
    "distillation": since("fine_tune", "project_nm"),
    **{f"distillation.{x}": since("fine_tune", "project_nm") for x in ("teacher", "temperature", "weight", "features")},
    "distillation.phases": since("fine_tune", "project_nm"),
    **{
        f"export.{x}": REPORTS | since("export_onnx", "export_onnx") for x in ("opset", "int8_weights", "dynamic_batch")
    },
    **{f"export.{x}": REPORTS | since("export_onnx", "export_onnx") for x in ("parity_examples", "min_top1_agreement")},
    "export.max_relative_difference": REPORTS | since("export_onnx", "export_onnx"),
    "deploy.runtime": REPORTS
    | {"dense/build_engine.openvinox", "sparse/build_engine.openvinox", "benchmark/openvinox"},
    "deploy.params": REPORTS | ENGINES,
    "deploy.flavour": ENGINES | {"dense/export_onnx.onnxruntime", "sparse/export_onnx.onnxruntime"},
    "deploy.triton": NOTHING,
    "deploy": {RACE},
    **{f"benchmark.{x}": REPORTS | {RACE} for x in ("batch_sizes", "rounds", "round_ms", "warmup_ms", "threads")},
}
"""Each field of a recipe, and every step that runs again when it changes, the steps after it included.

What is measured after a stage depends on how it is exported and timed; the training of a stage on neither.
"""

ONE_BY_ONE: dict[str, set[str]] = {
    ".nm.fine_tune=None": since("quantize", "project_nm"),
    ".nm.fine_tune.optimizer={}": since(None, "project_nm"),
    ".nm.fine_tune.schedule={}": since(None, "project_nm"),
    ".train.training.optimizer={}": NOTHING,
    ".train.training.schedule={}": NOTHING,
    ".distillation.phases[0]": since("quantize", "quantize"),
}
"""Values of a field that are a case of their own."""


def field_of(path: str) -> str:
    """`.training.optimizer.lr` is of the field training.optimizer, `.init=None` of init."""
    section, *inner = path.lstrip(".").split(".")
    name = re.split(r"[\[+=]|reversed", section)[0]
    return ".".join([name, *(re.split(r"[\[+=]|reversed", part)[0] for part in inner[:1])])


def fields_of_a_recipe() -> set[str]:
    """The fields of the schema, two levels deep; deeper ones belong to these."""
    found = set()
    for name, info in Recipe.model_fields.items():
        kinds = [kind for arg in union(info.annotation) for kind in (arg, *(union(x)[0] for x in get_args(arg)))]
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        found |= {f"{name}.{field}" for kind in inner for field in kind.model_fields} or {name}
    return found


def run_again(prints: Prints, before: Recipe, after: Recipe) -> set[str]:
    """The steps of `after` that run where all of `before` is in the store, if what runs gives other bytes."""

    def digests(recipe: Recipe) -> dict[str, str]:
        steps, records, found = plan(recipe).steps, dict[str, Record](), {}
        for step in steps:
            found[step.id] = digest(prints.parts(step, records))
            (record,) = records_for((step,)).values()
            made = {name: hashlib.sha256(f"{found[step.id]}:{name}".encode()).hexdigest() for name in record.digests}
            records[step.id] = dataclasses.replace(record, digests=made)
        return found

    known = set(digests(before).values())
    return {step for step, fingerprint in digests(after).items() if fingerprint not in known}


def test_each_field_of_a_recipe_changed_in_turn_runs_exactly_the_listed_steps_again(
    recipe: Make, prints: Prints, tmp_path: Path
) -> None:
    start = recipe(data={"source": "npz", "params": {"path": tmp_path / "data.npz"}})
    tried = dict(others(start, Recipe, tmp_path))
    wrong = {}
    for path, changed in tried.items():
        if path in (".data=None", ".deploy+1"):  # a recipe without data, or with one target twice, is none
            continue
        expected = ONE_BY_ONE.get(path, RUNS_AGAIN.get(field_of(path)))
        if (found := run_again(prints, start, changed)) != expected:
            wrong[path] = (sorted(found - (expected or set())), sorted((expected or set()) - found))
    assert wrong == {}
    assert set(ONE_BY_ONE) <= set(tried)
    assert {field_of(path) for path in tried} - {"data", "deploy"} <= set(RUNS_AGAIN)


def test_every_field_of_the_schema_has_its_row(recipe: Make, tmp_path: Path) -> None:
    fields = fields_of_a_recipe()
    assert fields <= set(RUNS_AGAIN), fields - set(RUNS_AGAIN)
    start = recipe(data={"source": "npz", "params": {"path": tmp_path / "data.npz"}})
    assert fields <= {field_of(path) for path, _ in others(start, Recipe, tmp_path)}
