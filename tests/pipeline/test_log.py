"""The log of a run directory after real runs: what was done, what went wrong, where it is, and no secret."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]

SECRET = "zq81-kk02-pwpw"

NETWORK = """\
import os, warnings

class Refused(RuntimeError):
    pass

def build():
    warnings.warn("about to fail")
    raise Refused("https://ann:s3cret-pass@host/weights?sig=abcdef refused " + os.environ["HOST_TOKEN"])
"""

FAILING = """\
version: 1
name: failing
model: {source: file, params: {path: net.py, object: build}}
data: {source: digits}
training: {steps: 1}
train: {method: dense}
"""


def everything_written(folder: Path) -> str:
    """The text of all files in a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return "\n".join(path.read_bytes().decode("utf-8", "replace") for path in files)


def test_an_error_is_one_line_and_the_log_has_the_traceback_without_secrets(
    cli: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOST_TOKEN", SECRET)
    (tmp_path / "net.py").write_text(NETWORK, encoding="utf-8")
    (tmp_path / "failing.yaml").write_text(FAILING, encoding="utf-8")
    done = cli("run", "failing.yaml", "--trust-code")
    assert done.returncode == 5
    log = tmp_path / "runs" / "failing" / "run.log"
    *_, where, line = done.stderr.splitlines()
    assert re.fullmatch(
        r"sparsify-deploy: .*net\.py:8: Refused: https://\[hidden\]@host/weights\?sig=\[hidden\] .*", line
    )
    assert where == "sparsify-deploy: log: runs/failing/run.log"
    assert "Traceback" not in done.stderr
    text = log.read_text(encoding="utf-8")
    assert "trace    Traceback (most recent call last):" in text
    assert "in build" in text
    assert "warning  " in text
    assert "about to fail" in text
    assert re.search(r"begins   run: sparsify-deploy \S+: .* run failing\.yaml --trust-code", text)
    assert "ends     run: exit code 5 after" in text
    for written in (done.stdout, done.stderr, everything_written(tmp_path / "runs")):
        assert SECRET not in written
        assert "s3cret-pass" not in written
        assert "abcdef refused" not in written


def test_a_finished_run_has_told_what_it_did(finished: Path) -> None:
    text = (finished / "runs" / "tiny" / "run.log").read_text(encoding="utf-8")
    said = [line for line in (finished / "stderr").read_text(encoding="utf-8").splitlines() if ": first time" in line]
    assert len(said) > 10
    for line in said:
        assert f"says     {line}" in text
    assert re.search(r"machine  packages: .*'torch'", text)
    assert re.search(r"progress train \d+/12 ", text)
    assert re.search(r"ends     run: done after \d", text)


def test_a_killed_run_leaves_whole_lines_and_the_next_one_appends(
    cli: Call, start: Callable[..., subprocess.Popen[bytes]], recipe: Path, tmp_path: Path
) -> None:
    log = tmp_path / "runs" / "tiny" / "run.log"
    process = start("run", recipe, "--until", "sparse/init_mask")
    while not log.exists() or b"says" not in log.read_bytes():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed = log.read_text(encoding="utf-8")
    assert killed.endswith("\n")
    assert "ends" not in killed
    again = cli("run", recipe, "--until", "sparse/init_mask")
    assert again.returncode == 0, again.stderr
    text = log.read_text(encoding="utf-8")
    assert text.startswith(killed)
    assert text.count("begins   run") == 2
    assert text.splitlines()[-1].split(" ", 2)[2].startswith("ends     run: done")


def test_a_worker_that_dies_of_a_signal_is_in_the_log_too(
    start: Callable[..., subprocess.Popen[bytes]], recipe: Path, tmp_path: Path
) -> None:
    log = tmp_path / "runs" / "tiny" / "run.log"
    process = start("run", recipe)
    while not log.exists() or b"says" not in log.read_bytes():
        assert process.poll() is None
        time.sleep(0.01)
    worker = int(log.read_text(encoding="utf-8").split()[1])
    if worker == process.pid:
        process.kill()
        process.wait()
        pytest.skip("this system has no supervising process")
    os.kill(worker, signal.SIGSEGV)
    assert process.wait(timeout=60) == 3
    last = log.read_text(encoding="utf-8").splitlines()[-1]
    assert "dies     the process crashed (SIGSEGV)" in last
    assert "log: runs/tiny/run.log" in (tmp_path / "log").read_text(encoding="utf-8").splitlines()[-2]


@pytest.mark.parametrize("place", ["a-file/run", "linked"])
def test_a_run_directory_that_cannot_be_written_is_refused_before_anything_runs(
    cli: Call, recipe: Path, tmp_path: Path, place: str
) -> None:
    (tmp_path / "a-file").write_text("mine", encoding="utf-8")
    if place == "linked":
        (tmp_path / "linked").mkdir()
        (tmp_path / "linked" / "run.log").symlink_to(tmp_path / "a-file")
    done = cli("run", recipe, "--run-dir", place, "--store", "elsewhere")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.match(r"sparsify-deploy: .*run(\.log)?: cannot be written \(.*\): choose another place", line)
    assert (tmp_path / "a-file").read_text(encoding="utf-8") == "mine"
    assert not list((tmp_path / "elsewhere").glob("*-*"))
