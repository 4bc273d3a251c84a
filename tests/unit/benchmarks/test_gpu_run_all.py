"""The one command: its steps in order, their time, what a failing one does; a stand-in for Python writes down calls."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "gpu" / "run_all.sh"
pytestmark = pytest.mark.skipif(shutil.which("timeout") is None, reason="needs coreutils' timeout")
STUB = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$CALLS"
[[ "$*" == *"${FAILING:-no such step}"* ]] && exit 3
exit 0
"""


def called(tmp_path: Path, *steps: str, **more: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    calls = tmp_path / "calls"
    for name in ("trt", "torch"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": os.environ["PATH"],
        "CALLS": str(calls),
        "TRT_PYTHON": str(tmp_path / "trt"),
        "TORCH_PYTHON": str(tmp_path / "torch"),
        "WORK": str(tmp_path / "work"),
        **more,
    }
    command = ["bash", str(SCRIPT), str(tmp_path / "results"), *steps]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    return done, calls.read_text().splitlines() if calls.exists() else []


def test_every_step_in_order_of_importance(tmp_path: Path) -> None:
    done, lines = called(tmp_path, RUNS="runs/one runs/two")
    assert done.returncode == 0, done.stdout + done.stderr
    modules = [line.split()[2] for line in lines]
    engines = "gpu.engines"
    expected = ["gpu.qdq", engines, engines, "gpu.gemm", "gpu.qdq", engines, "gpu.predictor", "gpu.targets"]
    assert modules == ["sparsify_deploy", *expected]
    assert [line.split()[0] for line in lines] == ["trt"] * 4 + ["torch"] + ["trt"] * 4
    assert all("--runtime tensorrt" in line for line in lines if engines in line or "gpu.qdq" in line)
    assert "--batches 32 --nets --run runs/one --run runs/two" in lines[3]
    assert "--batches 32 8 1 256 --run runs/one --run runs/two" in lines[6]
    assert "--budget-s 120" in lines[1]
    assert (tmp_path / "results").is_dir()


def test_no_step_gets_more_than_is_left_of_the_call(tmp_path: Path) -> None:
    done, lines = called(tmp_path, "chains", "engines32", BUDGET_S="60")
    budgets = [int(line.partition("--budget-s ")[2].split()[0]) for line in lines]
    assert len(budgets) == 2
    assert all(40 <= budget <= 55 for budget in budgets)
    done, more = called(tmp_path, "chains", BUDGET_S="10")
    assert len(more) == 2  # no new call
    assert "not finished: chains" in done.stdout
    assert done.returncode == 1


def test_a_failing_step_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    done, lines = called(tmp_path, "engines32", "gemm", "targets", FAILING="gpu.gemm")
    assert len(lines) == 3
    assert done.returncode == 1
    assert "gemm: exit code 3" in done.stdout
    assert done.stdout.endswith("not finished: gemm\n")


def test_a_rehearsal_asks_for_no_gpu(tmp_path: Path) -> None:
    _, lines = called(tmp_path, REHEARSE="1", RUNTIME="onnxruntime")
    assert all("tensorrt" not in line for line in lines)
    assert all("--runtime onnxruntime --scale small" in line for line in lines if "gpu.engines" in line)
    assert any("--device cpu --rehearse" in line for line in lines)


def test_wrong_calls(tmp_path: Path) -> None:
    done, lines = called(tmp_path, "gem")
    assert (done.returncode, lines) == (2, [])
    assert "unknown step gem" in done.stderr
    bare = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, timeout=60, check=False)
    assert bare.returncode != 0
    assert "usage:" in bare.stderr
