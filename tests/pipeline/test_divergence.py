"""Runs whose training diverges, in every stage that trains: exit 6, the last finite checkpoint kept, and a way on."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

TASK = """\
import math, os
import torch.nn.functional as F

calls = 0


class task:
    metrics = {"top1": "higher"}

    def loss(self, outputs, batch):
        global calls
        loss = F.cross_entropy(outputs["output"], batch["target"])
        if not loss.requires_grad:
            return loss
        calls += 1
        broken = os.environ.get("BREAK_AT")
        return loss * float(os.environ.get("BREAK_BY", "nan")) if broken and calls > int(broken) else loss

    def evaluate(self, outputs, batch):
        return {"top1": float((outputs["output"].argmax(1) == batch["target"]).mean())}
"""

RECIPE = """\
version: 1
name: tiny
seed: 3
threads: 1
sparsity: 0.6
task: {name: file, params: {path: my_task.py}}
model:
  source: builtin
  params: {name: resnet8, width: 16, in_channels: 1}
data: {source: digits}
training: {steps: 12, batch_size: 16, optimizer: {lr: 0.05}}
init: {criterion: magnitude, keep_dense: [conv1, fc]}
train: {method: rigl, params: {update_every: 3}}
nm: {fill_batches: 2, fine_tune: {steps: 6}}
quantize: {calibration_batches: 2, qat: {steps: 6, optimizer: {lr: 0.001}}}
export: {parity_examples: 32, min_top1_agreement: 0.1}
deploy: [{runtime: onnxruntime}]
benchmark: {rounds: 5, round_ms: 2.0, warmup_ms: 2.0}
"""
IMP = "train: {method: imp, params: {rate: 0.4, rewind_step: 2}}"
ARGUMENTS = ("--trust-code", "--checkpoint-every", "0", "-q", "--device", "cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my_task.py").write_text(TASK)
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    return tmp_path


def partials(folder: Path, stage: str) -> list[Path]:
    return list(folder.glob(f"runs/tiny/store/{stage}-*.partial"))


def finite(path: Path) -> bool:
    import torch

    from sparsify_deploy.training import checkpoint

    content = checkpoint.read(path)
    assert content is not None
    return all(bool(t.isfinite().all()) for t in content["model"].values() if isinstance(t, torch.Tensor))


def diverged(done, label: str) -> str:
    assert done.returncode == 6, done.stderr
    line = next(each for each in done.stderr.splitlines() if each.startswith(f"sparsify-deploy: {label}: "))
    assert "Traceback" not in done.stderr
    assert re.search(rf"sparsify-deploy: {label}: .* at step \d+ of \d+ \(learning rate", line), line
    assert "lower optimizer.lr, add schedule.warmup_fraction, or set clip_norm" in line
    return line


STAGES = {
    "dense": ("", "dense/train", "train", "train", 12),
    "rigl": ("dense/build_engine.onnxruntime", "sparse/train", "train", "train", 12),
    "imp": ("dense/build_engine.onnxruntime", "sparse/train", "train", "train.level-1", 10),
    "fine-tune": ("sparse/train", "sparse/project_nm", "project_nm", "fine_tune", 6),
    "qat": ("dense/fine_tune", "dense/quantize", "quantize", "qat", 6),
}
"""What is to be done before, the step that breaks, its stage, the name of its fit and how many steps that has."""


@pytest.mark.parametrize("case", ["dense", *(pytest.param(c, marks=pytest.mark.slow) for c in [*STAGES][1:])])
def test_a_loss_that_breaks_in_a_stage_leaves_a_checkpoint_that_the_run_goes_on_from(
    cli, folder, monkeypatch, case
) -> None:
    before, step, stage, label, steps = STAGES[case]
    if case == "imp":
        text = re.sub(r"(?m)^(train|init): .*\n", "", RECIPE)
        (folder / "tiny.yaml").write_text(text + IMP + "\n")
    if before:  # undisturbed, and in a process of its own: calls of the loss count from here
        done = cli("run", "tiny.yaml", *ARGUMENTS, "--until", before)
        assert done.returncode == 0, done.stderr
    # loss calls before: those of the dense fit, and of the gradients that choose which weights to fill
    at = random.Random(case).randrange(2, steps - 1) + {"imp": 12, "fine-tune": 2}.get(case, 0)
    monkeypatch.setenv("BREAK_AT", str(at))
    diverged(cli("run", "tiny.yaml", *ARGUMENTS, "--until", step), label)
    (kept,) = partials(folder, stage)
    assert all(finite(path) for path in kept.glob("*.checkpoint"))
    assert (kept / f"{label}.checkpoint").exists()
    monkeypatch.delenv("BREAK_AT")
    again = cli("run", "tiny.yaml", *ARGUMENTS[:3], "--device", "cpu", "--until", step)
    assert again.returncode == 0, again.stderr
    assert re.search(rf"{re.escape(label)}: goes on at step \d+", again.stderr)
    assert not partials(folder, stage)


RATES = {
    "training.optimizer.lr": "train",
    "nm.fine_tune.optimizer.lr": "fine_tune",
    "quantize.qat.optimizer.lr": "qat",
}


@pytest.mark.parametrize(
    "field", [pytest.param(field, marks=[pytest.mark.slow] if i else []) for i, field in enumerate(RATES)]
)
def test_a_learning_rate_of_1e10_is_6_in_every_stage(cli, folder, field) -> None:
    done = cli("run", "tiny.yaml", *ARGUMENTS, "--set", f"{field}=1e10")
    assert re.search(r"learning rate \d\.?\d*e\+(08|09|10)", diverged(done, RATES[field]))
    for kept in folder.glob("runs/tiny/store/*.partial/*.checkpoint"):
        assert finite(kept)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_loss_that_breaks_at_a_random_step_is_6(cli, folder, monkeypatch, seed) -> None:
    """NaN, an infinity, and a loss that is finite and a hundred million times what it was."""
    chosen = random.Random(seed)
    at, by = chosen.randrange(4, 16), chosen.choice(["nan", "inf", "-inf", "1e8"])
    text = RECIPE.replace("training: {steps: 12", "training: {steps: 24")
    (folder / "tiny.yaml").write_text(text)
    monkeypatch.setenv("BREAK_AT", str(at))
    monkeypatch.setenv("BREAK_BY", by)
    line = diverged(cli("run", "tiny.yaml", *ARGUMENTS, "--until", "dense/train"), "train")
    (kept,) = partials(folder, "train")
    assert finite(kept / "train.checkpoint")
    step = int(re.search(r"at step (\d+) of 24", line)[1])
    assert f"the checkpoint of step {step}, the last finite one, is kept" in line
    if by != "1e8":  # such gradients may overflow before the loss has stayed there for five steps
        assert f"the loss is {'nan' if by == 'nan' else by}" in line
    else:
        assert re.search(r"the loss was above [\d.e+]+ for 5 steps|is not finite|the loss is (nan|inf)", line)


@pytest.mark.slow
def test_a_row_of_the_data_that_is_infinite_is_named(cli, folder) -> None:
    import numpy as np

    random_numbers = np.random.default_rng(0)
    x = random_numbers.standard_normal((120, 1, 8, 8)).astype(np.float32)
    x[60] = np.inf
    y = random_numbers.integers(0, 10, 120)
    np.savez(folder / "data.npz", x_train=x[:100], y_train=y[:100], x_test=x[100:], y_test=y[100:])
    text = RECIPE.replace("{source: digits}", "{source: npz, params: {path: data.npz}}")
    (folder / "tiny.yaml").write_text(text)
    done = cli("run", "tiny.yaml", *ARGUMENTS, "--until", "dense/train")
    assert done.returncode in (5, 6), done.stderr
    line = next(each for each in done.stderr.splitlines() if "finite" in each)
    assert "input" in line or "x_train" in line
