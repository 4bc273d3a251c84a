"""SIGTERM and Ctrl-C: exit 75, soon, with one line; the same command goes on and ends with the same bytes."""

from __future__ import annotations

import json
import os
import pty
import random
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a supervisor's child is a thing of Linux")
ROOT = Path(__file__).resolve().parents[2]
MOMENTS = (
    (signal.SIGTERM, "store/init_mask-*.partial", 0.0, r"in sparse/init_mask;"),
    (signal.SIGINT, "store/train-*.partial/*.checkpoint", 0.0, r": train: stopped at step \d+ of 12 and saved;"),
    (signal.SIGINT, "store/measure-*.partial", 0.05, r"in \w+/\w+\.report;"),
    (signal.SIGTERM, "store/export_onnx-*.partial", 0.05, r"in \w+/export_onnx;"),
    (signal.SIGINT, "store/build_engine-*.partial", 0.01, r"in \w+/build_engine.openvino;"),
    (signal.SIGTERM, "store/benchmark-*.partial", 0.2, r"in .*benchmark.openvino;"),
)
"""In turn: in the first stage, in training, in a report's measuring, in an export, in a build, in a race."""


@pytest.fixture
def lean(recipe: Path) -> Path:
    """The recipe without INT8, whose imports alone take seconds; its race takes minutes if nobody stops it."""
    text = re.sub(r"quantize:.*\n|benchmark:.*\n", "", recipe.read_text(encoding="utf-8"))
    recipe.write_text(text + "benchmark: {rounds: 200, round_ms: 100.0, warmup_ms: 5.0}\n", encoding="utf-8")
    return recipe


def test_a_signal_in_each_kind_of_work_ends_it_politely_and_loses_nothing(server, lean, tmp_path, digests):
    trial, arguments = server("light"), ["run", str(lean), "--checkpoint-every", "0", "--until", "benchmark"]
    run, whole = tmp_path / "run", {}
    run.mkdir()
    for number, pattern, after_s, place in MOMENTS:
        stopped = trial(run, arguments=arguments, signal=[number, pattern, after_s])
        assert stopped["hit"], (pattern, stopped)
        assert stopped["code"] == 75, stopped
        assert stopped["took_s"] < 60
        lines = [line for line in stopped["said"].splitlines() if "the same command goes on from" in line]
        assert len(lines) == 1, stopped
        assert lines[0].startswith("sparsify-deploy: "), stopped
        assert "Traceback" not in stopped["said"]
        assert re.search(place, lines[0]), (place, lines[0])
        found = digests(run / "store")
        assert {name: found[name] for name in whole} == whole
        whole = found
        assert not [path for path in run.rglob("*") if ".sparsify-" in path.name]
    assert any('resumed_from": ' in path.read_text() for path in run.glob("store/train-*/manifest.json"))


