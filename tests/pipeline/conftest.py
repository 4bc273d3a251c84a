"""Runs of the command line in processes of their own, as a user starts them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HARNESS = Path(__file__).with_name("faults.py")

RECIPE = """\
version: 1
name: tiny
seed: 3
threads: 1
sparsity: 0.6
model:
  source: builtin
  params: {name: resnet8, width: 16, in_channels: 1}
data: {source: digits}
training: {steps: 12, batch_size: 16, optimizer: {lr: 0.05}}
init: {criterion: synflow, params: {rounds: 5}, keep_dense: [conv1, fc]}
train: {method: rigl, params: {update_every: 3}}
nm: {fill_batches: 2, fine_tune: {steps: 6}}
quantize: {calibration_batches: 2, qat: {steps: 4, optimizer: {lr: 0.001}}}
export: {parity_examples: 32, min_top1_agreement: 0.8}
deploy:
  - {runtime: openvino}
benchmark: {rounds: 5, round_ms: 3.0, warmup_ms: 5.0}
"""

Result = subprocess.CompletedProcess[str]


def command(*arguments: str | Path) -> list[str]:
    """The argv of one call of the command line."""
    return [sys.executable, "-m", "sparsify_deploy", *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    """The environment of a child: one torch thread, no colours."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", **more}


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., Result]:
    """Call the command line in `tmp_path` and return what it printed and its exit code."""

    def call(*arguments: str | Path) -> Result:
        return subprocess.run(
            command(*arguments),
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return call


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., subprocess.Popen[bytes]]:
    """Start the command line in `tmp_path` and return at once; its output goes to a file."""

    def begin(*arguments: str | Path) -> subprocess.Popen[bytes]:
        with (tmp_path / "log").open("ab") as log:
            return subprocess.Popen(command(*arguments), cwd=tmp_path, env=environment(), stdout=log, stderr=log)

    return begin


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe with every stage and both branches that takes seconds."""
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tiny.yaml`, its finished run and what that printed, made once; copy it to change it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(RECIPE, encoding="utf-8")
    done = subprocess.run(
        command("run", "tiny.yaml"),
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout, encoding="utf-8")
    (folder / "stderr").write_text(done.stderr, encoding="utf-8")
    return folder


def digests_of(store: Path, skip: Sequence[str] = ("benchmark", "build_engine")) -> dict[str, dict[str, str]]:
    """The digests of all committed weights, masks and ONNX files in a store, by stage folder."""
    timed = {"report", "benchmark"}  # these hold latencies
    found = {}
    for path in sorted(store.glob("*/manifest.json")):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["stage"] not in skip:
            outputs = {name: value["digest"] for name, value in manifest["outputs"].items() if name not in timed}
            found[path.parent.name] = outputs
    return found


@pytest.fixture
def digests() -> Callable[[Path], dict[str, dict[str, str]]]:
    """`digests_of`, for the tests."""
    return digests_of


@pytest.fixture(scope="session")
def faults() -> ModuleType:
    """`faults.py` beside this file."""
    spec = importlib.util.spec_from_file_location("faults", HARNESS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def server() -> Iterator[Callable[[str], Callable[..., dict[str, Any]]]]:
    """`server("small")` starts a fork server of `faults.py` and gives what makes one trial: `trial(RUN, **request)`."""
    started: list[subprocess.Popen[str]] = []

    def start(what: str) -> Callable[..., dict[str, Any]]:
        child = subprocess.Popen(
            [sys.executable, str(HARNESS), what],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        started.append(child)
        assert child.stdin is not None
        assert child.stdout is not None
        to, of = child.stdin, child.stdout
        assert of.readline() == "ready\n"

        def trial(run: Path, **request: Any) -> dict[str, Any]:
            to.write(json.dumps({"run": str(run), **request}) + "\n")
            to.flush()
            found: dict[str, Any] = json.loads(of.readline())
            return found

        return trial

    yield start
    for child in started:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.close()
        child.wait(timeout=60)
        child.stdout.close()
