"""`verify` finds every byte that is not as committed, and says what holds the pattern and what does not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sparsify_deploy.artifacts import durable
from sparsify_deploy.artifacts.fingerprint import file_digest
from sparsify_deploy.artifacts.store import MANIFEST
from sparsify_deploy.checkup import run_directory, verify
from sparsify_deploy.checkup.verify import DAMAGED, OK, UNCHECKED, UNMET, Check, Verified
from sparsify_deploy.errors import DataError, NativeCrash

NOTES = ("last", "digests.json", "layout.json", ".lock")
"""In a store: what only remembers, and is made again."""


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run directory that may be spoiled."""
    return Path(shutil.copytree(finished / "runs" / "tiny", tmp_path / "tiny", symlinks=True))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine is run."""
    monkeypatch.setattr(verify, "_compared", lambda part, engine, *rest: Check(part, engine, "parity", OK, ""))


def stage(run: Path, name: str, holding: str = "") -> Path:
    """The folder of a stage's result that has a file of that name."""
    (found,) = [path for path in sorted((run / "store").glob(f"{name}-*")) if (path / holding).exists()]
    return found


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = durable.read_json(folder / MANIFEST)
    return found


def reseal(folder: Path) -> None:
    """Make a manifest list the bytes that are there, as if the stage had written them."""
    content = manifest(folder)
    for entry in content["outputs"].values():
        entry["digest"] = file_digest(folder / entry["file"], "blake3")
    durable.write_json(folder / MANIFEST, content)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def told(found: Verified, state: str) -> set[Path]:
    return {check.file for check in found.of(state)}


