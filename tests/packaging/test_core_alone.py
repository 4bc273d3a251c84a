"""The core package without an extra, installed into an empty environment: what works there and what it asks for."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / "constraints" / f"py3{sys.version_info[1]}.txt"
NO_NETWORK = re.compile(
    r"NewConnectionError|Failed to establish|Temporary failure in name|ProxyError|Connect(ion)?Timeout"
)


def bare_environment() -> dict[str, str]:
    """The environment without PYTHONPATH and its like: they would let the checkout shine through."""
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}


@dataclass(frozen=True)
class Installed:
    """An environment with the core package, the wheel it came from, and a model to work on."""

    bin: Path
    wheel: Path
    model: Path

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.bin / program), *arguments],
            cwd=self.model.parent,
            env=bare_environment() | {"COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run("sparsify-deploy", *arguments)


def pip(*arguments: str | Path) -> None:
    """Run pip; skip where no package index answers."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", *map(str, arguments)],
        env=bare_environment() | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_RETRIES": "1"},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    if done.returncode and (found := NO_NETWORK.search(done.stdout + done.stderr)):
        pytest.skip(f"pip reaches no package index here ({found[0]})")
    assert done.returncode == 0, done.stderr[-3000:]


def write_model(path: Path) -> None:
    """A 3x3 convolution of 16 to 8 channels that holds 2:4 along its input channels, then a ReLU."""
    weight = np.random.default_rng(0).standard_normal((8, 16, 3, 3)).astype(np.float32)
    weight[:, 0::4] = 0
    weight[:, 3::4] = 0
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["input", "weight"], ["hidden"], pads=[1] * 4),
            helper.make_node("Relu", ["hidden"], ["output"]),
        ],
        "net",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 16, 8, 8])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["N", 8, 8, 8])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("core")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "sparsify_deploy", source / "sparsify_deploy", ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source)
    [wheel] = folder.glob("sparsify_deploy-*.whl")
    venv.create(folder / "venv", with_pip=False)
    pins = ("-c", CONSTRAINTS) if CONSTRAINTS.is_file() else ()
    pip("--python", folder / "venv" / "bin" / "python", "install", "--quiet", *pins, wheel)
    write_model(folder / "model.onnx")
    return Installed(folder / "venv" / "bin", wheel, folder / "model.onnx")


def test_the_wheel_holds_the_package_and_nothing_else(core: Installed) -> None:
    files = set(zipfile.ZipFile(core.wheel).namelist())
    assert {"sparsify_deploy/py.typed", "sparsify_deploy/recipe.schema.json"} <= files
    tops = {name.partition("/")[0] for name in files}
    assert tops == {"sparsify_deploy", core.wheel.name.partition("-py3")[0] + ".dist-info"}
    assert {
        f"sparsify_deploy/{p.relative_to(ROOT / 'sparsify_deploy')}" for p in (ROOT / "sparsify_deploy").rglob("*.py")
    } <= files


def test_torch_and_the_runtimes_are_not_there(core: Installed) -> None:
    probe = "import importlib.util as u, json; print(json.dumps([m for m in {} if u.find_spec(m)]))"
    done = core.run("python", "-c", probe.format(["torch", "modelopt", "onnxruntime", "openvino", "tensorrt_rtx"]))
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize(
    "arguments", [["--version"], ["version"], ["--help"], ["list"], ["validate", "RECIPE"]], ids=" ".join
)
def test_the_light_verbs_work(core: Installed, arguments: list[str]) -> None:
    done = core.cli(*(str(ROOT / "recipes" / "digits.yaml") if a == "RECIPE" else a for a in arguments))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


def test_inspect_works(core: Installed) -> None:
    done = core.cli("inspect", str(core.model), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    [layer] = json.loads(done.stdout)["chain"]["layers"]
    assert (layer["op"], layer["shape"], layer["zeros"] / layer["weights"]) == ("Conv", [8, 16, 3, 3], 0.5)
    assert layer["pattern_held"]
    assert layer["shape_rule"]


def test_doctor_works_and_says_what_to_install(core: Installed) -> None:
    done = core.cli("doctor")
    assert (done.returncode, done.stderr) == (0, "")
    for extra in ("train", "cpu"):
        assert f"sparsify-deploy[{extra}]" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        pytest.param(["build", "MODEL"], "cpu", id="build"),
        pytest.param(["build", "MODEL", "--runtime", "onnxruntime"], "cpu", id="build with ONNX Runtime"),
        pytest.param(["build", "MODEL", "--runtime", "tensorrt_rtx"], "tensorrt-rtx", id="build with TensorRT-RTX"),
        pytest.param(["bench", "MODEL"], "cpu", id="bench"),
        pytest.param(["run", "RECIPE", "--run-dir", "run"], "train", id="run"),
    ],
)
def test_what_needs_an_extra_names_it(core: Installed, arguments: list[str], extra: str) -> None:
    known = {"MODEL": str(core.model), "RECIPE": str(ROOT / "recipes" / "digits.yaml")}
    done = core.cli(*(known.get(a, a) for a in arguments))
    assert done.returncode == 3, done.stderr
    assert f"sparsify-deploy[{extra}]" in done.stderr
    said = [line for line in done.stderr.splitlines() if line != "sparsify-deploy: log: run/run.log"]
    assert len(said) == 1, done.stderr
