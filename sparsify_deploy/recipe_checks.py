"""What no single section of a recipe can see: settings that exclude one another, or have no effect together."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from sparsify_deploy import menu
from sparsify_deploy.params import n_and_m
from sparsify_deploy.prediction.gpus import unknown_name
from sparsify_deploy.recipe import Init, Recipe, Train

LEAST_GATE_BATCH = 32
"""Below it launches and the bytes of weights hide what 2:4 does: a gate on that would stop every run."""

Mistake = tuple[tuple[str | int, ...], str]
"""The path of a field, and `what, what to do`."""


def mistakes(recipe: Recipe) -> list[Mistake]:
    """What no single section can see."""
    parts = (
        *(_training_mistakes, _mask_mistakes, _nm_mistakes, _distillation_mistakes),
        *(_deploy_mistakes, _prediction_mistakes, _gate_mistakes),
    )
    return [mistake for part in parts for mistake in part(recipe)]


def _training_mistakes(recipe: Recipe) -> Iterator[Mistake]:
    trained = [
        (("train", "training"), recipe.train and recipe.train.training),
        (("nm", "fine_tune"), recipe.nm and recipe.nm.fine_tune),
        (("quantize", "qat"), recipe.quantize and recipe.quantize.qat),
    ]
    for path, override in trained:
        if override and recipe.training is None and override.epochs is None and override.steps is None:
            yield path, "has no length: give epochs or steps here or under training"


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
    if recipe.nm is None:
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
    metrics = menu.entry("tasks", recipe.task.name).create(recipe.task.params).metrics
    if gates.metric is not None and gates.metric not in metrics:
        hint = menu.did_you_mean(gates.metric, metrics)
        yield ("gates", "metric"), f"{recipe.task.name} has no metric {gates.metric!r}{hint}"
