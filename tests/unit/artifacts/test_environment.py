"""Facts about the machine, found without importing what they name."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from sparsify_deploy.artifacts import environment
from sparsify_deploy.artifacts.environment import ABSENT, FACTS, NO_GPU, PACKAGES, fact, machine, package


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    fact.cache_clear()
    environment._gpu_and_driver.cache_clear()
    yield
    fact.cache_clear()
    environment._gpu_and_driver.cache_clear()


def test_every_fact_is_text_and_an_unknown_name_is_an_error() -> None:
    for name in (*PACKAGES, *FACTS):
        assert fact(name).strip()
    assert fact("python") == platform.python_version()
    with pytest.raises(KeyError):
        fact("tensorflow")


def test_versions_come_from_the_installed_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.0", "tensorrt-cu12": "10.9"}

    def version(dist: str) -> str:
        if dist not in installed:
            raise importlib.metadata.PackageNotFoundError(dist)
        return installed[dist]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "torch" else None)
    assert package("onnxruntime") == "1.32.0 and 1.31.0 (onnxruntime-gpu)"
    assert package("tensorrt") == "10.9 (tensorrt-cu12)"
    assert package("openvino") == ABSENT
    assert package("torch") == "version unknown"


def test_the_cpu_is_its_model_and_the_instruction_sets_that_matter(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(
        "processor : 0\nmodel name\t: Some  CPU @ 2GHz\nflags\t\t: fpu avx2 avx512f avx512_vnni amx_int8\n\n"
        "processor : 1\nmodel name\t: Other\nflags : fpu\n"
    )
    model, flags = environment._cpuinfo(path)
    assert model == "Some CPU @ 2GHz"
    assert {"avx2", "avx512_vnni", "amx_int8"} <= flags
    assert environment._cpuinfo(tmp_path / "none") == ("", frozenset())


class FakeNvml(SimpleNamespace):
    class NVMLError(Exception):
        pass

    class NVMLError_LibraryNotFound(NVMLError):
        pass

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__(open=0)
        self.error = error

    def nvmlInit(self) -> None:
        if self.error:
            raise self.error
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return 3

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return (8, 6) if handle else (9, 0)

    def nvmlDeviceGetName(self, handle: int) -> str | bytes:
        return b"NVIDIA A10" if handle else "NVIDIA H100"

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"


def test_gpus_are_named_with_their_architecture_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[misc]
    assert environment._from_nvml() == ("NVIDIA A10 sm86; NVIDIA H100 sm90", "580.1")
    assert nvml.open == 0


def test_without_a_driver_there_is_no_gpu_and_a_broken_one_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(FakeNvml.NVMLError_LibraryNotFound()))  # type: ignore[misc]
    assert environment._from_nvml() == (NO_GPU, NO_GPU)
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(FakeNvml.NVMLError("version mismatch")))  # type: ignore[misc]
    assert environment._from_nvml() == ("none (version mismatch)", NO_GPU)


@pytest.mark.parametrize("loads", [True, False])
def test_pynvml_is_asked_only_where_the_drivers_library_loads(loads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        if not loads:
            raise OSError(f"{name}: cannot open shared object file")

    nvml = ModuleType("pynvml")
    nvml.__spec__ = ModuleSpec("pynvml", None)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr("ctypes.CDLL", load)
    monkeypatch.setattr(environment, "_from_nvml", lambda: ("NVIDIA A10 sm86", "580.1"))
    monkeypatch.setattr("shutil.which", lambda name: None)
    found = environment._gpu_and_driver.__wrapped__()
    assert found == (("NVIDIA A10 sm86", "580.1") if loads else (NO_GPU, NO_GPU))


def test_nvidia_smi_answers_where_pynvml_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA A10, 8.6, 580.1'\necho 'NVIDIA A10, 8.6, 580.1'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert environment._from_nvidia_smi() == ("NVIDIA A10 sm86", "580.1")
    tool.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    assert environment._from_nvidia_smi() == (NO_GPU, NO_GPU)


def test_a_machine_fits_into_a_report() -> None:
    found = machine()
    assert json.loads(json.dumps(found)) == found
    assert found["cores"] >= 1
    assert "pydantic" not in found["packages"]


def test_no_fact_imports_what_it_names() -> None:
    program = (
        "import sys\n"
        "for name in ('torch', 'numpy', 'onnx', 'onnxruntime', 'openvino', 'tensorrt_rtx', 'modelopt'):\n"
        "    assert name not in sys.modules\n"
        "from sparsify_deploy.artifacts import environment, fingerprint, store\n"
        "environment.machine()\n"
        "print([n for n in ('torch', 'numpy', 'onnx', 'onnxruntime', 'openvino', 'modelopt') if n in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
