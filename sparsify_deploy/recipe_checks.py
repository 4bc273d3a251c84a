"""What no single section of a recipe can see: settings that exclude one another, or have no effect together."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from sparsify_deploy import menu
from sparsify_deploy.params import n_and_m
from sparsify_deploy.prediction.gpus import unknown_name
from sparsify_deploy.recipe import Init, Recipe, Train
from sparsify_deploy.training.settings import Training, TrainingOverride

if TYPE_CHECKING:
    from sparsify_deploy.types import Task

LEAST_GATE_BATCH = 32
"""Below it launches and the bytes of weights hide what 2:4 does: a gate on that would stop every run."""

Mistake = tuple[tuple[str | int, ...], str]
"""The path of a field, and `what, what to do`."""


_NEEDS_NETWORK = ("training", "init", "train", "nm", "quantize", "distillation", "sparsity")
"""Sections that change a torch network."""


def mistakes(recipe: Recipe) -> list[Mistake]:
    """What no single section can see."""
    if recipe.model.source == "onnx":
        shared = (_given_mistakes, _deploy_mistakes, _prediction_mistakes, _gate_mistakes)
        return [mistake for part in shared for mistake in part(recipe)]
    if recipe.data is None:
        return [(("data",), "is required: add it")]
    parts = (
        *(
            _checkpoint_mistakes,
            _training_mistakes,
            _mask_mistakes,
            _nm_mistakes,
            _quantize_mistakes,
            _distillation_mistakes,
        ),
        *(_deploy_mistakes, _prediction_mistakes, _gate_mistakes),
    )
    return [mistake for part in parts for mistake in part(recipe)]


def _checkpoint_mistakes(recipe: Recipe) -> Iterator[Mistake]:
    model = recipe.model
    if model.checkpoint is None:
        for field in sorted({"checkpoint_match", "checkpoint_partial"} & model.model_fields_set):
            yield ("model", field), "has no effect without model.checkpoint: add one, or remove it"


def _given_mistakes(recipe: Recipe) -> Iterator[Mistake]:
    """A recipe that starts from an ONNX file has the deploy half alone."""
    why = "model.source onnx has none"
    for section in _NEEDS_NETWORK:
        if getattr(recipe, section) is not None:
            yield (section,), f"needs a torch network, and {why}: remove it, or start from the network itself"
    if recipe.model.checkpoint is not None:
        yield ("model", "checkpoint"), f"is loaded into a torch network, and {why}: remove it"
    if "dense_branch" in recipe.model_fields_set:
        yield ("dense_branch",), f"trains a dense twin of a torch network, and {why}: remove it"
    for field in sorted({"opset", "int8_weights", "dynamic_batch"} & recipe.export.model_fields_set):
        yield ("export", field), "has no effect on an ONNX file, which is taken as it is: remove it"
    if recipe.data is not None and recipe.data.augment:
        yield ("data", "augment"), f"is for training, and {why}: remove it"
    for i, target in enumerate(recipe.deploy):
        if target.flavour == "tensorrt":
            yield ("deploy", i, "flavour"), "has no effect on an ONNX file, which is taken as it is: remove it"
    if recipe.data is None:
        yield from _undata_mistakes(recipe)
    elif recipe.model.params.model_dump()["shapes"]:
        yield ("model", "params", "shapes"), "has no effect beside a data section, which gives the shapes: remove it"


def _undata_mistakes(recipe: Recipe) -> Iterator[Mistake]:
    """What an ONNX file without data cannot have."""
    if "task" in recipe.model_fields_set:
        yield ("task",), "has no effect without a data section: add one, or remove it"
    for i, target in enumerate(recipe.deploy):
        if target.flavour == "onnxruntime":
            text = "measures ranges on examples, and the recipe has no data: add a data section, or remove it"
            yield ("deploy", i, "flavour"), text
    for field in ("max_drop", "metric"):
        if getattr(recipe.gates, field) is not None:
            yield ("gates", field), "needs examples to measure a metric on: add a data section, or remove it"


def _training_mistakes(recipe: Recipe) -> Iterator[Mistake]:
    trained = [
        (("train", "training"), recipe.train and recipe.train.training),
        (("nm", "fine_tune"), recipe.nm and recipe.nm.fine_tune),
        (("quantize", "qat"), recipe.quantize and recipe.quantize.qat),
    ]
    for path, override in trained:
        if override and recipe.training is None and override.epochs is None and override.steps is None:
            yield path, "has no length: give epochs or steps here or under training"
        if override:
            for field, text in _unfit(recipe, path[0], recipe.training_for(override)):
                yield _given_at(recipe, path, override, field), text


def _unfit(recipe: Recipe, section: str, training: Training) -> Iterator[tuple[str, str]]:
    """Fields of the training of one section that have no meaning there, each with what to do."""
    method = recipe.train.method if section == "train" and recipe.train is not None else "static"
    if not menu.entry("methods", method).CAN_END_EARLY:
        for field in ("keep", "early_stop"):
            if getattr(training, field) not in ("last", None):
                yield field, f"has no meaning with train.method {method}, pruned as asked at its end only: leave it out"
    for field in ("mixup", "cutmix"):
        if getattr(training, field) is not None and not getattr(
            menu.entry("tasks", recipe.task.name), "SOFT_TARGETS", False
        ):
            yield field, f"mixes labels, and task {recipe.task.name} knows no mixed ones: leave it out"
    if training.compile and section == "quantize":
        yield "compile", "nvidia-modelopt's quantizers do not compile: set quantize.qat.compile false"
    distillation = recipe.distilled("fine_tune") if section == "nm" else None
    if training.compile and distillation is not None and distillation.features:
        yield "compile", "features of a compiled network cannot be read: set nm.fine_tune.compile false, or use logits"


def _given_at(recipe: Recipe, path: tuple[str, str], override: TrainingOverride, field: str) -> tuple[str, ...]:
    """Where a recipe gives a field of a stage's training: in the override, or in the defaults for all stages."""
    return (*path, field) if field in override.model_fields_set or recipe.training is None else ("training", field)


