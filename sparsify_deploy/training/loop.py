"""The one training loop: resumes exactly, holds or moves a mask, and stops when it is asked to.

Bit-exact resuming rests on three things: batch k depends on the seed and k alone, torch's random numbers are seeded
anew at each step from the seed and the step, and the learning rate is a function of the step. So a checkpoint holds
tensors and counters only, and no state of any generator, sampler or scheduler.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from sparsify_deploy.errors import CorruptArtifact, Diverged, Interrupted, UsageError
from sparsify_deploy.process.interrupt import at_safe_points
from sparsify_deploy.training import checkpoint, forward
from sparsify_deploy.training.averaging import Average
from sparsify_deploy.training.batches import Batches, derived_seed, training_batches
from sparsify_deploy.training.choosing import Choice
from sparsify_deploy.training.divergence import LossWatch, broken_slots, cause_outside, finite_names, not_finite
from sparsify_deploy.training.evaluation import device_of, evaluate, mode, moved, predict
from sparsify_deploy.training.history import History, Stopwatch, joined, restored
from sparsify_deploy.training.optimizer import build_optimizer
from sparsify_deploy.training.precision import LossScale, autocast, in_fp32
from sparsify_deploy.training.schedule import lr_factor
from sparsify_deploy.training.updater import Restorable, Update, Updater
from sparsify_deploy.types import Context, Split, Task, outputs_of

if TYPE_CHECKING:
    from sparsify_deploy.training.image_settings import Augment
    from sparsify_deploy.training.settings import Training
    from sparsify_deploy.training.vision import Mixing, Pixels
    from sparsify_deploy.types import Batch, Outputs

__all__ = ["Distilling", "History", "Trainer", "Update", "evaluate", "predict", "training_batches"]

_POINTS = 200
"""A history holds at most about this many losses, each the mean over the steps since the one before."""


class Distilling(Protocol):
    """A teacher's part in the loss; what it needs of the student's insides it takes by hooks of its own."""

    def loss(self, own: Tensor, outputs: Outputs, batch: Batch, /) -> Tensor:
        """The loss to train with, from the task's `own` loss and the student's `outputs`, floats as float32."""
        ...


class Trainer:
    """Trains one model on one split. Make it after the model is on its device; batches are moved there.

    `model` is changed in place, with `channels_last` in that memory format from here on. `folder` takes one
    `<label>.checkpoint` for each fit. `augment` are changes of the field `input`, by `augment.py`; `pixels` is what
    some of them need, and `mixing` mixes batches after them. `label` names a fit that is given no name of its own.
    `distillation` has the last word on the loss. `evaluate` gives the test metrics of the model as it stands, for
    methods with several fits; `validation` is what `settings.measures` measures on. Whole models only: every module
    is in training mode while it fits.
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
        augment: Sequence[Augment | str] = (),
        pixels: Pixels | None = None,
        mixing: Mixing | None = None,
        label: str = "train",
        distillation: Distilling | None = None,
        evaluate: Callable[[], Mapping[str, float]] | None = None,
        validation: Split | None = None,
    ) -> None:
        if settings.channels_last:
            forward.channels_last_(model)
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
        self.distillation = distillation
        self.evaluate = evaluate
        self.validation = validation
        self.step = 0
        self.fits: tuple[History, ...] = ()
        self._scale = LossScale(self.device, settings.precision)
        self._forward = forward.compiled(model) if settings.compile else model
        self._batches = Batches(
            split, seed=seed, batch_size=settings.batch_size, augment=augment, pixels=pixels, mixing=mixing
        )
        self._begin(History(0, ()), None, None)

    @property
    def history(self) -> History:
        """All fits so far as one."""
        return joined(self.fits)

    def fit(
        self,
        updater: Updater,
        label: str | None = None,
        *,
        start: int = 0,
        constant_rate: float | None = None,
        keep_at: int | None = None,
        measured: bool = False,
    ) -> History:
        """Train from step `start` to `total_steps`, from the model and the optimizer slots as they are.

        Ends with the weights as `settings` asks: the last or the averaged ones, or those that measured best on
        `validation`, which may also end it early. Learning rates and batches are those of the steps from `start` on;
        `constant_rate` replaces the schedule. `keep_at` is a step at which all state is kept for `rewind`; `measured`
        adds test metrics to the history.

        Goes on from the checkpoint of `label` in the folder if there is one; a fit that had finished is loaded, not
        repeated, and `fits` holds what came before it. `Diverged` on a loss that is not finite or has exploded, and
        before a checkpoint would hold weights, statistics, averages or optimizer slots that are not finite;
        `Interrupted` after `context.stop_requested()`, once the checkpoint is on disk; `CorruptArtifact` for a damaged
        checkpoint, `UsageError` for one of another run.
        """
        label = label or self.label
        path = self.checkpoint(label)
        mask = updater.mask
        fresh = History(0, (), label=label, start=start, dense_steps=self.total_steps)
        if mask is not None:
            fresh = dataclasses.replace(fresh, densities=mask.densities(), density=mask.density)
        self._begin(fresh, constant_rate, keep_at)
        self._watch_weights(updater)
        resumed_from = self._resume(path, updater)
        devices = [self.device] if self.device.type == "cuda" else []
        with at_safe_points(), mode(self.model, train=True), torch.random.fork_rng(devices=devices):
            self._run(updater, path, measured)
        done = dataclasses.replace(self._told(updater), resumed_from=resumed_from)
        self.fits = (*self.fits, done)
        return done

    def checkpoint(self, label: str) -> Path:
        """Where the fit `label` keeps its state."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", label):
            raise ValueError(f"a label becomes a file name: {label!r} cannot")
        return self.folder / f"{label}.checkpoint"

    def rewind(self, label: str, step: int) -> None:
        """Model, buffers, optimizer slots and loss scale as the fit `label` kept them at `step`."""
        path = self._kept(label)
        content = checkpoint.read(path)
        if content is None:
            raise CorruptArtifact(f"{path} is gone, which held step {step}: delete {self.folder} to train anew")
        if content["step"] != step:
            raise checkpoint.foreign(path, f"step: {content['step']} -> {step}")
        checkpoint.load_tensors_(self.model, content["model"], path)
        self.optimizer.load_state_dict(content["optimizer"])
        self._scale.load_state_dict(content["scale"])

    def _begin(self, fresh: History, constant_rate: float | None, keep_at: int | None) -> None:
        self._fit, self.step = fresh, fresh.start
        self._rate, self._keep_at = constant_rate, keep_at
        self._losses: list[tuple[int, float]] = []
        self._window: list[float] = []
        self._scale.skipped = 0
        self._watch = Stopwatch()
        self._average: Average | None = None
        self._choice: Choice | None = None
        self._over = False
        self._loss_watch, self._sound = LossWatch(), finite_names(self.model)
        self._saved_step: int | None = None

    def _watch_weights(self, updater: Updater) -> None:
        """Begin the average and the measurements that the settings ask for."""
        if self.settings.ema is not None:
            self._average = Average(self.model, self.settings.ema)
        if self.settings.measures:
            if self.validation is None:
                raise UsageError("training.keep, early_stop and evaluate_every need the data's validation split")
            metric, direction = next(iter(self.task.metrics.items()))
            self._choice = Choice(self.settings, metric, direction)
        if self.settings.chooses and not isinstance(updater, Restorable):
            raise UsageError(
                f"training.keep best and early_stop need a network that every step could end with: "
                f"{type(updater).__name__} is pruned as asked at its last step only"
            )

    def _kept(self, label: str) -> Path:
        return self.checkpoint(f"{label}.rewind")

    def _told(self, updater: Updater) -> History:
        notes = tuple(updater.notes)
        if skipped := self._scale.skipped:
            notes += (f"{self._fit.label}: fp16: gradients overflowed in {skipped} steps, which were skipped",)
        return dataclasses.replace(
            self._fit,
            steps=self.step - self._fit.start,
            losses=tuple(self._losses),
            updates=tuple(updater.updates),
            dense_gradient_every=updater.dense_gradient_every,
            notes=(*notes, *self._chosen()),
            metric=self._choice.metric if self._choice else "",
            curve=tuple(self._choice.curve) if self._choice else (),
        )

    def _chosen(self) -> Iterator[str]:
        """What the measurements decided, once the fit is over."""
        if self._choice is None or not self._over:
            return
        label, metric = self._fit.label, self._choice.metric
        step, value = self._choice.best
        if self.step < self.total_steps:
            yield f"{label}: stopped early at step {self.step} of {self.total_steps}: the {metric} no longer got better"
        elif (stop := self.settings.early_stop) is not None and len(self._choice.curve) <= stop.patience:
            counted = f"{len(self._choice.curve)} measurements, and patience {stop.patience}"
            yield f"{label}: early_stop had no effect: there were {counted}; lower it or evaluate_every"
        if self._choice.kept is not None:
            best = f"the best {metric} on the validation split ({value:.6g})"
            yield f"{label}: ends with the weights of step {step}, {best}"

    def _run(self, updater: Updater, path: Path, measured: bool) -> None:
        label, start = self._fit.label, self._fit.start
        every = math.ceil((self.total_steps - start) / _POINTS)
        saved_at = time.monotonic()
        finished = self._over
        while not self._over:
            if self.step == self._keep_at:
                self._save(self._kept(label), updater)
            loss = self.advance(updater, label)
            self._loss_watch.see(loss)
            if what := self._loss_watch.exploded(last=self.step == self.total_steps):
                raise self._diverged(label, what, self.step - 1)
            if self._average is not None:
                self._average.update()
            self._window.append(loss)
            if self.step == self.total_steps:
                updater.finish()
            self._measure(updater)
            self._over = self.step == self.total_steps or (self._choice is not None and self._choice.stops)
            if (self.step - start) % every == 0 or self._over:
                self._losses.append((self.step, math.fsum(self._window) / len(self._window)))
                self._window = []
            self.context.progress.update(label, self.step, self.total_steps, f"loss {loss:.4f}{self._latest()}")
            if self._over:
                break
            if self.context.stop_requested():
                self._save(path, updater)
                where = f"step {self.step} of {self.total_steps}"
                raise Interrupted(f"{label}: stopped at {where} and saved; the same command goes on from there")
            if time.monotonic() - saved_at >= self.context.checkpoint_every_s:
                self._save(path, updater)
                saved_at = time.monotonic()
        if not finished:
            if self.step < self.total_steps:
                updater.finish()
            self._settle(updater)
            self._check_result(updater, label)
            if measured and self.evaluate is not None:
                seconds = self._watch.read()
                self._fit = dataclasses.replace(self._fit, metrics=dict(self.evaluate()))
                self._watch = Stopwatch(*seconds)  # testing is not training
            self._save(path, updater)

    def _measure(self, updater: Updater) -> None:
        """Where it is due, the metric on the validation split of the network as it would end with this step."""
        if self._choice is None or not self.settings.measured_after(self.step, len(self._batches.split)):
            return
        assert self.validation is not None
        seconds = self._watch.read()
        with self._as_it_would_end(updater):
            metrics = evaluate(self.model, self.task, self.validation, self.inputs)
            self._choice.see(self.step, metrics[self._choice.metric], self.model, updater.mask)
        self._watch = Stopwatch(*seconds)  # measuring is not training

    def _latest(self) -> str:
        """The last measurement, for a line of progress."""
        if self._choice is None or not self._choice.curve:
            return ""
        return f", validation {self._choice.metric} {self._choice.curve[-1][1]:.4f}"

    @contextlib.contextmanager
    def _as_it_would_end(self, updater: Updater) -> Iterator[None]:
        live = {name: tensor.detach().clone() for name, tensor in checkpoint.tensors_of(self.model).items()}
        self._wear_average(updater)
        try:
            yield
        finally:
            checkpoint.put_(self.model, live)

    def _wear_average(self, updater: Updater) -> None:
        if self._average is not None:
            self._average.put_()
        if updater.mask is not None:  # an average also remembers weights that were dropped
            updater.mask.apply_(self.model)

    def _settle(self, updater: Updater) -> None:
        """The weights that the fit ends with into the model, and their mask into the updater."""
        kept = self._choice.kept if self._choice is not None else None
        if kept is not None:
            tensors, mask = kept
            checkpoint.put_(self.model, tensors)
            if mask is not None:
                assert isinstance(updater, Restorable)
                updater.restore(mask, self.step)
        elif self._average is not None:
            self._wear_average(updater)

    def advance(self, updater: Updater, label: str = "train") -> float:
        """One optimizer step of a model in training mode: the mean loss over its accumulated batches.

        Leaves torch's random state wherever the step left it, and writes nothing; `fit` is what calls it.
        """
        step, slices = self.step, self.settings.accumulate
        rate = self._rate
        if rate is None:
            rate = self.settings.optimizer.lr * lr_factor(self.settings.schedule, step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        _seed_torch(self.device, derived_seed("step", self.seed, step))
        updater.before_forward(step)
        loss = 0.0
        for k in range(step * slices, (step + 1) * slices):
            with forward.compiling() if self.settings.compile else contextlib.nullcontext():
                part = self._loss(k) / slices
                loss += part.item()
                if not math.isfinite(loss):
                    cause = cause_outside(self._batches.batch(k), self.model, self._sound)
                    raise self._diverged(label, f"the loss is {loss}", step, cause)
                self._scale.backward(part)
        if self._scale.unscaled_(self.optimizer) and updater.after_backward(step):
            if self.settings.clip_norm is not None:
                norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
                if not math.isfinite(norm):
                    raise self._diverged(label, f"the gradient norm is {norm.item()}", step)
            self.optimizer.step()
        self._scale.update()
        if self._scale.exhausted():
            raise self._diverged(label, "the gradients overflow fp16 at any loss scale", step)
        updater.after_step(step)
        self.step += 1
        return loss

    def _loss(self, k: int) -> Tensor:
        batch = moved(self._batches.batch(k), self.device)
        if self.settings.channels_last:
            batch = forward.laid_out(batch)
        precision = self.settings.precision
        with autocast(self.device, precision):
            found = outputs_of(self._forward, batch, self.inputs)
        outputs = in_fp32(found, precision)
        own = self.task.loss(outputs, batch)
        return own if self.distillation is None else self.distillation.loss(own, outputs, batch)

    def _check_result(self, updater: Updater, label: str) -> None:
        self._check_finite(label)
        moved_weights = updater.mask.check_holds(self.model) if updater.mask is not None else ()
        assert not moved_weights, f"pruned weights of {', '.join(moved_weights)} are not zero"

    def _check_finite(self, label: str) -> None:
        """`Diverged` where the state holds what no later step could mend, though the loss may not show it yet."""
        tensors = checkpoint.tensors_of(self.model)
        broken = next(not_finite(tensors, self._sound | dict(self.model.named_parameters()).keys()), None)
        if broken is None:
            broken = next(broken_slots(self.model, self.optimizer), None)
        if broken is None and self._average is not None:
            broken = next(not_finite(self._average.state_dict()["tensors"], self._sound), None)
            broken = broken and f"the average of {broken}"
        if broken is not None:
            raise self._diverged(label, f"{broken} is not finite", self.step - 1)

    def _diverged(self, label: str, what: str, step: int, cause: str = "") -> Diverged:
        rate = self.optimizer.param_groups[0]["lr"]
        advice = "lower optimizer.lr, add schedule.warmup_fraction, or set clip_norm"
        if self.settings.precision == "fp16":
            advice += ", or set precision: bf16, which has the range of fp32"
        kept = "; this fit had no checkpoint yet"
        if self._saved_step is not None:
            kept = (
                f"; the checkpoint of step {self._saved_step}, the last finite one, is kept: the same command goes on "
                "from there, to the same end if nothing changed, and with a changed recipe it starts anew"
            )
        where = f"at step {step} of {self.total_steps} (learning rate {rate:.3g})"
        return Diverged(f"{label}: {what} {where}: {cause or advice}{kept}")

    def _plan(self, updater: Updater) -> dict[str, Any]:
        """What a checkpoint must have been made with for going on to make sense."""
        return {
            **checkpoint.flat(self.settings.model_dump(mode="json")),
            "seed": self.seed,
            "augment": [c if isinstance(c, str) else c.model_dump_json() for c in self._batches.augment],
            "examples": len(self._batches.split),
            "updater": type(updater).__name__,
            "start": self._fit.start,
            "constant rate": self._rate,
            "kept step": self._keep_at,
        }

    def _save(self, path: Path, updater: Updater) -> None:
        self._check_finite(self._fit.label)
        train_s, cpu_s = self._watch.read()
        self._fit = dataclasses.replace(self._fit, train_s=train_s, cpu_s=cpu_s)
        checkpoint.write(
            path,
            {
                "plan": self._plan(updater),
                "environment": checkpoint.environment(self.device),
                "step": self.step,
                "model": {name: tensor.detach() for name, tensor in checkpoint.tensors_of(self.model).items()},
                "optimizer": self.optimizer.state_dict(),
                "scale": self._scale.state_dict(),
                "updater": updater.state_dict(),
                "average": self._average.state_dict() if self._average else None,
                "choice": self._choice.state_dict() if self._choice else None,
                "over": self._over,
                "fit": dataclasses.asdict(self._fit),
                "fits": [dataclasses.asdict(fit) for fit in self.fits],
                "losses": self._losses,
                "window": self._window,
                "loss watch": self._loss_watch.state_dict(),
            },
        )
        if path == self.checkpoint(self._fit.label):
            self._saved_step = self.step

    def _resume(self, path: Path, updater: Updater) -> int | None:
        content, label = checkpoint.read(path), self._fit.label
        if content is None:
            return None
        if changed := checkpoint.differences(content["plan"], self._plan(updater)):
            raise checkpoint.foreign(path, "; ".join(changed))
        checkpoint.load_tensors_(self.model, content["model"], path)
        self.optimizer.load_state_dict(content["optimizer"])
        self._scale.load_state_dict(content["scale"])
        updater.load_state_dict(content["updater"])
        if self._average is not None:
            self._average.load_state_dict(content["average"])
        if self._choice is not None:
            self._choice.load_state_dict(content["choice"])
        self.step, self._over = content["step"], content["over"]
        self._fit = restored(content["fit"])
        self.fits = tuple(restored(fit) for fit in content["fits"])
        self._watch = Stopwatch(self._fit.train_s, self._fit.cpu_s)
        self._losses = [(step, loss) for step, loss in content["losses"]]
        self._window = list(content["window"])
        if "loss watch" in content:  # older checkpoints have none
            self._loss_watch.load_state_dict(content["loss watch"])
        self._saved_step = self.step
        say = self.context.progress.say
        if self._over:
            say(f"{label}: finished before, {self.step - self._fit.start} steps loaded")
        else:
            say(f"{label}: goes on at step {self.step} of {self.total_steps}")
        if changed := checkpoint.differences(content["environment"], checkpoint.environment(self.device)):
            what = "; ".join(changed)
            say(f"{label}: the checkpoint was made elsewhere ({what}): results may differ in the last bits")
        return self.step


def _seed_torch(device: torch.device, seed: int) -> None:
    # Not torch.manual_seed: without a GPU it queues a call, with a stack trace, at every step.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
