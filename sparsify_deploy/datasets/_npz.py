"""Reads the arrays of a .npz archive, and tells images from feature vectors."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np

from sparsify_deploy.datasets._memory import UNIT, Affine, floats, numbers, scaling
from sparsify_deploy.errors import DataError
from sparsify_deploy.menu import did_you_mean
from sparsify_deploy.preprocessing.arrays import Archive, PythonObjects, UnreadableArray, is_archive
from sparsify_deploy.preprocessing.arrays import array as bare_array
from sparsify_deploy.preprocessing.spec import ArrayInput, ArraySpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

_CHANNELS = (1, 3, 4)
_NONE: Mapping[str, str] = {}


def read(
    path: Path, names: Sequence[str], optional: Container[str] = (), advice: Mapping[str, str] = _NONE
) -> dict[str, NDArray[Any]]:
    """The arrays of an archive by name, without those of `optional` that it lacks.

    Raises DataError; for a missing array with what `advice` says of it.
    """
    if not path.is_file():
        raise DataError(f"{path}: {'is a folder, expected a .npz file' if path.is_dir() else 'no such file'}")
    arrays = {}
    with _opened(path) as file:
        try:
            archive = Archive(file)
        except UnreadableArray as exc:
            raise DataError(f"{path}: not a readable .npz archive, damaged or cut short ({exc})") from exc
        for name in names:
            if name not in archive.names and name in optional:
                continue
            if name not in archive.names:
                hint = did_you_mean(name, archive.names)
                raise DataError(f"{path}: no array is called {name!r}{hint}{advice.get(name, '')}")
            try:
                array = archive.read(name)
            except PythonObjects as exc:
                raise DataError(f"{path}: {name} holds Python objects, expected numbers; save it as such") from exc
            except UnreadableArray as exc:
                raise DataError(f"{path}: {name} cannot be read, damaged or cut short ({exc})") from exc
            if array.ndim == 0:
                raise DataError(f"{path}: {name} is no array of examples")
            arrays[name] = array
    return arrays


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The file, unless it holds one bare array. Raises DataError."""
    try:
        file = path.open("rb")
    except OSError as exc:
        raise DataError(f"{path}: cannot be read ({exc.strerror})") from exc
    with file:
        if not is_archive(file):
            with suppress(UnreadableArray):
                bare_array(file)
                raise DataError(
                    f"{path}: one bare array, expected a .npz archive (numpy.savez) with inputs and targets"
                )
            file.seek(0)
        yield file


def layout_of(inputs: NDArray[Any], asked: str, where: str) -> str:
    """NHWC, NCHW, NHW or none. Raises DataError where that cannot be told."""
    rank = len(asked) if asked not in ("auto", "none") else None
    if rank is not None and inputs.ndim != rank:
        raise DataError(f"{where}: layout {asked} has {rank} axes, the array has shape {inputs.shape}")
    if asked != "auto":
        return asked
    if inputs.ndim == 3:
        return "NHW"
    if inputs.ndim != 4:
        return "none"
    first, last = inputs.shape[1] in _CHANNELS, inputs.shape[3] in _CHANNELS
    if first == last:
        raise DataError(f"{where}: cannot tell where the channels of {inputs.shape} are: set layout to NHWC or NCHW")
    return "NCHW" if first else "NHWC"


def inputs_of(values: NDArray[Any], layout: str, where: str) -> NDArray[Any]:
    """uint8 or float32, images as `(N, C, H, W)`. Raises DataError for other types."""
    if values.dtype != np.uint8:
        if values.dtype.kind != "f":
            raise DataError(f"{where}: inputs of type {values.dtype}, expected uint8 (0..255) or floats: convert them")
        values = floats(values, where)
    if layout == "NHW" and values.ndim == 3:
        return values[:, None]
    if layout == "NHWC" and values.ndim == 4:
        return np.ascontiguousarray(values.transpose(0, 3, 1, 2))
    return values


def affine_of(values: NDArray[Any], layout: str, *, normalize: bool) -> Affine | None:
    """What makes inputs of `values`, measured on them; None: they are inputs already."""
    if layout != "none":
        return scaling(values, normalize=normalize)
    return UNIT if values.dtype == np.uint8 else None


def spec_of(stored: NDArray[Any], layout: str, affine: Affine | None, words: str) -> ArraySpec:
    """How one example of the array `stored`, as the archive holds it, becomes an input."""
    known: dict[str, Literal["HW", "HWC"]] = {"NHW": "HW", "NHWC": "HWC"}
    axes: Literal["HW", "HWC", "any"] = known.get(layout, "any")
    dtype: Literal["uint8", "float32"] = "uint8" if stored.dtype == np.uint8 else "float32"
    scale = numbers(affine) if affine is not None else ((), ())
    return ArraySpec((ArrayInput("input", dtype, stored.shape[1:], axes, *scale),), example=words)
