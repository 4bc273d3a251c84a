"""Memory that runs out in a stage, in each of its disguises: exit 7 with the batch size, the peak and advice."""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS and /proc are Linux's")

HOOK = '''\
"""Lowers the limit on a process's memory inside of one step, after what that imports is imported."""
import ctypes, importlib, importlib.abc, importlib.util, os, resource, sys
from contextlib import contextmanager


class After(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "sparsify_deploy.process.watch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            limit_in(module)

        spec.loader.exec_module = exec_module
        return spec


def limit_in(watch):
    step, batch = watch.step, watch.batch

    @contextmanager
    def limited(name, *more):
        with step(name, *more):
            if name == os.environ["LIMIT_IN"] and os.environ["LIMIT_BY"].isdecimal():
                lower(int(os.environ["LIMIT_BY"]))
            yield

    @contextmanager
    def fails(size, field=""):
        with batch(size, field):
            if watch.current().step == os.environ["LIMIT_IN"] and field:
                fail(os.environ["LIMIT_BY"])
            yield

    watch.step, watch.batch = limited, fails


def lower(mib):
    for name in os.environ["LIMIT_AFTER"].split():
        importlib.import_module(name)
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (mib << 20), size + (mib << 20)))


def fail(how):
    if how == "MemoryError":
        raise MemoryError
    if how == "numpy":
        import numpy
        numpy.empty(1 << 60, numpy.uint8)
    if how == "torch":
        import torch
        torch.empty(1 << 60, dtype=torch.uint8)
    if how == "CUDA":
        import torch
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ...")
    if how == "std::bad_alloc":
        ctypes.CDLL("libstdc++.so.6")._ZSt17__throw_bad_allocv()
    if how == "SIGKILL":
        os.kill(os.getpid(), 9)


if "LIMIT_IN" in os.environ:
    sys.meta_path.insert(0, After())
'''

TRAIN = "torch sparsify_deploy.training.loop sparsify_deploy.sparsity.mask"
AFTER = {
    "sparse/init_mask": f"{TRAIN} sparsify_deploy.criteria.synflow",
    "sparse/train": TRAIN,
    "sparse/train.report": f"{TRAIN} onnx onnxruntime openvino",
    "sparse/project_nm": TRAIN,
    "sparse/quantize": f"{TRAIN} modelopt.torch.quantization",
    "sparse/export_onnx": f"{TRAIN} modelopt.torch.quantization onnx onnxruntime",
    "sparse/build_engine.openvino": f"{TRAIN} onnx onnxruntime openvino",
    "benchmark/openvino": f"{TRAIN} onnx openvino",
}


