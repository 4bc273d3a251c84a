"""The whole YAML schema of a recipe, as frozen pydantic models.

`recipe_source.load` reads a file into a `Recipe`. A section of a menu (a model source, a criterion, a training
method, a runtime...) names its entry and hands `params:` to that entry's own `Params`. Nothing here imports
torch or numpy: a recipe is judged on a machine that has neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator

from sparsify_deploy import menu
from sparsify_deploy.params import Fraction, InputPath, NMPattern, NonNegative, Positive, n_and_m
from sparsify_deploy.params import Params as Section
from sparsify_deploy.training.image_settings import Augmentation
from sparsify_deploy.training.settings import Distillation, Training, TrainingOverride

SCHEMA_VERSION = 1


class NotGiven(Section):
    """Stands for the `params` of a menu section until its entry's own `Params` takes their place."""


class MenuSection(Section):
    """A section that names an entry of the menu `MENU` in its field `KEY`, which stands before its `params`."""

    MENU: ClassVar[str]
    KEY: ClassVar[str]

    @field_validator("source", "name", "criterion", "method", "runtime", check_fields=False)
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in menu.names(cls.MENU):
            raise ValueError(f"unknown name {name!r}{menu.did_you_mean(name, menu.names(cls.MENU))}")
        return name

    @field_validator("params", mode="before", check_fields=False)
    @classmethod
    def _params(cls, value: Any, info: ValidationInfo) -> Section:
        name = info.data.get(cls.KEY)
        if name is None:  # the name is already reported as a mistake
            return NotGiven()
        params: type[Section] = menu.entry(cls.MENU, name).Params
        if isinstance(value, params):
            return value
        if isinstance(value, NotGiven):
            value = None
        if value is not None and not isinstance(value, Mapping):
            raise ValueError("expected a mapping of parameters")
        return params.model_validate(value or {}, context=info.context)


ParamsOf = SerializeAsAny[Section]
"""The validated `Params` of the menu entry named beside it."""


class Model(MenuSection):
    """Where the network comes from, and a checkpoint to start from."""

    MENU: ClassVar[str] = "models"
    KEY: ClassVar[str] = "source"
    source: str = Field("builtin", description="a model source, see `sparsify-deploy list models`")
    params: ParamsOf = Field(default_factory=NotGiven, description="the source's own parameters")
    checkpoint: InputPath | None = Field(
        None, description="weights to start from: .safetensors, or .pt read with weights_only"
    )
    checkpoint_match: Literal["names", "order"] = Field(
        "names", description="order: the k-th tensor of the file is the k-th of the network, whatever their names"
    )
    checkpoint_partial: bool = Field(
        False,
        description="load what fits, such as all but a new classifier, and leave the rest as initialised; by order, "
        "all but the last module",
    )


class Data(MenuSection):
    """Where the examples come from."""

    MENU: ClassVar[str] = "datasets"
    KEY: ClassVar[str] = "source"
    source: str = Field("digits", description="a data set source, see `sparsify-deploy list datasets`")
    params: ParamsOf = Field(default_factory=NotGiven, description="the source's own parameters")
    augment: tuple[Augmentation, ...] = Field(
        (),
        strict=False,
        description="for images while training, in this order: crop pads by an eighth and crops at random; the others "
        "but flip are torchvision's, by name or as {name: parameters}",
    )


class TaskSection(MenuSection):
    """What the model is for: loss and metrics."""

    MENU: ClassVar[str] = "tasks"
    KEY: ClassVar[str] = "name"
    name: str = Field("classification", description="a task, see `sparsify-deploy list tasks`")
    params: ParamsOf = Field(default_factory=NotGiven, description="the task's own parameters")


Patterns = Annotated[tuple[str, ...], Field(strict=False)]


class Init(MenuSection):
    """A mask before training, at the recipe's `sparsity` or of an N:M pattern."""

    MENU: ClassVar[str] = "criteria"
    KEY: ClassVar[str] = "criterion"
    criterion: str = Field("synflow", description="what scores weights, see `sparsify-deploy list criteria`")
    params: ParamsOf = Field(default_factory=NotGiven, description="the criterion's own parameters")
    allocation: Literal["global", "uniform", "erk"] = Field(
        "global", description="how the density is shared out over layers"
    )
    keep_dense: Patterns = Field((), description="layers left dense, shell patterns over module names")
    pattern: NMPattern | None = Field(
        None,
        description="N of every M input channels, in place of sparsity and allocation; for training that stays N:M",
    )
    batches: int = Field(1, ge=1, description="training batches a data-driven criterion sees")
    samples_per_class: int | None = Field(
        None, ge=1, description="so many training examples of each class, in place of `batches` batches as they come"
    )


