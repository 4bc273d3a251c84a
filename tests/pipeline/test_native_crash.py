"""A runtime that crashes or hangs wherever it is called, by every verb that calls it: exit 3 and one line.

The fakes are real: a package that does so when it is imported, or the installed one with one function replaced.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="verbs are supervised on Linux")

CRASH, HANG = "ctypes.string_at(0)", "time.sleep(1000)"

HOOK = '''\
import ctypes, importlib.abc, importlib.util, os, sys, time

package, _, place = os.environ.get("BREAK", "").partition(":")


def broken(*args, **kwargs):
    exec(os.environ["BREAK_BY"])


class After(importlib.abc.MetaPathFinder):
    """Replaces one function of `package` once it is imported."""

    def find_spec(self, name, path=None, target=None):
        if name != package:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        sys.meta_path.insert(0, self)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            *owners, last = place.split(".")
            for owner in owners:
                module = getattr(module, owner)
            setattr(module, last, broken)

        spec.loader.exec_module = exec_module
        return spec


if place:
    sys.meta_path.insert(0, After())
'''

RECIPE = """\
version: 1
name: given
model: {source: onnx, params: {path: model.onnx}}
deploy: [{runtime: openvino}]
benchmark: {rounds: 5, round_ms: 2.0, warmup_ms: 2.0}
"""

Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two small ONNX files and a recipe that starts from one."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((16, 16)).astype(np.float32)
    for name in ("model", "other"):
        graph = helper.make_graph(
            [helper.make_node("Gemm", ["input", "weight"], ["output"], "fc")],
            name,
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 16])],
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["n", 16])],
            [numpy_helper.from_array(weight, "weight")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        onnx.save(model, tmp_path / f"{name}.onnx")
    (tmp_path / "given.yaml").write_text(RECIPE)
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    return tmp_path


@pytest.fixture
def call(folder: Path) -> Call:
    """Call the command line where `place` of `package` does `by`; without a place the package does when imported."""

    def run(arguments: Sequence[str], package: str, place: str, by: str) -> subprocess.CompletedProcess[str]:
        if not place:
            (folder / "hook" / package).mkdir()
            (folder / "hook" / package / "__init__.py").write_text(f"import ctypes, time\n{by}\n")
        more = {"BREAK": f"{package}:{place}" if place else "", "BREAK_BY": by, "OMP_NUM_THREADS": "1"}
        if by == HANG:
            more["SPARSIFY_TIME_LIMIT_S"] = "4"
        return subprocess.run(
            [sys.executable, "-m", "sparsify_deploy", *arguments],
            cwd=folder,
            env={**os.environ, **more, "PYTHONPATH": str(folder / "hook")},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


BUILD_OV = ("build", "model.onnx", "--runtime", "openvino", "-q")
BUILD_ORT = ("build", "model.onnx", "--runtime", "onnxruntime", "-o", "built.onnx", "-q")
BENCH_OV = ("bench", "model.onnx", "--runtime", "openvino", "--rounds", "5", "--round-ms", "1", "-q")
BENCH_ORT = ("bench", "model.onnx", "--runtime", "onnxruntime", "--rounds", "5", "--round-ms", "1", "-q")
COMPARE = ("inspect", "model.onnx", "--compare", "other.onnx", "--shape", "input=2x16")
RUN = ("run", "given.yaml", "-q")

SESSION, EXECUTE = "InferenceSession.__init__", "InferenceSession.run_with_iobinding"
PLACES = [
    (BUILD_OV, "openvino", "", "importing OpenVINO"),
    (BUILD_OV, "openvino", "Core.read_model", "OpenVINO converting model.onnx"),
    (BUILD_OV, "openvino", "save_model", "OpenVINO converting model.onnx"),
    (BENCH_OV, "openvino", "Core.compile_model", "OpenVINO compiling model.xml"),
    (BENCH_OV, "openvino", "InferRequest.infer", "timing model.onnx"),
    (BUILD_ORT, "onnxruntime", "", "importing ONNX Runtime"),
    (BUILD_ORT, "onnxruntime", SESSION, "ONNX Runtime loading model.onnx"),
    (BENCH_ORT, "onnxruntime", EXECUTE, "timing model.onnx"),
    (COMPARE, "onnxruntime", SESSION, "ONNX Runtime loading"),
    (COMPARE, "onnxruntime", EXECUTE, "running a batch in OnnxRuntime"),
    (RUN, "onnxruntime", SESSION, "ONNX Runtime loading model.onnx"),
    (RUN, "onnxruntime", EXECUTE, "running a batch in OnnxRuntime"),
    (RUN, "openvino", "", "importing OpenVINO"),
    (RUN, "openvino", "save_model", "OpenVINO converting model.onnx"),
    (RUN, "openvino", "Core.compile_model", "OpenVINO compiling model.xml"),
    (RUN, "openvino", "InferRequest.infer", "running a batch in OpenVino"),
]
QUICK_CRASHES, QUICK_HANGS = (0, 4, 8, 11, 14), (7, 13)


def every(quick: Sequence[int]) -> list[object]:
    return [
        pytest.param(*each, id=f"{each[0][0]}-{each[1]}-{each[2] or 'import'}", marks=[] if i in quick else slow)
        for i, each in enumerate(PLACES)
    ]


slow = [pytest.mark.slow]


@pytest.mark.parametrize(("arguments", "package", "place", "named"), every(QUICK_CRASHES))
def test_a_segfault_is_3_and_one_line(
    call: Call, folder: Path, arguments: Sequence[str], package: str, place: str, named: str
) -> None:
    done = call(arguments, package, place, CRASH)
    assert (done.returncode, done.stdout) == (3, ""), done.stderr
    line = the_line(done)
    assert line.startswith("sparsify-deploy: the process crashed (SIGSEGV)")
    assert named in line
    if arguments is RUN:
        assert " in given/" in line
        follows_up(call, folder)


@pytest.mark.parametrize(("arguments", "package", "place", "named"), every(QUICK_HANGS))
def test_a_hang_is_3_and_one_line(
    call: Call, folder: Path, arguments: Sequence[str], package: str, place: str, named: str
) -> None:
    done = call(arguments, package, place, HANG)
    assert (done.returncode, done.stdout) == (3, ""), done.stderr
    line = the_line(done)
    assert named in line
    assert "was stopped after its time limit of 4 s: raise SPARSIFY_TIME_LIMIT_S" in line
    if arguments is RUN:
        follows_up(call, folder)


def the_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line, besides where the log is."""
    lines = done.stderr.splitlines()
    assert len(lines) <= 2, done.stderr
    (line,) = [each for each in lines if not each.startswith("sparsify-deploy: log: ")]
    return line


def follows_up(call: Call, folder: Path) -> None:
    """The lock is free, nothing broken was committed, and the same command ends well."""
    for each in (folder / "hook").glob("*/__init__.py"):
        each.unlink()
        each.parent.rmdir()
    done = call(RUN, "nothing", "nothing", "")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("by", [CRASH, HANG])
@pytest.mark.parametrize("place", ["Core.compile_model", "InferRequest.infer"])
def test_predict_and_profile_too(call: Call, folder: Path, finished: Path, by: str, place: str) -> None:
    np.save(folder / "image.npy", np.zeros((8, 8), np.float32))
    deploy = finished / "runs" / "tiny" / "deploy"
    engine = next(deploy.glob("*.xml"))
    for arguments in (("predict", str(deploy), "image.npy"), ("inspect", str(engine), "--profile")):
        done = call(arguments, "openvino", place, by)
        assert (done.returncode, done.stdout) == (3, ""), done.stderr
        the_line(done)
