"""Training: dense, with a fixed mask, or with one that moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from sparsify_deploy import menu
from sparsify_deploy.stages.base import Estimate
from sparsify_deploy.stages.fitting import Fit, estimate, fit_
from sparsify_deploy.stages.subject import Subject, reproducible, save_weights, unmet_packages
from sparsify_deploy.stages.teacher import check_teacher, taught, teacher_files, teacher_inputs
from sparsify_deploy.stages.training_checks import check_training, unmet_by_training
from sparsify_deploy.training.settings import Distillation
from sparsify_deploy.types import Context, Facts


@dataclass(frozen=True)
class Train:
    """One training method from the network's start, or from `weights` where the branch has some."""

    subject: Subject
    fit: Fit
    distillation: Distillation | None = None

    name: ClassVar[str] = "train"
    version: ClassVar[int] = 1
    environment: ClassVar[tuple[str, ...]] = ()

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("weights", "mask", *teacher_inputs(self.distillation))

    @property
    def outputs(self) -> Mapping[str, str]:
        files = {"weights": "weights.safetensors"}
        if menu.entry("methods", self.fit.method).LEAVES_MASK:
            files["mask"] = "mask.safetensors"
        return files

    def methods(self) -> Mapping[str, int]:
        return {**self.subject.methods(), **self.fit.version()}

    def files(self) -> Mapping[str, Path]:
        return {**self.subject.files(), **teacher_files(self.distillation)}

    def unmet(self) -> Sequence[str]:
        return [*unmet_packages("train", "torch"), *unmet_by_training(self.subject, self.fit.training)]

    def preflight(self) -> None:
        check_training(self.subject, self.fit.training, self.subject.check_network())
        check_teacher(self.distillation, self.subject)

    def estimate(self) -> Estimate:
        return estimate(self.subject, self.fit)

    def run(self, inputs: Mapping[str, Path], out: Path, context: Context) -> Facts:
        from sparsify_deploy.sparsity.mask import Mask

        device = reproducible(context)
        model = self.subject.network(inputs.get("weights"))
        self.subject.check_fits(model)
        mask = Mask.load(inputs["mask"]) if "mask" in inputs else None
        model.to(device)
        with taught(self.distillation, self.subject, inputs, model) as teacher:
            mask, facts = fit_(
                model, self.fit, mask, subject=self.subject, out=out, context=context, distillation=teacher
            )
            if teacher is not None:
                facts["distillation"] = teacher.facts
        save_weights(model, out / self.outputs["weights"])
        if mask is not None:
            mask.save(out / self.outputs["mask"])
        return facts
