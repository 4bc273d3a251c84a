"""Checks on what is copied into an engine, one wording for every runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparsify_deploy.errors import DataError
from sparsify_deploy.types import IOTensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparsify_deploy.types import Arrays


def checked(inputs: Arrays, expected: Sequence[IOTensor]) -> dict[str, NDArray[Any]]:
    """`inputs` as contiguous arrays in the engine's order.

    Raises DataError where a name is missing or unknown, or a shape or dtype is not what the engine takes.
    """
    import numpy as np

    names = [tensor.name for tensor in expected]
    for name in names:
        if name not in inputs:
            raise DataError(f"input {name!r} is missing: the engine takes {', '.join(names)}")
    for name in inputs:
        if name not in names:
            raise DataError(f"the engine has no input {name!r}: it takes {', '.join(names)}")
    result = {}
    for tensor in expected:
        array = np.ascontiguousarray(inputs[tensor.name]).reshape(np.shape(inputs[tensor.name]))
        if array.dtype.name != tensor.dtype:
            raise DataError(f"input {tensor.name!r} is {array.dtype.name}, the engine takes {tensor.dtype}: convert it")
        if not fits(array.shape, tensor.shape):
            raise DataError(
                f"input {tensor.name!r} has shape {shape_text(array.shape)}, "
                f"the engine takes {shape_text(tensor.shape)}"
            )
        result[tensor.name] = array
    return result


def fixed(
    inputs: Sequence[IOTensor], shapes: Mapping[str, tuple[int, ...]] | None
) -> tuple[tuple[IOTensor, ...], tuple[str, ...]]:
    """`inputs` with `shapes` put in, and the names whose shape that changed.

    Raises DataError where a name is unknown or a shape contradicts a fixed axis.
    """
    wanted = dict(shapes or {})
    result, changed = [], []
    for tensor in inputs:
        shape = wanted.pop(tensor.name, None)
        if shape is None:
            result.append(tensor)
            continue
        if not fits(shape, tensor.shape):
            raise DataError(
                f"input {tensor.name!r} cannot be {shape_text(shape)}: the engine takes {shape_text(tensor.shape)}"
            )
        if None in tensor.shape:
            changed.append(tensor.name)
        result.append(IOTensor(tensor.name, tuple(shape), tensor.dtype))
    if wanted:
        names = ", ".join(tensor.name for tensor in inputs)
        raise DataError(f"the engine has no input {next(iter(wanted))!r}: it takes {names}")
    return tuple(result), tuple(changed)


def fits(shape: Sequence[int], expected: Sequence[int | None]) -> bool:
    """True where `shape` has the rank and every fixed axis of `expected`."""
    return len(shape) == len(expected) and all(
        want is None or have == want for have, want in zip(shape, expected, strict=True)
    )


def shape_text(shape: Sequence[int | None]) -> str:
    """`(1, 3, ?, ?)`."""
    return "(" + ", ".join("?" if axis is None else str(axis) for axis in shape) + ")"
