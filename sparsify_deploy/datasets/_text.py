"""Texts in memory as token numbers, padded one batch at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from sparsify_deploy.datasets import _text_rows
from sparsify_deploy.datasets._memory import targets
from sparsify_deploy.datasets._splits import GET_VALIDATION, check_asked, hold_out
from sparsify_deploy.errors import DataError
from sparsify_deploy.menu import did_you_mean
from sparsify_deploy.preprocessing import text
from sparsify_deploy.preprocessing.spec import TextSpec, samples
from sparsify_deploy.preprocessing.tokenizer_files import FILE
from sparsify_deploy.types import AxisSizes

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from sparsify_deploy.datasets._text_rows import Rows
    from sparsify_deploy.datasets.text import Params
    from sparsify_deploy.preprocessing.spec import Raw

_AXIS = "length"
"""How the axis of tokens is called in exported files."""


@dataclass(frozen=True)
class TextSplit:
    """Texts as tokens, and their targets `(N,)`."""

    tokens: text.Tokens
    targets: NDArray[Any]
    spec: TextSpec

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def target(self) -> NDArray[Any]:
        """All targets `(N,)`, which are judged without making the texts."""
        return self.targets

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        """The examples at int64 `indices` `(B,)`, padded together: int64 `(B, L)`."""
        rows = indices.numpy()
        batch = {**text.padded(self.tokens, rows, self.spec), "target": self.targets[rows]}
        return {name: torch.from_numpy(value) for name, value in batch.items()}


@dataclass(frozen=True)
class TextDataSet:
    """A `types.DataSet` of texts; `raw` holds a few texts of the test split, by index."""

    parts: Mapping[str, TextSplit]
    classes: tuple[str, ...] | None
    notes: tuple[str, ...]
    preprocessing: TextSpec
    preprocessing_files: Mapping[str, Path]
    raw: Mapping[int, Raw]
    dynamic_axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    axis_sizes: Mapping[str, AxisSizes] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[str, ...]:
        """input_ids and attention_mask, and token_type_ids where asked for."""
        return self.preprocessing.inputs

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits there are."""
        return tuple(self.parts)

    def split(self, name: Literal["train", "test", "validation"]) -> TextSplit:
        """One of `splits`. Raises DataError for another."""
        if name not in self.parts:
            raise DataError(f"data: there is no {name} split: {GET_VALIDATION}")
        return self.parts[name]


def text_data(found: Mapping[str, Sequence[Path]], params: Params) -> TextDataSet:
    """Read, label, divide and tokenise the files of each split. Raises DataError."""
    padding = text.padding(params.tokenizer)
    where = str(params.path)
    check_asked(params, where, test="test" in found, validation="validation" in found)
    rows = {split: _text_rows.read(paths, params) for split, paths in found.items()}
    notes = [line for split, some in rows.items() for line in _text_rows.left_out(some, split)]
    named = _text_rows.class_names(found["train"][0], params.label)
    labels, classes = labelled(rows, named, where)
    held = hold_out(labels["train"], params, where)
    for split, which in (("test", held.test), ("validation", held.validation), ("train", held.train)):
        if which is not None:
            rows[split], labels[split] = rows["train"].at(which.tolist()), labels["train"][which]
    spec = TextSpec(
        max_length=params.max_length,
        inputs=("input_ids", "attention_mask", *(("token_type_ids",) if params.token_type_ids else ())),
        pad=params.pad,
        pad_id=padding.id,
        pad_token=padding.token,
        pad_type_id=padding.type_id,
        pad_side=padding.side,
        pair=params.text_pair is not None,
        classes=classes,
    )
    source = params.tokenizer / FILE
    encoder = text.Encoder.open(source, spec)
    tokens = {split: encoder.encode(some.texts) for split, some in rows.items()}
    axes, sizes = free_axis(spec, encoder.special, [each.lengths for each in tokens.values()])
    return TextDataSet(
        parts={split: TextSplit(tokens[split], labels[split], spec) for split in rows},
        classes=classes,
        notes=(*notes, *held.notes, *_truncated([*tokens.values()], spec)),
        preprocessing=spec,
        preprocessing_files={spec.tokenizer: source},
        raw={i: rows["test"].texts[i] for i in samples(len(rows["test"].texts))},
        dynamic_axes=axes,
        axis_sizes=sizes,
    )


