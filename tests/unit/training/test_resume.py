"""An interrupted run goes on bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from sparsify_deploy.artifacts import durable
from sparsify_deploy.errors import CorruptArtifact, EnvironmentProblem, Interrupted, OutOfResources, UsageError
from sparsify_deploy.training import checkpoint
from sparsify_deploy.training.methods import rigl
from sparsify_deploy.training.settings import Optimizer
from sparsify_deploy.training.updater import Dense, HoldMask
from sparsify_deploy.types import Context

OPTIMIZERS = {
    "momentum": Optimizer(lr=0.05),
    "nesterov": Optimizer(lr=0.05, nesterov=True),
    "adam": Optimizer(name="adam", lr=0.01),
    "adamw": Optimizer(name="adamw", lr=0.01, weight_decay=0.05),
}
RIGL = rigl.Params(update_every=3, drop_fraction=0.5, end_fraction=0.9)


class StopAfter:
    """A `stop_requested` that says yes at one step."""

    def __init__(self, steps):
        self.left = steps

    def __call__(self):
        self.left -= 1
        return self.left == 0


def updater_for(trainer, tiny, method):
    if method == "dense":
        return Dense()
    held = HoldMask(trainer.model, trainer.optimizer, tiny.mask())
    return held if method == "static" else rigl.RigL(held, RIGL, trainer.total_steps)


def run(tiny, folder, settings, method, stop_after=None, **context):
    stop = StopAfter(stop_after) if stop_after else lambda: False
    recorder = tiny.recorder()
    trainer = tiny.trainer(
        folder,
        settings,
        context=Context(progress=recorder, stop_requested=stop, **({"checkpoint_every_s": 1e9} | context)),
        augment=("crop", "flip"),
    )
    updater = updater_for(trainer, tiny, method)
    try:
        history = trainer.fit(updater)
    except Interrupted as error:
        return str(error)
    return trainer, updater, history, recorder


def same(tiny, one, other):
    assert tiny.differing(tiny.state(one[0]), tiny.state(other[0])) == []
    assert one[1].mask == other[1].mask
    assert (one[2].losses, one[2].updates) == (other[2].losses, other[2].updates)


@pytest.mark.parametrize("method", ["dense", "static", "rigl"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("accumulate", "precision"), [(1, "fp32"), (3, "fp32"), (2, "bf16"), (2, "fp16")])
def test_resuming_is_bit_exact(tiny, tmp_path, method, optimizer, accumulate, precision):
    settings = tiny.settings(
        steps=14, optimizer=OPTIMIZERS[optimizer], accumulate=accumulate, precision=precision, clip_norm=1.0
    )
    undisturbed = run(tiny, tmp_path / "whole", settings, method)
    kill = random.Random(f"{method}{optimizer}{accumulate}").randrange(1, 14)
    message = run(tiny, tmp_path / "cut", settings, method, stop_after=kill)
    assert message == f"train: stopped at step {kill} of 14 and saved; the same command goes on from there"
    resumed = run(tiny, tmp_path / "cut", settings, method)
    same(tiny, undisturbed, resumed)
    assert resumed[2].resumed_from == kill
    assert f"train: goes on at step {kill} of 14" in resumed[3].said


def test_stopping_after_every_single_step_changes_nothing(tiny, tmp_path):
    settings = tiny.settings(steps=8)
    for kill in range(1, 8):
        assert "stopped at step" in run(tiny, tmp_path / "cut", settings, "rigl", stop_after=1), kill
    same(tiny, run(tiny, tmp_path / "whole", settings, "rigl"), run(tiny, tmp_path / "cut", settings, "rigl"))


def test_a_loss_window_cut_in_two_is_the_same_mean(tiny, tmp_path):
    settings = tiny.settings(steps=401)
    assert "step 10 of 401" in run(tiny, tmp_path / "cut", settings, "dense", stop_after=10)
    whole, resumed = (run(tiny, tmp_path / name, settings, "dense") for name in ("whole", "cut"))
    assert [step for step, _ in resumed[2].losses[:4]] == [3, 6, 9, 12]
    same(tiny, whole, resumed)


def test_checkpointing_changes_nothing(tiny, tmp_path):
    settings = tiny.settings()
    often = run(tiny, tmp_path / "often", settings, "rigl", checkpoint_every_s=0.0)
    same(tiny, run(tiny, tmp_path / "never", settings, "rigl"), often)
    assert sorted(p.name for p in (tmp_path / "often").iterdir()) == ["train.checkpoint", "train.checkpoint.before"]


SCRIPT = """
    import importlib.util, os, signal, sys
    from pathlib import Path
    import torch
    from sparsify_deploy.training.methods import rigl
    from sparsify_deploy.training.updater import HoldMask
    from sparsify_deploy.types import Context

    torch.set_num_threads(1)
    conftest, folder, where, step = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    spec = importlib.util.spec_from_file_location("tiny", conftest)
    tiny = importlib.util.module_from_spec(spec)
    sys.modules["tiny"] = tiny
    spec.loader.exec_module(tiny)
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)

    class Killed(rigl.RigL):
        def after_backward(self, now, /):
            trained = super().after_backward(now)
            if where == "in a step" and now == step:
                die()
            return trained

    fsync, written = os.fsync, [0]
    def dying(descriptor):
        written[0] += 1
        if where == "in a write" and written[0] > 2 * step:
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            die()
        fsync(descriptor)
    os.fsync = dying

    trainer = tiny._trainer(folder, context=Context(checkpoint_every_s=0.0), augment=("crop", "flip"))
    held = HoldMask(trainer.model, trainer.optimizer, tiny._mask())
    params = rigl.Params(update_every=3, drop_fraction=0.5, end_fraction=0.9)
    trainer.fit(Killed(held, params, trainer.total_steps))
