"""Examples of another source, with labels or without, made fit to calibrate a network that works on the main data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from sparsify_deploy.datasets._memory import MemorySplit
from sparsify_deploy.errors import DataError
from sparsify_deploy.preprocessing.spec import ImageSpec

if TYPE_CHECKING:
    from sparsify_deploy.types import DataSet, Split


def calibration_split(found: DataSet, main: DataSet) -> Split:
    """The train split of `found`, its inputs brought to numbers as those of `main` are.

    Both in memory, the scale of `main` takes the place of its own: what 0 and 1 stand for must not differ. Raises
    DataError where inputs are missing or of another shape or type, or images are fitted in another way.
    """
    split, ours = found.split("train"), main.split("train")
    if not len(split):
        raise DataError("there are no examples")
    _check_spec(getattr(found, "preprocessing", None), getattr(main, "preprocessing", None))
    if isinstance(split, MemorySplit) and isinstance(ours, MemorySplit):
        for name in set(split.fields) & set(main.inputs):
            if split.fields[name].dtype != ours.fields[name].dtype:
                kinds = (str(each.fields[name].dtype).removeprefix("torch.") for each in (split, ours))
                raise DataError("{!r} is stored as {}, in the data as {}: store it alike".format(name, *kinds))
        split = dataclasses.replace(split, affine=ours.affine)
    first = torch.zeros(1, dtype=torch.int64)
    there, here = split.take(first), ours.take(first)
    free: Mapping[str, Mapping[int, str]] = getattr(main, "dynamic_axes", {})
    for name in main.inputs:
        if name not in there:
            raise DataError(f"has no {name!r}, which the data has: its fields are {', '.join(there)}")
        shapes = [
            tuple(size for axis, size in enumerate(each[name].shape) if axis and axis not in free.get(name, {}))
            for each in (there, here)
        ]
        if shapes[0] != shapes[1]:
            raise DataError(
                f"{name!r} of one example has shape {tuple(there[name].shape[1:])}, in the data "
                f"{tuple(here[name].shape[1:])}: set the params of both alike"
            )
        if there[name].dtype != here[name].dtype:
            raise DataError(f"{name!r} is {there[name].dtype}, in the data {here[name].dtype}")
    return split


def _check_spec(theirs: object, ours: object) -> None:
    if not isinstance(theirs, ImageSpec) or not isinstance(ours, ImageSpec):
        return
    resized = theirs.size is not None and ours.size is not None
    if resized and theirs.fit != ours.fit:  # other differences show in the shape
        raise DataError(
            f"images are read with fit {theirs.fit}, those of the data with {ours.fit}: set params.fit alike"
        )
