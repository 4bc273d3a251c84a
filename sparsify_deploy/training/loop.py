"""The one training loop: resumes exactly, holds or moves a mask, and stops when it is asked to.

Bit-exact resuming rests on three things: batch k depends on the seed and k alone, torch's random numbers are seeded
anew at each step from the seed and the step, and the learning rate is a function of the step. So a checkpoint holds
tensors and counters only, and no state of any generator, sampler or scheduler.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsify_deploy.errors import Diverged, Interrupted
from sparsify_deploy.training import checkpoint
from sparsify_deploy.training.batches import Batches, derived_seed, training_batches
from sparsify_deploy.training.evaluation import device_of, evaluate, mode, moved, predict
from sparsify_deploy.training.optimizer import build_optimizer
from sparsify_deploy.training.schedule import lr_factor
from sparsify_deploy.training.updater import Update, Updater
from sparsify_deploy.types import Context, Split, Task, outputs_of

if TYPE_CHECKING:
    from sparsify_deploy.training.settings import Training

__all__ = ["History", "Trainer", "Update", "evaluate", "predict", "training_batches"]

_POINTS = 200
"""A history holds at most about this many losses, each the mean over the steps since the one before."""


@dataclass(frozen=True)
class History:
    """What one fit did. `losses` and `updates` count steps done; `densities` are the mask's at the start, by
    parameter name; `dense_gradient_every` is for the training cost; `resumed_from` is the step a checkpoint held."""

    steps: int
    losses: tuple[tuple[int, float], ...]
    densities: Mapping[str, float] = field(default_factory=dict)
    updates: tuple[Update, ...] = ()
    dense_gradient_every: int | None = None
    resumed_from: int | None = None
    notes: tuple[str, ...] = ()


class Trainer:
    """Trains one model on one split. Make it after the model is on its device; batches are moved there.

    `model` is changed in place. `folder` takes one `<label>.checkpoint` for each fit. `augment` names functions of
    `augment.py` that change the field `input`. `label` names a fit that is given no name of its own. Whole models
    only: every module is in training mode while it fits.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        split: Split,
        inputs: Sequence[str],
        settings: Training,
        *,
        seed: int,
        folder: Path,
        context: Context,
        augment: Sequence[str] = (),
        label: str = "train",
    ) -> None:
        self.model = model
        self.task = task
        self.inputs = tuple(inputs)
        self.settings = settings
        self.seed = seed
        self.folder = folder
        self.context = context
        self.device = device_of(model)
        self.optimizer = build_optimizer(model, settings.optimizer)
        self.total_steps = settings.total_steps(len(split))
        self.label = label
        self.step = 0
        self.history = History(0, ())
        self._batches = Batches(split, seed=seed, batch_size=settings.batch_size, augment=augment)
        self._losses: list[tuple[int, float]] = []
        self._window: list[float] = []

    def fit(self, updater: Updater, label: str | None = None) -> History:
        """Train for `total_steps` from the model and the optimizer slots as they are; also kept in `history`.

        Goes on from the checkpoint of `label` in the folder if there is one; a fit that had finished is loaded, not
        repeated. `Diverged` on a loss that is not finite; `Interrupted` after `context.stop_requested()`, once the
        checkpoint is on disk; `CorruptArtifact` for a damaged checkpoint, `UsageError` for one of another run.
        """
        label = label or self.label
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", label):
            raise ValueError(f"a label becomes a file name: {label!r} cannot")
        path = self.folder / f"{label}.checkpoint"
        self.step, self._losses, self._window = 0, [], []
        densities = updater.mask.densities() if updater.mask is not None else {}
        resumed_from = self._resume(path, updater, label)
        devices = [self.device] if self.device.type == "cuda" else []
        with mode(self.model, train=True), torch.random.fork_rng(devices=devices):
            self._run(updater, label, path)
        self.history = History(
            steps=self.step,
            losses=tuple(self._losses),
            densities=densities,
            updates=tuple(updater.updates),
            dense_gradient_every=updater.dense_gradient_every,
            resumed_from=resumed_from,
            notes=tuple(updater.notes),
        )
        return self.history

    def _run(self, updater: Updater, label: str, path: Path) -> None:
        every = math.ceil(self.total_steps / _POINTS)
        saved_at = time.monotonic()
        finished = self.step == self.total_steps
        while self.step < self.total_steps:
            loss = self.advance(updater, label)
            self._window.append(loss)
            if self.step % every == 0 or self.step == self.total_steps:
                self._losses.append((self.step, math.fsum(self._window) / len(self._window)))
                self._window = []
            self.context.progress.update(label, self.step, self.total_steps, f"loss {loss:.4f}")
            if self.step == self.total_steps:
                break
            if self.context.stop_requested():
                self._save(path, updater)
                where = f"step {self.step} of {self.total_steps}"
                raise Interrupted(f"{label}: stopped at {where} and saved; the same command goes on from there")
            if time.monotonic() - saved_at >= self.context.checkpoint_every_s:
                self._save(path, updater)
                saved_at = time.monotonic()
        if not finished:
            updater.finish()
            self._check_result(updater, label)
            self._save(path, updater)

    def advance(self, updater: Updater, label: str = "train") -> float:
        """One optimizer step of a model in training mode: the mean loss over its accumulated batches.

        Leaves torch's random state wherever the step left it, and writes nothing; `fit` is what calls it.
        """
        step, slices = self.step, self.settings.accumulate
        rate = self.settings.optimizer.lr * lr_factor(self.settings.schedule, step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        _seed_torch(self.device, derived_seed("step", self.seed, step))
        updater.before_forward(step)
        loss = 0.0
        for k in range(step * slices, (step + 1) * slices):
            part = self._loss(k) / slices
            loss += part.item()
            if not math.isfinite(loss):
                raise _diverged(label, f"the loss is {loss}", step, self.total_steps, rate)
            part.backward()  # type: ignore[no-untyped-call]
        if updater.after_backward(step):
            if self.settings.clip_norm is not None:
                norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
                if not math.isfinite(norm):
                    raise _diverged(label, f"the gradient norm is {norm.item()}", step, self.total_steps, rate)
            self.optimizer.step()
        updater.after_step(step)
        self.step += 1
        return loss

    def _loss(self, k: int) -> Tensor:
        batch = moved(self._batches.batch(k), self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            outputs = outputs_of(self.model, batch, self.inputs)
        if self.settings.precision == "bf16":
            outputs = {name: value.float() if value.is_floating_point() else value for name, value in outputs.items()}
        return self.task.loss(outputs, batch)

    def _check_result(self, updater: Updater, label: str) -> None:
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(parameter).all():
                rate = self.optimizer.param_groups[0]["lr"]
                raise _diverged(label, f"{name} is not finite", self.step - 1, self.total_steps, rate)
        moved_weights = updater.mask.check_holds(self.model) if updater.mask is not None else ()
        assert not moved_weights, f"pruned weights of {', '.join(moved_weights)} are not zero"

    def _plan(self, updater: Updater) -> dict[str, Any]:
        """What a checkpoint must have been made with for going on to make sense."""
        settings = self.settings.model_dump(mode="json")
        nested = {part: settings.pop(part) for part in ("optimizer", "schedule")}
        flat = {f"{part}.{key}": value for part, values in nested.items() for key, value in values.items()}
        return {
            **settings,
            **flat,
            "seed": self.seed,
            "augment": list(self._batches.augment),
            "examples": len(self._batches.split),
            "updater": type(updater).__name__,
        }

    def _save(self, path: Path, updater: Updater) -> None:
        checkpoint.write(
            path,
            {
                "plan": self._plan(updater),
                "environment": checkpoint.environment(self.device),
                "step": self.step,
                "model": {name: tensor.detach() for name, tensor in checkpoint.tensors_of(self.model).items()},
                "optimizer": self.optimizer.state_dict(),
                "updater": updater.state_dict(),
                "losses": self._losses,
                "window": self._window,
            },
        )

    def _resume(self, path: Path, updater: Updater, label: str) -> int | None:
        content = checkpoint.read(path)
        if content is None:
            return None
        if changed := checkpoint.differences(content["plan"], self._plan(updater)):
            raise checkpoint.foreign(path, "; ".join(changed))
        checkpoint.load_tensors_(self.model, content["model"], path)
        self.optimizer.load_state_dict(content["optimizer"])
        updater.load_state_dict(content["updater"])
        self.step = content["step"]
        self._losses = [(step, loss) for step, loss in content["losses"]]
        self._window = list(content["window"])
        say = self.context.progress.say
        if self.step == self.total_steps:
            say(f"{label}: finished before, {self.step} steps loaded")
        else:
            say(f"{label}: goes on at step {self.step} of {self.total_steps}")
        if changed := checkpoint.differences(content["environment"], checkpoint.environment(self.device)):
            what = "; ".join(changed)
            say(f"{label}: the checkpoint was made elsewhere ({what}): results may differ in the last bits")
        return self.step


def _diverged(label: str, what: str, step: int, total: int, rate: float) -> Diverged:
    return Diverged(
        f"{label}: {what} at step {step} of {total} (learning rate {rate:.3g}): lower optimizer.lr, add "
        "schedule.warmup_fraction, or set clip_norm"
    )


def _seed_torch(device: torch.device, seed: int) -> None:
    # Not torch.manual_seed: without a GPU it queues a call, with a stack trace, at every step.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
