"""Makes inputs of raw examples by a spec, float for float as the data set of the recipe gives them to the network."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from sparsify_deploy.errors import DataError, MissingExtra
from sparsify_deploy.preprocessing.images import Decoder, check_pillow
from sparsify_deploy.preprocessing.spec import ArrayInput, ArraySpec, ImageSpec, Raw, Spec, TextSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

Prepare: TypeAlias = "Callable[[Sequence[Raw], Sequence[str]], dict[str, NDArray[Any]]]"
"""Raw examples, and how errors name them, to inputs batched along axis 0."""


def prepare(
    spec: Spec, examples: Sequence[Raw], folder: Path | None = None, names: Sequence[str] = ()
) -> dict[str, NDArray[Any]]:
    """Raw examples as the network's inputs, batched along axis 0; as `opened` gives them, for one batch."""
    return opened(spec, folder)(examples, names)


def opened(spec: Spec, folder: Path | None = None) -> Prepare:
    """What makes inputs of raw examples. `folder` holds the spec's other files, which are read once.

    The function takes the examples and how errors name them (default: example 0, 1, ...) and raises DataError.
    """
    if isinstance(spec, ImageSpec):
        check_pillow("decoding images", "predict")
        return partial(_images, spec, Decoder(spec.mode, spec.size, spec.fit))
    if isinstance(spec, TextSpec):
        return _texts(spec, folder)
    return partial(_arrays, spec)


def _images(
    spec: ImageSpec, decode: Decoder, examples: Sequence[Raw], names: Sequence[str] = ()
) -> dict[str, NDArray[Any]]:
    parts = []
    for example, name in _named(examples, names):
        if not isinstance(example, bytes):
            raise DataError(f"{name}: {_word(example)}, but this model takes image files (PNG, JPEG, ...)")
        parts.append(_scaled(decode(example, name), spec.shift, spec.divisor))
    return {spec.input: _stacked(parts, names)}


def _texts(spec: TextSpec, folder: Path | None) -> Prepare:
    from sparsify_deploy.preprocessing.text import Encoder

    if importlib.util.find_spec("tokenizers") is None:
        raise MissingExtra("tokenizers", "predict", "splitting texts into tokens")
    if folder is None:
        raise DataError(f"{spec.tokenizer}: texts need the folder that holds it")
    encoder = Encoder.open(folder / spec.tokenizer, spec)

    def encode(examples: Sequence[Raw], names: Sequence[str] = ()) -> dict[str, NDArray[Any]]:
        for example, name in _named(examples, names):
            if not isinstance(example, (str, tuple)):
                raise DataError(f"{name}: {_word(example)}, but this model takes texts")
        return encoder(examples)

    return encode


def _arrays(spec: ArraySpec, examples: Sequence[Raw], names: Sequence[str] = ()) -> dict[str, NDArray[Any]]:
    parts: dict[str, list[NDArray[Any]]] = {each.name: [] for each in spec.inputs}
    for example, name in _named(examples, names):
        if not isinstance(example, (np.ndarray, Mapping)):
            raise DataError(f"{name}: {_word(example)}, but this model takes arrays (.npy or .npz)")
        arrays = {spec.inputs[0].name: example} if isinstance(example, np.ndarray) else example
        if {*arrays} != {*parts}:
            raise DataError(f"{name}: holds {', '.join(arrays)}; this model takes {', '.join(parts)}")
        for each in spec.inputs:
            parts[each.name].append(_array(each, arrays[each.name], name))
    return {key: _stacked(values, names) for key, values in parts.items()}


def _array(spec: ArrayInput, values: NDArray[Any], name: str) -> NDArray[Any]:
    """One example, with its axes in order and scaled."""
    fits = len(values.shape) == len(spec.shape) and all(
        want in (None, have) for want, have in zip(spec.shape, values.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if axis is None else str(axis) for axis in spec.shape)
        raise DataError(f"{name}: {spec.name} has shape {values.shape}, this model takes ({wanted})")
    kinds = {"uint8": "bytes (uint8, 0 to 255)", "float32": "numbers", "int64": "whole numbers"}
    right = {
        "uint8": values.dtype == np.uint8,
        "float32": values.dtype.kind in "fiu",
        "int64": values.dtype.kind in "iu",
    }
    if not right[spec.dtype]:
        raise DataError(f"{name}: {spec.name} holds {values.dtype}, this model takes {kinds[spec.dtype]}")
    if spec.layout == "HW":
        values = values[None]
    elif spec.layout == "HWC":
        values = values.transpose(2, 0, 1)
    if spec.dtype == "int64":
        return values.astype(np.int64)
    if not np.isfinite(values).all():
        raise DataError(f"{name}: {spec.name} holds a value that is not finite")
    return _scaled(values, spec.shift, spec.divisor) if spec.shift else values.astype(np.float32)


def _scaled(values: NDArray[Any], shift: tuple[float, ...], divisor: tuple[float, ...]) -> NDArray[np.float32]:
    """`(x - shift) / divisor` along axis 0, in float32 and in this order, as `datasets/_memory.py` has it."""
    shape = (-1, *(1,) * (values.ndim - 1))
    less, by = (np.array(numbers, dtype=np.float32).reshape(shape) for numbers in (shift, divisor))
    result: NDArray[np.float32] = (values.astype(np.float32) - less) / by
    return result


def _stacked(parts: Sequence[NDArray[Any]], names: Sequence[str]) -> NDArray[Any]:
    for i, part in enumerate(parts):
        if part.shape != parts[0].shape:
            which = names[i] if names else f"example {i}"
            raise DataError(f"{which}: becomes {part.shape}, the first of its batch {parts[0].shape}")
    return np.stack(parts)


def _named(examples: Sequence[Raw], names: Sequence[str]) -> list[tuple[Raw, str]]:
    return list(zip(examples, names or [f"example {i}" for i in range(len(examples))], strict=True))


def _word(example: Raw) -> str:
    kinds: dict[object, str] = {bytes: "an image file", str: "a text", tuple: "a pair of texts"}
    return kinds.get(type(example), "an array")
