"""Reads .npy and .npz files of others: numbers alone, and never more memory than the bytes of the file account for.

numpy itself makes an array as large as its header claims before it reads a byte of it, and inflates whatever an
archive holds. Here a header is held against the bytes that follow, and an archive that inflates beyond measure is
refused before it is inflated.
"""

from __future__ import annotations

import math
import os
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.lib import format as npy

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_INFLATED = 100
"""How many times its size in the archive an array of more than `FREELY_INFLATED` bytes may take."""

FREELY_INFLATED = 1 << 26

_KINDS = "biufcSUmM"
_CHUNK = 1 << 20
_ZIP_ERRORS = (
    *(zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, KeyError, IndexError, OverflowError),
    *(NotImplementedError, RuntimeError),  # a compression unknown here, a password
)


class UnreadableArray(Exception):
    """Bytes that are no array of plain numbers or texts; the message says why in a few words."""


class PythonObjects(UnreadableArray):
    """An array of pickled Python objects, which nobody should have to trust."""


def is_archive(file: IO[bytes]) -> bool:
    """Whether a file begins as a .npz does; its position is 0 afterwards."""
    file.seek(0)
    start = file.read(4)
    file.seek(0)
    return start in (b"PK\x03\x04", b"PK\x05\x06")


def array(file: IO[bytes]) -> NDArray[Any]:
    """The array of an open .npy file. Raises UnreadableArray."""
    with _explained():
        return _array(file, os.fstat(file.fileno()).st_size)


class Archive:
    """The arrays of an open .npz file by name; each is read when it is asked for. Raises UnreadableArray."""

    def __init__(self, file: IO[bytes]) -> None:
        with _explained():
            self._zip = zipfile.ZipFile(file)
        self._members = {info.filename.removesuffix(".npy"): info for info in self._zip.infolist()}

    @property
    def names(self) -> tuple[str, ...]:
        """What the arrays are called."""
        return tuple(self._members)

    def read(self, name: str) -> NDArray[Any]:
        """One of them."""
        info = self._members[name]
        if info.file_size > max(FREELY_INFLATED, MOST_INFLATED * info.compress_size):
            raise UnreadableArray(
                f"{info.compress_size:,} bytes that would be inflated to {info.file_size:,}; save it uncompressed, "
                "with numpy.savez"
            )
        with _explained(), self._zip.open(info) as stream:
            return _array(stream, info.file_size)


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except _ZIP_ERRORS as error:
        raise UnreadableArray(" ".join(f"{type(error).__name__}: {error}".split())[:160]) from error


def _array(stream: IO[bytes], size: int) -> NDArray[Any]:
    """The array that `stream`, of `size` bytes, begins with."""
    shape, fortran, dtype = _header(stream)
    if dtype.hasobject:
        raise PythonObjects("it holds Python objects")
    if dtype.kind not in _KINDS or dtype.fields or dtype.subdtype or not dtype.itemsize:
        raise UnreadableArray(f"it holds {str(dtype)[:80]}, neither numbers nor texts")
    count = math.prod(shape)
    if min(shape, default=0) < 0 or len(shape) > 32 or count * dtype.itemsize > size - stream.tell():
        raise UnreadableArray(f"its header claims {count:,} values of {dtype.itemsize} bytes, more than the file holds")
    values = np.empty(count, dtype)
    left = memoryview(values.view(np.uint8))  # type: ignore[arg-type]
    while left:
        read = stream.readinto(left[:_CHUNK])  # type: ignore[attr-defined]
        if not read:
            raise UnreadableArray("it is cut short")
        left = left[read:]
    return values.reshape(shape, order="F" if fortran else "C")


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and type as an array's first bytes have them."""
    try:
        version = npy.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"format {version}")
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # numpy's word on a header of Python 2
            shape, fortran, dtype = read(stream)
    except _ZIP_ERRORS:
        raise
    except Exception as error:  # parsing a header that is none ends in exceptions of many kinds
        raise ValueError(f"no header of an array ({type(error).__name__})") from error
    if not all(isinstance(axis, int) for axis in shape):
        raise ValueError("no header of an array (shape)")
    return tuple(shape), bool(fortran), dtype
