"""Arrays in a NumPy .npz archive, such as Keras' mnist.npz.

Bytes (uint8) stay bytes in memory and become floats one batch at a time. Images are standardised by the mean and
deviation of each channel of the train split. Feature vectors of floats are taken as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from sparsify_deploy.params import InputPath
from sparsify_deploy.params import Params as Base

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparsify_deploy.types import DataSet

VERSION = 1
RUNS_USER_CODE = False

_CHANNELS = (1, 3, 4)


class Params(Base):
    """The archive, the names of its arrays, and how to read them."""

    path: InputPath = Field(description="a .npz file")
    train_inputs: str = "x_train"
    train_targets: str = "y_train"
    test_inputs: str = "x_test"
    test_targets: str = "y_test"
    layout: Literal["auto", "NHWC", "NCHW", "NHW", "none"] = Field(
        "auto", description="axes of the inputs; auto: 3 axes NHW, 4 by where 1, 3 or 4 channels are, else none"
    )
    normalize: bool = Field(True, description="images: mean 0, deviation 1 per channel, measured on the train split")


def files(params: Params) -> Mapping[str, Path]:
    """The archive."""
    return {"path": params.path}


def open(params: Params) -> DataSet:
    """Images `(N, C, H, W)` or the arrays as they are, float32; integer targets int64 `(N,)`, others float32."""
    from sparsify_deploy.datasets._memory import UNIT, check_splits, data_set, scaling, targets

    names = [params.train_inputs, params.train_targets, params.test_inputs, params.test_targets]
    arrays = _read(params.path, names)
    where = [f"{params.path}: {name}" for name in names]
    layout = _layout(arrays[0], params.layout, where[0])
    train, test = ((_inputs(arrays[i], layout, where[i]), targets(arrays[i + 1], where[i + 1])) for i in (0, 2))
    check_splits(train, test, str(params.path))
    if layout != "none":
        affine = scaling(train[0], normalize=params.normalize)
    else:
        affine = UNIT if train[0].dtype == "uint8" else None
    return data_set(train, test, affine)


def _read(path: Path, names: list[str]) -> list[NDArray[Any]]:
    import zipfile
    import zlib

    import numpy as np

    from sparsify_deploy.errors import DataError
    from sparsify_deploy.menu import did_you_mean

    if not path.is_file():
        raise DataError(f"{path}: {'is a folder, expected a .npz file' if path.is_dir() else 'no such file'}")
    damaged = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError)
    with path.open("rb") as file:
        try:
            archive = np.load(file, allow_pickle=False)
        except damaged as exc:
            raise DataError(f"{path}: not a readable .npz archive, damaged or cut short ({_short(exc)})") from exc
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise DataError(f"{path}: one bare array, expected a .npz archive (numpy.savez) with inputs and targets")
        arrays = []
        for name in names:
            if name not in archive.files:
                raise DataError(f"{path}: no array is called {name!r}{did_you_mean(name, archive.files)}")
            try:
                array = archive[name]
            except damaged as exc:
                if "allow_pickle" in str(exc):
                    raise DataError(f"{path}: {name} holds Python objects, expected numbers; save it as such") from exc
                raise DataError(f"{path}: {name} cannot be read, damaged or cut short ({_short(exc)})") from exc
            if not isinstance(array, np.ndarray) or array.ndim == 0:
                raise DataError(f"{path}: {name} is no array of examples")
            arrays.append(array)
    return arrays


def _short(exc: Exception) -> str:
    return " ".join(f"{type(exc).__name__}: {exc}".split())[:160]


def _layout(inputs: NDArray[Any], asked: str, where: str) -> str:
    from sparsify_deploy.errors import DataError

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


def _inputs(values: NDArray[Any], layout: str, where: str) -> NDArray[Any]:
    import numpy as np

    from sparsify_deploy.datasets._memory import floats
    from sparsify_deploy.errors import DataError

    if values.dtype != np.uint8:
        if values.dtype.kind != "f":
            raise DataError(f"{where}: inputs of type {values.dtype}, expected uint8 (0..255) or floats: convert them")
        values = floats(values, where)
    if layout == "NHW" and values.ndim == 3:
        return values[:, None]
    if layout == "NHWC" and values.ndim == 4:
        return np.ascontiguousarray(values.transpose(0, 3, 1, 2))
    return values
