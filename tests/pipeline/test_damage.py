"""A flipped byte, a cut, an empty, missing or swapped file in any place is noticed before anything is made from it."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sparsify_deploy import reports
from sparsify_deploy.artifacts import durable
from sparsify_deploy.artifacts.store import ArtifactStore
from sparsify_deploy.errors import CorruptArtifact, SparsifyError
from sparsify_deploy.reporting import package
from sparsify_deploy.runtimes import _metadata
from sparsify_deploy.workspace import open_run

KINDS = ("flip", "flip, times put back", "cut", "longer", "empty", "delete", "folder", "link", "dangling link")
CACHES = ("digests.json", "last/", ".lock")
"""What is never believed: all in it can be found out again."""


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run without INT8, in `run`, and its recipe beside it; every test leaves it as it was."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("damage")
    text = """\
version: 1
name: tiny
sparsity: 0.6
threads: 1
model: {source: builtin, params: {name: resnet8, width: 16, in_channels: 1}}
data: {source: digits}
training: {steps: 4, batch_size: 16, optimizer: {lr: 0.05}}
init: {criterion: magnitude}
train: {method: static}
nm: {}
export: {parity_examples: 16}
deploy: [{runtime: openvino}]
benchmark: {rounds: 5, round_ms: 1.0, warmup_ms: 1.0}
"""
    (folder / "tiny.yaml").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "sparsify_deploy", "run", "tiny.yaml", "--run-dir", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


def artifacts(run: Path) -> list[Path]:
    """Every file of a run directory from which the program makes or tells something, relative to it."""
    found = []
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        published = name.startswith("onnx/") or name in ("recipe.yaml", "report.md", "report.html", reports.SUMS)
        if path.is_file() and not published and not any(part in name for part in CACHES) and path.suffix != ".log":
            found.append(path.relative_to(run))
    return found


@contextmanager
def damaged(path: Path, kind: str, rng: random.Random) -> Iterator[None]:
    """`path` changed in that way inside; outside it is as it was, its times included."""
    content, times, aside = path.read_bytes(), path.stat(), path.with_name(path.name + ".aside")
    path.rename(aside)
    changed = bytearray(content)
    if content:
        changed[rng.randrange(len(content))] ^= rng.randrange(1, 256)
    try:
        if kind.startswith("flip"):
            path.write_bytes(changed)
            if kind != "flip":
                os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        elif kind == "cut":
            path.write_bytes(content[: rng.randrange(len(content))])
        elif kind == "longer":
            path.write_bytes(content + b"\0")
        elif kind == "empty":
            path.write_bytes(b"")
        elif kind == "folder":
            path.mkdir()
        elif kind == "link":
            path.with_name("elsewhere").write_bytes(changed)
            path.symlink_to(path.with_name("elsewhere"))
        elif kind == "dangling link":
            path.symlink_to(path.with_name("nowhere"))
        yield
    finally:
        durable.remove(path)
        durable.remove(path.with_name("elsewhere"))
        aside.rename(path)


def use(folder: Path, name: Path) -> Any:
    """What reads that file, as the verbs do: `run` and `status`, `predict`, `bench`, `report`."""
    run, top = folder / "run", name.parts[0]
    if top == "deploy":
        return package.read(run / "deploy")
    if top == "engines":
        return _metadata.check((run / name).with_name("model.xml"), trust=False)
    if name.name == "report.json" and top == name.name:
        return reports.read_report(run)
    return open_run(folder / "tiny.yaml", run_dir=run).status()


def test_one_hundred_damages_are_all_found_and_named(kept: Path) -> None:
    """Each kind of file with each kind of damage at least once, then at random."""
    rng, run = random.Random(4), kept / "run"
    files = artifacts(run)
    kinds_of_file = {re.sub(r"-[0-9a-f]{64}", "", str(name)): name for name in files}
    assert {"safetensors", "onnx", "xml", "bin", "json"} <= {name.suffix[1:] for name in files}
    trials = [(name, rng.choice(KINDS)) for name in kinds_of_file.values()]
    trials += [(name, kind) for kind in KINDS for name in rng.sample(files, 3)]
    trials += [(rng.choice(files), rng.choice(KINDS)) for _ in range(max(100 - len(trials), 40))]
    assert len(trials) >= 100
    for name in {*dict(trials)}:
        use(kept, name)
    codes: dict[int, int] = {}
    for name, kind in trials:
        with damaged(run / name, kind, rng):
            try:
                use(kept, name)
            except SparsifyError as error:
                said, code = str(error), error.exit_code
            else:
                pytest.fail(f"{name}: {kind} was not noticed")
        codes[code] = codes.get(code, 0) + 1
        assert "\n" not in said
        assert name.name in said, (name, kind, said)
        assert re.search(r"--again|again|delete|--trust-engine|name the folder", said), said
        # a missing record or note leaves a folder that is as foreign as any other
        foreign = name.parts[0] in ("engines", "deploy") and kind in ("delete", "folder", "dangling link", "link")
        assert code == 9 or (foreign and code in (2, 5)), (name, kind, said)
    for name in {*dict(trials)}:
        use(kept, name)
    assert codes[9] >= 90


def test_published_copies_and_caches_that_were_damaged_are_made_again(kept: Path, cli: Callable[..., Any]) -> None:
    """None of them is believed: the run has nothing to do, and afterwards they are as they were."""
    rng, run = random.Random(5), kept / "run"
    for name in ("digests.json", "last/sparse.train.json", "last/benchmark.openvino.json"):
        path = run / "store" / name
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 0x21
        path.write_bytes(content)
    before = {}
    for path in [*run.glob("onnx/*/*"), *run.glob("engines/*/*/*"), *run.glob("report.*"), *run.glob("deploy/*")]:
        before[path] = path.read_bytes()
        content = bytearray(before[path])
        content[rng.randrange(len(content))] ^= 0x21
        path.write_bytes(content)
    done = cli("run", kept / "tiny.yaml", "--run-dir", run)
    assert done.returncode == 0, done.stderr
    assert "first time" not in done.stderr
    for path, content in before.items():
        assert path.is_file(), path
        if path.name not in ("report.json", "report.md", "report.html", "report.sha256"):  # they hold when and why
            assert path.read_bytes() == content, path
    assert reports.is_report_whole(run)
    assert durable.read_json(run / "store" / "digests.json")["files"]
    assert not [path for path in run.rglob("*") if ".sparsify-" in path.name]


def test_the_command_line_ends_with_exit_code_9_and_one_line(kept: Path, cli: Callable[..., Any]) -> None:
    (weights,) = kept.glob("run/store/project_nm-*/weights.safetensors")
    with damaged(weights, "flip", random.Random(6)):
        done = cli("run", kept / "tiny.yaml", "--run-dir", kept / "run")
    assert done.returncode == 9
    assert str(weights) in done.stderr
    assert len([line for line in done.stderr.splitlines() if "--again" in line]) == 1
    assert "Traceback" not in done.stderr


def test_a_change_under_a_remembered_digest_is_seen_although_size_and_time_are_put_back(tmp_path: Path) -> None:
    """Files beyond a MiB are not read again unless their stamp differs; that holds the time of change too."""
    store, parts = ArtifactStore(tmp_path), {"stage": "train"}
    with store.lock():
        (store.begin("train", parts) / "w.bin").write_bytes(b"w" * (3 << 20))
        made = store.commit("train", parts, {"weights": "w.bin"}, {}, 1.0)
        store.digests.hash(made.outputs["weights"])
    path = made.outputs["weights"]
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(1 << 20)
        file.write(b"x")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size
    with pytest.raises(CorruptArtifact, match=r"w\.bin is not what was committed"):
        ArtifactStore(tmp_path).find("train", parts)


def test_damage_in_a_run_that_is_half_done_is_found(tmp_path: Path) -> None:
    """A step checkpoint, the one before it, and the folder that a stage works in."""
    pytest.importorskip("torch")
    from sparsify_deploy.training import checkpoint

    store, parts, rng = ArtifactStore(tmp_path / "store"), {"stage": "train"}, random.Random(7)
    with store.lock():
        out = store.begin("train", parts)
        path = out / "train.checkpoint"
        for step in range(3):
            checkpoint.write(path, {"step": step})
    for kind in KINDS:
        if kind == "delete":
            continue
        with damaged(path, kind, rng):
            with pytest.raises(CorruptArtifact, match=r"train\.checkpoint .*delete that file") as caught:
                checkpoint.read(path)
            assert caught.value.exit_code == 9
    path.unlink()
    assert checkpoint.read(path) == {"step": 1}
    for kind in KINDS:
        if kind == "delete":
            continue
        with damaged(checkpoint.before(path), kind, rng), pytest.raises(CorruptArtifact, match="training starts over"):
            checkpoint.read(path)
    shutil.rmtree(out)
    out.write_text("a file")
    with ArtifactStore(tmp_path / "store").lock(), pytest.raises(CorruptArtifact, match="delete it"):
        store.begin("train", parts)
