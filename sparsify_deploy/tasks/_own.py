"""Judges a user's own task, and each answer it gives, in one line that names the user's file and line."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sparsify_deploy.errors import DataError
from sparsify_deploy.safety import usercode

if TYPE_CHECKING:
    from sparsify_deploy.types import Arrays, Batch, Direction, Outputs

_NEEDED = ("metrics", "loss", "evaluate")
_DIRECTIONS = ("higher", "lower")


@dataclass(frozen=True)
class OwnTask:
    """A user's task whose every answer is checked; `loss` is added to what `evaluate` gives where it lacks it."""

    path: Path
    made: Any
    metrics: Mapping[str, Direction]
    where: str

    @property
    def example_inputs(self) -> Callable[[Batch], Batch] | None:
        """The user's own, checked; None where the task has none."""
        return self._inputs if hasattr(self.made, "example_inputs") else None

    @property
    def answers(self) -> Callable[[Mapping[str, object]], tuple[str, ...]] | None:
        """The user's own, checked; None where the task has none."""
        return self._answers if hasattr(self.made, "answers") else None

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """What the user's `loss` gives: a scalar tensor; with a gradient, where the outputs have one."""
        with usercode.calling(self.path, DataError):
            found = self.made.loss(outputs, batch)
        at = self._at("loss")
        if not isinstance(found, Tensor):
            raise DataError(f"{at}: loss gives {type(found).__name__}, expected a scalar tensor")
        if found.shape != () or not found.is_floating_point():
            raise DataError(f"{at}: loss gives a {found.dtype} tensor of shape {tuple(found.shape)}, expected a scalar")
        if torch.is_grad_enabled() and any(o.requires_grad for o in outputs.values()) and not found.requires_grad:
            raise DataError(
                f"{at}: loss does not depend on the model's outputs, so there is nothing to train: compute it from "
                "them in torch, without detach(), item() or numpy"
            )
        return found

    def evaluate(self, outputs: Arrays, batch: Arrays) -> dict[str, float]:
        """Every metric and `loss` as finite numbers."""
        found = self._evaluated(outputs, batch)
        for name, value in found.items():
            if not math.isfinite(value):
                raise DataError(f"{self._at('evaluate')}: evaluate gives {name} as {value}, expected a finite number")
        return found

    def check(self, outputs: Outputs, batch: Batch) -> None:
        """Ask everything once, of one real batch and the outputs `(N, ...)` of a model for it. Raises DataError."""
        leaves = {
            name: value.detach().clone().requires_grad_(value.is_floating_point()) for name, value in outputs.items()
        }
        with torch.enable_grad():
            # a leaf could not be changed in place, and a network's output is none
            found = self.loss({name: value.clone() for name, value in leaves.items()}, batch)
            if not bool(found.isfinite()):
                raise DataError(f"{self._at('loss')}: loss gives {found.item()} for a batch of the data")
            with usercode.calling(self.path, DataError):
                torch.autograd.backward(found)
        # Not `evaluate`: of few examples a metric such as a correlation may have no value.
        self._evaluated({k: v.detach().numpy() for k, v in outputs.items()}, {k: v.numpy() for k, v in batch.items()})
        if self.answers is not None:
            self.answers(outputs)

    def _evaluated(self, outputs: Arrays, batch: Arrays) -> dict[str, float]:
        with usercode.calling(self.path, DataError):
            found = self.made.evaluate(outputs, batch)
        at = self._at("evaluate")
        if not isinstance(found, Mapping):
            raise DataError(f"{at}: evaluate gives {type(found).__name__}, expected a mapping of metric to number")
        if lacking := [name for name in self.metrics if name not in found]:
            raise DataError(
                f"{at}: evaluate gives no {lacking[0]!r}, which metrics declares (it gives {_names(found)})"
            )
        if strange := [name for name in found if name not in self.metrics and name != "loss"]:
            raise DataError(f"{at}: evaluate gives {strange[0]!r}, which metrics does not declare: say higher or lower")
        numbers = {name: self._number(name, value) for name, value in found.items()}
        return numbers if "loss" in numbers else {**numbers, "loss": self._loss_of(outputs, batch)}

    def _at(self, name: str) -> str:
        return usercode.place(self.path, getattr(self.made, name))

    def _number(self, name: str, value: Any) -> float:
        kind = type(value).__name__
        if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0:
            value = value.item()
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
            raise DataError(f"{self._at('evaluate')}: evaluate gives {name} as {kind}, expected a number")
        return float(value)

    def _loss_of(self, outputs: Arrays, batch: Arrays) -> float:
        with torch.no_grad():
            found = self.loss(
                {name: torch.from_numpy(np.asarray(values)) for name, values in outputs.items()},
                {name: torch.from_numpy(np.asarray(values)) for name, values in batch.items()},
            )
        return self._number("loss", found.item())

    def _inputs(self, batch: Batch) -> Batch:
        with usercode.calling(self.path, DataError):
            found = self.made.example_inputs(batch)
        at = self._at("example_inputs")
        if not isinstance(found, Mapping):
            raise DataError(f"{at}: example_inputs gives {type(found).__name__}, expected a mapping of field to tensor")
        for name, value in found.items():
            if name not in batch:
                raise DataError(f"{at}: example_inputs gives {name!r}, the data has {_names(batch)}")
            if not isinstance(value, Tensor) or value.dtype != batch[name].dtype or len(value) != len(batch[name]):
                given = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                like = f"{batch[name].dtype} of {len(batch[name])} examples"
                raise DataError(f"{at}: example_inputs gives {name!r} as {given}, expected a tensor of {like}")
        return {**batch, **found}

    def _answers(self, outputs: Mapping[str, object]) -> tuple[str, ...]:
        with usercode.calling(self.path, DataError):
            found = self.made.answers(outputs)
        at = self._at("answers")
        if not isinstance(found, (list, tuple, set, frozenset)):
            raise DataError(f"{at}: answers gives {type(found).__name__}, expected a list of names of outputs")
        if strange := [name for name in found if name not in outputs]:
            raise DataError(f"{at}: answers gives {strange[0]!r}, the model has {_names(outputs)}")
        return tuple(found)


