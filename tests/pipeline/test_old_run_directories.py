"""Run directories of every release: today's program goes on in them or says why not, and never misreads one."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsify_deploy import workspace
from sparsify_deploy.artifacts import durable, layout
from sparsify_deploy.artifacts.store import ArtifactStore
from sparsify_deploy.checkup import run_directory, verify
from sparsify_deploy.checkup.clean import clean
from sparsify_deploy.checkup.verify import DAMAGED, OK, UNMET, Check
from sparsify_deploy.errors import CorruptArtifact, DataError

LAYOUTS = Path(__file__).parent / "layouts"
RELEASES = sorted(path.name for path in LAYOUTS.iterdir() if path.is_dir())
INTERRUPTED = ("--set", "training.steps=400")


@pytest.fixture(params=RELEASES)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with `finished/`, `interrupted/` and `recipe.yaml` of a release."""
    with tarfile.open(LAYOUTS / request.param / "runs.tar.xz") as packed:
        packed.extractall(tmp_path, filter="data") if hasattr(tarfile, "data_filter") else packed.extractall(tmp_path)
    shutil.copy(LAYOUTS / request.param / "recipe.yaml", tmp_path)
    return tmp_path


def everything(folder: Path) -> dict[str, str]:
    """Every file of a folder with its digest, but for what only remembers."""
    notes = ("store/digests.json", "store/.lock", "store/layout.json")
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items() if name not in notes}


