"""What the package imports is what `pyproject.toml` declares, and what it pins has a pin for each Python."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")

ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTIONS = {
    "PIL": "pillow",
    "cuda": "cuda-bindings",
    "google": "protobuf",
    "modelopt": "nvidia-modelopt",
    "pynvml": "nvidia-ml-py",
    "ruamel": "ruamel-yaml",
    "sklearn": "scikit-learn",
    "tensorrt_rtx": "tensorrt-rtx-cu13",
}
UNPINNED = {"tensorrt", "onnxruntime-gpu"}
"""What needs NVIDIA's own libraries: its version is the GPU machine's choice."""


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements: list[str]) -> set[str]:
    return {normal(re.split(r"[\s<>=!~;\[]", line, maxsplit=1)[0]) for line in requirements}


def pins(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    pairs = [line.split("==") for line in lines]
    assert all(len(pair) == 2 for pair in pairs), f"{path.name} holds something else than exact pins"
    return {normal(name): version for name, version in pairs}


def imported() -> set[str]:
    """Distributions that the package imports at run time, wherever in a file."""
    found: set[str] = set()
    for path in (ROOT / "sparsify_deploy").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                name = node.args[0]
                found.update([name.value.partition(".")[0]] if isinstance(name, ast.Constant) else [])
    return {normal(DISTRIBUTIONS.get(n, n)) for n in found - sys.stdlib_module_names - {"sparsify_deploy"}}


def test_every_import_is_declared() -> None:
    declared = names(project()["dependencies"])
    for requirements in project()["optional-dependencies"].values():
        declared |= names(requirements)
    assert imported() - declared == set()


def test_every_core_dependency_is_used() -> None:
    assert names(project()["dependencies"]) - imported() == set()


@pytest.mark.parametrize("minor", [10, 11, 12, 13])
def test_every_declared_package_is_pinned(minor: int) -> None:
    lines = [*project()["dependencies"]]
    for extra, requirements in project()["optional-dependencies"].items():
        lines += requirements if minor > 10 or extra not in ("train", "vision", "hf", "docs") else []
    needed = [Requirement(line) for line in lines]
    python = {"python_version": f"3.{minor}"}
    wanted = {normal(r.name) for r in needed if r.marker is None or r.marker.evaluate(python)}
    assert wanted - UNPINNED - set(pins(ROOT / "constraints" / f"py3{minor}.txt")) == set()


def test_newer_pythons_get_the_pins_that_were_tested() -> None:
    tested = pins(ROOT / "constraints" / "py311.txt")
    for minor in (12, 13):
        assert pins(ROOT / "constraints" / f"py3{minor}.txt") == tested


def test_no_pin_brings_cuda_to_a_machine_without_a_gpu() -> None:
    allowed = {"nvidia-modelopt", "nvidia-ml-py", "cuda-bindings", "cuda-pathfinder", "tensorrt-rtx-cu13"}
    allowed |= {"tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13-libs", "tritonclient"}
    for path in (ROOT / "constraints").glob("*.txt"):
        cuda = {name for name in pins(path) if re.search(r"nvidia|cuda|-cu\d\d|triton", name)}
        assert cuda - allowed == set(), path.name
