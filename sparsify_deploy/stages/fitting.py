"""One run of a training method inside a stage, with what it cost."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from pydantic import BaseModel

from sparsify_deploy import menu
from sparsify_deploy.process import watch
from sparsify_deploy.stages.base import Estimate
from sparsify_deploy.stages.subject import Subject
from sparsify_deploy.stages.training_checks import mixing
from sparsify_deploy.training.settings import Training
from sparsify_deploy.types import Context, Json

if TYPE_CHECKING:
    from torch import nn

    from sparsify_deploy.sparsity.mask import Mask
    from sparsify_deploy.training.loop import Distilling


Phase: TypeAlias = Literal["train", "fine_tune", "qat"]
PHASES: tuple[Phase, ...] = ("train", "fine_tune", "qat")
_SECTIONS: dict[Phase, str] = {"train": "training", "fine_tune": "nm.fine_tune", "qat": "quantize.qat"}
"""Where a recipe says how each phase trains."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """A training method, its settings, and its phase: each phase draws its batches in an order of its own.

    `sparsity` is what a method that prunes while it trains ends with; None for the others.
    """

    method: str
    params: BaseModel
    training: Training
    phase: Phase
    sparsity: float | None = None

    def version(self) -> dict[str, int]:
        """The method's entry in a fingerprint."""
        return {f"methods/{self.method}": menu.entry("methods", self.method).VERSION}

    @property
    def density(self) -> float | None:
        """What is left of the weights at the end, for a method that prunes while it trains."""
        return None if self.sparsity is None else 1.0 - self.sparsity

    def optimizer_steps(self, total_steps: int) -> int:
        """How many the method takes where one dense training takes `total_steps`."""
        steps: int = menu.entry("methods", self.method).optimizer_steps(self.params, total_steps, self.density)
        return steps


def hold(mask: bool, training: Training, phase: Phase) -> Fit:
    """Training that leaves the mask where it is, or dense training where there is none."""
    method = "static" if mask else "dense"
    return Fit(method, menu.entry("methods", method).Params(), training, phase)


def fit_(
    model: nn.Module,
    fit: Fit,
    mask: Mask | None,
    *,
    subject: Subject,
    out: Path,
    context: Context,
    distillation: Distilling | None = None,
    part: int = 0,
) -> tuple[Mask | None, dict[str, Json]]:
    """Train `model` in place, with step checkpoints in `out`; the mask it ends with, its history and its cost.

    `part` numbers the fits of a stage that has several: each has checkpoints and an order of batches of its own.
    """
    from sparsify_deploy.training.cost import training_cost
    from sparsify_deploy.training.evaluation import evaluate
    from sparsify_deploy.training.forward import contiguous_
    from sparsify_deploy.training.loop import Trainer
    from sparsify_deploy.training.vision import Pixels

    examples, task = subject.examples, subject.opened_task
    trainer = Trainer(
        model,
        task,
        examples.split("train"),
        examples.inputs,
        fit.training,
        seed=subject.seed + PHASES.index(fit.phase) + len(PHASES) * part,
        folder=out,
        context=context,
        augment=subject.data.augment,
        pixels=Pixels.of(examples),
        mixing=mixing(subject, fit.training, model),
        label=f"{fit.phase}-{part + 1}" if part else fit.phase,
        distillation=distillation,
        evaluate=lambda: evaluate(model, task, examples.split("test"), examples.inputs),
        validation=examples.split("validation") if fit.training.measures else None,
    )
    with watch.batch(fit.training.batch_size, f"{_SECTIONS[fit.phase]}.batch_size"):
        after: Mask | None = menu.entry("methods", fit.method).train(trainer, mask, fit.params, fit.density)
    if fit.training.channels_last:
        contiguous_(model)
    cost = training_cost(model, subject.example(), examples.inputs, trainer.history)
    return after, {"method": fit.method, "history": dataclasses.asdict(trainer.history), "cost": cost}


def estimate(subject: Subject, training: Training | Fit | None) -> Estimate:
    """The optimizer steps of a run, and its FLOPs were it dense (2 x MACs, backward twice the forward)."""
    from sparsify_deploy.training.cost import forward_flops

    if training is None:
        return Estimate(optimizer_steps=0, training_flops=0.0)
    settings = training.training if isinstance(training, Fit) else training
    steps = settings.total_steps(len(subject.examples.split("train")))
    if isinstance(training, Fit):
        steps = training.optimizer_steps(steps)
    forward = sum(forward_flops(subject.network(), subject.example(), subject.examples.inputs).values())
    return Estimate(steps, 3.0 * forward * steps * settings.batch_size * settings.accumulate)
