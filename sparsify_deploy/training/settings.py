"""The settings of one run of the training loop, and how a stage overrides the recipe's defaults. Free of torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from sparsify_deploy.params import Fraction, InputPath, NonNegative, Positive
from sparsify_deploy.params import Params as Section


class Optimizer(Section):
    """An optimizer and its settings; `momentum` and `nesterov` are for sgd, `betas` and `eps` for adam and adamw."""

    name: Literal["sgd", "adam", "adamw"] = Field("sgd", description="torch.optim's")
    lr: Positive = Field(0.1, description="learning rate at the top of the schedule")
    momentum: Fraction = Field(0.9, description="sgd: momentum")
    nesterov: bool = Field(False, description="sgd: Nesterov's momentum")
    weight_decay: NonNegative = Field(5e-4, description="adamw: decoupled; else added to the gradient")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.999), strict=False, description="adam, adamw: the two averages")
    eps: Positive = Field(1e-8, description="adam, adamw: added to the denominator")


class Schedule(Section):
    """How the learning rate moves, after a linear warm-up from 0."""

    name: Literal["cosine", "step", "constant"] = Field("cosine", description="how the learning rate goes on")
    warmup_fraction: Fraction = Field(0.0, description="part of all optimizer steps spent warming up")
    milestones: tuple[Fraction, ...] = Field(
        (0.5, 0.75), strict=False, description="step: fractions of training after which the rate is multiplied by gamma"
    )
    gamma: Positive = Field(0.1, description="step: the factor at each milestone")
    final_fraction: Fraction = Field(0.0, description="cosine: last rate as a fraction of the first")


class EMA(Section):
    """An exponential moving average of the weights, which a stage then ends with (Polyak & Juditsky 1992)."""

    decay: float = Field(0.999, gt=0.0, lt=1.0, description="what each optimizer step leaves of the average")
    warmup: bool = Field(
        True, description="the decay of step n is at most (1 + n) / (10 + n), so that a short run forgets its start"
    )


class EarlyStop(Section):
    """When a run that no longer gets better ends; measured on the data's validation split."""

    patience: int = Field(5, ge=1, description="measurements in a row that may pass without a better one")
    min_delta: NonNegative = Field(0.0, description="what counts as better, in the metric's own unit")


