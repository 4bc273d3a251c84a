"""Iterative pruning, interrupted anywhere, goes on bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from sparsify_deploy.errors import Interrupted, UsageError
from sparsify_deploy.training import checkpoint
from sparsify_deploy.training.methods import imp
from sparsify_deploy.training.settings import Optimizer
from sparsify_deploy.types import Context

MODES = ("weight_rewind", "learning_rate_rewind", "finetune")
OPTIMIZERS = {
    "sgd": Optimizer(lr=0.05),
    "adam": Optimizer(name="adam", lr=0.01),
    "adamw": Optimizer(name="adamw", lr=0.01, weight_decay=0.05),
}
LEVELS = 3


def metrics_of(model):
    return {"sum": float(sum(p.detach().double().sum() for p in model.parameters()))}


def run(tiny, folder, settings, params, stop_after=None, **context):
    """A finished run, or where it was stopped."""
    left = [stop_after]

    def stop():
        if left[0] is None:
            return False
        left[0] -= 1
        return left[0] == 0

    recorder = tiny.recorder()
    given = {"checkpoint_every_s": 1e9} | context
    trainer = tiny.trainer(
        folder, settings, context=Context(progress=recorder, stop_requested=stop, **given), augment=("crop", "flip")
    )
    trainer.evaluate = lambda: metrics_of(trainer.model)
    try:
        mask = imp.train(trainer, None, params, 0.8**LEVELS)
    except Interrupted as error:
        return str(error)
    return trainer, mask, recorder


def same(tiny, one, other):
    assert tiny.differing(tiny.state(one[0]), tiny.state(other[0])) == []
    assert one[1] == other[1]
    mine, theirs = one[0].history, other[0].history
    assert (mine.losses, mine.updates, mine.steps) == (theirs.losses, theirs.updates, theirs.steps)
    assert [(x.metrics, x.densities, x.density) for x in mine.levels] == [
        (x.metrics, x.densities, x.density) for x in theirs.levels
    ]


@pytest.mark.parametrize(
    ("mode", "optimizer", "precision"),
    [*((mode, name, "fp32") for mode in MODES for name in OPTIMIZERS), ("weight_rewind", "adam", "fp16")],
)
def test_resuming_in_any_level_is_bit_exact(tiny, tmp_path, mode, optimizer, precision):
    settings = tiny.settings(steps=8, optimizer=OPTIMIZERS[optimizer], accumulate=2, clip_norm=1.0, precision=precision)
    params = imp.Params(retrain=mode, rewind_to=0.25)
    whole = run(tiny, tmp_path / "whole", settings, params)
    generator = random.Random(f"{mode}{optimizer}{precision}")
    # so many steps ask whether to stop: the last of a level does not
    for kill in generator.sample(range(1, 7 + LEVELS * 5), 2):
        folder = tmp_path / f"cut-{kill}"
        assert "stopped at step" in run(tiny, folder, settings, params, stop_after=kill)
        resumed = run(tiny, folder, settings, params)
        same(tiny, whole, resumed)
        assert any("goes on at step" in line for line in resumed[2].said)


@pytest.mark.parametrize("mode", MODES)
def test_stopping_after_every_single_step_changes_nothing_and_repeats_no_level(tiny, tmp_path, mode):
    settings, params = tiny.settings(steps=4), imp.Params(retrain=mode, rewind_step=1)
    stops = []
    while isinstance(found := run(tiny, tmp_path / "cut", settings, params, stop_after=1), str):
        stops.append(found.partition(" and saved")[0])
        assert len([path for path in (tmp_path / "cut").iterdir() if path.suffix == ".checkpoint"]) <= 3
    assert stops == [f"train.level-0: stopped at step {s} of 4" for s in (1, 2, 3)] + [
        f"train.level-{n}: stopped at step {s} of 4" for n in (1, 2, 3) for s in (2, 3)
    ]
    same(tiny, run(tiny, tmp_path / "whole", settings, params), found)


@pytest.mark.parametrize("mode", MODES)
def test_the_disk_holds_the_rewind_point_and_the_level_at_work(tiny, tmp_path, mode):
    settings, params = tiny.settings(steps=4), imp.Params(retrain=mode)
    often = run(tiny, tmp_path / "often", settings, params, checkpoint_every_s=0.0)
    same(tiny, run(tiny, tmp_path / "never", settings, params), often)
    files = {"train.level-3.checkpoint"} | ({"train.level-0.rewind.checkpoint"} if mode == "weight_rewind" else set())
    assert {path.name for path in (tmp_path / "often").iterdir() if not path.name.endswith(".before")} == files
    assert (tmp_path / "often" / "train.level-3.checkpoint.before").exists()
    assert not list((tmp_path / "often").glob("*level-[012].checkpoint.before"))
    again = run(tiny, tmp_path / "often", settings, params)
    assert again[2].updates == []
    same(tiny, often, again)


def test_a_checkpoint_of_another_rewind_step_is_refused(tiny, tmp_path):
    settings = tiny.settings(steps=4)
    run(tiny, tmp_path, settings, imp.Params(rewind_step=1), stop_after=2)
    with pytest.raises(UsageError, match="kept step: 1 -> 2"):
        run(tiny, tmp_path, settings, imp.Params(rewind_step=2))


SCRIPT = """
    import importlib.util, os, signal, sys
    from pathlib import Path
    import torch
    from sparsify_deploy.training.methods import imp
    from sparsify_deploy.types import Context

    torch.set_num_threads(1)
    conftest, folder, where, count = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    spec = importlib.util.spec_from_file_location("tiny", conftest)
    tiny = importlib.util.module_from_spec(spec)
    sys.modules["tiny"] = tiny
    spec.loader.exec_module(tiny)
    calls = [0]

    def dying(inner, harm=lambda *arguments: None):
        def call(*arguments, **options):
            calls[0] += 1
            if calls[0] == count:
                harm(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(*arguments, **options)
        return call

    def half(descriptor):
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)

    trainer = tiny._trainer(folder, context=Context(checkpoint_every_s=0.0), augment=("crop", "flip"))
    trainer.evaluate = lambda: {"sum": float(sum(p.detach().double().sum() for p in trainer.model.parameters()))}
    if where == "in a write":
        os.fsync = dying(os.fsync, half)
    elif where == "in a step":
        trainer.advance = dying(trainer.advance)
    elif where == "before a deletion":
        Path.unlink = dying(Path.unlink)
    elif where == "in a test":
        trainer.evaluate = dying(trainer.evaluate)
    elif where == "in a rewind":
        trainer.rewind = dying(trainer.rewind)
    imp.train(trainer, None, imp.Params(rewind_step=4), 0.8**3)
"""


@pytest.mark.parametrize(
    ("where", "count"),
    [
        ("in a step", 25),
        ("in a write", 1),
        ("in a write", 33),
        ("before a deletion", 2),
        ("in a test", 3),
        ("in a rewind", 2),
    ],
)
def test_a_killed_process_goes_on_bit_for_bit(tiny, tmp_path, where, count):
    folder = tmp_path / "cut"
    arguments = [str(Path(__file__).with_name("conftest.py")), str(folder), where, str(count)]
    root = str(Path(checkpoint.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), *arguments],
        capture_output=True, text=True, check=False, timeout=120, env=environment,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    settings, params = tiny.settings(), imp.Params(rewind_step=4)
    same(tiny, run(tiny, tmp_path / "whole", settings, params), run(tiny, folder, settings, params))
