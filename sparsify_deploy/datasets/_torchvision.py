"""Opens sets through torchvision, downloads them where that is asked for, and reads their images and labels."""

from __future__ import annotations

import contextlib
import io
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsify_deploy.datasets._encoded import Encoded
from sparsify_deploy.datasets._memory import targets
from sparsify_deploy.datasets._zoo import imported
from sparsify_deploy.errors import DataError, EnvironmentProblem, MissingExtra
from sparsify_deploy.preprocessing.images import check_pillow, short

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparsify_deploy.datasets.torchvision import Params, Set

_ROWS = 256
_BROKEN = (OSError, RuntimeError, ValueError, EOFError, AssertionError, LookupError, TypeError)
"""What torchvision's readers raise for files that are missing, damaged or of something else."""

_SILENT_S = 30.0
"""A server that says nothing for so long is not reached; torchvision itself would wait for ever."""


def splits(known: Set, params: Params) -> dict[str, Any]:
    """torchvision's own object for each split. Raises DataError, EnvironmentProblem."""
    check_pillow("the torchvision data set")
    asked: dict[str, str | bool | None] = {"train": known.train}
    if known.test is not None and params.labels:
        asked["test"] = known.test
    if params.validation is not None and params.labels:
        if params.validation not in known.others:
            own = f"has {', '.join(known.others)}" if known.others else "has none: set data.params.validation_fraction"
            raise DataError(f"data.params.validation {params.validation!r}: {params.name} {own}")
        asked["validation"] = params.validation
    return {split: _opened(value, params) for split, value in asked.items()}


def _opened(value: str | bool | None, params: Params) -> Any:
    made = getattr(imported("torchvision").datasets, params.name)
    field = {} if value is None else {"train" if isinstance(value, bool) else "split": value}
    where = f"{params.path}: {params.name}"
    try:
        return made(str(params.path), **field)
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or "a package", "train", f"torchvision's {params.name}") from error
    except _BROKEN as error:
        if not params.download:
            raise DataError(
                f"{where}: cannot be read ({short(error)}): get its files, or set data.params.download"
            ) from error
    try:
        with _patient_and_quiet():
            return made(str(params.path), **field, download=True)
    except _BROKEN as error:
        raise EnvironmentProblem(
            f"{where}: cannot be downloaded ({short(error)}); fetch it where there is a network and copy the folder"
        ) from error


@contextlib.contextmanager
def _patient_and_quiet() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SILENT_S)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(before)


def encoded(found: Any, params: Params, split: str) -> Encoded:
    """A split as PNG images, which lose nothing, so that they are decoded and resized like any others."""
    where = f"{params.path}: {params.name}: {split}"

    def place(row: int) -> str:
        return f"{where}: image {row}"

    def batches() -> Iterator[list[bytes | Path]]:
        for start in range(0, len(found), _ROWS):
            yield [_png(found, i) for i in range(start, min(start + _ROWS, len(found)))]

    return Encoded(len(found), _labels(found, where) if params.labels else None, batches, place)


def _png(found: Any, index: int) -> bytes:
    """One image as PNG; what cannot be read is empty, which no decoder takes for an image."""
    try:
        image = found[index][0]
    except (OSError, ValueError, SyntaxError):
        return b""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _labels(found: Any, where: str) -> NDArray[Any]:
    for name in ("targets", "labels", "_labels"):
        values = getattr(found, name, None)
        if values is not None and len(values) == len(found):
            return targets(np.asarray(values), where)
    return targets(np.array([found[i][1] for i in range(len(found))]), where)


def class_names(found: Any) -> tuple[str, ...] | None:
    """The names of the classes by label; the first of several names; None where torchvision has none."""
    names = getattr(found, "classes", None)
    return tuple(name if isinstance(name, str) else str(name[0]) for name in names) if names else None
