"""A disk that fills up at any moment: exit 7, the last checkpoint stays, nothing stray; with space it goes on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from sparsify_deploy.artifacts import durable
from sparsify_deploy.errors import OutOfResources

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """`disk(BYTES)` is a file system of its own of that size; called again it has another size, and keeps its files."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("a small disk needs Linux and root: mounts a tmpfs")
    folder, mounted = tmp_path / "disk", False
    folder.mkdir()

    def sized(size: int) -> Path:
        nonlocal mounted
        options = f"size={size},nr_inodes=4k" + (",remount" if mounted else "")
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a small disk needs the right to mount one: {done.stderr.strip()}")
        mounted = True
        return folder

    yield sized
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def lean(recipe: Path) -> Path:
    text = re.sub(r"quantize:.*\n", "", recipe.read_text(encoding="utf-8"))
    recipe.write_text(text, encoding="utf-8")
    return recipe


def used(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def is_whole(checkpoint: Path) -> bool:
    head, _, payload = checkpoint.read_bytes().partition(b"\n")
    return head.endswith(blake3(payload).hexdigest().encode())


def fill_up(
    disk: Callable[[int], Path],
    trial: Callable[..., dict[str, Any]],
    arguments: list[str],
    sizes: list[int],
    tmp_path: Path,
    known: dict[str, Any],
    digests: Callable[[Path], dict[str, Any]],
) -> dict[str, int]:
    """Run on ever larger disks; every other time without looking for space first. What stopped it, and how often."""
    why: dict[str, int] = {}
    for number, size in enumerate(sizes):
        folder = disk(size)
        run = folder / "run"
        run.mkdir()
        estimate = {} if number % 2 else {"no_estimate": True}
        full = trial(run, arguments=arguments, plain=True, answer=str(tmp_path / "answer"), **estimate)
        assert full["code"] == 7, (size, full)
        lines = [line for line in full["said"].splitlines() if line.startswith("sparsify-deploy: ") and "free" in line]
        assert len(lines) == 1, full["said"]
        assert "the same command goes on" in lines[0]
        assert "Traceback" not in full["said"]
        reason = "estimated" if "needs about" in lines[0] else "found full"
        why[reason] = why.get(reason, 0) + 1
        if reason == "estimated":
            assert re.search(r"needs about \d+\.\d MiB \(estimated\) and \d+\.\d MiB are free", lines[0]), lines[0]
        assert not [path for path in run.rglob("*") if ".sparsify-" in path.name or path.name.startswith(".openvino-")]
        for checkpoint in [*run.rglob("*.checkpoint"), *run.rglob("*.before")]:
            assert is_whole(checkpoint), (size, checkpoint)
        disk(256 * MIB)
        done = trial(run, arguments=arguments, plain=True, answer=str(tmp_path / "answer"))
        assert done["code"] == 0, (size, done)
        assert digests(run / "store") == known, size
        durable.remove(run)
    return why


def test_two_disks_that_are_too_small_for_a_training(disk, server, recipe, tmp_path, digests):
    arguments = ["run", str(lean(recipe)), "--quiet", "--checkpoint-every", "0", "--until", "dense/train"]
    trial = server("light")
    run = disk(256 * MIB) / "run"
    run.mkdir()
    done = trial(run, arguments=arguments, plain=True, answer=str(tmp_path / "answer"))
    assert done["code"] == 0, done
    known, whole = digests(run / "store"), used(run)
    durable.remove(run)
    sizes = [whole // 2, whole // 4 * 3]
    why = fill_up(disk, trial, arguments, sizes, tmp_path, known, digests)
    assert why == {"found full": 1, "estimated": 1}


@pytest.mark.slow
def test_twenty_disks_that_are_too_small_for_a_run(disk, server, recipe, tmp_path, digests):
    arguments = ["run", str(lean(recipe)), "--quiet", "--checkpoint-every", "0"]
    trial = server("light")
    run = disk(256 * MIB) / "run"
    run.mkdir()
    done = trial(run, arguments=arguments, plain=True, answer=str(tmp_path / "answer"))
    assert done["code"] == 0, done
    known, whole = digests(run / "store"), used(run)
    durable.remove(run)
    sizes = [max(whole * (number + 1) // 21, 16384) // 4096 * 4096 for number in range(20)]
    why = fill_up(disk, trial, arguments, sizes, tmp_path, known, digests)
    print(f"20 disks of {sizes[0] / MIB:.1f} to {sizes[-1] / MIB:.1f} MiB, the run needs {whole / MIB:.1f}: {why}")
    assert why["estimated"] >= 5
    assert why["found full"] >= 5


def test_the_estimate_says_what_is_needed_and_what_is_free(tmp_path):
    durable.check_space(tmp_path / "not" / "there" / "yet", 1, "sparse/train")
    with pytest.raises(OutOfResources, match=r"sparse/train needs about \d+\.\d MiB \(estimated\) and \d+\.\d MiB"):
        durable.check_space(tmp_path, 1 << 60, "sparse/train")


def test_the_estimate_is_no_less_than_what_stages_write_and_not_far_above(recipe, tmp_path):
    """Every stage of a run with both branches, by its own peak; below the slack nothing is said."""
    from sparsify_deploy.stages import space

    program = f"""
import json, sys, threading, time
from pathlib import Path
from sparsify_deploy import pipeline
from sparsify_deploy.__main__ import main
from sparsify_deploy.stages import space

found, peak, busy = [], [0], [None]

def watch():
    while True:
        folder = busy[0]
        if folder is not None:
            size = 0
            for path in folder.rglob("*"):
                try:
                    size += path.stat().st_size if path.is_file() else 0
                except OSError:
                    pass
            peak[0] = max(peak[0], size)
        time.sleep(0.002)

real_needed, real_commit = pipeline.needed_bytes, pipeline.ArtifactStore.commit

def needed(stage, inputs, out):
    peak[0], busy[0] = 0, out
    found.append([stage.name, real_needed(stage, inputs, out), 0])
    return found[-1][1]

def commit(self, *rest, **named):
    found[-1][2] = max(peak[0], sum(p.stat().st_size for p in busy[0].rglob("*") if p.is_file()))
    busy[0] = None
    return real_commit(self, *rest, **named)

pipeline.needed_bytes, pipeline.ArtifactStore.commit = needed, commit
threading.Thread(target=watch, daemon=True).start()
run = {str(tmp_path / "run")!r}
code = main(["run", {str(lean(recipe))!r}, "--quiet", "--checkpoint-every", "0", "--run-dir", run])
print(json.dumps([code, found]))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    code, found = json.loads(done.stdout.splitlines()[-1])
    assert code == 0
    assert len(found) > 8
    for name, needed, peak in found:
        assert needed >= peak, (name, needed, peak)
        assert needed - space.SLACK_BYTES <= 12 * max(peak, 1 << 16), (name, needed, peak)
