"""Classification: one label an example, by cross-entropy.

Label smoothing is that of Szegedy et al. 2016 (arXiv 1512.00567) and `class_weights: balanced` that of King & Zeng 2001
(Political Analysis 9); both shape the training loss only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from sparsify_deploy.errors import DataError
from sparsify_deploy.params import Fraction
from sparsify_deploy.params import Params as Base
from sparsify_deploy.tasks._fields import chosen_name, chosen_output, target_of
from sparsify_deploy.types import SOFT_TARGET

if TYPE_CHECKING:
    from torch import Tensor

    from sparsify_deploy.types import Arrays, Batch, Direction, Outputs, Task

VERSION = 2
RUNS_USER_CODE = False
SOFT_TARGETS = True

LEAST_CLASSES = 6
"""From so many classes on, `top5` says something and is measured without being asked for."""


class Params(Base):
    """What a classifier's loss and metrics need."""

    label_smoothing: Fraction = Field(0.0, description="share of the target spread evenly over the classes")
    output: str | None = Field(None, description="the output that holds the logits; none: the only one, or logits")
    top_k: Annotated[tuple[Annotated[int, Field(ge=2)], ...], Field(strict=False)] | None = Field(
        None, description="k of the metrics topK, as [5]; none: 5 where there are 6 classes or more"
    )
    positive: int | None = Field(
        None, ge=0, description="the label whose F1 is the metric f1_binary; none: 1 where there are two classes"
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="balanced: a label's loss counts by the inverse of its share of the training split"
    )


def files(params: Params) -> Mapping[str, Path]:
    """No file."""
    return {}


def create(params: Params) -> Task:
    """Logits `(N, classes)` against integer labels `(N,)` in the field `target`."""
    return Classification(params)


