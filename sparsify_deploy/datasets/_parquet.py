"""Opens Parquet files of encoded images and labels, one split a time."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsify_deploy.datasets import _arrow
from sparsify_deploy.datasets._encoded import Encoded
from sparsify_deploy.datasets._memory import targets
from sparsify_deploy.errors import DataError
from sparsify_deploy.menu import did_you_mean
from sparsify_deploy.preprocessing.images import check_pillow, short

_ROWS = 512
_LEAST_BYTES = 16
"""What a row takes in memory, be its image ever so small."""
_PURPOSE = "the parquet data set"


def stored(paths: Sequence[Path], *, image: str, label: str | None) -> Encoded:
    """The rows of some files, in order; labels are read now, images when they are asked for."""
    counts, labels = [], []
    for path in paths:
        with _open(path, (image,) if label is None else (image, label)) as file:
            counts.append(int(file.metadata.num_rows))
            _arrow.check_rows(counts[-1], _LEAST_BYTES, str(path))
            if label is not None:
                labels += [
                    targets(
                        _arrow.labels(column, label, f"{path}: row {row}"), f"{path}: column {label} from row {row}"
                    )
                    for row, column in _columns(path, file, label)
                ]
    if not sum(counts):
        raise DataError(f"{', '.join(map(str, paths))}: no rows")
    starts = [sum(counts[:i]) for i in range(len(counts))]

    def where(row: int) -> str:
        at = bisect_right(starts, row) - 1
        return f"{paths[at]}: row {row - starts[at]}"

    def batches() -> Iterator[list[bytes | Path]]:
        for path in paths:
            with _open(path, (image,)) as file:
                for row, column in _columns(path, file, image):
                    yield _arrow.contents(column, image, lambda i, path=path, row=row: f"{path}: row {row + i}")  # type: ignore[misc]

    return Encoded(sum(counts), np.concatenate(labels) if label is not None else None, batches, where)


def class_names(path: Path, label: str) -> tuple[str, ...] | None:
    """The names of a ClassLabel column in the Hugging Face metadata of the schema, or None where it has none."""
    with _open(path, ()) as file:
        metadata = file.schema_arrow.metadata or {}
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):  # a data set that never saw the `datasets` library
        return None
    return tuple(map(str, names)) if isinstance(names, list) else None


def _open(path: Path, columns: Sequence[str]) -> Any:
    _arrow.check_pyarrow(_PURPOSE)
    check_pillow(_PURPOSE)
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        known = file.schema_arrow.names
    except (pa.ArrowException, OSError, UnicodeDecodeError) as exc:
        raise DataError(f"{path}: not a readable Parquet file, damaged or cut short ({short(exc)})") from exc
    for column in columns:
        if column not in known:
            file.close()
            raise DataError(f"{path}: no column is called {column!r}{did_you_mean(column, known)}")
    return file


def _columns(path: Path, file: Any, name: str) -> Iterator[tuple[int, Any]]:
    """First row and values of one column, up to `_ROWS` rows a time and at least one."""
    import pyarrow as pa

    row = 0
    try:
        for batch in file.iter_batches(batch_size=_ROWS, columns=[name]):
            if batch.num_rows:
                batch.validate(full=True)
                yield row, batch.column(name)
            row += batch.num_rows
    except (pa.ArrowException, OSError) as exc:
        raise DataError(f"{path}: damaged at or after row {row} ({short(exc)})") from exc
