"""`kill -9` in each stage, then the same command again: the weights are those of an undisturbed run."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

TRAINED = ("train", "project_nm", "quantize")
IN_ORDER = ("init_mask", "train", "measure", "quantize", "export_onnx", "build_engine", "project_nm", "benchmark")


def wait_for(process, store: Path, stage: str, seconds: float = 120.0) -> bool:
    """Until `stage` is at work (a training one until it has a step checkpoint); False where the run ended before."""
    pattern = f"{stage}-*.partial/*.checkpoint" if stage in TRAINED else f"{stage}-*.partial"
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if any(store.glob(pattern)):
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    pytest.fail(f"{stage} did not start within {seconds} s")


@pytest.mark.slow
def test_a_run_killed_in_each_stage_ends_with_the_bytes_of_an_undisturbed_one(cli, start, recipe, tmp_path, digests):
    arguments = ("run", recipe, "--checkpoint-every", "0")
    undisturbed = cli(*arguments, "--run-dir", "undisturbed")
    assert undisturbed.returncode == 0, undisturbed.stderr
    killed, store = [], tmp_path / "killed" / "store"
    for stage in IN_ORDER:
        process = start(*arguments, "--run-dir", "killed")
        if wait_for(process, store, stage):
            process.send_signal(signal.SIGKILL)
            killed.append(stage)
        process.wait()
    assert tuple(killed) == IN_ORDER
    last = cli(*arguments, "--run-dir", "killed")
    assert last.returncode == 0, last.stderr
    assert digests(store) == digests(tmp_path / "undisturbed" / "store")
    resumed = [
        json.loads(path.read_text())["measured"]["history"]["resumed_from"]
        for path in store.glob("*/manifest.json")
        if "history" in json.loads(path.read_text())["measured"]
    ]
    assert any(resumed), "no training stage went on from a step checkpoint"
    assert not list(store.glob("*.partial"))


def test_an_asked_for_stop_saves_a_checkpoint_and_says_how_to_go_on(cli, start, recipe, tmp_path, digests):
    process = start("run", recipe, "--set", "training.steps=400", "--until", "sparse/train", "--checkpoint-every", "0")
    assert wait_for(process, tmp_path / "runs" / "tiny" / "store", "train")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    log = (tmp_path / "log").read_text()
    assert "stopped at step" in log
    assert "Traceback" not in log
