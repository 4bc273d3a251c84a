"""What a stage that trains needs of the machine, the data and the network, found out before anything runs."""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparsify_deploy.errors import DataError, ModelError, SparsifyError, is_out_of_memory
from sparsify_deploy.stages.subject import Subject, first_line
from sparsify_deploy.tasks._fields import usual_name
from sparsify_deploy.training.image_settings import from_torchvision
from sparsify_deploy.training.settings import Training

if TYPE_CHECKING:
    from torch import nn

    from sparsify_deploy.training.vision import Mixing

_MODE_EXAMPLES = 4
"""Examples that show which outputs there are: BatchNorm cannot train on one."""
_TRIED = 2
"""Training examples that are augmented and mixed before a run, to see that they can be."""


def unmet_by_training(subject: Subject, training: Training | None) -> Sequence[str]:
    """One line for each thing that is not installed and that the augmentation, the mixing or the compiler needs."""
    if training is None:
        return ()
    found = []
    asked = [f"data.augment {name}" for name in from_torchvision(subject.data.augment)]
    asked += [f"training.{name}" for name in ("mixup", "cutmix") if getattr(training, name) is not None]
    if asked and importlib.util.find_spec("torchvision") is None:
        found.append(f"{', '.join(asked)} needs torchvision: pip install 'sparsify-deploy[vision]'")
    compiler = os.environ.get("CXX", "g++")
    if training.compile and shutil.which(compiler) is None:
        found.append(
            f"training.compile needs a C++ compiler, and there is no {compiler}: install g++, name one in CXX, or set "
            "compile false"
        )
    return found


def check_training(subject: Subject, training: Training | None, model: nn.Module) -> None:
    """Raise where the data cannot be augmented, mixed, measured on or compiled for as `training` asks, or where `model`
    cannot run in the memory format it asks for; `model` is left as it is."""
    if training is None:
        return
    _check_mode(subject, model)
    if training.compile and subject.free_axes:
        raise ModelError(
            f"training.compile makes code for one shape of batch, and the {' and '.join(subject.free_axes.names)} of "
            "this data differs from batch to batch: give all examples one size (data.params.pad max_length), or set "
            "compile false"
        )
    if training.measures:
        _check_validation(subject)
    if subject.data.augment or training.mixes:
        _check_batches(subject, training, model)
    if training.channels_last:
        _check_channels_last(subject, model)


def mixing(subject: Subject, training: Training, model: nn.Module) -> Mixing | None:
    """What mixes batches; None where nothing does. The number of classes is that of the model's logits."""
    import torch

    from sparsify_deploy.training.evaluation import device_of, mode, moved
    from sparsify_deploy.training.vision import Mixing
    from sparsify_deploy.types import outputs_of

    if not training.mixes:
        return None
    with mode(model, train=False), torch.no_grad():
        outputs = outputs_of(model, moved(subject.example(), device_of(model)), subject.examples.inputs)
    name = getattr(subject.task.params, "output", None)
    if name is None:
        name = usual_name(outputs)
    logits = outputs.get(name)
    if logits is None or logits.ndim != 2:
        raise DataError("training.mixup and cutmix need logits of shape (N, classes), which the model does not give")
    return Mixing(training.mixup, training.cutmix, logits.shape[1])


def _check_mode(subject: Subject, model: nn.Module) -> None:
    """`ModelError` where the network fails in training, or has outputs there that the task cannot judge.

    Auxiliary heads give such outputs; in a dict beside `logits` they do no harm.
    """
    import torch

    from sparsify_deploy.training.evaluation import mode

    batch = subject.example(_MODE_EXAMPLES)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    given = []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for train in (False, True):
                with mode(model, train=train):
                    given.append(subject.outputs(model, batch, " in train mode" if train else ""))
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    evaluated, trained = given
    if {*evaluated} == {*trained}:
        return
    try:
        with torch.no_grad():
            subject.opened_task.loss(trained, batch)
    except (SparsifyError, RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
        raise ModelError(
            f"model {subject.model.source} gives {', '.join(trained)} in training and {', '.join(evaluated)} in "
            "evaluation: turn off what it adds in training, such as auxiliary heads (model.params.arguments: "
            "{aux_logits: false}), or return the same in both"
        ) from error


def _check_validation(subject: Subject) -> None:
    try:
        split = subject.examples.split("validation")
    except (KeyError, ValueError, NotImplementedError) as error:  # a user's own data set that knows two splits
        raise DataError(
            "training.keep best, early_stop and evaluate_every measure on a split called validation, which this data "
            "set does not have: give it one, or leave them out; the test split decides nothing"
        ) from error
    if len(split) == 0:
        raise DataError("the validation split is empty, and training.keep, early_stop or evaluate_every measure on it")


def _check_batches(subject: Subject, training: Training, model: nn.Module) -> None:
    from sparsify_deploy.training.batches import Batches
    from sparsify_deploy.training.vision import Pixels

    split = subject.examples.split("train")
    Batches(
        split,
        seed=subject.seed,
        batch_size=min(_TRIED, len(split)),
        augment=subject.data.augment,
        pixels=Pixels.of(subject.examples),
        mixing=mixing(subject, training, model),
    ).batch(0)


def _check_channels_last(subject: Subject, model: nn.Module) -> None:
    import torch

    from sparsify_deploy.training.evaluation import mode
    from sparsify_deploy.training.forward import channels_last_, laid_out
    from sparsify_deploy.types import outputs_of

    if not any(parameter.ndim == 4 for parameter in model.parameters()):
        raise ModelError("training.channels_last has no effect on a network without 2-D convolutions: leave it out")
    model = copy.deepcopy(model)
    channels_last_(model)
    try:
        with mode(model, train=False), torch.no_grad():
            outputs_of(model, laid_out(subject.example(2)), subject.examples.inputs)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"training.channels_last: the network cannot run in that memory format ({first_line(error)[:160]}): use "
            "reshape or flatten in place of view, or leave channels_last out"
        ) from error