"""


@pytest.mark.parametrize(("where", "step"), [("in a step", 7), ("in a write", 5)])
def test_a_killed_process_goes_on_bit_for_bit(tiny, tmp_path, where, step):
    folder = tmp_path / "cut"
    arguments = [str(Path(__file__).with_name("conftest.py")), str(folder), where, str(step)]
    root = str(Path(checkpoint.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), *arguments],
        capture_output=True, text=True, check=False, timeout=120, env=environment,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (folder / f".train.checkpoint{durable.NEW}").exists() == (where == "in a write")

    def rigl_named_as_in_the_script(where, **context):
        trainer = tiny.trainer(where, context=Context(**context), augment=("crop", "flip"))
        held = HoldMask(trainer.model, trainer.optimizer, tiny.mask())
        updater = type("Killed", (rigl.RigL,), {})(held, RIGL, trainer.total_steps)
        return trainer, updater, trainer.fit(updater)

    resumed = rigl_named_as_in_the_script(folder)
    assert resumed[2].resumed_from == step
    same(tiny, rigl_named_as_in_the_script(tmp_path / "whole"), resumed)
    assert sorted(p.name for p in folder.iterdir()) == ["train.checkpoint", "train.checkpoint.before"]


def test_a_finished_fit_is_loaded_and_not_repeated(tiny, tmp_path):
    settings = tiny.settings()
    first = run(tiny, tmp_path, settings, "rigl")
    again = run(tiny, tmp_path, settings, "rigl")
    same(tiny, first, again)
    assert again[3].updates == []
    assert again[3].said[-1] == "train: finished before, 12 steps loaded"


def test_several_fits_share_a_folder_and_go_on_where_the_chain_broke(tiny, tmp_path):
    def chain(folder, stop_after=None):
        stop = StopAfter(stop_after) if stop_after else lambda: False
        trainer = tiny.trainer(folder, context=Context(stop_requested=stop))
        updater = Dense()
        for level in range(3):
            trainer.fit(updater, f"level-{level}")
        return trainer

    whole = chain(tmp_path / "whole")
    with pytest.raises(Interrupted, match="level-1: stopped at step 4 of 12"):
        chain(tmp_path / "cut", stop_after=11 + 4)
    assert tiny.differing(tiny.state(whole), tiny.state(chain(tmp_path / "cut"))) == []


@pytest.mark.parametrize("harm", ["truncated", "flipped bit", "empty", "junk"])
def test_a_damaged_checkpoint_is_named_and_refused(tiny, tmp_path, harm):
    run(tiny, tmp_path, tiny.settings(), "static", stop_after=5)
    path = tmp_path / "train.checkpoint"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    harmed = {"truncated": bytes(data[:-100]), "flipped bit": bytes(data), "empty": b"", "junk": b"PK\x03\x04 junk"}
    path.write_bytes(harmed[harm])
    with pytest.raises(CorruptArtifact, match=r"train.checkpoint is damaged .* delete that file"):
        run(tiny, tmp_path, tiny.settings(), "static")


def test_a_checkpoint_of_other_settings_is_refused_with_the_difference(tiny, tmp_path):
    run(tiny, tmp_path, tiny.settings(), "static", stop_after=5)
    with pytest.raises(UsageError, match=r"another run \(batch_size: 8 -> 4\)"):
        run(tiny, tmp_path, tiny.settings(batch_size=4), "static")
    with pytest.raises(UsageError, match=r"optimizer.lr: 0.05 -> 0.1"):
        run(tiny, tmp_path, tiny.settings(optimizer=Optimizer(lr=0.1)), "static")
    with pytest.raises(UsageError, match="updater: HoldMask -> RigL"):
        run(tiny, tmp_path, tiny.settings(), "rigl")


def test_a_checkpoint_of_another_model_is_refused(tiny, tmp_path):
    run(tiny, tmp_path, tiny.settings(), "dense", stop_after=5)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4))
    with pytest.raises(UsageError, match="another run"):
        tiny.trainer(tmp_path, model=model, augment=("crop", "flip")).fit(Dense())


def test_another_environment_is_said(tiny, tmp_path, monkeypatch):
    run(tiny, tmp_path, tiny.settings(), "dense", stop_after=5)
    monkeypatch.setattr(checkpoint.torch, "get_num_threads", lambda: 17)
    said = run(tiny, tmp_path, tiny.settings(), "dense")[3].said
    assert (
        said[-1] == "train: the checkpoint was made elsewhere (threads: 1 -> 17): results may differ in the last bits"
    )


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "a.checkpoint"
    checkpoint.write(path, {"step": 1})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutOfResources, match=r"a.checkpoint: No space left on device; free some space"):
        checkpoint.write(path, {"step": 2})
    assert checkpoint.read(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.checkpoint"]


def test_the_checkpoint_before_the_last_takes_its_place_where_that_is_gone_and_never_where_it_is_damaged(tmp_path):
    path = tmp_path / "a.checkpoint"
    for step in (1, 2, 3):
        checkpoint.write(path, {"step": step})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.checkpoint", "a.checkpoint.before"]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(CorruptArtifact, match=r"delete that file .*: it goes on from a\.checkpoint\.before"):
        checkpoint.read(path)
    path.unlink()
    assert checkpoint.read(path) == {"step": 2}
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(CorruptArtifact, match="cannot be read"):
        checkpoint.read(path)
    checkpoint.delete(path)
    assert checkpoint.read(path) is None


def test_a_disk_that_gives_other_bytes_back_is_noticed_before_the_last_checkpoint_is_replaced(tmp_path, monkeypatch):
    path = tmp_path / "a.checkpoint"
    checkpoint.write(path, {"step": 1})

    def rotting(file):
        file.flush()
        os.pwrite(file.fileno(), b"x", 200)

    monkeypatch.setattr(durable, "flush", rotting)
    with pytest.raises(EnvironmentProblem, match="gave back other bytes"):
        checkpoint.write(path, {"step": 2})
    monkeypatch.undo()
    assert checkpoint.read(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.checkpoint"]


def test_a_checkpoint_replaces_the_file_and_never_writes_into_it(tmp_path):
    path = tmp_path / "a.checkpoint"
    checkpoint.write(path, {"step": 1})
    (tmp_path / "link").hardlink_to(path)
    checkpoint.write(path, {"step": 2})
    assert checkpoint.read(tmp_path / "link") == {"step": 1}
    assert checkpoint.read(path) == {"step": 2}


def test_a_folder_that_cannot_be_written_is_an_environment_problem(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match="cannot write the checkpoint"):
        checkpoint.write(tmp_path / "file" / "a.checkpoint", {})


def test_a_label_that_is_no_file_name_is_our_bug(tiny, tmp_path):
    with pytest.raises(ValueError, match="label"):
        tiny.trainer(tmp_path).fit(Dense(), "../escape")


def test_the_loss_scale_and_its_skipped_steps_go_on_too(tiny, tmp_path):
    """The scale starts too high and grows again every other step; there is a stop after each."""
    settings = tiny.settings(steps=10, precision="fp16")

    def chain(folder, stop_after=None):
        stop = StopAfter(stop_after) if stop_after else lambda: False
        trainer = tiny.trainer(folder, settings, context=Context(stop_requested=stop))
        trainer._scale._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)
        try:
            trainer.fit(HoldMask(trainer.model, trainer.optimizer, tiny.mask()))
        except Interrupted:
            return None
        return trainer

    whole = chain(tmp_path / "whole")
    skipped = whole._scale.skipped
    assert 1 < skipped < 9
    assert whole.history.notes == (f"train: fp16: gradients overflowed in {skipped} steps, which were skipped",)
    while (resumed := chain(tmp_path / "cut", stop_after=1)) is None:
        pass
    assert tiny.differing(tiny.state(whole), tiny.state(resumed)) == []
    assert resumed.history.notes == whole.history.notes
    assert resumed._scale.state_dict() == whole._scale.state_dict()


def test_the_seconds_of_interrupted_parts_add_up(tiny, tmp_path, monkeypatch):
    from sparsify_deploy.training import history

    clock = iter(range(1000))
    monkeypatch.setattr(history, "time", type("Time", (), {
        "monotonic": staticmethod(lambda: float(next(clock))), "process_time": staticmethod(lambda: 0.5),
    }))  # fmt: skip
    settings = tiny.settings(steps=4)
    parts = []
    for _ in range(3):
        run(tiny, tmp_path, settings, "dense", stop_after=1)
        parts.append(checkpoint.read(tmp_path / "train.checkpoint")["fit"]["train_s"])
    assert parts[0] < parts[1] < parts[2]
    _, _, done, _ = run(tiny, tmp_path, settings, "dense")
    assert done.train_s == parts[2] + (parts[0] if parts[1] == 2 * parts[0] else 1.0)
    assert done.cpu_s == 0.0
