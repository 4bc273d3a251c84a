"""BatchNorm folded, INT8 quantizers placed and calibrated, quantisation-aware training with the mask held."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from sparsify_deploy import menu
from sparsify_deploy.errors import CheckFailed
from sparsify_deploy.recipe import Quantize as QuantizeSection
from sparsify_deploy.stages.base import Estimate
from sparsify_deploy.stages.calibration import calibration_files, calibration_methods
from sparsify_deploy.stages.fitting import estimate, fit_, hold
from sparsify_deploy.stages.subject import Subject, load_tensors, reproducible, save_tensors, unmet_packages
from sparsify_deploy.stages.teacher import check_teacher, taught, teacher_files, teacher_inputs
from sparsify_deploy.stages.training_checks import check_training, unmet_by_training
from sparsify_deploy.training.settings import Distillation, Training
from sparsify_deploy.types import Context, Facts, Json

if TYPE_CHECKING:
    from sparsify_deploy.quantization.int8 import Int8Settings, Quantized


@dataclass(frozen=True)
class Quantize:
    """INT8 weights per output channel and activations per tensor, on a folded copy of the network."""

    subject: Subject
    quantize: QuantizeSection
    training: Training | None
    batch_size: int
    distillation: Distillation | None = None

    name: ClassVar[str] = "quantize"
    version: ClassVar[int] = 4
    outputs: ClassVar[Mapping[str, str]] = {"quantized": "quantized.safetensors"}
    environment: ClassVar[tuple[str, ...]] = ("modelopt",)

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("weights", "mask", *teacher_inputs(self.distillation))

    def methods(self) -> Mapping[str, int]:
        held = {f"methods/{name}": menu.entry("methods", name).VERSION for name in ("dense", "static")}
        return {**self.subject.methods(), **calibration_methods(self.quantize), **held}

    def files(self) -> Mapping[str, Path]:
        return {**self.subject.files(), **calibration_files(self.quantize), **teacher_files(self.distillation)}

    def unmet(self) -> Sequence[str]:
        needed = unmet_packages("quantize", "torch", "modelopt", "requests", "huggingface_hub")
        return [*needed, *unmet_by_training(self.subject, self.training)]

    def preflight(self) -> None:
        from sparsify_deploy.quantization.table import check_patterns

        names = [name for name, _ in self.subject.check_traceable().named_modules() if name]
        check_patterns(self.quantize.keep_float, names)
        if self.quantize.calibration_data is not None:
            self.subject.calibration_examples(self.quantize.calibration_data)
        check_training(self.subject, self.training, self.subject.check_network())
        check_teacher(self.distillation, self.subject, folded=True)

    def estimate(self) -> Estimate:
        return estimate(self.subject, self.training)

    def run(self, inputs: Mapping[str, Path], out: Path, context: Context) -> Facts:
        from sparsify_deploy.quantization import int8
        from sparsify_deploy.sparsity.mask import Mask

        device = reproducible(context)
        mask = Mask.load(inputs["mask"]) if "mask" in inputs else None
        model = self.subject.network(inputs.get("weights"))
        self.subject.check_fits(model)
        quantized = int8.prepare(model, settings_of(self.quantize))
        quantized.module.to(device)
        other = self.quantize.calibration_data
        batches = self.subject.calibration(self.quantize.calibration_batches, self.batch_size, other)
        notes = int8.calibrate_(quantized, batches, self.subject.examples.inputs)
        facts: dict[str, Json] = {
            "placement": [dataclasses.asdict(row) for row in quantized.placement],
            "calibration": dataclasses.asdict(notes),
            "calibration_notes": list(self.subject.calibration_examples(other)[1]) if other is not None else [],
        }
        if self.training is not None:
            held = hold(mask is not None, self.training, phase="qat")
            with taught(self.distillation, self.subject, inputs, quantized.module, folded=True) as teacher:
                facts |= fit_(
                    quantized.module,
                    held,
                    mask,
                    subject=self.subject,
                    out=out,
                    context=context,
                    distillation=teacher,
                )[1]
                if teacher is not None:
                    facts["distillation"] = teacher.facts
        if mask is not None and (moved := mask.check_holds(quantized.module)):
            raise CheckFailed(f"quantize: pruned weights are no longer zero in {', '.join(moved)}")
        save_tensors(int8.state(quantized), out / self.outputs["quantized"])
        return facts


def settings_of(section: QuantizeSection) -> Int8Settings:
    """The part of the section that shapes the network, so that a later stage can rebuild it."""
    from sparsify_deploy.quantization.int8 import Int8Settings

    return Int8Settings(
        keep_float=section.keep_float,
        residual=section.residual,
        concat=section.concat,
        pooling=section.pooling,
        attention=section.attention,
        stream=section.stream,
    )


def rebuild(subject: Subject, section: QuantizeSection, state: Path) -> Quantized:
    """The quantised network of `state`, as the quantize stage left it."""
    from sparsify_deploy.quantization import int8

    quantized = int8.prepare(subject.network(), settings_of(section))
    int8.load_(quantized, load_tensors(state))
    return quantized