@dataclass(frozen=True)
class Classification:
    """Cross-entropy; `accuracy` is the share of examples whose largest logit is the label's; ties: the lower.

    `class_counts` gives the training examples of each label, None where they are not known.
    """

    params: Params
    class_counts: Callable[[], tuple[int, ...] | None] = lambda: None

    @property
    def metrics(self) -> Mapping[str, Direction]:
        """Those that are always measured."""
        found: dict[str, Direction] = {"accuracy": "higher", "balanced_accuracy": "higher", "f1_macro": "higher"}
        found |= {f"top{k}": "higher" for k in self.params.top_k or ()}
        return found if self.params.positive is None else {**found, "f1_binary": "higher"}

    @property
    def also_measured(self) -> Mapping[str, Direction]:
        """Those that follow from the number of classes."""
        found: dict[str, Direction] = {"top5": "higher"} if self.params.top_k is None else {}
        return found if self.params.positive is not None else {**found, "f1_binary": "higher"}

    def answers(self, outputs: Mapping[str, Any]) -> tuple[str, ...]:
        """The output with the logits: others, such as features, have no largest value that means anything."""
        return (chosen_name(outputs, self.params.output),)

    def counting(self, class_counts: Callable[[], tuple[int, ...] | None]) -> Classification:
        """The same task, told how to learn the training examples of each label."""
        return replace(self, class_counts=class_counts)

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Mean cross-entropy in the logits' dtype, with label smoothing and class weights.

        `soft_target` `(N, classes)`, which mixing examples adds to a batch, takes the labels' place.
        """
        import torch
        from torch.nn import functional as F

        logits, target = chosen_output(outputs, self.params.output), target_of(batch)
        smoothing = self.params.label_smoothing
        integer = not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
        _check(logits.shape, target.shape, target.dtype, integer)
        if target.numel():
            lowest, highest = target.aminmax()
            _check_range(int(lowest), int(highest), logits.shape[1])
        weights = self._weights(logits)
        if (given := batch.get(SOFT_TARGET)) is not None:
            soft = given.to(logits.dtype)
            whole = F.cross_entropy(logits, soft, weights, label_smoothing=smoothing, reduction="sum")
            # torch would divide by N, and for labels by the sum of their weights: a label is to weigh alike as shares
            return whole / (len(soft) if weights is None else (soft @ weights).sum())
        return F.cross_entropy(logits, target.long(), weights, label_smoothing=smoothing)

    def evaluate(self, outputs: Arrays, batch: Arrays) -> dict[str, float]:
        """The metrics in 0..1, and `loss`, the mean cross-entropy without smoothing and class weights.

        `balanced_accuracy` is the mean recall of the labels that occur, `f1_macro` the mean F1 of those that occur or
        are answered, `topK` the share of labels among the K largest logits, ties to the lower label.
        """
        import numpy as np

        logits, target = chosen_output(outputs, self.params.output), target_of(batch)
        _check(logits.shape, target.shape, target.dtype, bool(np.issubdtype(target.dtype, np.integer)))
        if len(target) == 0:
            raise DataError("there are no examples to evaluate")
        classes = logits.shape[1]
        _check_range(int(target.min()), int(target.max()), classes)
        self._check_asked(classes)
        if not np.isfinite(logits).all():
            raise DataError(
                "the model's logits are not all finite, so no metric means anything: it overflowed somewhere"
            )
        wide = logits.astype(np.float64)
        wide -= wide.max(axis=1, keepdims=True)
        right = wide[np.arange(len(target)), target]
        ks = self.params.top_k if self.params.top_k is not None else (5,) if classes >= LEAST_CLASSES else ()
        return {
            "accuracy": float((logits.argmax(axis=1) == target).mean()),
            **_by_class(logits.argmax(axis=1), target, classes, self.params.positive),
            **{f"top{k}": float((_ranks(logits, target) < k).mean()) for k in ks},
            "loss": float((np.log(np.exp(wide).sum(axis=1)) - right).mean()),
        }

    def _check_asked(self, classes: int) -> None:
        for k in self.params.top_k or ():
            if k >= classes:
                raise DataError(f"task.params.top_k: top{k} of {classes} classes is always 1: take it out")
        if self.params.positive is not None and self.params.positive >= classes:
            raise DataError(
                f"task.params.positive: label {self.params.positive} is not one of the model's {classes} classes, "
                f"0 to {classes - 1}"
            )

    def _weights(self, logits: Tensor) -> Tensor | None:
        """`(classes,)`: mean count of the labels that occur over the count of each; one that never does as if once."""
        import torch

        if self.params.class_weights == "none":
            return None
        counts = self.class_counts()
        if counts is None:
            raise DataError(
                "task.params.class_weights balanced needs integer labels that can be counted without reading the "
                "examples, and this data set has none: set it none, or write a task of your own (task.name file)"
            )
        counts = (*counts, *(0,) * (logits.shape[1] - len(counts)))[: logits.shape[1]]
        whole = sum(counts) / sum(count > 0 for count in counts)
        return torch.tensor([whole / max(count, 1) for count in counts], dtype=logits.dtype, device=logits.device)


def _by_class(answers: Any, target: Any, classes: int, positive: int | None) -> dict[str, float]:
    """Mean recall and F1 of the classes, of answers `(N,)` against labels `(N,)`."""
    import numpy as np

    there, said = np.bincount(target, minlength=classes), np.bincount(answers, minlength=classes)
    hits = np.bincount(target[answers == target], minlength=classes)
    seen, either = there > 0, (there + said) > 0
    f1 = np.divide(2.0 * hits, there + said, out=np.zeros(classes), where=either)
    found = {"balanced_accuracy": float((hits[seen] / there[seen]).mean()), "f1_macro": float(f1[either].mean())}
    if positive is None and classes == 2:
        positive = 1
    return found if positive is None else {**found, "f1_binary": float(f1[positive])}


def _ranks(logits: Any, target: Any) -> Any:
    """How many classes come before each example's label: larger logits, and equal ones of lower labels."""
    import numpy as np

    right = logits[np.arange(len(target)), target][:, None]
    before = np.arange(logits.shape[1])[None] < target[:, None]
    return (logits > right).sum(axis=1) + ((logits == right) & before).sum(axis=1)


def _check(logits: tuple[int, ...], target: tuple[int, ...], dtype: Any, whole: bool) -> None:
    several = "; for several labels an example write a task of your own (task.name file, init --task)"
    own = several if len(target) > 1 else ""
    if len(logits) != 2:
        raise DataError(f"classification needs logits of shape (N, classes), the model gives {tuple(logits)}{own}")
    if tuple(target) != (logits[0],):
        raise DataError(f"classification needs a target of shape ({logits[0]},), the data gives {tuple(target)}{own}")
    if not whole:
        raise DataError(
            f"classification needs integer labels as target, the data gives {dtype}: values need task.name regression"
        )


def _check_range(lowest: int, highest: int, classes: int) -> None:
    if lowest < 0 or highest >= classes:
        wrong = lowest if lowest < 0 else highest
        raise DataError(
            f"label {wrong} is not one of the model's {classes} classes, 0 to {classes - 1}: correct the label, or "
            "give the model more classes"
        )
