"""The teacher of a distillation, opened for a stage: the dense baseline, a checkpoint, or the network's own start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sparsify_deploy.errors import DataError
from sparsify_deploy.safety import usercode
from sparsify_deploy.stages.subject import Subject
from sparsify_deploy.training.settings import Distillation

if TYPE_CHECKING:
    from torch import nn

    from sparsify_deploy.training.distillation import Distiller


def teacher_inputs(distillation: Distillation | None) -> tuple[str, ...]:
    """`teacher` where the dense baseline teaches: an input of a stage that distils."""
    return ("teacher",) if distillation is not None and distillation.teacher is None else ()


def teacher_files(distillation: Distillation | None) -> dict[str, Path]:
    """The checkpoint that teaches, where the recipe names one."""
    if distillation is None or distillation.teacher is None:
        return {}
    if distillation.teacher.is_dir():
        raise DataError(f"distillation.teacher: {distillation.teacher} is a folder: name the file in it")
    return {"distillation.teacher": distillation.teacher}


@contextmanager
def taught(
    distillation: Distillation | None,
    subject: Subject,
    inputs: Mapping[str, Path],
    student: nn.Module,
    *,
    folded: bool = False,
) -> Iterator[Distiller | None]:
    """What `fit_` takes as `distillation` while it trains `student`; None without a distillation."""
    from sparsify_deploy.training.distillation import distilling
    from sparsify_deploy.training.evaluation import device_of

    if distillation is None:
        yield None
        return
    teacher = _open(distillation, subject, inputs.get("teacher"), folded=folded).to(device_of(student))
    with distilling(
        teacher,
        student,
        distillation,
        inputs=subject.examples.inputs,
        example=subject.example(),
        output=getattr(subject.task.params, "output", None),
    ) as distiller:
        yield distiller


def check_teacher(distillation: Distillation | None, subject: Subject, *, folded: bool = False) -> None:
    """Before anything runs: raise where a named checkpoint does not fit, or a feature matches no module."""
    from sparsify_deploy.training.distillation import matched

    if distillation is None:
        return
    student = subject.check_traceable() if folded else subject.check_network()
    if distillation.teacher is not None:
        _open(distillation, subject, None, folded=False)
    matched(student, student, distillation.features, subject.examples.inputs, subject.example())


def _open(distillation: Distillation, subject: Subject, baseline: Path | None, *, folded: bool) -> nn.Module:
    """The teacher with its weights. Without a `train` section there is no `baseline`: the network's start teaches.

    `folded` like the student of a quantisation, whose convolutions return what BatchNorm returned before: only then
    do modules of one name compute the same.
    """
    from sparsify_deploy.models._checkpoint import load_checkpoint
    from sparsify_deploy.quantization.folding import fold_batchnorm

    model = subject.network(baseline)
    if distillation.teacher is not None:
        shown = usercode.approved(distillation.teacher) is not None
        load_checkpoint(model, distillation.teacher, trusted=subject.trusted and shown, advise=False)
    return fold_batchnorm(model) if folded else model
