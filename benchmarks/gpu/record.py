"""Result files that can be gone on with: one row a measurement, under a fingerprint of the machine and the code."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path

from sparsify_deploy.artifacts import environment
from sparsify_deploy.errors import CorruptArtifact, Interrupted, UsageError
from sparsify_deploy.types import Json

_ROOT = Path(__file__).resolve().parents[2]
_ASKED = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
_THROTTLED = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
"""The same by newer and by older drivers."""
_PACKAGES = ("cuda-bindings", "nvidia-cusparselt-cu13", "nvidia-cusparselt-cu12")
_SAME = ("kind", "gpu", "driver", "cpu", "packages", "cuda", "rehearsal")


Row = Mapping[str, Json]


def fingerprint(kind: str, *, rehearsal: bool, cuda: str | None = None) -> dict[str, Json]:
    """Device, driver, CUDA, package versions, commit and time. `cuda` is what a framework was built with, if known."""
    packages = dict(environment.machine()["packages"])
    for name in _PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "kind": kind,
        "rehearsal": rehearsal,
        "gpu": environment.fact("gpu"),
        "driver": environment.fact("driver"),
        "cuda": cuda or _driver_cuda(),
        "cpu": environment.fact("cpu"),
        "python": environment.fact("python"),
        "packages": packages,
        "commit": commit(),
        "created": now(),
    }


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def commit() -> str:
    """The commit that is measured, with `+` where files differ: from git, else from the variable COMMIT."""
    if (named := os.environ.get("COMMIT")) is not None:
        return named
    if shutil.which("git") is None or not (_ROOT / ".git").exists():
        return "unknown"
    head = _said(["git", "-C", str(_ROOT), "rev-parse", "HEAD"])
    changed = _said(["git", "-C", str(_ROOT), "status", "--porcelain", "--untracked-files=no"])
    return head + ("+" if changed else "")


def clocks() -> dict[str, str] | None:
    """Clocks, temperature, power and reasons for throttling as `nvidia-smi` shows them; None without a GPU."""
    if shutil.which("nvidia-smi") is None:
        return None
    for reasons in _THROTTLED:
        names = (*_ASKED, reasons)
        said = _said(["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0"])
        values = [value.strip() for value in said.split(",")]
        if len(values) == len(names):
            return dict(zip(names, values, strict=True))
    return {"nvidia-smi": said}


def _driver_cuda() -> str:
    """The newest CUDA that the driver runs, as `nvidia-smi` says it."""
    if shutil.which("nvidia-smi") is None:
        return "none"
    words = _said(["nvidia-smi"]).replace("|", " ").split()
    follows = [words[i + 2] for i in range(len(words) - 2) if words[i] == "CUDA" and words[i + 1] == "Version:"]
    return f"{follows[0]} (driver)" if follows else "unknown"


def _said(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return (done.stdout or done.stderr).strip()


class Record:
    """A result file: `fingerprint`, `rows` by key, and how often a key was begun. Every change is on disk at once."""

    def __init__(self, path: Path, found: Mapping[str, Json]) -> None:
        """Start or go on. Raises UsageError where the file was measured on another machine or with other versions."""
        self.path, self._commit = path, found["commit"]
        self.fingerprint, self.rows, self.attempts = dict(found), dict[str, Json](), dict[str, int]()
        if not path.is_file():
            return
        kept = load(path)
        different = [key for key in _SAME if kept["fingerprint"].get(key) != found[key]]
        if different:
            key = different[0]
            raise UsageError(
                f"{path}: was measured with {key} {kept['fingerprint'].get(key)!r}, this is {found[key]!r}; "
                "give another --out"
            )
        self.fingerprint, self.rows, self.attempts = kept["fingerprint"], kept["rows"], kept.get("attempts", {})

    def begin(self, key: str) -> None:
        """Count an attempt, before it can kill the process."""
        self.attempts[key] = self.attempts.get(key, 0) + 1
        self._write()

    def take_back(self, key: str) -> None:
        """Count an attempt no more."""
        self.attempts.pop(key, None)
        self._write()

    def put(self, key: str, row: Row) -> None:
        """Keep a row, when it was measured and by which commit."""
        self.rows[key] = {**row, "measured": now(), "commit": self._commit}
        self.attempts.pop(key, None)
        self._write()

    def _write(self) -> None:
        write(self.path, {"fingerprint": self.fingerprint, "rows": self.rows, "attempts": self.attempts})


def write(path: Path, whole: Row) -> None:
    """Replace a result file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def load(path: Path) -> dict[str, Json]:
    """A result file. Raises CorruptArtifact where it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise CorruptArtifact(f"{path}: is no JSON; measure again into another file") from None
    if not isinstance(found, dict) or not {"fingerprint", "rows"} <= found.keys():
        raise CorruptArtifact(f"{path}: holds no fingerprint and rows; measure again into another file")
    return found


def perform(
    record: Record, jobs: Mapping[str, Callable[[], Row]], *, budget_s: float | None, show: Callable[[str, Row], str]
) -> int:
    """Do the jobs whose row is missing, in order, and print each row. Returns the exit code: 1 where one
    failed, else 75 where there was no time for all.

    No job is begun that the slowest one so far would not fit into what is left of `budget_s`. One that fails is
    named with its traceback and costs the others nothing; one that was begun before and never finished (it killed
    the process, or the session ended) comes last.
    """
    end = None if budget_s is None else time.monotonic() + budget_s
    slowest, failed, left = 0.0, 0, 0
    waiting = sorted((key for key in jobs if key not in record.rows), key=lambda key: record.attempts.get(key, 0))
    for position, key in enumerate(waiting):
        began = time.monotonic()
        if end is not None and began + slowest > end:
            print(f"out of time, left for the next call: {', '.join(waiting[position:])}", flush=True)
            left = len(waiting) - position
            break
        record.begin(key)
        try:
            row = jobs[key]()
        except KeyboardInterrupt:  # the call's time is over, which is not the job's fault
            record.take_back(key)
            raise
        except Exception:  # noqa: BLE001 whatever it was, time on a GPU is too dear to lose the other jobs
            failed += 1
            print(f"{key} FAILED:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        else:
            record.put(key, row)
            print(show(key, row), flush=True)
        slowest = max(slowest, time.monotonic() - began)
    return 1 if failed else Interrupted.exit_code if left else 0