def test_a_finished_run_is_as_it_was_committed(cli: Callable[..., Any], run: Path) -> None:
    done = cli("verify", run, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    by_what: dict[str, list[dict[str, str]]] = {}
    for check in found["checks"]:
        by_what.setdefault(check["what"], []).append(check)
    assert {what: {check["state"] for check in checks} for what, checks in by_what.items()} == {
        "bytes": {OK},
        "2:4 of mask": {OK},
        "2:4 of weights": {OK},
        "2:4 of ONNX initializers": {OK},
        "engine's record": {OK},
        "copy": {OK},
        "parity with ONNX": {OK},
        "parity with torch": {UNCHECKED},
    }
    assert {check["part"] for check in by_what["2:4 of weights"]} == {"sparse/project_nm", "sparse/quantize"}
    assert len(by_what["parity with ONNX"]) == len(by_what["engine's record"]) == 2
    results = [path for path in (run / "store").glob("*-*") if path.is_dir()]
    assert len(by_what["bytes"]) == len(results) + len(["report.json", "report.md", "report.html"])
    assert found["exit_code"] == 0
    assert "comparing model.xml with its ONNX file" in done.stderr


@pytest.mark.usefixtures("quick")
def test_the_table_says_what_was_not_checked_and_why(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sparsify_deploy.__main__ import main

    assert main(["verify", str(run), "-q"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "0 NOT MET, 0 DAMAGED, 2 not checked" in shown.out.splitlines()[-1]
    assert shown.out.count("torch's answers are not stored; when exported: largest difference") == 2


def protected(run: Path) -> Iterator[Path]:
    """Every file of a run directory that something says the bytes of."""
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        inside = path.relative_to(run)
        note = inside.parts[0] == "store" and inside.parts[1] in NOTES
        if not note and inside.parts[0] not in ("recipe.yaml", "run.log", "report.sha256"):
            yield path


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("how", [flip, cut, Path.unlink])
def test_a_changed_byte_in_any_file_is_found_and_the_file_named(run: Path, how: Callable[[Path], None]) -> None:
    files = list(protected(run))
    assert len(files) > 60
    for path in files:
        content = path.read_bytes()
        how(path)
        found = verify.verify(run)
        assert found.exit_code == 9, path
        named = told(found, DAMAGED)
        assert any(path == other or other in path.parents or path in other.parents for other in named), (path, named)
        for check in found.of(DAMAGED):
            assert "--again" in check.finding or "`run`" in check.finding, check
        path.write_bytes(content)
    assert verify.verify(run).exit_code == 0


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("how", [flip, cut, Path.unlink])
@pytest.mark.parametrize("lists", [True, False])
def test_all_files_that_are_damaged_at_once_are_named(run: Path, how: Callable[[Path], None], lists: bool) -> None:
    """`lists` say what the bytes of other files are, which nobody can judge without them."""
    own = {run / "report.json", run / "deploy" / "deploy.json"}
    files = [path for path in protected(run) if (path.name == MANIFEST or path in own) == lists]
    assert len(files) > 15
    for path in files:
        how(path)
    found = verify.verify(run)
    named = told(found, DAMAGED)
    assert found.exit_code == 9
    for path in files:
        assert any(path == other or other in path.parents or path in other.parents for other in named), path


@pytest.mark.usefixtures("quick")
def test_every_damaged_file_is_listed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sparsify_deploy.__main__ import main

    damaged = [
        stage(run, "project_nm") / "weights.safetensors",
        stage(run, "project_nm") / "mask.safetensors",
        stage(run, "init_mask") / "mask.safetensors",
        run / "deploy" / "model.onnx",
        run / "report.md",
    ]
    for path in damaged:
        flip(path)
    shutil.rmtree(gone := stage(run, "benchmark"))
    engine = next((run / "store").glob("build_engine-*")) / "engine" / "model.bin"
    flip(engine)
    assert main(["verify", str(run), "-q"]) == 9
    shown = capsys.readouterr()
    for path in (*damaged, engine):
        assert sum(str(path) in line for line in shown.err.splitlines()) == 1, path
    assert any("benchmark/openvino: its result" in line for line in shown.err.splitlines()), gone
    assert all(line.startswith("sparsify-deploy: ") for line in shown.err.splitlines())
    assert f"{len(damaged) + 2} DAMAGED" in shown.out


def test_damaged_files_are_not_opened(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (run / "store").rglob("*"):
        if path.suffix in (".safetensors", ".onnx", ".xml", ".bin"):
            flip(path)
    from sparsify_deploy.checkup import pattern_checks
    from sparsify_deploy.runtimes import _child

    monkeypatch.setattr(pattern_checks, "_opened", lambda path: pytest.fail(f"{path} was opened"))
    monkeypatch.setattr(_child, "call", lambda *given, **named: pytest.fail("an engine was opened"))
    found = verify.verify(run)
    assert found.exit_code == 9
    assert [check for check in found.checks if "2:4" in check.what] == []


# -- the pattern ---------------------------------------------------------------------------------------------------


def with_a_weight_too_many(values: dict[str, Any], name: str) -> None:
    block = values[name].reshape(values[name].shape[0], values[name].shape[1], -1)
    block[0, :4, 0] = True if block.dtype == bool else 0.5


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("project_nm", "mask.safetensors"),
        ("project_nm", "weights.safetensors"),
        ("quantize", "quantized.safetensors"),
    ],
)
def test_tensors_that_break_the_pattern_are_named(run: Path, name: str, file: str) -> None:
    folders = [path for path in (run / "store").glob(f"{name}-*") if "mask" in (path / MANIFEST).read_text("utf-8")]
    folder = next(path for path in folders if name == "project_nm" or "mask" in manifest(path)["parts"]["inputs"])
    values = load_file(folder / file)
    layer = next(row["layer"] for row in manifest(stage(run, "project_nm"))["measured"]["layers"] if row["projected"])
    with_a_weight_too_many(values, f"{layer}.weight")
    save_file(values, folder / file)
    reseal(folder)
    found = verify.verify(run)
    assert found.exit_code == 4
    (broken,) = found.of(UNMET)
    assert broken.file == folder / file
    assert f"breaks 2:4 along input channels: {layer}.weight in 1 groups" in broken.finding


@pytest.mark.usefixtures("quick")
def test_a_projected_layer_that_the_mask_lacks_is_named(run: Path) -> None:
    folder = stage(run, "project_nm")
    values = load_file(folder / "mask.safetensors")
    name = next(iter(sorted(values)))
    projected = [row["layer"] for row in manifest(folder)["measured"]["layers"] if row["projected"]]
    name = next(name for name in sorted(values) if name.rpartition(".")[0] in projected)
    del values[name]
    save_file(values, folder / "mask.safetensors")
    reseal(folder)
    assert any(f"{name} is not in it" in check.finding for check in verify.verify(run).of(UNMET))


@pytest.mark.usefixtures("quick")
def test_initializers_that_break_the_pattern_are_named(run: Path) -> None:
    import onnx

    folder = next(path for path in (run / "store").glob("export_onnx-*") if manifest(path)["measured"]["nm_checked"])
    model = onnx.load(folder / "model.onnx")
    name = manifest(folder)["measured"]["nm_checked"][0]["parameter"]
    (tensor,) = [each for each in model.graph.initializer if each.name == name]
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.reshape(values.shape[0], values.shape[1], -1)[0, :4, 0] = 1
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, name))
    onnx.save(model, folder / "model.onnx")
    reseal(folder)
    (broken,) = verify.verify(run).of(UNMET)
    assert broken.file == folder / "model.onnx"
    assert f"{name} in 1 groups" in broken.finding


def test_the_pattern_of_other_stages_is_read_off_their_records(tmp_path: Path) -> None:
    from sparsify_deploy.artifacts.store import Record
    from sparsify_deploy.checkup import pattern_checks

    def record(stage: str, measured: dict[str, Any], settings: dict[str, Any], **masks: Any) -> Record:
        path = tmp_path / f"{stage}.safetensors"
        save_file(masks, path)
        return Record(
            stage=stage,
            fingerprint="0" * 64,
            parts={"settings": settings, "inputs": {}},
            folder=tmp_path,
            outputs={"mask": path},
            digests={"mask": stage},
            bytes={"mask": 1},
            measured=measured,
            seconds=0.0,
            created="",
        )

    good = np.tile(np.array([True, True, False, False]), (2, 2))
    bad = np.ones((2, 8), bool)
    bad[0, 0] = False
    dense = np.ones((2, 8), bool)
    records = [
        record("init_mask", {"init_pattern": "2:4"}, {}, a=good, b=bad),
        record("train", {}, {"fit": {"params": {"pattern": "2:4"}}}, a=good, b=bad, c=dense),
        record("other", {"init_pattern": None}, {}, a=bad),
    ]
    found = list(pattern_checks.held(records, {tmp_path / f"{r.stage}.safetensors" for r in records}))
    assert [(held.record.stage, held.layers, held.broken) for held in found] == [
        ("init_mask", 2, ("b in 4 groups",)),
        ("train", 2, ("b in 4 groups",)),
    ]


# -- engines -------------------------------------------------------------------------------------------------------


def test_an_engine_that_computes_something_else_is_found(run: Path) -> None:
    folders = sorted((run / "store").glob("build_engine-*"))
    sparse, dense = sorted(folders, key=lambda path: manifest(path)["parts"]["inputs"]["onnx"])
    for name in ("model.xml", "model.bin"):
        shutil.copyfile(dense / "engine" / name, sparse / "engine" / name)
    record = durable.read_json(sparse / "engine" / "model.xml.json")
    record["files"] = {name: file_digest(sparse / "engine" / name) for name in record["files"]}
    durable.write_json(sparse / "engine" / "model.xml.json", record)
    reseal(sparse)
    found = verify.verify(run)
    assert [check.file for check in found.of(UNMET)] == [sparse / "engine" / "model.xml"]
    assert "relative L2 difference" in found.of(UNMET)[0].finding


@pytest.mark.usefixtures("quick")
def test_an_engine_of_another_file_is_found(run: Path) -> None:
    folder = sorted((run / "store").glob("build_engine-*"))[0]
    record = durable.read_json(folder / "engine" / "model.xml.json")
    durable.write_json(folder / "engine" / "model.xml.json", {**record, "onnx_sha256": "0" * 64})
    reseal(folder)
    assert any("built from another ONNX file" in check.finding for check in verify.verify(run).of(DAMAGED))


def test_an_engine_that_crashes_is_a_line_and_the_rest_is_checked(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsify_deploy.runtimes import _child

    def crash(*given: Any, **named: Any) -> None:
        raise NativeCrash(f"{named['what']} crashed (SIGSEGV)")

    monkeypatch.setattr(_child, "call", crash)
    found = verify.verify(run)
    assert found.exit_code == 4
    assert [check.what for check in found.of(UNMET)] == ["parity with ONNX"] * 2
    assert all("crashed (SIGSEGV)" in check.finding for check in found.of(UNMET))


def test_a_runtime_that_is_not_here_is_said_and_no_fault(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsify_deploy.runtimes import openvino

    monkeypatch.setattr(openvino, "unavailable_reason", lambda: "install it")
    found = verify.verify(run)
    assert found.exit_code == 0
    assert {check.finding for check in found.checks if check.what == "parity with ONNX"} == {"install it"}


# -- other folders -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_a_store_elsewhere_is_named(run: Path, tmp_path: Path) -> None:
    (run / "store").rename(tmp_path / "shared")
    with pytest.raises(DataError, match="give it with --store"):
        verify.verify(run)
    assert verify.verify(run, tmp_path / "shared").exit_code == 0


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "a store of another kind"])
def test_what_is_no_run_directory_is_said(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    from sparsify_deploy.__main__ import main

    place = tmp_path / "place"
    if kind == "file":
        place.write_text("", encoding="utf-8")
    elif kind != "missing":
        place.mkdir()
    if kind == "a store of another kind":
        (place / "store").mkdir()
        (place / "store" / "manifest.json").write_text("{}", encoding="utf-8")
    for verb in ("verify", "clean"):
        assert main([verb, str(place)]) == 5
        assert "name a run directory, such as runs/digits" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_an_attempt_that_did_not_finish_is_looked_into(run: Path) -> None:
    pytest.importorskip("torch")
    from sparsify_deploy.training import checkpoint

    partial = run / "store" / f"train-{'ab' * 32}.partial"
    partial.mkdir()
    checkpoint.write(partial / "train.checkpoint", {"step": 1})
    checkpoint.write(partial / "train.checkpoint", {"step": 2})
    found = verify.verify(run)
    assert found.exit_code == 0
    assert {check.file.name for check in found.of(OK) if check.part == "train, unfinished"} == {
        "train.checkpoint",
        "train.checkpoint.before",
    }
    flip(partial / "train.checkpoint.before")
    assert told(verify.verify(run), DAMAGED) == {partial / "train.checkpoint.before"}


@pytest.mark.usefixtures("quick")
def test_a_result_that_no_report_names_is_checked_too(run: Path) -> None:
    report = run_directory.find(run).report
    assert report is not None
    for name in ("report.json", "report.sha256"):
        (run / name).unlink()
    found = verify.verify(run)
    assert "not of the last report" in {check.part for check in found.checks}
    assert found.exit_code == 0
    assert "there is none: no run has finished here" in {check.finding for check in found.of(UNCHECKED)}