class Training(Section):
    """One run of the training loop; exactly one of `epochs` and `steps`."""

    epochs: Positive | None = Field(None, description="passes over the training split; this or steps")
    steps: int | None = Field(None, ge=1, description="optimizer steps; this or epochs")
    batch_size: int = Field(64, ge=1, description="examples an optimizer step and accumulation slice")
    accumulate: int = Field(1, ge=1, description="batches whose gradients are averaged into one optimizer step")
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    clip_norm: Positive | None = Field(None, description="largest gradient norm, after the mask acted")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="bf16, fp16: autocast; weights stay FP32; fp16 scales the loss"
    )
    ema: EMA | None = Field(None, description="average the weights; the average is what the stage ends with")
    channels_last: bool = Field(False, description="convolutions in channels-last memory format while training")
    compile: bool = Field(False, description="torch.compile the forward pass; needs a C++ compiler")
    mixup: Positive | None = Field(None, description="alpha of MixUp on whole batches (arXiv 1710.09412)")
    cutmix: Positive | None = Field(
        None, description="alpha of CutMix (arXiv 1905.04899); with mixup, each batch gets one of the two"
    )
    keep: Literal["last", "best"] = Field(
        "last", description="best: end with the weights whose metric on the validation split was best"
    )
    early_stop: EarlyStop | None = None
    evaluate_every: Positive | None = Field(
        None, description="epochs between measurements on the validation split; none: 1 where keep or early_stop needs"
    )

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs and steps")
        return self

    def steps_per_epoch(self, examples: int) -> float:
        """Optimizer steps in one epoch: `floor(examples / batch_size)` batches, or one smaller batch where there are
        fewer examples than `batch_size`; the last, incomplete batch is left out. Not whole with `accumulate`."""
        return max(1, examples // self.batch_size) / self.accumulate

    def total_steps(self, examples: int) -> int:
        """`steps`, or the optimizer steps of `epochs` over `examples`, rounded, at least 1."""
        if self.epochs is None:
            return self.steps or 1
        return max(1, round(self.epochs * self.steps_per_epoch(examples)))

    @property
    def chooses(self) -> bool:
        """Whether the validation split decides which weights a run ends with."""
        return self.keep == "best" or self.early_stop is not None

    @property
    def measures(self) -> bool:
        """Whether a run is measured on the validation split."""
        return self.chooses or self.evaluate_every is not None

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed, and with them their labels."""
        return self.mixup is not None or self.cutmix is not None

    def measured_after(self, step: int, examples: int) -> bool:
        """Whether the run is measured after its first `step` optimizer steps: by each interval of
        `evaluate_every`, and at the end."""
        interval = (self.evaluate_every or 1.0) * self.steps_per_epoch(examples)
        passed, before = (int(done / interval + 1e-9) for done in (step, step - 1))  # 2.9999999999999996 are three
        return step == self.total_steps(examples) or passed > before


class Distillation(Section):
    """A dense teacher's answers as part of the loss (Hinton 2015, arXiv 1503.02531)."""

    teacher: InputPath | None = Field(
        None, description="a checkpoint of the same network: .safetensors or .pt; none: the dense FP32 baseline"
    )
    temperature: Positive = Field(4.0, description="softens both sides' logits; their loss is scaled by its square")
    weight: float = Field(0.9, gt=0.0, le=1.0, description="share of the teacher's loss; the task's own gets the rest")
    features: tuple[str, ...] = Field(
        (), strict=False, description="modules whose outputs are compared in place of the logits"
    )
    phases: tuple[Literal["fine_tune", "qat"], ...] = Field(
        ("fine_tune", "qat"), strict=False, min_length=1, description="where it applies"
    )


class OptimizerOverride(Section):
    """The fields of `training.optimizer` to change for one stage."""

    name: Literal["sgd", "adam", "adamw"] | None = None
    lr: Positive | None = None
    momentum: Fraction | None = None
    nesterov: bool | None = None
    weight_decay: NonNegative | None = None
    betas: tuple[Fraction, Fraction] | None = Field(None, strict=False)
    eps: Positive | None = None


class ScheduleOverride(Section):
    """The fields of `training.schedule` to change for one stage."""

    name: Literal["cosine", "step", "constant"] | None = None
    warmup_fraction: Fraction | None = None
    milestones: tuple[Fraction, ...] | None = Field(None, strict=False)
    gamma: Positive | None = None
    final_fraction: Fraction | None = None


_MAY_BE_NONE = frozenset({"clip_norm", "ema", "mixup", "cutmix", "early_stop", "evaluate_every"})
"""Fields of `training` that an override may turn off again; null in any other overrides nothing."""


class TrainingOverride(Section):
    """The fields of `training` to change for one stage; naming `epochs` or `steps` replaces the other."""

    epochs: Positive | None = None
    steps: int | None = Field(None, ge=1)
    batch_size: int | None = Field(None, ge=1)
    accumulate: int | None = Field(None, ge=1)
    optimizer: OptimizerOverride | None = None
    schedule: ScheduleOverride | None = None
    clip_norm: Positive | None = None
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    ema: EMA | None = Field(None, description="null: no average in this stage")
    channels_last: bool | None = None
    compile: bool | None = None
    mixup: Positive | None = None
    cutmix: Positive | None = None
    keep: Literal["last", "best"] | None = None
    early_stop: EarlyStop | None = None
    evaluate_every: Positive | None = None

    @model_validator(mode="after")
    def _one_length(self) -> TrainingOverride:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give epochs or steps, not both")
        return self

    def over(self, base: Training) -> Training:
        """`base` with this override's own fields in place of its."""
        changes = {
            k: value for k in self.model_fields_set if (value := getattr(self, k)) is not None or k in _MAY_BE_NONE
        }
        for part in ("optimizer", "schedule"):
            if isinstance(own := changes.get(part), Section):
                fields = {k: getattr(own, k) for k in own.model_fields_set}
                changes[part] = getattr(base, part).model_copy(update=fields)
        if self.epochs is not None:
            changes["steps"] = None
        if self.steps is not None:
            changes["epochs"] = None
        return base.model_copy(update=changes)
