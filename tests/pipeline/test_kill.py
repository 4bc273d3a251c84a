"""`kill -9` at work, then the same command again: the weights are those of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRAINED = ("train", "project_nm", "quantize")
TIMED = ("build_engine", "benchmark")
KILLS = (
    ("store/init_mask-*.partial", 0.0),
    ("store/train-*.partial/*.checkpoint", 0.0),
    ("store/train-*.partial/*.checkpoint", 0.05),
    ("store/measure-*.partial", 0.1),
    ("store/project_nm-*.partial", 0.02),
    ("store/export_onnx-*.partial", 0.1),
    ("store/build_engine-*.partial", 0.02),
    ("store/benchmark-*.partial", 0.05),
)
"""When to kill: once a file is there, and so many seconds later."""


@pytest.fixture
def lean(recipe: Path) -> Path:
    """The recipe without INT8, whose imports alone take seconds."""
    text = re.sub(r"quantize:.*\n", "", recipe.read_text(encoding="utf-8"))
    recipe.write_text(text, encoding="utf-8")
    return recipe


def test_a_run_killed_eight_times_ends_with_the_bytes_of_an_undisturbed_one(server, lean, tmp_path, digests):
    trial, arguments = server("light"), ["run", str(lean), "--quiet", "--checkpoint-every", "0"]
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "killed"
    run.mkdir()
    undisturbed.mkdir()
    done = trial(undisturbed, arguments=arguments)
    assert done["code"] == 0, done
    hit, whole = [], {}
    for pattern, after_s in KILLS:
        killed = trial(run, arguments=arguments, signal=[signal.SIGKILL, pattern, after_s])
        assert killed["code"] in (0, -signal.SIGKILL), killed
        hit.append(killed["hit"])
        found = digests(run / "store")
        assert {name: found[name] for name in whole} == whole, "a committed stage was lost"
        whole = found
    assert sum(hit) == len(KILLS)
    last = trial(run, arguments=arguments)
    assert last["code"] == 0, last
    assert digests(run / "store") == digests(undisturbed / "store")
    resumed = [
        json.loads(path.read_text())["measured"]["history"]["resumed_from"]
        for path in (run / "store").glob("*/manifest.json")
        if "history" in json.loads(path.read_text())["measured"]
    ]
    assert any(resumed), "no training stage went on from a step checkpoint"
    assert not list((run / "store").glob("*.partial"))
    assert not [path for path in run.rglob("*") if ".sparsify-" in path.name]


# -- the soak ------------------------------------------------------------------------------------------------------


@dataclass
class Soak:
    """Kills of whole processes, as `kill -9 PID` does it, and what they hit."""

    recipe: Path
    folder: Path
    seed: int = 0
    kills: int = 0
    live: int = 0
    runs: int = 0
    hit: Counter[str] = field(default_factory=Counter)
    took_s: list[float] = field(default_factory=list)

    def start(self, run: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "sparsify_deploy", "run", str(self.recipe), "--run-dir", str(run)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
        options = ("--set", "threads=1", "--checkpoint-every", "0")
        log = (self.folder / "log").open("a", encoding="utf-8")
        with log:
            return subprocess.Popen([*command, *options], stdout=log, stderr=log, text=True, env=environment)

    def finish(self, run: Path) -> float:
        """Run to the end, undisturbed; seconds."""
        began = time.monotonic()
        process = self.start(run)
        assert process.wait(timeout=900) == 0, (self.folder / "log").read_text(encoding="utf-8")[-2000:]
        return time.monotonic() - began

    def kill(self, run: Path, wait: float | None, target: str, delay: float) -> bool:
        """Start, kill after `wait` seconds, or `delay` after the stage `target` began; whether it was still alive."""
        process, began, seen = self.start(run), time.monotonic(), None
        while process.poll() is None:
            now = time.monotonic()
            if wait is not None and now - began >= wait:
                break
            if wait is None and seen is None and any((run / "store").glob(f"{target}-*.partial")):
                seen = now
            if wait is None and seen is not None and now - seen >= delay:
                break
            assert now - began < 600
            time.sleep(0.002)
        alive = process.poll() is None
        process.kill()
        process.wait()
        self.kills += 1
        self.live += alive
        if alive:
            at_work = [path.name.partition("-")[0] for path in (run / "store").glob("*.partial")]
            self.hit[at_work[0] if at_work else "between stages"] += 1
        return alive


def outputs(store: Path) -> dict[str, dict[str, str]]:
    """Digests of all weights, masks and ONNX files, by the folder of their stage.

    A folder whose manifest is written is committed: the next process gives it its name.
    """
    found = {}
    for path in sorted(store.glob("*/manifest.json")):
        manifest = json.loads(path.read_bytes())
        if manifest["stage"] not in TIMED:
            kept = {k: v["digest"] for k, v in manifest["outputs"].items() if k not in ("report", "benchmark")}
            found[path.parent.name.removesuffix(".partial")] = kept
    return found


@pytest.mark.slow
def test_two_hundred_kills_lose_nothing(tmp_path):
    """SPARSIFY_SOAK_KILLS changes how many there are, SPARSIFY_SOAK_JSON names a file for the figures.

    Half of the moments are uniform over the seconds that are left, half over the stages that are left and then within
    one, or the short stages would hardly ever be hit.
    """
    wanted = int(os.environ.get("SPARSIFY_SOAK_KILLS", "200"))
    least = 10 if wanted >= 200 else 0
    began, rng = time.monotonic(), random.Random(0)
    soak = Soak(ROOT / "recipes" / "smoke.yaml", tmp_path)
    undisturbed = tmp_path / "undisturbed"
    whole_s = soak.finish(undisturbed)
    known = outputs(undisturbed / "store")
    seconds: dict[str, list[float]] = {}
    for path in (undisturbed / "store").glob("*/manifest.json"):
        manifest = json.loads(path.read_bytes())
        seconds.setdefault(manifest["stage"], []).append(manifest["seconds"])
    idle_s = max(whole_s - sum(map(sum, seconds.values())), 1.0)
    stages, run, resumed = sorted(seconds), None, 0
    while soak.kills < wanted or any(soak.hit[stage] < least for stage in stages):
        assert soak.kills < 2 * wanted, f"{soak.kills} kills and some stage was hardly hit: {soak.hit}"
        if run is None:
            run = tmp_path / f"run-{soak.runs}"
            soak.runs += 1
        done = Counter(path.name.partition("-")[0] for path in run.glob("store/*") if (path / "manifest.json").exists())
        left = {s: sum(seconds[s]) * (1 - done[s] / len(seconds[s])) for s in stages if done[s] < len(seconds[s])}
        before = outputs(run / "store")
        rare = [s for s in left if soak.hit[s] < least] if soak.kills >= wanted else list(left)
        if soak.kills >= wanted and not rare:  # what is still to be hit lies behind this run
            alive = False
        elif soak.kills < wanted and (soak.kills % 2 or not rare):
            alive = soak.kill(run, rng.uniform(0.0, idle_s + sum(left.values())), "", 0.0)
        else:
            target = rng.choice(sorted(rare))
            alive = soak.kill(run, None, target, rng.uniform(0.0, max(seconds[target])))
        after = outputs(run / "store")
        assert {name: after.get(name) for name in before} == before, "a committed stage was lost"
        if not alive:
            soak.took_s.append(soak.finish(run))
            assert outputs(run / "store") == known
            resumed += _resumed(run)
            shutil.rmtree(run)
            run = None
        if soak.kills % 10 == 0:
            _told(soak, resumed, len(soak.took_s), whole_s, began)
    if run is not None:
        soak.took_s.append(soak.finish(run))
        assert outputs(run / "store") == known
        resumed += _resumed(run)
        assert not [path for path in run.rglob("*") if ".sparsify-" in path.name or path.suffix == ".partial"]
    _told(soak, resumed, len(soak.took_s), whole_s, began)
    assert resumed or wanted < 50
    assert soak.live >= 0.75 * wanted
    assert all(soak.hit[stage] >= least for stage in stages), soak.hit


def _told(soak: Soak, resumed: int, ended: int, whole_s: float, began: float) -> None:
    """Print the figures so far, and write them where SPARSIFY_SOAK_JSON says."""
    figures: dict[str, Any] = {
        "kills": soak.kills,
        "of a live process": soak.live,
        "in each stage": dict(sorted(soak.hit.items())),
        "runs that ended byte-identical": ended,
        "trainings that went on from a step checkpoint": resumed,
        "undisturbed_s": round(whole_s, 1),
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
    print(json.dumps(figures), flush=True)
    if path := os.environ.get("SPARSIFY_SOAK_JSON"):
        Path(path).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _resumed(run: Path) -> int:
    measured = [json.loads(path.read_bytes())["measured"] for path in run.glob("store/*/manifest.json")]
    return sum(bool(each["history"]["resumed_from"]) for each in measured if "history" in each)