def labelled(
    rows: Mapping[str, Rows], names: tuple[str, ...] | None, where: str
) -> tuple[dict[str, NDArray[Any]], tuple[str, ...] | None]:
    """The targets of every split, and the names of classes: `names`, or those found where labels are no numbers."""
    kind = _kind([label for some in rows.values() for label in some.labels], where)
    if kind is str:
        names = names or tuple(sorted({str(label) for label in rows["train"].labels}))
        return {split: _numbered(some, names) for split, some in rows.items()}, names
    made = {}
    for split, some in rows.items():
        values = np.array([kind(label) for label in some.labels])
        if kind is int:
            _check_range(values, some, names)
        made[split] = targets(values, where)
    return made, names if kind is int else None


def _numbered(rows: Rows, names: Sequence[str]) -> NDArray[Any]:
    known = {name: i for i, name in enumerate(names)}
    for label, place in zip(rows.labels, rows.where, strict=True):
        if str(label) not in known:
            raise DataError(
                f"{place}: label {str(label)!r} is not one of the {len(names)} classes{did_you_mean(str(label), names)}"
            )
    return np.array([known[str(label)] for label in rows.labels], np.int64)


def _check_range(values: NDArray[Any], rows: Rows, names: Sequence[str] | None) -> None:
    wrong = np.flatnonzero((values < 0) | (values >= (len(names) if names is not None else np.inf)))
    if len(wrong):
        limit = f"0 to {len(names) - 1}, one of {', '.join(names)}" if names is not None else "0 or more"
        raise DataError(f"{rows.where[wrong[0]]}: label {values[wrong[0]]} is out of range, expected {limit}")


def _kind(labels: Sequence[Any], where: str) -> type[int] | type[float] | type[str]:
    """Whole numbers, else numbers, else names; CSV holds all of them as text."""
    if all(isinstance(label, (int, np.integer)) for label in labels):
        return int
    if all(isinstance(label, (int, float)) for label in labels):
        return float
    if not all(isinstance(label, (str, int)) for label in labels):
        strange = next(label for label in labels if not isinstance(label, (str, int)))
        raise DataError(f"{where}: a label is {type(strange).__name__}, expected a number or a name")
    for kind in (int, float):
        try:
            _ = [kind(label) for label in labels]
        except ValueError:
            continue
        return kind
    return str


def free_axis(
    spec: TextSpec, special: int, lengths: Sequence[NDArray[np.int64]]
) -> tuple[dict[str, dict[int, str]], dict[str, AxisSizes]]:
    """The axis of tokens where its size differs between batches.

    It goes from a text of the `special` tokens alone, for whoever deploys the network may get one, to `max_length`,
    and is typically the median of the `lengths` of all texts.
    """
    every = np.concatenate(lengths)
    if spec.pad == "max_length" or int(every.min()) == spec.max_length:
        return {}, {}
    sizes = AxisSizes(max(special, 1), max(int(np.median(every)), 1), spec.max_length)
    return {name: {1: _AXIS} for name in spec.inputs}, {_AXIS: sizes}


def _truncated(tokens: Sequence[text.Tokens], spec: TextSpec) -> tuple[str, ...]:
    cut, total = sum(each.truncated for each in tokens), sum(len(each.lengths) for each in tokens)
    if not cut:
        return ()
    return (f"data: {cut} of {total} texts ({cut / total:.1%}) were cut at max_length {spec.max_length} tokens",)
