"""Reads columns of texts and labels from Parquet, CSV and JSON Lines files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify_deploy.datasets._arrow import check_rows
from sparsify_deploy.errors import DataError, MissingExtra
from sparsify_deploy.menu import did_you_mean
from sparsify_deploy.preprocessing.images import short
from sparsify_deploy.preprocessing.text import is_unicode

if TYPE_CHECKING:
    from sparsify_deploy.datasets.text import Params

_NAMED = 5
_LEAST_BYTES = 128
"""What a row takes in memory, be its texts ever so short."""


@dataclass
class Rows:
    """Texts, or pairs of texts, with their labels as the files hold them; `where` names each, `left_out` the others."""

    texts: list[Any] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    where: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def at(self, indices: Sequence[int]) -> Rows:
        """The rows at `indices`."""
        texts, labels, where = ([values[i] for i in indices] for values in (self.texts, self.labels, self.where))
        return Rows(texts, labels, where)


def read(paths: Sequence[Path], params: Params) -> Rows:
    """The rows of some files, in order. A row without text or label is left out, or raises DataError.

    So does every file that cannot be read or lacks a column.
    """
    names = [params.text, *([params.text_pair] if params.text_pair is not None else []), params.label]
    rows = Rows()
    for path in paths:
        columns = _READERS[path.suffix](path, names)
        text, label = columns[params.text], columns[params.label]
        pair = columns[params.text_pair] if params.text_pair is not None else None
        for i in range(len(text.values)):
            where = f"{path}: {text.place} {text.first + i}"
            if reason := _objection([(name, columns[name].values[i]) for name in names], params.label, where):
                if params.unreadable == "raise":
                    raise DataError(f"{where}: {reason}; mend it, or set data.params.unreadable: skip")
                rows.left_out.append(f"{path.name} {text.place} {text.first + i}")
                continue
            rows.texts.append(text.values[i] if pair is None else (text.values[i], pair.values[i]))
            rows.labels.append(label.values[i])
            rows.where.append(where)
    total = len(rows.texts) + len(rows.left_out)
    if len(rows.left_out) > params.max_unreadable * total:
        raise DataError(
            f"{paths[0].parent}: {len(rows.left_out)} of {total} rows have no text or no label, more than "
            f"data.params.max_unreadable {params.max_unreadable:g} allows; the first: {rows.left_out[0]}"
        )
    if not rows.texts:
        raise DataError(f"{', '.join(map(str, paths))}: no rows")
    return rows


def left_out(rows: Rows, split: str) -> tuple[str, ...]:
    """The note on rows that were left out, if any."""
    if not rows.left_out:
        return ()
    total, names = len(rows.left_out) + len(rows.texts), ", ".join(rows.left_out[:_NAMED])
    more = ", ..." if len(rows.left_out) > _NAMED else ""
    what = f"{len(rows.left_out)} of {total} rows without text or label: {names}{more}"
    return (f"data: the {split} split leaves out {what}",)


def _objection(cells: Sequence[tuple[str, Any]], label: str, where: str) -> str:
    """Why a row cannot be used, "" where it can. Raises DataError for a text that is of another type."""
    for name, value in cells:
        if value is None or value == "":
            return f"{name} is empty"
        if name == label:
            continue
        if not isinstance(value, str):
            raise DataError(f"{where}: {name} holds {type(value).__name__}, expected text: name the column by data")
        if not value.strip():
            return f"{name} is empty"
        if not is_unicode(value):
            return f"{name} is not valid Unicode"
    return ""


@dataclass(frozen=True)
class _Column:
    """Values of a column; `place` and `first` say how a file counts them."""

    values: Sequence[Any]
    place: str
    first: int


def _parquet(path: Path, names: Sequence[str]) -> Mapping[str, _Column]:
    with _opened(path) as file:
        known = file.schema_arrow.names
        for name in names:
            if name not in known:
                raise _no_column(path, name, known)
        check_rows(file.metadata.num_rows, _LEAST_BYTES, str(path))
        table = _read(file, path, names)
    try:
        return {name: _Column(table.column(name).to_pylist(), "row", 0) for name in names}
    except UnicodeDecodeError as exc:
        raise DataError(f"{path}: a text in it is not UTF-8: save the file again") from exc


def class_names(path: Path, label: str) -> tuple[str, ...] | None:
    """The names of a ClassLabel column in Hugging Face's metadata of a Parquet file, or None where it has none."""
    if path.suffix != ".parquet":
        return None
    try:
        with _opened(path) as file:
            metadata = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])
        names = metadata["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):  # a file that the `datasets` library never wrote
        return None
    return tuple(map(str, names)) if isinstance(names, list) else None


def _opened(path: Path) -> Any:
    try:
        import pyarrow as pa  # type: ignore[import-untyped]
        from pyarrow import parquet
    except ImportError as exc:
        raise MissingExtra("pyarrow", "train", "the text data set") from exc
    try:
        file = parquet.ParquetFile(path)
        _ = file.schema_arrow.names
    except (pa.ArrowException, OSError, UnicodeDecodeError) as exc:
        raise _damaged(path, exc) from exc
    return file


def _read(file: Any, path: Path, names: Sequence[str]) -> Any:
    """Some columns, each value of them sound."""
    import pyarrow as pa

    try:
        table = file.read(columns=list(names))
        table.validate(full=True)
    except (pa.ArrowException, OSError) as exc:
        raise _damaged(path, exc) from exc
    return table


def _damaged(path: Path, exc: Exception) -> DataError:
    return DataError(f"{path}: not a readable Parquet file, damaged or cut short ({short(exc)})")


def _csv(path: Path, names: Sequence[str]) -> Mapping[str, _Column]:
    reader = csv.reader(io.StringIO(_content(path), newline=""), strict=True)
    columns: dict[str, list[str]] = {name: [] for name in names}
    try:
        header = next(reader, [])
        for name in names:
            if name not in header:
                raise _no_column(path, name, header)
        for i, row in enumerate(reader):
            if row and len(row) != len(header):
                raise DataError(f"{path}: record {i + 1} has {len(row)} cells, the header {len(header)}")
            for name in names:
                columns[name].append(row[header.index(name)] if row else "")
    except csv.Error as exc:
        raise DataError(f"{path}: line {reader.line_num}: not valid CSV ({exc})") from exc
    return {name: _Column(values, "record", 1) for name, values in columns.items()}


def _jsonl(path: Path, names: Sequence[str]) -> Mapping[str, _Column]:
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for i, line in enumerate(_content(path).rstrip("\n").split("\n")):
        try:
            row = json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError) as exc:
            raise DataError(f"{path}: line {i + 1}: not valid JSON ({short(exc)})") from exc
        if not isinstance(row, dict):
            raise DataError(f"{path}: line {i + 1}: holds no JSON object, as in {{{json.dumps(names[0])}: ...}}")
        if not i:
            for name in names:
                if name not in row:
                    raise _no_column(path, name, list(row))
        for name in names:
            columns[name].append(row.get(name))
    return {name: _Column(values, "line", 1) for name, values in columns.items()}


def _content(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise DataError(f"{path}: byte {exc.start} is not UTF-8: save the file as UTF-8") from exc
    except OSError as exc:
        raise DataError(f"{path}: cannot be read ({exc.strerror})") from exc


def _no_column(path: Path, name: str, known: Sequence[str]) -> DataError:
    hint = did_you_mean(name, known) if known else "; it has none"
    return DataError(f"{path}: no column is called {name!r}{hint}")


_READERS = {".parquet": _parquet, ".csv": _csv, ".jsonl": _jsonl}
