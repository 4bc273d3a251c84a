"""Axes besides the batch whose size differs between batches, and batches of a given size along them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sparsify_deploy.errors import DataError
from sparsify_deploy.types import AxisSizes

if TYPE_CHECKING:
    from torch import Tensor

    from sparsify_deploy.types import Batch, DataSet

BATCH = "batch"
"""The name of axis 0 in an exported file."""


@dataclass(frozen=True)
class FreeAxes:
    """Field -> axis -> name, and name -> sizes where the data set knows them. False where there is none."""

    axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    sizes: Mapping[str, AxisSizes] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.axes)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the axes, each once."""
        return tuple(dict.fromkeys(name for axes in self.axes.values() for name in axes.values()))

    @property
    def typical(self) -> dict[str, int]:
        """Name to typical size, of those with sizes."""
        return {name: sizes.typical for name, sizes in self.sizes.items()}


def free_axes(data: DataSet) -> FreeAxes:
    """What a data set says in `dynamic_axes` and `axis_sizes`, which it need not have. Raises DataError."""
    axes: Mapping[str, Mapping[int, str]] = getattr(data, "dynamic_axes", {})
    sizes: Mapping[str, AxisSizes] = getattr(data, "axis_sizes", {})
    found = FreeAxes({name: dict(each) for name, each in axes.items() if each}, dict(sizes))
    for name, each in found.axes.items():
        for axis, called in each.items():
            if axis < 1 or called == BATCH or not called.isidentifier():
                raise DataError(
                    f"data: dynamic_axes calls axis {axis} of {name!r} {called!r}: expected an axis from 1 on, and a "
                    f"word other than {BATCH!r}"
                )
    for called, size in found.sizes.items():
        if called not in found.names:
            raise DataError(f"data: axis_sizes names {called!r}, which dynamic_axes does not")
        if not 1 <= size.least <= size.typical <= size.largest:
            raise DataError(f"data: axis_sizes of {called!r} are {size}, expected 1 <= least <= typical <= largest")
    return found


def sized(batch: Batch, free: FreeAxes, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """`batch` with each axis named in `sizes` cut to that size, or filled up from its own start."""
    import torch

    result = dict(batch)
    for name, axes in free.axes.items():
        for axis, called in axes.items():
            if name in result and called in sizes and result[name].shape[axis] != sizes[called]:
                value = result[name]
                where = torch.arange(sizes[called], device=value.device) % value.shape[axis]
                result[name] = value.index_select(axis, where)
    return result


def sizes_of(batch: Batch, free: FreeAxes) -> dict[str, int]:
    """Name to its size in `batch`. Raises DataError where two fields differ, or a field has no such axis."""
    found: dict[str, int] = {}
    for name, axes in free.axes.items():
        if name not in batch:
            raise DataError(f"data: dynamic_axes names {name!r}, and the fields are {', '.join(batch)}")
        for axis, called in axes.items():
            if axis >= batch[name].dim():
                raise DataError(f"data: dynamic_axes names axis {axis} of {name!r}, which has {batch[name].dim()} axes")
            if found.setdefault(called, batch[name].shape[axis]) != batch[name].shape[axis]:
                raise DataError(
                    f"data: axis {called!r} has size {found[called]} in one field and {batch[name].shape[axis]} in "
                    f"{name!r}: fields that share a name have one size"
                )
    return found
