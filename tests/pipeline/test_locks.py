"""Twenty at once on one run directory: one works, the others say who; after a kill the next starts at once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
HELD = re.compile(
    r"sparsify-deploy: \S*store is in use by process (\d+) on \S+: wait for it to end, stop it, or choose"
)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


def begin(recipe: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        command = [sys.executable, "-m", "sparsify_deploy", "run", str(recipe), "--until", "sparse/train"]
        return subprocess.Popen(command, cwd=recipe.parent, env=environment(), stdout=file, stderr=file)


def wait_for(folder: Path, pattern: str, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 120
    while not any(folder.glob(pattern)):
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.mark.parametrize("many", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_of_many_started_at_once_one_works_and_the_others_name_it(recipe, tmp_path, many):
    """Those that come too late are measured: their wall time from the start, and their own CPU time."""
    recipe.write_text(recipe.read_text().replace("steps: 12", "steps: 100000"))
    took, started = {}, {}
    processes = []
    for number in range(many):
        processes.append(begin(recipe, tmp_path / f"log-{number}"))
        started[processes[-1].pid] = time.monotonic()
    refused = []
    try:
        until = time.monotonic() + 120
        while len(refused) < many - 1:
            assert time.monotonic() < until
            for process in [each for each in processes if each not in refused]:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    process.returncode = os.waitstatus_to_exitcode(status)
                    took[pid] = (time.monotonic() - started[pid], usage.ru_utime + usage.ru_stime)
                    refused.append(process)
            time.sleep(0.002)
        (holder,) = [each for each in processes if each not in refused]
        assert holder.poll() is None
        worker = int(Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text())
        for process in refused:
            said = (tmp_path / f"log-{processes.index(process)}").read_text()
            assert process.returncode == 8, said
            (line,) = [line for line in said.splitlines() if "in use" in line]
            named = HELD.match(line)
            assert named is not None, said
            assert int(named[1]) == worker, said
            assert "Traceback" not in said
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if many == 20:  # in turn, each has the machine to itself but for the holder
        walls, cpus = zip(*took.values(), strict=True)
        print(f"refused: all at once, longest {max(walls):.2f} s wall, {max(cpus):.2f} s of its own CPU time")
        assert max(cpus) < 2.0


@pytest.mark.parametrize("who", ["the command", pytest.param("its worker", marks=pytest.mark.slow)])
def test_after_a_kill_of_the_holder_the_next_starts_at_once(recipe, tmp_path, who):
    recipe.write_text(recipe.read_text().replace("steps: 12", "steps: 100000"))
    holder = begin(recipe, tmp_path / "holder")
    wait_for(tmp_path, "runs/tiny/store/train-*.partial", holder)
    (worker,) = map(int, Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split())
    os.kill(holder.pid if who == "the command" else worker, signal.SIGKILL)
    holder.wait()
    from sparsify_deploy.artifacts.store import ArtifactStore

    with ArtifactStore(tmp_path / "runs/tiny/store").lock():
        pass
    assert not Path(f"/proc/{worker}").exists() or "Z" in Path(f"/proc/{worker}/stat").read_text().split()[2]


BUILDER = """
import os, sys, time
from pathlib import Path
from sparsify_deploy.artifacts.store import ArtifactStore
from sparsify_deploy.runtimes import _child

with ArtifactStore(Path(sys.argv[1])).lock():
    _child.call("slow_build:build", sys.argv[2], what="the builder", time_limit_s=600)
"""
BUILD = """
import os, time
from pathlib import Path

def build(request):
    known = [f"/proc/self/fd/{each}" for each in os.listdir("/proc/self/fd")]
    locks = [each for each in known if os.path.lexists(each) and os.readlink(each).endswith(".lock")]
    Path(request + ".new").write_text(f"{os.getpid()} {bool(locks)}")
    os.rename(request + ".new", request)
    time.sleep(600)
"""


def test_a_kill_in_the_middle_of_a_build_takes_the_builder_along_and_leaves_no_lock(tmp_path):
    (tmp_path / "slow_build.py").write_text(BUILD)
    told = tmp_path / "told"
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, "-c", BUILDER, str(tmp_path / "store"), str(told)]
    holder = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths})
    wait_for(tmp_path, "told", holder)
    builder, has_lock = told.read_text().split()
    assert has_lock == "False", "the builder holds the lock's descriptor"
    holder.kill()
    holder.wait()
    from sparsify_deploy.artifacts.store import ArtifactStore

    with ArtifactStore(tmp_path / "store").lock():
        pass
    until = time.monotonic() + 30
    while Path(f"/proc/{builder}").exists() and Path(f"/proc/{builder}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < until, "the builder lives on"
        time.sleep(0.01)


def test_a_lock_of_a_process_at_work_is_refused_at_once_and_one_of_a_dying_one_is_waited_for(tmp_path):
    """The kernel takes memory back before it drops locks: for that long the holder is dead and the lock is held."""
    import fcntl
    import socket

    from sparsify_deploy.artifacts.lock import locked
    from sparsify_deploy.errors import Locked

    slept = []
    file = (tmp_path / ".lock").open("w+")
    fcntl.flock(file, fcntl.LOCK_EX)

    def attempt(holder: int, let_go_after: int) -> None:
        slept.clear()
        file.seek(0)
        file.truncate()
        file.write(f"process {holder} on {socket.gethostname()}\n")
        file.flush()

        def sleep(seconds: float) -> None:
            slept.append(seconds)
            if len(slept) == let_go_after:
                fcntl.flock(file, fcntl.LOCK_UN)

        with locked(tmp_path, clock=lambda: sum(slept), sleep=sleep):
            pass

    gone = subprocess.Popen(["true"])
    gone.wait()
    with pytest.raises(Locked, match=f"in use by process {os.getpid()} "):
        attempt(os.getpid(), let_go_after=3)
    assert slept == []
    with pytest.raises(Locked, match=f"in use by process {gone.pid} "):
        attempt(gone.pid, let_go_after=10**6)
    assert 0.9 < sum(slept) < 1.1
    attempt(gone.pid, let_go_after=3)
    assert len(slept) == 3
    file.close()
