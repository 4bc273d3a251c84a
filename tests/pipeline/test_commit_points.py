"""A kill before and after each write, fsync and rename: the same command again ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Server = Callable[[str], Callable[..., dict[str, Any]]]
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/fd")


def tree(run: Path) -> dict[str, bytes]:
    """Every file of a run directory with its bytes; times of day and the memory of digests left out."""
    found = {}
    for path in sorted(run.rglob("*")):
        if path.is_file() and path.name not in (".lock", "digests.json"):
            content = path.read_bytes()
            if path.name == "manifest.json":
                manifest = json.loads(content)
                content = json.dumps([manifest["stage"], manifest["outputs"], manifest["parts"]]).encode()
            found[str(path.relative_to(run))] = content
    return found


def begun(folder: Path) -> Path:
    """A run directory with a result that the work makes anew."""
    from sparsify_deploy.artifacts.store import ArtifactStore

    store, parts = ArtifactStore(folder / "store"), {"stage": "old", "settings": {"n": 1}}
    with store.lock():
        out = store.begin("old", parts)
        (out / "a.bin").write_bytes(b"a")
        (out / "b").mkdir()
        (out / "b" / "c.bin").write_bytes(b"c")
        store.commit("old", parts, {"a": "a.bin", "b": "b"}, {}, 1.0)
    (folder / "mine.sparsify.txt").write_text("a user's own file stays")
    return folder


def moments(number: int, points: list[str]) -> Iterator[str]:
    """Where to die at a point, without what leaves the same disk as dying before the next one."""
    yield "before"
    if points[number].startswith("fsync"):
        yield "torn"
    if points[number].startswith("open") or number == len(points) - 1:
        yield "after"


def each(number: int, points: list[str]) -> Iterator[str]:
    yield from ("before", "after", *(["torn"] if points[number].startswith("fsync") else []))


@pytest.mark.parametrize("where", [moments, pytest.param(each, marks=pytest.mark.slow)])
def test_a_kill_at_every_point_of_a_small_run_is_recovered_from(
    tmp_path: Path, faults: ModuleType, server: Server, where: Callable[[int, list[str]], Iterator[str]]
) -> None:
    start = begun(tmp_path / "start")
    run = tmp_path / "run"
    trial = server("small")
    undisturbed = trial(faults.copied(start, run))
    assert undisturbed["code"] == 0, undisturbed
    assert undisturbed["early"] == [], "renamed into its place before it was on the disk"
    points, wanted = undisturbed["points"], tree(run)
    assert len({*points}) >= 40
    again = trial(run)
    assert again["code"] == 0
    assert tree(run) == wanted
    seen: set[tuple[str, str]] = set()
    for number, label in enumerate(points):
        for moment in where(number, points):
            if where is moments and (label, moment) in seen:
                continue
            seen.add((label, moment))
            died = trial(faults.copied(start, run), die=[number, moment])
            assert died["code"] == -signal.SIGKILL, (label, moment, died)
            resumed = trial(run)
            assert resumed["code"] == 0, (label, moment, resumed)
            assert resumed["early"] == [], (label, moment)
            assert tree(run) == wanted, (label, moment)


@pytest.mark.slow
def test_a_second_kill_at_any_point_of_the_recovery_is_recovered_from(
    tmp_path: Path, faults: ModuleType, server: Server
) -> None:
    """What is brought to its end after a kill may be killed again: in a commit and in a deletion."""
    start = begun(tmp_path / "start")
    run, halfway = tmp_path / "run", tmp_path / "halfway"
    trial = server("small")
    undisturbed = trial(faults.copied(start, run))
    points, wanted = undisturbed["points"], tree(run)
    renamed = [k for k, label in enumerate(points) if label == "rename store/train.partial -> store/train"]
    deleted = [k for k, label in enumerate(points) if label.startswith("rename store/old -> ")]
    assert len(renamed) == len(deleted) == 1
    for first, where in ((renamed[0], "before"), (deleted[0], "after")):
        trial(faults.copied(start, run), die=[first, where])
        faults.copied(run, halfway)
        rest = trial(run)["points"]
        for second in range(0, min(len(rest), 30), 3):
            died = trial(faults.copied(halfway, run), die=[second, "after"])
            assert died["code"] == -signal.SIGKILL
            assert trial(run)["code"] == 0
            assert tree(run) == wanted, (points[first], rest[second])


def results(run: Path, timed: frozenset[str]) -> dict[str, Any]:
    """What a run directory holds: outputs by their bytes, but by their names where latencies are in them."""
    found: dict[str, Any] = {"store": {}, "files": set()}
    for path in sorted(run.glob("store/*/manifest.json")):
        outputs = json.loads(path.read_bytes())["outputs"]
        exact = path.parent.name.partition("-")[0] not in ("benchmark", "build_engine")
        found["store"][path.parent.name] = {
            name: entry["digest"] if exact and name not in timed else "" for name, entry in outputs.items()
        }
    for path in run.rglob("*"):
        name = str(path.relative_to(run))
        if path.is_file() and not name.startswith("deploy/"):  # which model is shipped depends on latencies
            found["files"].add(name)
    return found


@pytest.mark.slow
def test_a_kill_at_points_of_every_step_of_a_real_run_is_recovered_from(
    tmp_path: Path, faults: ModuleType, server: Server, recipe: Path
) -> None:
    """Step by step: each begins with what the undisturbed run had left, so that a trial costs one step and not all.

    Of the points that no step before had, SPARSIFY_POINTS (12) are drawn in each step; SPARSIFY_POINTS_JSON names a
    file for the figures.
    """
    from sparsify_deploy.workspace import open_run

    steps = [step.id for step in open_run(recipe).plan.steps]
    rng, most = random.Random(2), int(os.environ.get("SPARSIFY_POINTS", "12"))
    base, run, after = faults.copied(tmp_path / "none", tmp_path / "base"), tmp_path / "run", tmp_path / "after"
    seen: set[tuple[str, str]] = set()
    timed = frozenset({"report", "benchmark"})
    trial = server("real")
    for step in steps:
        arguments = ["run", str(recipe), "--quiet", "--checkpoint-every", "0", "--until", step]
        undisturbed = trial(faults.copied(base, run), arguments=arguments)
        assert undisturbed["code"] == 0, undisturbed
        assert undisturbed["early"] == []
        points, wanted = undisturbed["points"], results(run, timed)
        faults.copied(run, after)
        new = [(number, each) for number in range(len(points)) for each in moments(number, points)]
        new = [(number, each) for number, each in new if (points[number], each) not in seen]
        for number, moment in sorted(rng.sample(new, min(most, len(new)))):
            label = points[number]
            if (label, moment) in seen:
                continue
            seen.add((label, moment))
            died = trial(faults.copied(base, run), arguments=arguments, die=[number, moment])
            if died["code"] == 0:  # one deletion less: what a name of a temporary folder decides
                continue
            assert died["code"] == -signal.SIGKILL, (step, label, moment, died)
            resumed = trial(run, arguments=arguments)
            assert resumed["code"] == 0, (step, label, moment, resumed)
            assert results(run, timed) == wanted, (step, label, moment)
        faults.copied(after, base)
    labels = {label for label, _ in seen}
    assert len(labels) >= 40 or most < 12
    figures = {"points of a real run": len(labels), "kills": len(seen), "steps": len(steps)}
    print(json.dumps(figures))
    if path := os.environ.get("SPARSIFY_POINTS_JSON"):
        Path(path).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
