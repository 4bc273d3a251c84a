"""How much of the disk a stage needs at its peak: an estimate from what it reads and what its settings make it keep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsify_deploy.artifacts.fingerprint import files_below
from sparsify_deploy.stages.base import Stage
from sparsify_deploy.stages.fitting import Fit
from sparsify_deploy.stages.given import Given
from sparsify_deploy.stages.subject import Subject
from sparsify_deploy.training.settings import Training

SLACK_BYTES = 2 << 20
"""Manifests, reports, histories, and that a file takes whole blocks."""

_GENERATIONS = 3
"""Checkpoints of one fit that are there at once: the one being written, the last, and the one before it."""

_ENGINE = 2
"""An engine against the ONNX file it comes from: builders add their own code, and floats may come out of integers."""


def needed_bytes(stage: Stage, inputs: Mapping[str, Path], out: Path) -> int:
    """What the disk must have left for `stage`, which works in `out`; what an earlier attempt left there counts.

    Everything large that a stage writes is a copy of the network in one form or another, so the estimate is the size of
    the network, by its largest input or its own tensors, times the most copies that lie there at once.
    """
    network = max([_bytes(path) for path in inputs.values()] or [_network_bytes(stage)])
    copies = len(stage.outputs) + 1 + max((_GENERATIONS * _held(each) for each in _trainings(stage)), default=0)
    if getattr(stage, "runtime", None) is not None:
        variants = getattr(stage, "variants", None)
        built = 1 if variants is None else sum(each.kind != "engine" for each in variants)
        copies += _ENGINE * (built + 1)  # one of them twice while it takes its place
    there = _bytes(out) if out.is_dir() else 0
    return max(network * copies - there, 0) + SLACK_BYTES


def _bytes(path: Path) -> int:
    files = [path / name for name in files_below(path)] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _network_bytes(stage: Stage) -> int:
    subject = getattr(stage, "subject", None)
    if isinstance(subject, Given):
        return sum(path.stat().st_size for path in subject.files().values() if path.is_file())
    if not isinstance(subject, Subject):
        return 0
    tensors = subject.check_network().state_dict().values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _trainings(stage: Stage) -> Iterator[Training]:
    """The trainings among a stage's settings, one level deep."""
    settings: list[Any] = [*vars(stage).values()]
    for value in settings:
        if isinstance(value, Training):
            yield value
        elif isinstance(value, Fit):
            yield value.training


def _held(training: Training) -> int:
    """How many networks one checkpoint of a training holds: weights, optimizer slots, an average, the best so far."""
    slots = 1 if training.optimizer.name == "sgd" else 2
    return 1 + slots + (training.ema is not None) + training.chooses
