"""A teacher's answers as part of the loss: its softened logits (Hinton 2015, arXiv 1503.02531), or features named by
the recipe (FitNets, Romero 2015, 1412.6550, without a regressor: teacher and student are the same network).

With the task's own loss L, weight a and temperature T the loss is (1 - a) L + a D. D is, on what the task trains on:

- logits, where the batch's `target` holds one integer a position and the output has classes along axis 1:
  T^2 KL(softmax(teacher / T) || softmax(student / T)), summed over classes, mean over the rest;
- values otherwise: the mean squared difference, to which T does not apply;
- features: the mean over features of the mean squared difference divided by the teacher's mean square.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from sparsify_deploy.errors import Diverged, ModelError
from sparsify_deploy.menu import did_you_mean
from sparsify_deploy.training.evaluation import device_of, mode, moved
from sparsify_deploy.types import outputs_of

if TYPE_CHECKING:
    from sparsify_deploy.training.settings import Distillation
    from sparsify_deploy.types import Batch, Json, Outputs

Recorded = dict[str, list[Tensor]]
"""Module name to what it returned in the last forward pass, one tensor a call."""


@contextmanager
def distilling(
    teacher: nn.Module,
    student: nn.Module,
    settings: Distillation,
    *,
    inputs: Sequence[str],
    example: Batch,
    output: str | None = None,
) -> Iterator[Distiller]:
    """A `Distiller` for as long as the student trains; the teacher is in evaluation mode meanwhile.

    `example` is a small batch that finds out which modules run. `output` is the one the task trains on; none: the one
    called `logits`, else every floating-point output. Both networks are on one device; neither is changed, and the
    hooks on them are gone at the end. `ModelError` for a feature that one of them lacks.
    """
    names = matched(teacher, student, settings.features, inputs, example)
    with mode(teacher, train=False), _recorded(teacher, names) as theirs, _recorded(student, names) as own:
        yield Distiller(teacher, settings, inputs=inputs, output=output, names=names, theirs=theirs, own=own)


class Distiller:
    """Makes the training loss of one student; `distilling` makes one.

    The teacher sees the student's own batch, in float32 and without a graph, once a batch. Its forward pass leaves
    torch's random state as it was, so that dropout in the student draws what it would draw without a teacher.
    """

    def __init__(
        self,
        teacher: nn.Module,
        settings: Distillation,
        *,
        inputs: Sequence[str],
        output: str | None,
        names: Sequence[str],
        theirs: Recorded,
        own: Recorded,
    ) -> None:
        self._teacher = teacher
        self._settings = settings
        self._inputs = tuple(inputs)
        self._output = output
        self._names = tuple(names)
        self._theirs, self._own = theirs, own
        self._device = device_of(teacher)

    @property
    def facts(self) -> dict[str, Json]:
        """For a stage's facts. `relative_flops` is the teacher's forward pass over a dense step, backward counted as
        twice the forward; no other figure of a fit's cost holds it."""
        settings = self._settings
        return {
            "temperature": settings.temperature,
            "weight": settings.weight,
            "features": list(self._names),
            "relative_flops": 1 / 3,
        }

    def loss(self, own: Tensor, outputs: Outputs, batch: Batch) -> Tensor:
        """The scalar to train on, from the task's loss and the student's outputs of the forward pass just made.

        `Diverged` where the teacher's answer is not finite.
        """
        answers = self._ask(batch)
        distance = self._features() if self._names else self._answers(outputs, answers, batch)
        weight = self._settings.weight
        if weight == 1.0:  # not 0 * own: what is not finite there would spoil the sum
            return distance
        return (1.0 - weight) * own + weight * distance

    def _ask(self, batch: Batch) -> Mapping[str, Any]:
        devices = [self._device] if self._device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices=devices),
            torch.no_grad(),
            torch.autocast(self._device.type, enabled=False),
        ):
            return outputs_of(self._teacher, batch, self._inputs)

    def _answers(self, outputs: Outputs, answers: Mapping[str, Any], batch: Batch) -> Tensor:
        names = [self._output] if self._output is not None else ["logits"] if "logits" in answers else list(answers)
        names = [name for name in names if _floating(answers.get(name)) and _floating(outputs.get(name))]
        if not names:
            raise ModelError(
                f"distillation: teacher and student share no floating-point output to compare "
                f"(the student has {', '.join(outputs) or 'none'}): name features in distillation.features"
            )
        distances = []
        for name in names:
            student, teacher = outputs[name].float(), _finite(f"output {name!r}", answers[name]).float()
            _check_shapes(f"output {name!r}", student, teacher)
            distances.append(
                softened_kl(student, teacher, self._settings.temperature)
                if are_logits(student, batch)
                else functional.mse_loss(student, teacher)
            )
        return torch.stack(distances).mean()

    def _features(self) -> Tensor:
        distances = []
        for name in self._names:
            theirs, own = self._theirs.get(name, []), self._own.get(name, [])
            if len(theirs) != len(own) or not own:
                raise ModelError(
                    f"distillation: {name!r} ran {len(own)} times in the student and {len(theirs)} times in the "
                    "teacher: leave it out of distillation.features"
                )
            for student, teacher in zip(own, theirs, strict=True):
                distances.append(relative_square(student.float(), _finite(f"feature {name!r}", teacher).float(), name))
        return torch.stack(distances).mean()


