"""Judges the labels of any source once it is open: what stops a run, and what a reader of its report must know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from sparsify_deploy.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparsify_deploy.types import DataSet, Split

_RARE = 0.2
"""A class with less than this share of what it would have, were all classes alike, is rare."""

_NAMED = 3
_SPLITS: tuple[Literal["train", "test", "validation"], ...] = ("train", "test", "validation")


@dataclass(frozen=True)
class Judged:
    """Lines for the report, and the training examples of each label from 0; no counts where labels are no classes."""

    notes: tuple[str, ...] = ()
    class_counts: tuple[int, ...] | None = None


def judge(data: DataSet) -> Judged:
    """Look at all labels of all splits, where they can be had without the examples.

    That is where a split has `fields`, or `target`, one integer an example; other targets are nobody's classes.
    Raises DataError for an empty split, labels of one class alone, and a label below 0 or beyond `classes`.
    """
    names = getattr(data, "splits", ("train", "test"))
    splits = {name: data.split(name) for name in ("train", "test", "validation") if name in {*names, "train", "test"}}
    for name, split in splits.items():
        if not len(split):
            raise DataError(f"data: the {name} split is empty")
    found = {name: labels for name, split in splits.items() if (labels := _labels(split)) is not None}
    for name, labels in found.items():
        _check_range(labels, name, data.classes)
    if "train" not in found:
        return Judged(tuple(_one_hot(splits["train"])))
    present, sizes = np.unique(found["train"], return_counts=True)
    if len(present) == 1:
        only = _called(int(present[0]), data.classes)
        raise DataError(
            f"data: all {len(found['train']):,} training examples are of class {only}: there is nothing to tell apart, "
            "give examples of two classes or more"
        )
    trained = dict(zip(present.tolist(), sizes.tolist(), strict=True))
    known = range(len(data.classes)) if data.classes is not None else range(int(present[-1]) + 1)
    dense = len(known) <= 10 * len(present)  # else the integers are hardly classes
    counts = tuple(trained.get(label, 0) for label in known) if dense else None
    notes = [
        *(_imbalance(counts, found, data.classes) if counts is not None else ()),
        *_strangers(trained, found, data),
    ]
    return Judged(tuple(notes), counts)


def largest_label(data: DataSet) -> tuple[Literal["train", "test", "validation"], int] | None:
    """The split and the index of an example with the largest label; None where labels are not to be had so."""
    best: tuple[int, Literal["train", "test", "validation"], int] | None = None
    names = {*getattr(data, "splits", ("train", "test")), "train", "test"}
    for name in _SPLITS:
        if name in names and (labels := _labels(data.split(name))) is not None:
            index = int(labels.argmax())
            if best is None or int(labels[index]) > best[0]:
                best = (int(labels[index]), name, index)
    return None if best is None else best[1:]


def _target(split: Split) -> NDArray[Any] | None:
    """The targets of a split, where they can be had without the examples."""
    fields = getattr(split, "fields", None)
    target = fields.get("target") if isinstance(fields, Mapping) else getattr(split, "target", None)
    values = target.numpy() if isinstance(target, Tensor) else target
    return values if isinstance(values, np.ndarray) else None


def _labels(split: Split) -> NDArray[Any] | None:
    values = _target(split)
    return values if values is not None and values.ndim == 1 and values.dtype.kind in "iu" else None


def _one_hot(split: Split) -> Iterator[str]:
    """A line where the targets are one-hot rows `(N, classes)`, which mean labels."""
    if (values := _target(split)) is None or values.ndim != 2 or values.shape[1] < 2 or values.dtype.kind not in "fiu":
        return
    if ((values == 0) | (values == 1)).all() and (values.sum(axis=1) == 1).all():
        yield (
            f"data: each target is a row of {values.shape[1]} zeros and ones that sum to 1, which looks like one-hot "
            "labels: for classification save the labels themselves, y.argmax(1), as integers"
        )


def _check_range(labels: NDArray[Any], name: str, classes: tuple[str, ...] | None) -> None:
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0:
        raise DataError(f"data: label {lowest} at index {int(labels.argmin())} of the {name} split; labels start at 0")
    if classes is not None and highest >= len(classes):
        raise DataError(
            f"data: label {highest} at index {int(labels.argmax())} of the {name} split, but {len(classes)} classes "
            f"are named, 0 to {len(classes) - 1}"
        )


def _imbalance(
    counts: tuple[int, ...], found: Mapping[str, NDArray[Any]], classes: tuple[str, ...] | None
) -> Iterator[str]:
    total = sum(counts)
    rare = sorted(
        (label for label in range(len(counts)) if counts[label] < _RARE * total / len(counts)), key=counts.__getitem__
    )
    if not rare:
        return
    shown = [
        f"class {_called(i, classes)} has {counts[i]:,} of {total:,} training examples ({_percent(counts[i] / total)})"
        for i in rare[:1]
    ]
    if len(rare) > 1:
        also = ", ".join(_called(i, classes) for i in rare[1:_NAMED])
        shown.append(f"also rare: {also}" + (f" and {len(rare) - _NAMED} more" if len(rare) > _NAMED else ""))
    line = "data: " + "; ".join(shown)
    if "test" in found:
        labels, sizes = np.unique(found["test"], return_counts=True)
        top = int(sizes.argmax())
        share = float(sizes[top] / len(found["test"]))
        line += (
            f"; to answer {_called(int(labels[top]), classes)} always is right in {_percent(share)} of the test split"
        )
    yield line


def _strangers(trained: Mapping[int, int], found: Mapping[str, NDArray[Any]], data: DataSet) -> Iterator[str]:
    """Classes that a split has and training never sees."""
    for name in ("test", "validation"):
        if name not in found:
            continue
        labels, sizes = np.unique(found[name], return_counts=True)
        strange = [
            (int(label), int(size)) for label, size in zip(labels, sizes, strict=True) if int(label) not in trained
        ]
        if strange:
            named = ", ".join(_called(label, data.classes) for label, _ in strange[:_NAMED])
            named += ", ..." if len(strange) > _NAMED else ""
            yield (
                f"data: {sum(size for _, size in strange):,} of {len(found[name]):,} {name} examples are of classes "
                f"that no training example has, so they count as wrong unless the weights know them already: {named}"
            )


def _called(label: int, classes: tuple[str, ...] | None) -> str:
    return repr(classes[label]) if classes is not None and label < len(classes) else str(label)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.1f} %"
