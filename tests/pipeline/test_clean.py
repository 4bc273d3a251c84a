"""`clean` deletes what this program left over, what it was asked to, and nothing that is anybody else's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsify_deploy.artifacts.lock import locked
from sparsify_deploy.artifacts.store import ArtifactStore
from sparsify_deploy.checkup.clean import clean, size
from sparsify_deploy.errors import CorruptArtifact, DataError, Locked, UsageError

NAME = "train-" + "ab" * 32


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory by its marks alone: a result that the report uses, one that it does not, an attempt."""
    store = ArtifactStore(tmp_path / "run" / "store")
    with store.lock():
        for name in ("used", "unused"):
            folder = store.begin("train", {"name": name})
            (folder / "weights").write_bytes(b"x" * 1000)
            record = store.commit("train", {"name": name}, {"weights": "weights"}, {}, 1.0)
            if name == "used":
                used = record.fingerprint
        partial = store.begin("train", {"name": "attempt"})
        (partial / "train.checkpoint").write_bytes(b"x" * 5000)
    report = json.loads(REPORT)
    report["steps"] = [{"id": "dense/train", "state": "ran", "seconds": 1.0, "fingerprint": used, "why": ""}]
    (tmp_path / "run" / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return tmp_path / "run"


REPORT = """{"recipe": "r", "created": "", "machine": {}, "metric": "accuracy", "direction": "higher", "rows": [],
"engines": [], "benchmarks": [], "gates": [], "notes": [], "verdict": ""}"""

LEFT = (
    "store/.layout.json.sparsify-new",
    f"store/{NAME}.discarded",
    f"store/.{NAME}.sparsify-old",
    "store/last/.x.json.sparsify-new",
    ".deploy.sparsify-old",
    ".report.json.sparsify-new",
    "deploy.partial",
    "report.html.partial",
    "onnx/sparse/model.onnx.partial",
    "engines/dense/.openvino.sparsify-new",
    "triton/.model.sparsify-old",
)
"""Names that killed processes of this release and of 0.1.0 leave, some of them folders."""

FOREIGN = (
    "notes.partial",
    "recipe.yaml",
    "run.log",
    "mine.discarded",
    "data/x.sparsify-note",
    "store/my-model.partial",
    "store/train-abc.partial",
    f"store/{NAME}.tar",
    f"store/x{NAME}x.discarded",
    "deploy/model.onnx",
    "onnx/model.partial.onnx",
)
"""Names that are like ours, and are not."""


def plant(run: Path, names: tuple[str, ...]) -> None:
    for number, name in enumerate(names):
        path = run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if number % 2:
            path.mkdir()
            path = path / "inside"
        path.write_bytes(b"x" * 100)


def everything(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_leftovers_go_and_nothing_else(run: Path) -> None:
    plant(run, FOREIGN)
    before = everything(run)
    plant(run, LEFT)
    announced = clean(run, dry_run=True)
    with_all = everything(run)
    assert clean(run, dry_run=True) == announced
    assert everything(run) == with_all
    done = clean(run)
    parents = {"store/last", "onnx/sparse", "onnx", "engines", "engines/dense", "triton"}
    assert everything(run) - {"store/digests.json"} == (before | parents) - {"store/digests.json"}
    assert {piece.path.relative_to(run).as_posix() for piece in done.pieces if piece.goes} == set(LEFT)
    assert (done.freed_bytes, done.pieces, announced.dry_run) == (len(LEFT) * 100, announced.pieces, True)
    assert clean(run).freed_bytes == 0


def test_a_run_directory_that_is_named_through_a_link_is_cleaned_too(run: Path, tmp_path: Path) -> None:
    plant(run, LEFT)
    (tmp_path / "link").symlink_to(run)
    through = clean(tmp_path / "link")
    assert through.freed_bytes > 0
    assert not [name for name in LEFT if os.path.lexists(run / name)]


def test_what_is_kept_is_named_with_its_size_and_its_option(run: Path) -> None:
    kept = {piece.path.name.split("-")[0]: piece for piece in clean(run).pieces}
    assert len(clean(run).pieces) == 2
    for piece in clean(run).pieces:
        option = "--unfinished" if piece.path.name.endswith(".partial") else "--unused"
        assert option in piece.why
        assert not piece.goes
        assert piece.bytes == size(piece.path) > 1000
    assert kept


@pytest.mark.parametrize(("option", "ending"), [("unfinished", ".partial"), ("unused", "")])
def test_attempts_and_unused_results_go_where_asked_to(run: Path, option: str, ending: str) -> None:
    before = everything(run / "store")
    announced = clean(run, dry_run=True, **{option: True})  # type: ignore[arg-type]
    done = clean(run, **{option: True})  # type: ignore[arg-type]
    (gone,) = {name.partition("/")[0] for name in before - everything(run / "store") if name.startswith("train-")}
    assert gone.endswith(ending)
    assert (".partial" in gone) == (option == "unfinished")
    assert done.freed_bytes == announced.freed_bytes > 1000
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert (run / "store" / f"train-{report['steps'][0]['fingerprint']}").is_dir()


def test_links_are_not_followed(run: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "manifest.json").write_text("{}", encoding="utf-8")
    (precious / "file").write_text("precious", encoding="utf-8")
    (run / "store" / NAME).symlink_to(precious)
    (run / "store" / f"{NAME}.partial").symlink_to(precious)
    (run / "store" / f".{NAME}.sparsify-old").symlink_to(precious)
    (run / ".deploy.sparsify-new").symlink_to(precious / "file")
    partial = run / "store" / f"quantize-{'cd' * 32}.partial"
    partial.mkdir()
    (partial / "parts.json").symlink_to(precious / "file")
    (run / "onnx").symlink_to(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "y.partial").write_text("", encoding="utf-8")
    found = clean(run, unfinished=True, unused=True)
    assert everything(precious) == {"manifest.json", "file"}
    assert (tmp_path / "x" / "y.partial").exists()
    assert (run / "store" / NAME).is_symlink()
    assert not os.path.lexists(run / "store" / f".{NAME}.sparsify-old")
    assert not os.path.lexists(run / ".deploy.sparsify-new")
    assert partial.is_dir(), "its mark is a link"
    assert any("holds no mark of this program" in piece.why for piece in found.pieces)


def test_a_folder_without_marks_stays(run: Path) -> None:
    (run / "store" / NAME).mkdir()
    (run / "store" / NAME / "thesis.tex").write_text("", encoding="utf-8")
    (run / "store" / f"{NAME}.partial").mkdir()
    clean(run, unfinished=True, unused=True)
    assert (run / "store" / NAME / "thesis.tex").exists()
    assert (run / "store" / f"{NAME}.partial").exists()


def test_a_run_at_work_is_left_alone(run: Path) -> None:
    plant(run, LEFT)
    before = everything(run)
    source = "import pathlib, sys; from sparsify_deploy.checkup import clean; clean.clean(pathlib.Path(sys.argv[1]))"
    with locked(run / "store"):
        done = subprocess.run([sys.executable, "-c", source, run], capture_output=True, text=True, check=False)
        assert "is in use by process" in done.stderr.splitlines()[-1]
        assert Locked.__name__ in done.stderr
        assert everything(run) == before
        assert clean(run, dry_run=True).freed_bytes == len(LEFT) * 100


def test_what_is_used_must_be_known(run: Path) -> None:
    (run / "report.json").write_text("{", encoding="utf-8")
    with pytest.raises(CorruptArtifact):
        clean(run, unused=True)
    (run / "report.json").unlink()
    with pytest.raises(UsageError, match="has no report that says which results are used"):
        clean(run, unused=True)
    assert not any("--unused" in piece.why for piece in clean(run).pieces)


def test_results_in_a_shared_store_are_not_this_runs_to_delete(run: Path, tmp_path: Path) -> None:
    (run / "store").rename(tmp_path / "shared")
    for options in ({"unused": True}, {"unfinished": True}):
        with pytest.raises(UsageError, match="may be shared with other recipes"):
            clean(run, tmp_path / "shared", **options)
    assert clean(run, tmp_path / "shared").freed_bytes == 0
    with pytest.raises(DataError):
        clean(run)


def test_the_verb_says_what_it_does(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sparsify_deploy.__main__ import main

    plant(run, LEFT)
    assert main(["clean", str(run), "--dry-run"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("would delete") for line in shown) == len(LEFT)
    assert shown[-1] == "would free 0.00 MiB"
    assert main(["clean", str(run), "--unfinished", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(piece["bytes"] for piece in found["pieces"] if piece["goes"]) > 5000
    assert not list((run / "store").glob("*.partial"))


def test_after_all_that_can_go_is_gone_a_run_has_nothing_to_do(
    cli: Callable[..., Any], finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished / "runs", tmp_path / "runs")
    shutil.copy(finished / "tiny.yaml", tmp_path)
    folder = tmp_path / "runs" / "tiny"
    shutil.copytree(next((folder / "store").glob("init_mask-*")), folder / "store" / f"init_mask-{'ef' * 32}")
    assert len([piece for piece in clean(folder, unused=True, unfinished=True).pieces if piece.goes]) == 1
    done = cli("status", "tiny.yaml", "--json")
    assert {step["state"] for step in json.loads(done.stdout)} == {"cached"}