class Train(MenuSection):
    """Training with a dense, fixed or moving mask."""

    MENU: ClassVar[str] = "methods"
    KEY: ClassVar[str] = "method"
    method: str = Field("rigl", description="a training method, see `sparsify-deploy list methods`")
    params: ParamsOf = Field(default_factory=NotGiven, description="the method's own parameters")
    training: TrainingOverride = TrainingOverride()


class NM(Section):
    """N:M projection along input channels, then fine-tuning with the mask held."""

    pattern: NMPattern = Field("2:4", description="N:M, N of every M kept, M <= 16")
    via: Annotated[tuple[NMPattern, ...], Field(strict=False)] = Field(
        (), description="looser patterns on the way, such as [4:8]; each gets an equal share of the fine-tuning"
    )
    permute: Literal["none", "channel_swap", "stripe_groups"] = Field(
        "none", description="reorder channels first so that the pattern keeps more magnitude; the outputs stay the same"
    )
    fill: bool = Field(True, description="grow every group back to N weights where the sparse mask left fewer")
    fill_batches: int = Field(8, ge=1, description="batches whose dense gradient chooses the refilled positions")
    layers: Literal["rule_of_thumb", "pattern_possible"] = Field(
        "rule_of_thumb", description="rule_of_thumb: K % 8 and C % 16 as ASP; pattern_possible: C % M"
    )
    keep_dense: Patterns = Field((), description="layers never projected, shell patterns over module names")
    keep_worst_dense: int = Field(
        0, ge=0, description="leave so many more layers dense: those that lose most when projected alone"
    )
    fine_tune: TrainingOverride | None = Field(None, description="none: project only")

    @property
    def nm(self) -> tuple[int, int]:
        """N and M."""
        return n_and_m(self.pattern)


class CalibrationData(MenuSection):
    """Examples for calibration alone, which need no labels."""

    MENU: ClassVar[str] = "datasets"
    KEY: ClassVar[str] = "source"
    source: str = Field("folder", description="a data set source; its train split, or with labels false all of it")
    params: ParamsOf = Field(default_factory=NotGiven, description="the source's own parameters")


class Quantize(Section):
    """INT8 with calibration, and quantisation-aware training with the mask held."""

    calibration_batches: int = Field(8, ge=1, description="training batches that set the ranges of activations")
    calibration_data: CalibrationData | None = Field(
        None, description="calibrate on these examples, scaled as those of data are; none: on data's train split"
    )
    keep_float: Patterns = Field((), description="layers left in float, shell patterns over module names")
    residual: bool = Field(
        True, description="Q/DQ on the identity branch of residual adds, so that they fuse into INT8"
    )
    concat: bool = Field(
        True, description="Q/DQ with one scale on all inputs of a concatenation that quantised layers read"
    )
    pooling: bool = Field(
        True, description="Q/DQ in front of global average pooling, so that the layer before it writes INT8"
    )
    attention: bool = Field(
        True, description="Q/DQ on both inputs of both products of attention; the softmax stays float"
    )
    stream: bool = Field(
        False, description="Q/DQ on what layers add to a residual stream that LayerNorm reads, so that they write INT8"
    )
    qat: TrainingOverride | None = Field(None, description="none: post-training quantisation only")


class Export(Section):
    """The ONNX file."""

    opset: int = Field(17, ge=13, le=20, description="of the ONNX file")
    int8_weights: bool = Field(
        True, description="store INT8 weights as integers, a quarter of the bytes; false for TensorRT before 10"
    )
    dynamic_batch: bool = Field(True, description="false: the batch size is fixed at 1")
    parity_examples: int = Field(256, ge=1, description="test examples compared between torch and the ONNX file")
    min_top1_agreement: Fraction = Field(0.995, description="INT8: least share of equal top-1 answers")
    max_relative_difference: Positive = Field(1e-4, description="FP32: largest difference over the largest output")