def _mask_mistakes(recipe: Recipe) -> Iterator[Mistake]:
    init, train = recipe.init, recipe.train
    method = menu.entry("methods", train.method) if train is not None else None
    if train is not None and method is not None:
        if method.NEEDS_MASK and init is None:
            text = f"{train.method} needs a starting mask: add an init section (random with erk is RigL's own)"
            yield ("train", "method"), text
        if not method.NEEDS_MASK and init is not None:
            yield ("init",), f"has no effect with train.method {train.method}: remove one of the two"
        if method.NEEDS_SPARSITY and recipe.sparsity is None:
            yield ("train", "method"), f"{train.method} needs the share of weights to drop: give sparsity at the top"
        if recipe.sparsity is not None and not method.NEEDS_MASK and not method.NEEDS_SPARSITY:
            yield ("sparsity",), f"has no effect with train.method {train.method}: remove it"
    if init is not None:
        yield from _init_mistakes(init, recipe.sparsity, train)
    elif recipe.sparsity is not None and method is None:
        yield ("sparsity",), "has no effect without an init section: add one, or remove it"


def _init_mistakes(init: Init, sparsity: float | None, train: Train | None) -> Iterator[Mistake]:
    given = init.model_fields_set
    if train is None:
        yield ("init",), "has no effect without a train section: add one, or remove it"
    if init.pattern is None and sparsity is None:
        yield ("init",), "needs the share of weights to drop: give sparsity at the top, such as 0.8"
    if init.pattern is not None and sparsity is not None:
        yield ("sparsity",), f"has no effect beside init.pattern {init.pattern}: remove one of the two"
    if init.pattern is not None and train is not None:
        params = train.params.model_dump()
        if "pattern" in params and params["pattern"] is None:
            text = f"{train.method} would move weights out of {init.pattern}: set train.params.pattern {init.pattern}"
            yield ("init", "pattern"), text
        elif "drop_fraction" in params and "pattern" not in params:
            yield ("init", "pattern"), f"{train.method} does not keep a pattern: use rigl, set or static"
    for field in given & {"batches", "samples_per_class"}:
        if not menu.entry("criteria", init.criterion).NEEDS_DATA:
            yield ("init", field), f"has no effect with init.criterion {init.criterion}, which needs no data: remove it"
    if {"batches", "samples_per_class"} <= given and init.samples_per_class is not None:
        yield ("init", "batches"), "has no effect beside samples_per_class: remove one of the two"
    if "allocation" in given and init.pattern is not None:
        yield ("init", "allocation"), f"has no effect beside init.pattern {init.pattern}: remove one of the two"


def _nm_mistakes(recipe: Recipe) -> Iterator[Mistake]:
    if recipe.nm is None:
        return
    for i, (loose, tight) in enumerate(pairwise((*recipe.nm.via, recipe.nm.pattern))):
        (loose_n, loose_m), (n, m) = n_and_m(loose), n_and_m(tight)
        # A looser group is a whole number of tighter ones, and keeps at least what they keep.
        if loose_m % m or loose_n * m < n * loose_m or loose == tight:
            yield ("nm", "via", i), f"{loose} does not contain {tight}: the way to 2:4 goes through 4:8, for one"
    if recipe.nm.permute == "stripe_groups" and recipe.nm.nm[1] > 4:
        yield ("nm", "permute"), f"stripe_groups tries too many partitions for {recipe.nm.pattern}: use channel_swap"
    if "fill_batches" in recipe.nm.model_fields_set and not recipe.nm.fill:
        yield ("nm", "fill_batches"), "has no effect with nm.fill false: remove it"
    if recipe.nm.via and recipe.nm.fine_tune is None:
        yield ("nm", "via"), "has no effect without nm.fine_tune: add one, or remove it"


