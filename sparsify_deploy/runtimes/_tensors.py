"""Checks on what is copied into an engine, one wording for every runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparsify_deploy.errors import DataError, UsageError
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


def narrowed(inputs: Arrays, expected: Sequence[IOTensor]) -> dict[str, NDArray[Any]]:
    """`inputs` with INT64 as INT32 where the engine takes that: TensorRT 8.6 makes INT32 of the file's INT64.

    Raises DataError where a value does not fit.
    """
    import numpy as np

    kinds = {tensor.name: tensor.dtype for tensor in expected}
    result: dict[str, NDArray[Any]] = {}
    for name, given in inputs.items():
        array = np.asarray(given)
        if array.dtype == np.int64 and kinds.get(name) == "int32":
            small = array.astype(np.int32)
            if not np.array_equal(small, array):
                raise DataError(f"input {name!r} has values beyond INT32, which is what this engine takes")
            array = small
        result[name] = array
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


RANDOM_INPUTS = "standard normal floats, integers 0 or 1"
"""What `random_inputs` makes where no range of integers is given."""


def full_shapes(
    tensors: Sequence[IOTensor], batch: int, given: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, tuple[int, ...]]:
    """A whole shape for every input: that of `given`, else its own with `batch` on a free axis 0.

    Raises UsageError where a name is unknown or a shape contradicts a fixed axis, DataError where an axis stays free.
    """
    known = {tensor.name: tensor for tensor in tensors}
    for name, shape in given.items():
        if name not in known:
            raise UsageError(f"--shape {name}: {where} has no such input; it takes {', '.join(known)}")
        if not fits(shape, known[name].shape):
            raise UsageError(f"--shape {name}: {shape_text(shape)} does not fit {shape_text(known[name].shape)}")
    found = {}
    for tensor in tensors:
        if tensor.name in given:
            found[tensor.name] = tuple(given[tensor.name])
            continue
        if not tensor.shape:
            raise DataError(f"{where}: input {tensor.name} has no batch axis, which timing needs")
        first, *rest = tensor.shape
        if None in rest:
            raise DataError(
                f"{where}: input {tensor.name} is {shape_text(tensor.shape)}, with a dynamic axis besides the batch: "
                f"pass --shape {tensor.name}=" + "x".join("N" if axis is None else str(axis) for axis in tensor.shape)
            )
        if first is not None and first != batch:
            raise UsageError(f"{where}: input {tensor.name} has the fixed batch size {first}: use --batch {first}")
        found[tensor.name] = (batch, *(int(axis) for axis in rest if axis is not None))
    return found


def typical_shapes(
    tensors: Sequence[IOTensor], batch: int, sizes: Mapping[str, Mapping[str, Sequence[int]]]
) -> dict[str, tuple[int, ...]]:
    """The shape of each input whose free axes besides the first all have `sizes`: the typical ones.

    `sizes` is input to axis, as text, to its least, typical and largest size; `batch` goes on a free axis 0.
    """
    found = {}
    for tensor in tensors:
        known = {0: batch, **{int(axis): typical for axis, (_, typical, _) in sizes.get(tensor.name, {}).items()}}
        shape = [known.get(i) if axis is None else axis for i, axis in enumerate(tensor.shape)]
        if tensor.name in sizes and None not in shape:
            found[tensor.name] = tuple(axis for axis in shape if axis is not None)
    return found


def random_inputs(
    tensors: Sequence[IOTensor], shapes: Mapping[str, tuple[int, ...]], integers: tuple[int, int] = (0, 1)
) -> dict[str, NDArray[Any]]:
    """Standard-normal floats and integers from `integers`, both ends included; the same each time.

    0 and 1 are valid as a token of any vocabulary and as a mask.
    """
    import numpy as np

    generator = np.random.default_rng(0)
    inputs: dict[str, NDArray[Any]] = {}
    for tensor in tensors:
        kind, shape = np.dtype(tensor.dtype), shapes[tensor.name]
        if kind.kind in "iu":
            bounds = np.iinfo(kind)
            if not (bounds.min <= integers[0] and integers[1] <= bounds.max):
                raise UsageError(f"--int-range {integers[0]}:{integers[1]}: input {tensor.name} is {kind.name}")
        low, high = integers if kind.kind in "iu" else (0, 1)
        drawn = generator.standard_normal(shape) if kind.kind == "f" else generator.integers(low, high + 1, shape)
        inputs[tensor.name] = drawn.astype(kind)
    return inputs


def fits(shape: Sequence[int], expected: Sequence[int | None]) -> bool:
    """True where `shape` has the rank and every fixed axis of `expected`."""
    return len(shape) == len(expected) and all(
        want is None or have == want for have, want in zip(shape, expected, strict=True)
    )


def shape_text(shape: Sequence[int | None]) -> str:
    """`(1, 3, ?, ?)`."""
    return "(" + ", ".join("?" if axis is None else str(axis) for axis in shape) + ")"