def started(*arguments: str | Path, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "sparsify_deploy", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def children(process: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_everything_is_still_being_imported_is_polite_too(recipe, tmp_path, number):
    process = started("run", recipe, cwd=tmp_path)
    until = time.monotonic() + 60
    while not children(process.pid) and time.monotonic() < until:
        time.sleep(0.001)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert len(said.splitlines()) == 1
    assert "interrupted" in said or "stopped" in said


def test_native_code_that_does_not_come_back_is_given_eight_seconds():
    """A child that does not heed a signal is killed; its supervisor says so in one line."""
    program = """
import signal, sys, time
from sparsify_deploy import supervisor

def work():
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    print("deaf", file=sys.stderr)
    time.sleep(600)

supervisor._PATIENCE_S = 0.5
sys.exit(supervisor.supervise(work))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        assert process.stderr.readline() == "deaf\n"
        process.terminate()
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, said
    assert said.count("\n") == 1
    assert "interrupted" in said


@pytest.mark.parametrize("how", ["2>&1 | head -1", "2>/dev/full"])
def test_a_run_whose_stderr_goes_away_goes_on_to_its_end(tmp_path, how):
    """Its module prints as well; only results are on stdout."""
    (tmp_path / "net.py").write_text(MODULE, encoding="utf-8")
    recipe = tmp_path / "own.yaml"
    recipe.write_text(OWN, encoding="utf-8")
    command = f'"$0" -m sparsify_deploy run "$1" --trust-code --run-dir run --until fine_tune --json {how}'
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}", sys.executable, recipe],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "run" / "run.log").read_text(encoding="utf-8").splitlines()
    assert " ends     run: done after" in log[-1]
    if "head" not in how:
        assert json.loads(done.stdout)["verdict"]


def test_a_terminal_that_is_closed_saves_the_work_and_the_log_tells_no_tales(tmp_path):
    (tmp_path / "net.py").write_text(MODULE, encoding="utf-8")
    recipe, log = tmp_path / "own.yaml", tmp_path / "run" / "run.log"
    recipe.write_text(OWN.replace("steps: 2", "steps: 1000000"), encoding="utf-8")
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(tmp_path)
        arguments = ("run", str(recipe), "--trust-code", "--run-dir", "run", "--checkpoint-every", "1000")
        os.execv(sys.executable, [sys.executable, "-m", "sparsify_deploy", *arguments])
    until = time.monotonic() + 60
    while not (log.exists() and "progress fine_tune" in log.read_text()) and time.monotonic() < until:
        if select.select([terminal], (), (), 0.05)[0]:
            os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 75
    assert " ends     run: exit code 75" in log.read_text(encoding="utf-8").splitlines()[-1]
    assert list(tmp_path.glob("run/store/*.partial/*.checkpoint"))


OWN = """\
version: 1
name: own
model: {source: file, params: {path: net.py, object: build}}
data: {source: digits}
training: {steps: 6, batch_size: 16, optimizer: {name: sgd, lr: 0.05}}
nm: {fill_batches: 1, fine_tune: {steps: 2}}
"""
MODULE = """\
import os, sys, threading, time
import torch

def build():
    print("a word"); print("another", file=sys.stderr); os.write(1, b"a native word")
    threading.Thread(target=time.sleep, args=(10000,)).start()
    layers = torch.nn.Flatten(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)
    return torch.nn.Sequential(*layers)
"""


@pytest.mark.slow
def test_fifty_signals_at_random_moments(recipe, tmp_path, digests):
    """Exit 75 in less than 10 s each time; then the same bytes. SPARSIFY_SIGNALS_JSON names a file for the figures."""
    rng = random.Random(1)
    began = time.monotonic()
    undisturbed = started("run", recipe, "--run-dir", "undisturbed", cwd=tmp_path)
    undisturbed.communicate(timeout=600)
    assert undisturbed.returncode == 0
    left_s = whole_s = time.monotonic() - began
    known = digests(tmp_path / "undisturbed" / "store")
    took, hits, places, number_of_runs = [], 0, [], 0
    while hits < int(os.environ.get("SPARSIFY_SIGNALS", "50")):
        run = f"run-{number_of_runs}"
        process = started("run", recipe, "--run-dir", run, cwd=tmp_path)
        started_at = time.monotonic()
        try:
            _, said = process.communicate(timeout=rng.uniform(0.15, left_s))
        except subprocess.TimeoutExpired:
            asked = time.monotonic()
            process.send_signal(rng.choice((signal.SIGTERM, signal.SIGINT)))
            _, said = process.communicate(timeout=60)
            took.append(time.monotonic() - asked)
            hits += 1
            left_s = max(left_s - (asked - started_at), 0.3 * whole_s)
            if process.returncode == 75:
                places.append(next(line for line in said.splitlines() if "the same command goes on" in line))
                continue
        assert process.returncode == 0, said
        assert digests(tmp_path / run / "store") == known
        number_of_runs, left_s = number_of_runs + 1, whole_s
    process = started("run", recipe, "--run-dir", run, cwd=tmp_path)
    process.communicate(timeout=600)
    assert process.returncode == 0
    assert digests(tmp_path / run / "store") == known
    figures = {
        "signals": hits,
        "exit 75": len(places),
        "longest_s": round(max(took), 2),
        "median_s": round(sorted(took)[len(took) // 2], 2),
        "said": sorted({re.sub(r"\d+", "N", line) for line in places}),
    }
    print(json.dumps(figures, indent=1))
    if path := os.environ.get("SPARSIFY_SIGNALS_JSON"):
        Path(path).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    assert max(took) < 10.0
    assert all(line.startswith("sparsify-deploy: ") for line in places)