def checked(made: Any, path: Path, name: str) -> OwnTask:
    """The task that `name` of the file `path` gave; `DataError` where it is none."""
    where = f"{path}: {name}"
    with usercode.calling(path, DataError):
        lacking = [part for part in _NEEDED if not hasattr(made, part)]
        metrics = None if lacking else made.metrics
    if lacking:
        kind = type(made).__name__
        raise DataError(f"{where} gives {kind} without {lacking[0]!r}, expected loss, metrics and evaluate")
    for part in ("loss", "evaluate"):
        _check_signature(path, part, getattr(made, part), ("outputs", "batch"))
    if hasattr(made, "example_inputs"):
        _check_signature(path, "example_inputs", made.example_inputs, ("batch",))
    if hasattr(made, "answers"):
        _check_signature(path, "answers", made.answers, ("outputs",))
    if not isinstance(metrics, Mapping) or not metrics:
        shown = f"is {metrics!r:.60}" if not isinstance(metrics, Mapping) else "is empty"
        raise DataError(
            f'{where}: metrics {shown}, expected a mapping of name to direction, as {{"accuracy": "higher"}}'
        )
    for metric, direction in metrics.items():
        if not isinstance(metric, str) or not metric:
            raise DataError(f"{where}: metrics names {metric!r}, expected text")
        if direction not in _DIRECTIONS:
            raise DataError(f'{where}: metrics[{metric!r}] is {direction!r:.60}, expected "higher" or "lower"')
    if metrics.get("loss", "lower") != "lower":
        raise DataError(f'{where}: metrics["loss"] is "higher": a loss is better the lower it is, name it otherwise')
    return OwnTask(path, made, dict(metrics), where)


def _check_signature(path: Path, name: str, found: Any, takes: tuple[str, ...]) -> None:
    if not callable(found):
        raise DataError(f"{path}: {name} is {type(found).__name__}, expected a function of {', '.join(takes)}")
    try:
        signature = inspect.signature(found)
        signature.bind(*takes)
    except (TypeError, ValueError) as exc:
        raise DataError(
            f"{usercode.place(path, found)}: {name} cannot be called as {name}({', '.join(takes)}): {exc}"
        ) from exc


def _names(mapping: Mapping[Any, Any]) -> str:
    return ", ".join(map(str, mapping)) or "nothing"