def test_a_fixture_of_every_release_is_small_and_named_in_the_changelog() -> None:
    text = (LAYOUTS.parents[2] / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", text, re.MULTILINE)
    assert sorted(released) == RELEASES
    for release in RELEASES:
        assert (LAYOUTS / release / "runs.tar.xz").stat().st_size < 300 << 10


def test_looking_at_an_old_run_changes_nothing(old: Path) -> None:
    before = everything(old)
    found = workspace.open_run(old / "recipe.yaml", run_dir=old / "finished").status()
    assert {status.state for status in found} <= {"cached", "to run", "follows"}
    for status in found:
        if status.state == "to run":  # the reason is a difference that can be read, never a guess
            assert re.match(r"(settings|methods|version|environment|inputs|files)\b.*: (new, |.* -> )", status.why)
    report = workspace.read_report(old / "finished")
    assert report.verdict.startswith("Verdict: ")
    assert len(report.steps) == 18
    assert run_directory.find(old / "finished").report == report
    assert everything(old) == before


def test_an_old_report_is_shown_with_its_own_figures(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sparsify_deploy.__main__ import main

    assert main(["report", str(old / "finished")]) == 0
    shown = capsys.readouterr().out
    plain = json.loads((old / "finished" / "report.json").read_text(encoding="utf-8"))
    assert plain["verdict"] in shown
    for row in plain["rows"]:
        metric = row["model"]["metrics"][plain["metric"]]
        assert re.search(rf"^{re.escape(row['label'])} +{metric:.4f} ", shown, re.MULTILINE)


def test_an_old_run_can_be_verified_and_its_damage_is_found(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_compared", lambda part, engine, *rest: Check(part, engine, "parity", OK, ""))
    found = verify.verify(old / "finished")
    assert found.exit_code == 0
    assert {check.what for check in found.of(OK)} >= {"bytes", "2:4 of mask", "2:4 of weights", "copy"}
    assert not found.of(DAMAGED) + found.of(UNMET)
    for damaged in ("*/weights.safetensors", "*/engine/model.xml", "*/manifest.json"):
        path = next((old / "finished" / "store").glob(damaged))
        content = path.read_bytes()
        path.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
        assert verify.verify(old / "finished").exit_code == 9, damaged
        path.write_bytes(content)


def test_an_interrupted_old_run_keeps_its_attempt_until_asked(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_compared", lambda part, engine, *rest: Check(part, engine, "parity", OK, ""))
    (attempt,) = (old / "interrupted" / "store").glob("*.partial")
    assert any(check.file.parent == attempt for check in verify.verify(old / "interrupted").of(OK))
    assert not any(piece.goes for piece in clean(old / "interrupted").pieces)
    assert attempt.is_dir()
    assert [piece.path for piece in clean(old / "interrupted", unfinished=True).pieces if piece.goes] == [attempt]
    assert not attempt.exists()


def test_a_finished_old_run_goes_on_and_its_results_stay(cli: Callable[..., Any], old: Path) -> None:
    pytest.importorskip("torch")
    before = everything(old / "finished" / "store")
    done = cli("run", "recipe.yaml", "--run-dir", "finished", "--until", "dense/fine_tune")
    assert done.returncode == 0, done.stderr
    after = everything(old / "finished" / "store")
    assert {name: after[name] for name in before if not name.startswith("last/")} == {
        name: digest for name, digest in before.items() if not name.startswith("last/")
    }
    steps = [line for line in done.stderr.splitlines() if line.startswith("dense/train: ")]
    assert steps, "0.1.0 had other settings, so that its training is not taken for today's"
    assert "settings." in steps[0]
    assert verify.verify(old / "finished").exit_code == 0
    assert cli("run", "recipe.yaml", "--run-dir", "finished", "--until", "dense/fine_tune").stderr == ""


@pytest.mark.slow
def test_an_interrupted_old_run_goes_on_to_the_end(cli: Callable[..., Any], old: Path) -> None:
    pytest.importorskip("torch")
    arguments = ("recipe.yaml", "--run-dir", "interrupted", "--until", "dense/train", *INTERRUPTED)
    done = cli("run", *arguments)
    assert done.returncode == 0, done.stderr
    assert "dense/train: " in done.stderr
    fresh = cli("run", *arguments[:2], "fresh", *arguments[3:])
    assert fresh.returncode == 0, fresh.stderr

    def weights(folder: str) -> set[str]:
        return {
            hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (old / folder / "store").glob("train-*/weights.safetensors")
        }

    assert weights("fresh") == weights("interrupted")


def test_predict_says_that_an_old_run_has_no_package(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sparsify_deploy.__main__ import main

    assert main(["predict", str(old / "finished" / "deploy"), "x.npy"]) == 5
    assert "finished run" in capsys.readouterr().err


# -- what a newer release wrote ------------------------------------------------------------------------------------


@pytest.fixture
def newer(old: Path) -> Path:
    """A run directory whose store is one layout ahead."""
    number = layout.LAYOUT + 1
    durable.write_json(old / "finished" / "store" / layout.FILE, {"layout": number, "a new": "field"})
    return old


def test_a_store_of_a_newer_layout_is_refused_by_every_verb(newer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sparsify_deploy.__main__ import main

    before = everything(newer)
    recipe = [str(newer / "recipe.yaml"), "--run-dir", str(newer / "finished")]
    for command in (
        ["run", *recipe],
        ["sensitivity", *recipe],
        ["status", *recipe],
        ["explain", *recipe],
        ["verify", str(newer / "finished")],
        ["clean", str(newer / "finished")],
    ):
        assert main(command) == 5, command
        (line,) = capsys.readouterr().err.splitlines()
        assert f"store: has layout {layout.LAYOUT + 1}, and this program knows those up to {layout.LAYOUT}: use" in line
    assert everything(newer) == before


def test_the_number_is_written_once_and_read_before_anything_else(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    with store.lock():
        assert durable.read_json(tmp_path / "store" / layout.FILE) == {"layout": layout.LAYOUT}
    stamp = (tmp_path / "store" / layout.FILE).stat().st_mtime_ns
    with ArtifactStore(tmp_path / "store").lock():
        assert (tmp_path / "store" / layout.FILE).stat().st_mtime_ns == stamp


@pytest.mark.parametrize("content", [b"", b"{}", b'{"layout": 2}', b"\xff"])
def test_a_number_that_cannot_be_read_is_no_number(tmp_path: Path, content: bytes) -> None:
    (tmp_path / layout.FILE).write_bytes(content)
    with pytest.raises(CorruptArtifact, match="delete that file if no newer release"):
        layout.check(tmp_path)


@pytest.mark.parametrize("number", [0, "3", None, 2.5])
def test_what_is_no_number_is_said(tmp_path: Path, number: object) -> None:
    durable.write_json(tmp_path / layout.FILE, {"layout": number})
    with pytest.raises(CorruptArtifact, match="names no layout"):
        layout.check(tmp_path)


def test_a_newer_report_is_refused(old: Path) -> None:
    path = old / "finished" / "report.json"
    path.write_text(json.dumps({"format": 99, "rows": "of another kind"}), encoding="utf-8")
    with pytest.raises(DataError, match=r"report\.json: is of format 99, and this program reads"):
        workspace.read_report(old / "finished")


def test_the_record_of_a_newer_engine_is_refused(old: Path) -> None:
    from sparsify_deploy.runtimes import _metadata

    engine = old / "finished" / "engines" / "dense" / "openvino" / "model.xml"
    record = _metadata.check(engine, trust=False)
    assert record is not None
    durable.write_json(_metadata.metadata_path(engine), {**record, "format": _metadata.FORMAT + 1})
    with pytest.raises(DataError, match=r"is of format \d, and this program reads those up to \d: use the release"):
        _metadata.check(engine, trust=True)
