"""Reads Arrow columns of encoded images, numbers and labels."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify_deploy.errors import DataError, MissingExtra

if TYPE_CHECKING:
    from numpy.typing import NDArray


def check_pyarrow(purpose: str) -> None:
    """Raises MissingExtra where pyarrow is not installed."""
    try:
        import pyarrow  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as exc:
        raise MissingExtra("pyarrow", "train", purpose) from exc


def check_rows(rows: int, bytes_a_row: int, where: str) -> None:
    """Raises DataError where so many rows cannot be held in memory: a few bytes of Parquet may claim any number."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if rows < 0 or rows * bytes_a_row > memory:
        raise DataError(
            f"{where}: {rows:,} rows of {bytes_a_row:,} bytes or more do not fit into the {memory / 2**30:.0f} GiB of "
            "memory here: take fewer, or a smaller size"
        )


def contents(column: Any, name: str, where: Callable[[int], str], *, outside: bool = False) -> list[bytes | Path]:
    """The encoded images of a column of `{bytes, path}` or binary; `where` tells the place of a row in the column.

    An image that lies outside the data is a DataError, or its path where `outside` is allowed.
    """
    import pyarrow as pa

    kind = column.type
    names = [kind.field(i).name for i in range(kind.num_fields)] if pa.types.is_struct(kind) else []
    paths = column.flatten()[names.index("path")].to_pylist() if outside and "path" in names else None
    if "bytes" in names:
        column = column.flatten()[names.index("bytes")]
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise DataError(
            f"{where(0)}: the image column {name} is {kind}, expected encoded images: {{bytes, path}} or binary"
        )
    found: list[bytes | Path | None] = column.to_pylist()
    for row, content in enumerate(found):
        if content is None and paths is not None and paths[row] is not None:
            found[row] = Path(paths[row])
        elif content is None:
            raise DataError(f"{where(row)}: no image bytes; images outside the data's own files are not read")
    return [content for content in found if content is not None]


def labels(column: Any, name: str, where: str) -> NDArray[Any]:
    """A column of integers (classes), truth values or floats, as it is."""
    import pyarrow as pa

    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_boolean(column.type)):
        raise DataError(f"{where}: column {name} is {column.type}, expected integers (classes) or floats (values)")
    if column.null_count:
        raise DataError(f"{where}: column {name} has an empty value here or shortly after")
    values: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return values
