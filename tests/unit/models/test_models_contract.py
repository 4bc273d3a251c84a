"""Every entry of the models menu meets the menu's contract, on a Python without torch and numpy."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest

from sparsify_deploy import menu

ENTRIES = menu.names("models")

LOAD_BARE = """
import json, sys
for blocked in ("torch", "numpy", "modelopt", "onnx", "safetensors"):
    sys.modules[blocked] = None
import importlib
m = importlib.import_module("sparsify_deploy.models." + sys.argv[1])
from sparsify_deploy.params import Params
given = {"file": {"path": "net.py"}, "onnx": {"path": "net.py"}}.get(sys.argv[1], {"name": "resnet8"})
params = m.Params.model_validate(given, context={"folder": "/somewhere"})
files = m.files(params)
print(json.dumps({
    "version": m.VERSION, "user": m.RUNS_USER_CODE, "params": issubclass(m.Params, Params),
    "build": callable(m.build), "files": {k: str(v) for k, v in files.items()},
}))
"""


@pytest.mark.parametrize("name", ENTRIES)
def test_model_entry_loads_bare_and_is_whole(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", LOAD_BARE, name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["version"] >= 1
    assert facts["params"]
    assert facts["build"]
    assert facts["user"] is (name == "file")
    assert facts["files"] == ({"path": "/somewhere/net.py"} if name in ("file", "onnx") else {})


@pytest.mark.parametrize("name", ENTRIES)
def test_model_entry_has_a_summary_and_the_common_signatures(name: str) -> None:
    summary = menu.summary("models", name)
    assert summary.endswith(".")
    assert len(summary) < 110
    entry = menu.entry("models", name)
    assert list(inspect.signature(entry.build).parameters) == ["params"]
    assert list(inspect.signature(entry.files).parameters) == ["params"]


def test_the_models_menu_lists_what_there_is() -> None:
    assert {"builtin", "file"} <= set(ENTRIES)
