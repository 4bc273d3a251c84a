"""A tiny data set, tasks and networks, and a `Context` whose events are recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify_deploy.sparsity.mask import Mask
from sparsify_deploy.tasks import classification
from sparsify_deploy.training.loop import Trainer
from sparsify_deploy.training.settings import Optimizer, Schedule, Training
from sparsify_deploy.types import Context


class TensorSplit:
    def __init__(self, **fields: Tensor) -> None:
        self.fields = fields

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        return {name: value[indices] for name, value in self.fields.items()}


@dataclass
class Recorder:
    said: list[str] = field(default_factory=list)
    updates: list[tuple[str, int, int, str]] = field(default_factory=list)

    def update(self, label: str, done: int, total: int, note: str = "") -> None:
        self.updates.append((label, done, total, note))

    def say(self, message: str) -> None:
        self.said.append(message)


@pytest.fixture(autouse=True)
def _as_in_a_stage():
    """One thread, and only operations that have a deterministic form, as stages ask torch for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def _images(count: int = 37) -> TensorSplit:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(count, 1, 8, 8, generator=generator)
    return TensorSplit(input=images, target=torch.randint(4, (count,), generator=generator))


def _network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(256, 8),
            nn.ReLU(),
            nn.Linear(8, 4),
        )


def _mask(density: float = 0.4) -> Mask:
    generator = torch.Generator().manual_seed(5)
    shapes = {name: p.shape for name, p in _network().named_parameters() if p.ndim > 1}
    return Mask({name: torch.rand(shape, generator=generator) < density for name, shape in shapes.items()})


def _settings(**changes: Any) -> Training:
    optimizer = changes.pop("optimizer", Optimizer(lr=0.05))
    schedule = changes.pop("schedule", Schedule(warmup_fraction=0.2))
    base = {"steps": 12, "batch_size": 8} | changes
    return Training(optimizer=optimizer, schedule=schedule, **base)


def _trainer(folder: Path, settings: Training | None = None, **changes: Any) -> Trainer:
    given = {
        "model": _network(),
        "task": classification.create(classification.Params()),
        "split": _images(),
        "inputs": ("input",),
        "seed": 7,
        "context": Context(progress=Recorder(), checkpoint_every_s=1e9),
        "augment": (),
    } | changes
    parts = [given.pop(name) for name in ("model", "task", "split", "inputs")]
    return Trainer(*parts, settings or _settings(), folder=folder, **given)


def _state(trainer: Trainer) -> dict[str, Tensor]:
    """Every tensor of the model and of the optimizer."""
    tensors = {f"model.{k}": v.detach().clone() for k, v in trainer.model.state_dict().items()}
    for index, slots in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"slot.{index}.{k}": v.clone() for k, v in slots.items() if isinstance(v, Tensor)}
    return tensors


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of tensors that differ in any bit."""
    names = sorted({*one, *other})
    return [n for n in names if n not in one or n not in other or not torch.equal(one[n], other[n])]


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """The builders above, by name."""
    makers: dict[str, Callable[..., Any]] = {
        "split": TensorSplit,
        "images": _images,
        "network": _network,
        "mask": _mask,
        "settings": _settings,
        "trainer": _trainer,
        "state": _state,
        "differing": _same,
        "recorder": Recorder,
    }
    return SimpleNamespace(**makers)
