"""Code that a recipe names is executed with --trust-code alone: files that leave a mark when it is, for each verb."""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsify_deploy.__main__ import main
from sparsify_deploy.errors import UsageError
from sparsify_deploy.recipe import CalibrationData
from sparsify_deploy.stages.trust import user_code
from sparsify_deploy.types import Silent
from sparsify_deploy.workspace import open_run

RECIPE = """\
version: 1
{model}
{data}
task: {{{task}}}
training: {{steps: 2}}
nm: {{fine_tune: {{}}}}
quantize: {{}}
deploy: [{{runtime: openvino}}]
{more}
"""

PLAIN = {
    "model": "model: {params: {name: resnet8, in_channels: 1}}",
    "data": "data: {source: digits}",
    "task": "",
    "more": "",
}

CODE = {
    "model.source file": ("own.py", {"model": "model: {source: file, params: {path: own.py}}"}),
    "data.source file": ("own.py", {"data": "data: {source: file, params: {path: own.py}}"}),
    "task.name file": ("own.py", {"task": "name: file, params: {path: own.py}"}),
    "model.checkpoint": ("evil.pt", {"model": PLAIN["model"].replace("model: {", "model: {checkpoint: evil.pt, ")}),
    "distillation.teacher": ("evil.pt", {"more": "distillation: {teacher: evil.pt, phases: [fine_tune]}"}),
}


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (self.mark,))  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python file and a pickle that leave the file `ran` behind when they are executed."""
    monkeypatch.chdir(tmp_path)
    mark = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
    Path("own.py").write_text(mark + "task = model = data = 3\n", encoding="utf-8")
    with zipfile.ZipFile("evil.pt", "w") as archive:
        archive.writestr("evil/data.pkl", pickle.dumps({"w": Evil(tmp_path / "ran")}, protocol=2))
        archive.writestr("evil/version", "3\n")


@pytest.fixture
def write() -> Callable[..., Path]:
    def _write(**changes: str) -> Path:
        path = Path("r.yaml")
        path.write_text(RECIPE.format(**{**PLAIN, **changes}), encoding="utf-8")
        return path

    return _write


def ran() -> bool:
    return Path("ran").exists()


def digest(name: str) -> str:
    return hashlib.sha256(Path(name).read_bytes()).hexdigest()


@pytest.mark.parametrize("section", CODE)
@pytest.mark.parametrize(
    "verb",
    [["validate"], ["plan"], ["plan", "--json"], ["status"], ["explain"], ["run"], ["sensitivity"]],
    ids=" ".join,
)
def test_no_verb_runs_code_without_the_flag(write, capsys, section: str, verb: list[str]) -> None:
    name, changes = CODE[section]
    write(**changes)
    code = main([verb[0], "r.yaml", *verb[1:]])
    printed = capsys.readouterr()
    assert not ran()
    if verb[0] not in ("run", "sensitivity"):
        assert code == 0, printed.err
    else:
        assert code == 2
        (line,) = printed.err.splitlines()
        assert "--trust-code" in line
        assert f"{section}: {Path(name).resolve()} (sha256 {digest(name)})" in line
    if verb == ["plan"]:
        assert "dense/model.report" in printed.out
        assert f"with --trust-code: {section}: {Path(name).resolve()} (sha256 {digest(name)})" in printed.out
    if verb == ["plan", "--json"]:
        found = json.loads(printed.out)
        assert found["steps"][0]["state"] == "to run"
        assert (found["trusted"], found["layers"], len(found["code"])) == (False, [], 1)


def test_every_file_is_named(write) -> None:
    write(model=CODE["model.source file"][1]["model"], task=CODE["task.name file"][1]["task"])
    with pytest.raises(UsageError) as caught:
        open_run(Path("r.yaml"), trust_code=False)
    assert str(caught.value) == (
        "r.yaml: runs code that it names, so read that first, then add --trust-code: "
        f"model.source file: {Path('own.py').resolve()} (sha256 {digest('own.py')}) is executed; "
        f"task.name file: {Path('own.py').resolve()} (sha256 {digest('own.py')}) is executed"
    )


def test_calibration_data_count_too(write) -> None:
    """A recipe may not name such a file there; should it ever, it is asked about."""
    write(data=CODE["data.source file"][1]["data"])
    recipe = open_run(Path("r.yaml")).recipe
    data = CalibrationData.model_construct(source="file", params=recipe.data.params)
    assert recipe.quantize is not None
    changed = recipe.model_copy(update={"quantize": recipe.quantize.model_copy(update={"calibration_data": data})})
    assert [code.section for code in user_code(changed)] == [
        "data.source file",
        "quantize.calibration_data.source file",
    ]


@pytest.mark.parametrize("section", CODE)
def test_a_workspace_that_was_not_told_runs_nothing(write, section: str) -> None:
    write(**CODE[section][1])
    opened = open_run(Path("r.yaml"))
    for verb in (
        lambda: opened.run(Silent(), device="cpu", checkpoint_every_s=30.0),
        lambda: opened.sensitivity(Silent(), device="cpu"),
    ):
        with pytest.raises(UsageError, match="add --trust-code"):
            verb()
    assert not ran()


@pytest.mark.parametrize("section", CODE)
def test_the_flag_lets_it_run_and_says_what(write, section: str) -> None:
    write(**CODE[section][1])
    said = []

    class Listening(Silent):
        def say(self, message: str) -> None:
            said.append(message)

    opened = open_run(Path("r.yaml"), trust_code=True)
    assert not ran()
    assert opened.plan.subject.trusted
    with pytest.raises(Exception):  # noqa: B017, PT011 - a network that is 3, a checkpoint of nothing
        opened.run(Listening(), device="cpu", checkpoint_every_s=30.0)
    name = CODE[section][0]
    assert said[0].startswith(f"trusted: {section}: {Path(name).resolve()} (sha256 {digest(name)})")
    assert ran()


def test_what_runs_no_code_needs_no_flag(write, capsys) -> None:
    write()
    assert open_run(Path("r.yaml"), trust_code=False).code == ()
    assert main(["plan", "r.yaml"]) == 0
    assert "trust" not in capsys.readouterr().out


def test_a_file_that_is_gone_is_one_line(write, capsys) -> None:
    write(task="name: file, params: {path: gone.py}")
    assert main(["run", "r.yaml"]) == 5
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["validate", "r.yaml"]) == 0


@pytest.mark.parametrize("arguments", [["list"], ["list", "tasks"], ["report", "runs/r"]], ids=" ".join)
def test_verbs_without_a_recipe_run_nothing(write, capsys, arguments: list[str]) -> None:
    write(**CODE["task.name file"][1])
    main(arguments)
    assert not ran()


@pytest.mark.parametrize(
    "options",
    [
        ["--model", "file:own.py", "--data", "digits"],
        ["--model", "builtin:resnet8", "--data", "file:own.py"],
        ["--model", "builtin:resnet8", "--data", "digits", "--checkpoint", "evil.pt"],
    ],
    ids=" ".join,
)
def test_init_runs_nothing_without_the_flag(capsys, options: list[str]) -> None:
    assert main(["init", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--trust-code" in line
    assert "sha256" in line
    assert not ran()


def test_a_task_of_ones_own_is_asked_for_its_metrics_once_it_is_trusted(write, capsys) -> None:
    write(task="name: file, params: {path: own.py}", more="gates: {metric: hits, max_drop: 0.1}")
    assert main(["validate", "r.yaml"]) == 0
    Path("own.py").write_text(
        "class task:\n    metrics = {'hit': 'higher'}\n"
        "    def loss(self, outputs, batch): ...\n    def evaluate(self, outputs, batch): ...\n",
        encoding="utf-8",
    )
    capsys.readouterr()
    assert main(["run", "r.yaml", "--trust-code"]) == 2
    assert "gates.metric: file has no metric 'hits'; did you mean 'hit'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "metric", "says"),
    [
        ("", "top5", "top5 is measured by the number of classes: ask for it in task.params (top_k, positive)"),
        ("params: {top_k: [5]}", "top5", None),
        ("params: {positive: 1}", "f1_binary", None),
        ("name: regression", "r2", None),
        ("", "f1_macr", "classification has no metric 'f1_macr'; did you mean 'f1_macro'?"),
        ("name: regression", "accuracy", "regression has no metric 'accuracy'"),
    ],
)
def test_gates_take_any_metric_that_is_always_measured(write, capsys, task, metric, says) -> None:
    write(task=task, more=f"gates: {{metric: {metric}}}")
    assert main(["validate", "r.yaml"]) == (2 if says else 0)
    printed = capsys.readouterr()
    assert (says or "valid") in printed.out + printed.err


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("checkpoint_partial: true", "model.checkpoint_partial: has no effect without model.checkpoint"),
        ("checkpoint_match: order", "model.checkpoint_match: has no effect without model.checkpoint"),
    ],
)
def test_settings_of_a_checkpoint_that_have_no_effect(write, capsys, model, says) -> None:
    write(model=PLAIN["model"].replace("model: {", f"model: {{{model}, "))
    assert main(["validate", "r.yaml"]) == 2
    assert says in capsys.readouterr().err


def test_paths_of_a_run_with_code_of_the_users_do_not_follow_the_working_directory(
    write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, changes = CODE["model.source file"]
    recipe = write(**changes)
    opened = open_run(recipe, run_dir=Path("run"), store=Path("kept"), trust_code=True)
    assert (opened.folder, opened.source, opened.store.folder) == (
        tmp_path / "run",
        tmp_path / "r.yaml",
        tmp_path / "kept",
    )
    assert [code.path for code in opened.code] == [tmp_path / name]
    assert open_run(recipe, run_dir=Path("run")).folder == Path("run")