def _quantize_mistakes(recipe: Recipe) -> Iterator[Mistake]:
    data = recipe.quantize.calibration_data if recipe.quantize is not None else None
    if data is not None and menu.entry("datasets", data.source).RUNS_USER_CODE:
        text = f"{data.source} runs Python code, which calibration data may not: save the examples as .npz"
        yield ("quantize", "calibration_data", "source"), text


def _distillation_mistakes(recipe: Recipe) -> Iterator[Mistake]:
    distillation = recipe.distillation
    if distillation is None:
        return
    phases = {
        "fine_tune": ("nm.fine_tune", recipe.nm is not None and recipe.nm.fine_tune is not None),
        "qat": ("quantize.qat", recipe.quantize is not None and recipe.quantize.qat is not None),
    }
    for i, phase in enumerate(distillation.phases):
        section, there = phases[phase]
        if not there:
            yield (
                ("distillation", "phases", i),
                f"{phase} has no effect without {section}: add it, or leave {phase} out",
            )
    if distillation.features and "temperature" in distillation.model_fields_set:
        yield ("distillation", "temperature"), "has no effect on features: remove one of the two"
    if distillation.teacher is None and recipe.train is not None and not recipe.dense_branch:
        yield (
            ("distillation",),
            "the teacher is the dense baseline: set dense_branch true, or name a teacher checkpoint",
        )
    if distillation.features and recipe.nm is not None and recipe.nm.permute != "none":
        text = "are compared channel by channel, and nm.permute reorders channels: use logits, or permute none"
        yield ("distillation", "features"), text


def _deploy_mistakes(recipe: Recipe) -> Iterator[Mistake]:
    names = [target.runtime for target in recipe.deploy]
    for i, name in enumerate(names):
        if name in names[:i]:
            yield ("deploy", i, "runtime"), f"{name} is there twice: name each runtime once"
        if recipe.deploy[i].triton and name == "tensorrt_rtx":
            yield ("deploy", i, "triton"), "Triton cannot serve its engines, only TensorRT-RTX runs them: remove it"
    if len(set(recipe.benchmark.batch_sizes)) < len(recipe.benchmark.batch_sizes):
        yield ("benchmark", "batch_sizes"), "names a size twice: each once"
    if not recipe.export.dynamic_batch and recipe.benchmark.batch_sizes != (1,):
        yield ("benchmark", "batch_sizes"), "export.dynamic_batch false fixes the batch at 1: give [1]"


def _prediction_mistakes(recipe: Recipe) -> Iterator[Mistake]:
    settings, limit = recipe.prediction, recipe.gates.min_predicted_speedup
    for i, name in enumerate(settings.gpus):
        if (unknown := unknown_name(name)) is not None:
            yield ("prediction", "gpus", i), unknown
        elif name in settings.gpus[:i]:
            yield ("prediction", "gpus", i), f"{name} is there twice: name each GPU once"
    if len(set(settings.batch_sizes)) < len(settings.batch_sizes):
        yield ("prediction", "batch_sizes"), "names a size twice: each once"
    if limit is None:
        return
    if recipe.nm is None and recipe.model.source != "onnx":
        yield ("gates", "min_predicted_speedup"), "is about what 2:4 gains: add an nm section, or remove it"
    if not settings.gpus:
        yield ("prediction", "gpus"), "gates.min_predicted_speedup needs a GPU to predict: name one, such as a100"
    if max(settings.batch_sizes) < LEAST_GATE_BATCH:
        text = f"gates.min_predicted_speedup needs a batch of at least {LEAST_GATE_BATCH}: add one, or remove the gate"
        yield ("prediction", "batch_sizes"), text


def _gate_mistakes(recipe: Recipe) -> Iterator[Mistake]:
    gates = recipe.gates
    if gates.max_drop is not None and not recipe.dense_branch:
        yield ("gates", "max_drop"), "compares with the dense twin: set dense_branch true, or remove it"
    if gates.min_speedup is not None and not recipe.deploy:
        yield ("gates", "min_speedup"), "needs an engine that is timed: add a deploy section, or remove it"
    if gates.metric is not None and not menu.entry("tasks", recipe.task.name).RUNS_USER_CODE:
        yield from unknown_metric(recipe, menu.entry("tasks", recipe.task.name).create(recipe.task.params))


def unknown_metric(recipe: Recipe, task: Task) -> Iterator[Mistake]:
    """The metric that gates name, where the task does not always measure it."""
    metric, name = recipe.gates.metric, recipe.task.name
    if metric is None or metric in task.metrics:
        return
    if metric in getattr(task, "also_measured", {}):
        text = f"{metric} is measured by the number of classes: ask for it in task.params (top_k, positive)"
        yield ("gates", "metric"), text
    else:
        hint = menu.did_you_mean(metric, task.metrics)
        yield ("gates", "metric"), f"{name} has no metric {metric!r}{hint}"