def softened_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of logits `(N, classes, ...)`: summed over classes, mean
    over the rest. The factor T^2 keeps the size of the gradient the same at every temperature (section 2.1)."""
    divergence = functional.kl_div(
        functional.log_softmax(student / temperature, 1),
        functional.log_softmax(teacher / temperature, 1),
        reduction="none",
        log_target=True,
    )
    return temperature**2 * divergence.sum(1).mean()


def relative_square(student: Tensor, teacher: Tensor, name: str) -> Tensor:
    """The mean squared difference over the teacher's mean square, so that features of any size weigh alike."""
    _check_shapes(f"feature {name!r}", student, teacher)
    scale = teacher.square().mean()
    if scale.item() == 0.0:
        raise ModelError(
            f"distillation: the teacher's feature {name!r} is zero for a whole batch: leave it out of "
            "distillation.features"
        )
    return functional.mse_loss(student, teacher) / scale


def are_logits(output: Tensor, batch: Batch) -> bool:
    """Whether `output` holds classes along axis 1 for the whole numbers in the batch's `target`."""
    target = batch.get("target")
    if target is None or target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        return False
    return output.ndim >= 2 and tuple(target.shape) == (*output.shape[:1], *output.shape[2:])


def matched(
    teacher: nn.Module, student: nn.Module, patterns: Sequence[str], inputs: Sequence[str], example: Batch
) -> tuple[str, ...]:
    """The modules that match any of the shell `patterns` and return a floating-point tensor in both networks, in the
    order they run. `ModelError` for a pattern that matches none, or for outputs of different shapes."""
    if not patterns:
        return ()
    theirs, own = (_shapes(model, inputs, example) for model in (teacher, student))
    both = [name for name in own if name in theirs]
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name in both if fnmatchcase(name, pattern)}
        if not found:
            folded = isinstance(student, fx.GraphModule)
            why = "; before quantisation BatchNorm is folded away and blocks are taken apart" if folded else ""
            raise ModelError(
                f"distillation.features: {pattern!r} matches no module that returns a tensor in teacher and student"
                f"{why}{did_you_mean(pattern, both)}"
            )
        chosen |= found
    for name in chosen:
        if own[name] != theirs[name]:
            raise ModelError(
                f"distillation.features: {name!r} returns {own[name]} in the student and {theirs[name]} in the teacher"
            )
    return tuple(name for name in both if name in chosen)


def _shapes(model: nn.Module, inputs: Sequence[str], example: Batch) -> dict[str, list[tuple[int, ...]]]:
    """The shapes each module returns for `example`, in the order they run."""
    names = [name for name, _ in model.named_modules() if name]
    with mode(model, train=False), torch.no_grad(), _recorded(model, names) as found:
        outputs_of(model, moved(example, device_of(model)), inputs)
        return {name: [tuple(value.shape) for value in values] for name, values in found.items()}


@contextmanager
def _recorded(model: nn.Module, names: Sequence[str]) -> Iterator[Recorded]:
    """What the modules `names` return in each forward pass of `model`, from the latest pass."""
    found: Recorded = {}
    modules = dict(model.named_modules())

    def start(_module: nn.Module, _arguments: object) -> None:
        found.clear()

    def recorder(name: str) -> Any:
        def record(_module: nn.Module, _arguments: object, result: object) -> None:
            if _floating(result):
                # A copy, for an activation that works in place would overwrite what came before it.
                found.setdefault(name, []).append(result.clone())  # type: ignore[attr-defined]

        return record

    handles = [model.register_forward_pre_hook(start)] if names else []
    handles += [modules[name].register_forward_hook(recorder(name)) for name in names]
    try:
        yield found
    finally:
        found.clear()
        for handle in handles:
            handle.remove()


def _floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _finite(what: str, value: Tensor) -> Tensor:
    if not bool(value.isfinite().all()):
        raise Diverged(
            f"distillation: the teacher's {what} is not finite: it overflowed or its training diverged; name another "
            "distillation.teacher"
        )
    return value


def _check_shapes(what: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ModelError(
            f"distillation: {what} has shape {tuple(student.shape)} in the student and {tuple(teacher.shape)} in the "
            "teacher: they must be the same network"
        )
