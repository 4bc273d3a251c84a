"""Makes a data set of a user's dict of arrays, and judges a user's own data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from sparsify_deploy.datasets._memory import MemoryDataSet, MemorySplit, floats, targets, tensor
from sparsify_deploy.errors import DataError
from sparsify_deploy.menu import did_you_mean
from sparsify_deploy.preprocessing.spec import Spec

if TYPE_CHECKING:
    from sparsify_deploy.types import DataSet, Split

_KEYS = ("train", "test", "validation", "classes")
_ADVICE = "give it under the key 'validation'"
_SHAPE = 'expected {"train": {"input": array, "target": array}, "test": {...}} or a DataSet'


def wrapped(data: Mapping[Any, Any], where: str) -> MemoryDataSet:
    """A data set of the dict `data`; `where` begins every error."""
    for key in data:
        if key not in _KEYS:
            raise DataError(f"{where}: unknown key {key!r}{did_you_mean(str(key), _KEYS)}")
    train, test = (_split(data, name, where) for name in ("train", "test"))
    validation = _split(data, "validation", where) if "validation" in data else None
    _check_like(train, test, "test", where)
    if validation is not None:
        _check_like(train, validation, "validation", where)
    inputs = tuple(name for name in train.fields if name != "target")
    classes = _classes(data.get("classes"), where)
    return MemoryDataSet(train, test, inputs, classes, validation=validation, advice=_ADVICE)


def _check_like(train: MemorySplit, other: MemorySplit, role: str, where: str) -> None:
    if list(train.fields) != list(other.fields):
        raise DataError(f"{where}: train has the fields {list(train.fields)}, {role} {list(other.fields)}")
    for name, values in train.fields.items():
        theirs = other.fields[name]
        if values.shape[1:] != theirs.shape[1:] or values.dtype != theirs.dtype:
            kinds = " and ".join(f"{v.dtype} {tuple(v.shape[1:])}" for v in (values, theirs))
            raise DataError(f"{where}: train and {role} are unlike in {name!r}: {kinds}")


def _classes(names: Any, where: str) -> tuple[str, ...] | None:
    if names is None:
        return None
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
        raise DataError(f"{where}: classes are {names!r}, expected a list of names")
    return tuple(names)


def checked(made: object, where: str) -> DataSet:
    """`made` if it is a usable data set: it names its inputs, and both splits give one example with them."""
    data: Any = made
    for attribute in ("inputs", "classes", "split"):
        if not hasattr(data, attribute):
            raise DataError(f"{where}: gives {type(made).__name__} without {attribute!r}, {_SHAPE}")
    if not isinstance(data.inputs, tuple) or not data.inputs:
        raise DataError(f"{where}: inputs are {data.inputs!r}, expected a tuple of field names")
    has_validation = "validation" in getattr(data, "splits", ())
    for name in ("train", "test", *(("validation",) if has_validation else ())):
        split = data.split(name)
        if not len(split):
            raise DataError(f"{where}: the {name} split is empty")
        batch = split.take(torch.zeros(1, dtype=torch.int64))
        for key in data.inputs:
            if key not in batch:
                raise DataError(f"{where}: the {name} split gives the fields {list(batch)} and no {key!r}")
        for key, value in batch.items():
            if not isinstance(value, Tensor) or value.shape[:1] != (1,):
                kind = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise DataError(f"{where}: for one index, take gives {key!r} as {kind}, expected a tensor (1, ...)")
            if value.is_floating_point() and value.dtype != torch.float32:
                raise DataError(f"{where}: take gives {key!r} as {value.dtype}, expected float32")
    _check_preprocessing(data, where)
    result: DataSet = data if has_validation else _NoValidation(data, where)
    return result


class _NoValidation:
    """A user's data set that names no validation split: what its `split` would give for one is anybody's guess."""

    def __init__(self, own: Any, where: str) -> None:
        self._own = own
        self._where = where

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def split(self, name: Literal["train", "test", "validation"]) -> Split:
        if name == "validation":
            raise DataError(
                f"{self._where}: there is no validation split: give the data set `splits`, a tuple of names with "
                "validation among them"
            )
        found: Split = self._own.split(name)
        return found


def _check_preprocessing(data: Any, where: str) -> None:
    """Where a data set says how raw examples become its inputs, it says so in our words, with examples to try it on."""
    spec = getattr(data, "preprocessing", None)
    if spec is None:
        return
    if not isinstance(spec, Spec):
        raise DataError(
            f"{where}: preprocessing is {type(spec).__name__}, expected a spec of sparsify_deploy.preprocessing.spec "
            "(ImageSpec, TextSpec or ArraySpec), or None"
        )
    raw = getattr(data, "raw", None)
    if not isinstance(raw, Mapping) or not raw or not all(isinstance(index, int) for index in raw):
        raise DataError(
            f"{where}: has preprocessing and no raw: give a dict of a few raw examples of the test split by index"
        )


def _split(data: Mapping[Any, Any], name: str, where: str) -> MemorySplit:
    given = data.get(name)
    if not isinstance(given, Mapping):
        raise DataError(f"{where}: {name} is {'missing' if given is None else type(given).__name__}, {_SHAPE}")
    fields = {str(key): _field(str(key), value, f"{where}: {name}: {key}") for key, value in given.items()}
    if "target" not in fields or len(fields) < 2:
        raise DataError(f"{where}: {name} has the fields {list(fields)}, expected 'target' and at least one input")
    lengths = {key: len(value) for key, value in fields.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{where}: the fields of {name} differ in length: {lengths}")
    if not all(value.numel() for value in fields.values()):
        raise DataError(f"{where}: {name} is empty")
    return MemorySplit(fields)


def _field(key: str, value: Any, where: str) -> Tensor:
    array = value.detach().cpu().float().numpy() if _is_bfloat16(value) else value
    array = array.detach().cpu().numpy() if isinstance(array, Tensor) else np.asarray(array)
    if array.ndim == 0:
        raise DataError(f"{where} is {type(value).__name__}, expected an array with examples along axis 0")
    if key == "target":
        return tensor(targets(array, where))
    if array.dtype.kind == "f":
        return tensor(floats(array, where))
    if array.dtype == np.uint8:
        raise DataError(f"{where} is uint8, and nothing is scaled here: give floats, such as x / 255")
    if array.dtype.kind in "iub":
        return tensor(array.astype(np.int64))
    raise DataError(f"{where} is of type {array.dtype}, expected numbers")


def _is_bfloat16(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16