class Target(MenuSection):
    """One engine to build."""

    MENU: ClassVar[str] = "runtimes"
    KEY: ClassVar[str] = "runtime"
    runtime: str = Field(description="what builds and runs it, see `sparsify-deploy list runtimes`")
    params: ParamsOf = Field(default_factory=NotGiven, description="the runtime's own parameters")
    flavour: Literal["tensorrt", "onnxruntime"] | None = Field(
        None, description="where Q/DQ stand in the ONNX file it is built from; none: as the runtime likes it"
    )
    triton: bool = Field(False, description="also write a Triton model repository with this engine")


class Prediction(Section):
    """What 2:4 and INT8 would gain on GPUs that need not be there, from the shapes of the layers."""

    gpus: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        ("a100", "h100"), description="see `sparsify-deploy plan --help` for their names"
    )
    batch_sizes: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False, min_length=1)] = Field(
        (1, 32), description="batch sizes predicted for"
    )


class Benchmark(Section):
    """How engines are timed: interleaved rounds, median ratio with a bootstrap interval, an A/A control."""

    batch_sizes: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False, min_length=1)] = Field(
        (1,), description="batch sizes timed; the verdict is on the first"
    )
    rounds: int = Field(20, ge=5, description="interleaved rounds")
    round_ms: Positive = Field(30.0, description="time spent on each variant in a round, ms")
    warmup_ms: Positive = Field(200.0, description="warm-up of each variant, ms")
    threads: int = Field(1, ge=1, le=1024, description="CPU threads of the runtime while timing")


class Gates(Section):
    """What the run must reach; a gate not met is exit code 4, artifacts kept."""

    metric: str | None = Field(None, description="the task's metric for max_drop; none: its first")
    max_drop: NonNegative | None = Field(
        None, description="largest loss in the metric against the dense FP32 model, in the metric's own unit"
    )
    min_speedup: Positive | None = Field(None, description="least speed-up over the dense twin on the first runtime")
    min_sparsity: Fraction | None = Field(None, description="least measured sparsity of the prunable weights")
    min_predicted_speedup: Positive | None = Field(
        None, description="least predicted gain of 2:4 on the first of prediction.gpus; stops a run before it trains"
    )


MENU_SECTIONS: Mapping[type[Section], tuple[str, str]] = {
    section: (section.MENU, section.KEY) for section in (Model, Data, CalibrationData, TaskSection, Init, Train, Target)
}
"""Sections that name an entry of a menu: the menu, and the field that holds the name; `params` are the entry's."""


class Recipe(Section):
    """One model's way from a network to an engine."""

    version: Literal[1] = Field(description="of this schema")
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="none: the file's name")
    seed: int = Field(0, ge=0, lt=2**31, description="of initialisation, masks, the order of examples, augmentation")
    threads: int | None = Field(None, ge=1, le=1024, description="torch threads; none: all cores this process may use")
    sparsity: Fraction | None = Field(None, description="share of the prunable weights dropped by init and train")
    dense_branch: bool = Field(True, description="also train, quantise, build and time the dense twin")
    store: InputPath | None = Field(None, description="an artifact store shared with other recipes")
    model: Model
    data: Data | None = Field(
        None, description="none: only where model.source is onnx, which then runs on inputs that are drawn"
    )
    task: TaskSection = Field(default_factory=TaskSection)
    training: Training | None = None
    init: Init | None = None
    train: Train | None = None
    nm: NM | None = None
    quantize: Quantize | None = None
    distillation: Distillation | None = None
    export: Export = Export()
    deploy: Annotated[tuple[Target, ...], Field(strict=False)] = ()
    prediction: Prediction = Prediction()
    benchmark: Benchmark = Benchmark()
    gates: Gates = Gates()

    def training_for(self, override: TrainingOverride) -> Training:
        """The training defaults with one stage's override on top; `mistakes` has checked that it has a length."""
        return override.over(self.training or Training(steps=1))

    def distilled(self, phase: Literal["fine_tune", "qat"]) -> Distillation | None:
        """The distillation of one phase, None where the recipe asks for none there."""
        return self.distillation if self.distillation and phase in self.distillation.phases else None
