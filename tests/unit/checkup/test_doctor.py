"""What doctor finds, on this machine and on pretended ones."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata

import pytest

from sparsify_deploy import menu
from sparsify_deploy.artifacts import environment
from sparsify_deploy.checkup import doctor
from sparsify_deploy.checkup.findings import Finding
from sparsify_deploy.runtimes import _packages


@pytest.fixture(scope="module")
def found():
    return {finding.name: finding for finding in doctor.diagnose()}


def test_every_subject_has_one_finding_with_advice_where_something_is_wrong(found):
    subjects = {"python", "core packages", "torch", "modelopt", "torchvision", "onnxruntime packages"}
    places = {"gpu", "cpu", "cores", "memory", "open files", "shared memory", "disk", "temporary files"}
    assert set(found) - {"memory limit"} == subjects | places | set(menu.names("runtimes"))
    for finding in found.values():
        assert finding.state in ("ok", "warn", "missing")
        assert "\n" not in finding.detail + finding.advice
        assert bool(finding.advice) == (finding.state != "ok"), finding


def test_versions_are_those_installed(found):
    assert f"onnx {metadata.version('onnx')}" in found["core packages"].detail
    if _packages.installed("openvino"):
        assert metadata.version("openvino") in found["openvino"].detail


def test_the_core_alone_is_enough():
    """With everything else blocked it still answers, and imports neither torch nor a runtime."""
    blocked = ("torch", "modelopt", "openvino", "onnxruntime", "tensorrt", "tensorrt_rtx", "cuda", "pynvml")
    code = (
        "import sys, importlib.util as u\n"
        f"blocked = {blocked!r}\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name.split('.')[0] in blocked else find(name, package)\n"
        "sys.modules.update(dict.fromkeys(blocked))\n"
        "import importlib.metadata as m\n"
        "version = m.version\n"
        "def known(name):\n"
        "    if any(part in name.replace('-', '_') for part in blocked): raise m.PackageNotFoundError(name)\n"
        "    return version(name)\n"
        "m.version = known\n"
        "from sparsify_deploy.checkup.doctor import diagnose\n"
        "print({f.name: f.state for f in diagnose()})"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=False, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    states = eval(done.stdout)
    for name in ("torch", "modelopt", *menu.names("runtimes")):
        assert states[name] == "missing"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed (SIGSEGV)"),
        (
            "raise RuntimeError('operator torchvision::nms\\ndoes not exist')",
            "RuntimeError: operator torchvision::nms does",
        ),
        ("import a_module_that_is_not_there", "ModuleNotFoundError"),
        ("x = 1", None),
    ],
)
def test_a_package_is_imported_in_a_child(tmp_path, monkeypatch, source, message):
    (tmp_path / "suspicious.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    failure = doctor._import_failure("suspicious")
    assert failure is None if message is None else message in failure
    assert "suspicious" not in sys.modules


@pytest.mark.parametrize(
    ("flags", "state", "text"),
    [
        ("Xeon avx2 avx512_vnni amx_int8", "ok", "AMX"),
        ("Xeon avx2 avx512f avx512_vnni", "ok", "dot products"),
        ("Core avx2 fma", "warn", "no INT8 dot products"),
        ("Neoverse asimd asimddp", "ok", "dot products"),
    ],
)
def test_the_cpus_int8_is_judged(flags, state, text):
    finding = doctor._cpu(flags)
    assert finding.state == state
    assert text in finding.detail


def test_a_gpu_is_shown_with_its_driver(monkeypatch):
    facts = {"gpu": "NVIDIA Test sm86", "driver": "580.1"}
    monkeypatch.setattr(environment, "fact", facts.get)
    assert doctor._gpu() == Finding("gpu", "ok", "NVIDIA Test sm86, driver 580.1")


def test_modelopt_without_what_it_does_not_declare(monkeypatch):
    monkeypatch.setattr(_packages, "installed", lambda name: name != "requests")
    monkeypatch.setattr(doctor, "_imported", lambda *args: None)
    finding = list(doctor._training())[1]
    assert finding.state == "warn"
    assert finding.detail == "lacks requests"
