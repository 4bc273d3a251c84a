"""Decodes the files of an image folder, and leaves out and counts those that are none."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsify_deploy.errors import DataError
from sparsify_deploy.preprocessing.images import Decoder, check_pillow, threads

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparsify_deploy.datasets.folder import Params

_NAMED = 5


def read(labelled: Sequence[tuple[Path, int]], params: Params) -> tuple[tuple[NDArray[np.uint8], NDArray[Any]], str]:
    """All images `(N, C, size, size)` and their classes `(N,)`, in the order given; and what was left out, in words.

    Raises DataError for the first file that is no image; with `unreadable: skip` only where they are more than
    `max_unreadable` of all, and then it says how many and which.
    """
    check_pillow("the folder data set")
    decode = Decoder(params.mode, params.size, params.fit)
    channels = 1 if params.mode == "L" else 3
    pixels = np.empty((len(labelled), channels, params.size, params.size), dtype=np.uint8)

    def fill(index: int) -> DataError | None:
        path = labelled[index][0]
        try:
            pixels[index] = decode(path.read_bytes(), str(path))
        except OSError as error:
            return DataError(f"{path}: cannot be read ({error.strerror})")
        except DataError as error:
            return error
        return None

    with ThreadPoolExecutor(max_workers=threads()) as pool:
        failed = {i: error for i, error in enumerate(pool.map(fill, range(len(labelled)))) if error is not None}
    labels = np.array([label for _, label in labelled], dtype=np.int64)
    if not failed:
        return (pixels, labels), ""
    _judge(list(failed.values()), len(labelled), params)
    kept = np.array([i not in failed for i in range(len(labelled))])
    names = ", ".join(str(labelled[i][0].relative_to(params.path)) for i in list(failed)[:_NAMED])
    more = ", ..." if len(failed) > _NAMED else ""
    left_out = f"{len(failed)} of {len(labelled)} files that are no images: {names}{more}"
    return (pixels[kept], labels[kept]), left_out


def _judge(failed: Sequence[DataError], total: int, params: Params) -> None:
    if params.unreadable == "raise":
        raise DataError(f"{failed[0]}; remove the file, or set data.params.unreadable: skip")
    if len(failed) > params.max_unreadable * total:
        raise DataError(
            f"{params.path}: {len(failed)} of {total} files are no images, more than data.params.max_unreadable "
            f"{params.max_unreadable:g} allows; the first: {failed[0]}"
        )
