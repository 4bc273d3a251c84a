"""The contract every entry of the runtimes menu meets."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsify_deploy import menu
from sparsify_deploy.params import Params
from sparsify_deploy.runtimes import _metadata, _packages

NAMES = menu.names("runtimes")
FOREIGN = ("torch", "numpy", "onnx", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "cuda")


def test_the_menu_holds_the_four_runtimes():
    assert set(NAMES) >= {"onnxruntime", "openvino", "tensorrt", "tensorrt_rtx"}


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_has_what_the_seam_asks_for(name):
    runtime = menu.entry("runtimes", name)
    assert isinstance(runtime.VERSION, int)
    assert runtime.SUFFIX.startswith(".")
    assert issubclass(runtime.Params, Params)
    runtime.Params()
    assert menu.summary("runtimes", name).endswith(".")
    for function, positional, keywords in (
        ("unavailable_reason", [], {}),
        ("cannot_run_reason", [], {}),
        ("version", [], {}),
        ("build", ["onnx", "engine", "params"], {"progress": None}),
        ("open", ["engine", "params"], {"threads": 1, "shapes": None}),
        ("profile", ["engine", "params", "inputs"], {"threads": 1}),
    ):
        found = inspect.signature(getattr(runtime, function)).parameters.values()
        assert [p.name for p in found if p.kind is p.POSITIONAL_ONLY] == positional
        optional = {p.name: p.default for p in found if p.kind is p.KEYWORD_ONLY}
        assert optional == keywords


def test_no_two_runtimes_share_a_suffix():
    for name in NAMES:
        assert _metadata.runtime_of(Path("x" + menu.entry("runtimes", name).SUFFIX)) == name


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_loads_and_answers_without_any_other_package(name):
    code = (
        f"import sys\nsys.modules.update(dict.fromkeys({FOREIGN!r}))\n"
        "from sparsify_deploy import menu\n"
        f"r = menu.entry('runtimes', {name!r})\nr.Params()\nprint(r.SUFFIX)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == menu.entry("runtimes", name).SUFFIX


@pytest.mark.parametrize("name", NAMES)
def test_a_reason_is_one_line_and_building_raises_it(name, tmp_path, monkeypatch):
    monkeypatch.setattr(_packages, "installed", lambda module: False)
    runtime = menu.entry("runtimes", name)
    reason = runtime.unavailable_reason()
    assert "\n" not in reason
    assert "pip install 'sparsify-deploy[" in reason
    assert runtime.version() is None


def test_a_folder_left_by_a_removed_package_is_not_installed(tmp_path, monkeypatch):
    (tmp_path / "leftover_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not _packages.installed("leftover_package")
    assert not _packages.installed("leftover_package.inner")
    assert not _packages.installed("no_such_package.inner")
    assert _packages.installed("pydantic")
