"""Every entry of the tasks menu meets the menu's contract, on a Python without torch and numpy."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest

from sparsify_deploy import menu

ENTRIES = menu.names("tasks")

LOAD_BARE = """
import json, sys
for blocked in ("torch", "numpy", "sklearn"):
    sys.modules[blocked] = None
import importlib
m = importlib.import_module("sparsify_deploy.tasks." + sys.argv[1])
from sparsify_deploy.params import Params
params = m.Params.model_validate({"path": "own.py"} if sys.argv[1] == "file" else {}, context={"folder": "/somewhere"})
found = {} if m.RUNS_USER_CODE else {**m.create(params).metrics, **getattr(m.create(params), "also_measured", {})}
print(json.dumps({
    "version": m.VERSION, "user": m.RUNS_USER_CODE, "params": issubclass(m.Params, Params), "metrics": found,
    "files": {k: str(v) for k, v in m.files(params).items()},
}))
"""


@pytest.mark.parametrize("name", ENTRIES)
def test_task_entry_loads_bare_and_knows_its_metrics(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", LOAD_BARE, name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["version"] >= 1
    assert facts["params"]
    assert facts["user"] is (name == "file")
    assert facts["files"] == ({"path": "/somewhere/own.py"} if name == "file" else {})
    assert {*facts["metrics"].values()} <= {"higher", "lower"}
    assert facts["metrics"] or name == "file"


@pytest.mark.parametrize("name", ENTRIES)
def test_task_entry_has_a_summary_and_the_common_signatures(name: str) -> None:
    summary = menu.summary("tasks", name)
    assert summary.endswith(".")
    assert len(summary) < 110
    entry = menu.entry("tasks", name)
    assert list(inspect.signature(entry.create).parameters) == ["params"]
    assert list(inspect.signature(entry.files).parameters) == ["params"]


def test_the_tasks_menu_lists_what_there_is() -> None:
    assert {"classification", "regression", "file"} <= set(ENTRIES)