def call(
    folder: Path, step: str, by: str | int, *arguments: str, imports: str = ""
) -> subprocess.CompletedProcess[str]:
    (folder / "hook").mkdir(exist_ok=True)
    (folder / "hook" / "sitecustomize.py").write_text(HOOK)
    more = {"LIMIT_IN": step, "LIMIT_BY": str(by), "LIMIT_AFTER": imports, "PYTHONPATH": str(folder / "hook")}
    return subprocess.run(
        [sys.executable, "-m", "sparsify_deploy", "run", "tiny.yaml", "-q", *arguments],
        cwd=folder,
        env={**os.environ, **more, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def told(done: subprocess.CompletedProcess[str], step: str, batch: str = "") -> str:
    """The line of an exit 7, with all that it must hold."""
    assert done.returncode == 7, (done.returncode, done.stderr[-2000:])
    assert "Traceback" not in done.stderr
    ours = [each for each in done.stderr.splitlines() if each.startswith("sparsify-deploy: ")]
    (line,) = [each for each in ours if not each.startswith("sparsify-deploy: log: ")]
    assert f" in {step}" in line
    assert re.search(r"peak memory \d+\.\d\d GiB", line)
    assert batch in line
    assert "smaller" in line
    return line


@pytest.mark.parametrize(
    "how",
    [
        "std::bad_alloc",
        "CUDA",
        *(pytest.param(how, marks=pytest.mark.slow) for how in ("MemoryError", "numpy", "torch", "SIGKILL")),
    ],
)
def test_each_disguise_of_spent_memory_is_7_with_batch_size_peak_and_advice(recipe, tmp_path, how) -> None:
    done = call(tmp_path, "dense/train", how, "--until", "dense/train")
    line = told(done, "dense/train", ", with batch size 16 (training.batch_size)")
    assert "use a smaller training.batch_size, with training.accumulate" in line


@pytest.mark.slow
def test_training_that_outgrows_its_limit_is_7_and_goes_on_without_it(recipe, tmp_path) -> None:
    wide = ("--set", "model.params.width=64", "--set", "training.batch_size=1024", "--until", "dense/train")
    done = call(tmp_path, "dense/train", 100, *wide, imports=TRAIN)
    told(done, "dense/train", ", with batch size 1024 (training.batch_size)")
    assert call(tmp_path, "", 0, *wide).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("mib", [1, 16, 64, 256])
@pytest.mark.parametrize("step", AFTER)
def test_a_low_limit_in_any_stage_is_7_or_enough(finished, tmp_path, step, mib) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    done = call(tmp_path, step, mib, "--again", step, imports=AFTER[step])
    if done.returncode == 3:  # a library that did not look at what it was given: the limit is named all the same
        assert re.search(rf"crashed \(SIG[A-Z]+\) in {step}.*: its memory was limited to \d", done.stderr)
    elif done.returncode != 0:
        told(done, step)
    assert call(tmp_path, "", 0).returncode == 0


SOAK = """\
import gc, json, os, sys
from pathlib import Path

import torch
from torch import nn

from sparsify_deploy.sparsity.mask import Mask
from sparsify_deploy.tasks import classification
from sparsify_deploy.training.loop import Trainer
from sparsify_deploy.training.methods import rigl
from sparsify_deploy.training.settings import EMA, Optimizer, Training
from sparsify_deploy.types import Context, Silent


class Images:
    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.images = torch.randn(256, 1, 8, 8, generator=generator)
        self.labels = torch.randint(4, (256,), generator=generator)

    def __len__(self):
        return 256

    def take(self, indices):
        return {"input": self.images[indices], "target": self.labels[indices]}


class Samples(Silent):
    rows = []

    def update(self, label, done, total, note=""):
        if done % int(sys.argv[2]) == 0:
            gc.collect()
            with open("/proc/self/statm") as file:
                resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            self.rows.append((done, resident, len(os.listdir("/proc/self/fd")), len(gc.get_objects())))


torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
settings = Training(
    steps=int(sys.argv[1]), batch_size=8, optimizer=Optimizer(name="adamw", lr=1e-3), clip_norm=1.0, ema=EMA()
)
trainer = Trainer(
    model, classification.create(classification.Params()), Images(), ("input",), settings, seed=1,
    folder=Path(sys.argv[3]), context=Context(Samples(), checkpoint_every_s=0.5),
)
mask = Mask({"4.weight": torch.rand(4, 288) < 0.3})
rigl.train(trainer, mask, rigl.Params(update_every=50))
print(json.dumps(Samples.rows))
"""


def soaked(folder: Path, steps: int, every: int) -> list[tuple[int, int, int, int]]:
    """Rows of step, resident bytes, open descriptors, objects, of a training with RigL, an average and checkpoints."""
    import json

    done = subprocess.run(
        [sys.executable, "-c", SOAK, str(steps), str(every), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(row) for row in json.loads(done.stdout)]


def test_training_leaves_no_descriptor_and_no_object_behind(tmp_path) -> None:
    """The short form of the soak, by what can be counted: resident memory says nothing over a few steps."""
    rows = soaked(tmp_path, 800, 100)[1:]
    assert {row[2] for row in rows} == {rows[0][2]}
    assert rows[-1][3] - rows[0][3] < 0.5 * (rows[-1][0] - rows[0][0])


@pytest.mark.slow
def test_ten_thousand_steps_grow_by_less_than_a_megabyte_in_a_thousand(tmp_path, record_property) -> None:
    import numpy as np

    rows = np.array(soaked(tmp_path, 10_000, 250))
    warm = rows[rows[:, 0] >= 1000]
    slope = np.polyfit(warm[:, 0] / 1000, warm[:, 1] / 1e6, 1)[0]
    record_property("MB per 1,000 steps", slope)
    print(f"RSS grows by {slope:.3f} MB per 1,000 steps; descriptors {sorted(set(warm[:, 2]))}")
    assert slope < 1.0
    assert len(set(warm[:, 2])) == 1


@pytest.mark.gpu
def test_a_gpu_without_room_is_7_and_says_how_much_it_took() -> None:
    import torch

    from sparsify_deploy.errors import OutOfResources
    from sparsify_deploy.process import memory, watch

    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    eighth = torch.cuda.get_device_properties(0).total_memory // 8

    def fill() -> None:
        with memory.explained(), watch.step("sparse/train"), watch.batch(64, "training.batch_size"):
            [torch.empty(eighth, dtype=torch.uint8, device="cuda") for _ in range(9)]

    with pytest.raises(OutOfResources, match=r"in sparse/train, with batch size 64 .*on the GPU \d+\.\d\d GiB of"):
        fill()
    gc.collect()
    torch.cuda.empty_cache()
