"""Reads columns of encoded images and labels; the only module of the data sets that knows pyarrow."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsify_deploy.datasets._memory import targets
from sparsify_deploy.errors import DataError, MissingExtra
from sparsify_deploy.menu import did_you_mean
from sparsify_deploy.preprocessing.images import Decoder, check_pillow, short, threads

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ROWS = 1024
_IMAGES_A_JOB = 64
_PURPOSE = "the parquet data set"


def read(
    paths: Sequence[Path], *, image: str, label: str, size: int | None, mode: str
) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """All images `(N, C, H, W)` and labels of some files, in the order of the files and rows."""
    decode = Decoder(mode, size)
    images: NDArray[np.uint8] | None = None
    labels: list[NDArray[Any]] = []
    done = 0
    with ExitStack() as stack, ThreadPoolExecutor(max_workers=threads()) as pool:
        opened = [stack.enter_context(_open(path, (image, label))) for path in paths]
        total = sum(file.metadata.num_rows for file in opened)
        if not total:
            raise DataError(f"{', '.join(map(str, paths))}: no rows")
        for path, file in zip(paths, opened, strict=True):
            for row, contents, some_labels in _batches(path, file, image, label):
                if images is None:
                    images = np.empty((total, *decode(contents[0], f"{path}: row {row}").shape), dtype=np.uint8)
                jobs = [
                    pool.submit(_fill_, decode, images[done + k :][: len(part)], part, path, row + k)
                    for k in range(0, len(contents), _IMAGES_A_JOB)
                    for part in [contents[k : k + _IMAGES_A_JOB]]
                ]
                for job in jobs:
                    job.result()
                labels.append(targets(some_labels, f"{path}: column {label} from row {row}"))
                done += len(contents)
    assert images is not None
    return images, np.concatenate(labels)


def _fill_(decode: Decoder, out: NDArray[np.uint8], contents: Sequence[bytes], path: Path, first_row: int) -> None:
    """Decode `contents` into `out` `(B, C, H, W)`; `first_row` is the row of the first in `path`."""
    for offset, content in enumerate(contents):
        where = f"{path}: row {first_row + offset}"
        pixels = decode(content, where)
        if pixels.shape != out.shape[1:]:
            raise DataError(
                f"{where}: an image of {pixels.shape[1:]}, the first is of {out.shape[2:]}: set size to resize them all"
            )
        out[offset] = pixels


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
    try:
        import pyarrow as pa  # type: ignore[import-untyped]
        from pyarrow import parquet
    except ImportError as exc:
        raise MissingExtra("pyarrow", "train", _PURPOSE) from exc
    check_pillow(_PURPOSE)
    try:
        file = parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as exc:
        raise DataError(f"{path}: not a readable Parquet file, damaged or cut short ({short(exc)})") from exc
    known = file.schema_arrow.names
    for column in columns:
        if column not in known:
            file.close()
            raise DataError(f"{path}: no column is called {column!r}{did_you_mean(column, known)}")
    return file


def _batches(path: Path, file: Any, image: str, label: str) -> Iterator[tuple[int, list[bytes], NDArray[Any]]]:
    """First row, encoded images and labels, up to `_ROWS` rows a time and at least one."""
    import pyarrow as pa

    row = 0
    try:
        for batch in file.iter_batches(batch_size=_ROWS, columns=[image, label]):
            if batch.num_rows:
                contents = _contents(path, row, batch.column(image))
                yield row, contents, _labels(f"{path}: row {row}", label, batch.column(label))
            row += batch.num_rows
    except (pa.ArrowException, OSError) as exc:
        raise DataError(f"{path}: damaged at or after row {row} ({short(exc)})") from exc


def _contents(path: Path, first_row: int, column: Any) -> list[bytes]:
    import pyarrow as pa

    kind = column.type
    names = [kind.field(i).name for i in range(kind.num_fields)] if pa.types.is_struct(kind) else []
    if "bytes" in names:
        column = column.flatten()[names.index("bytes")]
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise DataError(f"{path}: the image column is {kind}, expected encoded images: {{bytes, path}} or binary")
    if column.null_count:
        row = first_row + column.is_null().to_pylist().index(True)
        raise DataError(f"{path}: row {row}: no image bytes; images outside the Parquet file are not read")
    contents: list[bytes] = column.to_pylist()
    return contents


def _labels(where: str, label: str, column: Any) -> NDArray[Any]:
    import pyarrow as pa

    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_boolean(column.type)):
        raise DataError(f"{where}: column {label} is {column.type}, expected integers (classes) or floats (values)")
    if column.null_count:
        raise DataError(f"{where}: column {label} has an empty value here or shortly after")
    values: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return values
