"""Opens data sets through the package `datasets`, quietly, and reads their columns as Arrow."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsify_deploy.datasets import _arrow
from sparsify_deploy.datasets._encoded import Encoded, image_set
from sparsify_deploy.datasets._memory import UNIT, data_set, floats, normalization, numbers, targets, unlabelled
from sparsify_deploy.datasets._memory import check_splits as check_alike
from sparsify_deploy.datasets._splits import GET_TEST, parted
from sparsify_deploy.datasets._zoo import imported
from sparsify_deploy.errors import DataError, EnvironmentProblem
from sparsify_deploy.menu import did_you_mean
from sparsify_deploy.preprocessing.images import check_pillow, short
from sparsify_deploy.preprocessing.spec import ArrayInput, ArraySpec, samples

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparsify_deploy.datasets._memory import Affine, MemoryDataSet
    from sparsify_deploy.datasets.huggingface import Params

    Tables = dict[str, Any]

_TEST_NAMES = ("test", "validation", "valid", "val")
_LABEL_NAMES = ("label", "labels")
_ROWS = 256
_ANSWER_S = 10.0
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ARROW = {".parquet": "Parquet", ".arrow": "Arrow"}


@contextmanager
def quiet() -> Iterator[Any]:
    """The package, without progress bars and messages of its own; as it was afterwards."""
    library, hub = imported("datasets"), imported("huggingface_hub")
    said, hub_said = library.logging.get_verbosity(), hub.logging.get_verbosity()
    bars, hub_bars = library.are_progress_bars_disabled(), hub.utils.are_progress_bars_disabled()
    library.logging.set_verbosity(library.logging.CRITICAL)
    hub.logging.set_verbosity(hub.logging.CRITICAL)
    library.disable_progress_bars()
    hub.utils.disable_progress_bars()
    try:
        yield library
    finally:
        library.logging.set_verbosity(said)
        hub.logging.set_verbosity(hub_said)
        if not bars:
            library.enable_progress_bars()
        if not hub_bars:
            hub.utils.enable_progress_bars()


def local(library: Any, there: Mapping[str, Path], params: Params) -> Tables:
    """The splits of the local data set that consists of the files `there`, by their own names. Raises DataError."""
    path = params.path
    assert path is not None
    if path.is_dir() and ("dataset_dict.json" in there or "state.json" in there):
        _check_saved(path, there)
        try:
            found = library.load_from_disk(str(path))
        except Exception as error:  # damaged files end in exceptions of many kinds
            raise DataError(f"{path}: cannot be read as save_to_disk leaves it, damaged ({short(error)})") from error
        for table in found.values() if isinstance(found, Mapping) else (found,):
            _check_sound(table.data.table, path)
        return dict(found) if isinstance(found, Mapping) else {params.train: found}
    loose = {below: file for below, file in there.items() if file.suffix in _ARROW}
    if not loose:
        raise DataError(f"{path}: holds neither what save_to_disk leaves nor .parquet or .arrow files")
    if path.is_file():
        return {params.train: _table(library, [path])}
    splits: dict[str, list[Path]] = {}
    known = (params.train, params.test, params.validation, "train", *_TEST_NAMES)
    for below, file in loose.items():
        words = re.split(r"[/._-]", below)
        names = [name for name in dict.fromkeys(known) if name is not None and (name in words or name == below)]
        if len(names) > 1:
            raise DataError(f"{file}: belongs to {' and '.join(names)} by its path: rename it")
        splits.setdefault(names[0] if names else "", []).append(file)
    if set(splits) == {""}:
        splits = {params.train: splits[""]}
    return {name: _table(library, paths) for name, paths in splits.items() if name}


def _check_saved(path: Path, there: Mapping[str, Path]) -> None:
    """Raises DataError where what save_to_disk leaves names files that lie elsewhere, which it never does."""
    try:
        splits = json.loads(there["dataset_dict.json"].read_bytes())["splits"] if "dataset_dict.json" in there else [""]
        named = [*splits]
        for split in splits:
            if not isinstance(split, str):
                raise TypeError(f"a split is {type(split).__name__}")
            state = there.get(f"{split}/state.json" if split else "state.json")
            listed = json.loads(state.read_bytes())["_data_files"] if state is not None else []
            named += [each["filename"] for each in listed]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as save_to_disk leaves it, damaged ({short(error)})") from error
    for name in named:
        if not isinstance(name, str) or Path(name).name != name or name == ".." or ":" in name:
            raise DataError(f"{path}: names {str(name)[:200]!r}, which is no file of it: save it again")


def _check_sound(table: Any, where: Path) -> None:
    """Raises DataError where a value is not: Arrow takes offsets as they come, and reads beyond the file."""
    import pyarrow as pa  # type: ignore[import-untyped]

    try:
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{where}: damaged ({short(error)})") from error


def _table(library: Any, paths: Sequence[Path]) -> Any:
    import pyarrow as pa
    from pyarrow import ipc, parquet

    tables = []
    for path in paths:
        try:
            if path.suffix == ".parquet":
                with parquet.ParquetFile(path) as file:
                    _arrow.check_rows(file.metadata.num_rows, 1, str(path))
                    tables.append(file.read())
            else:
                tables.append(ipc.open_stream(pa.memory_map(str(path))).read_all())
            _check_sound(tables[-1], path)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            kind = _ARROW[path.suffix]
            raise DataError(f"{path}: not a readable {kind} file, damaged or cut short ({short(error)})") from error
    try:
        return library.Dataset(pa.concat_tables(tables), fingerprint="local")
    except Exception as error:  # features in the metadata of a file may be anything
        raise DataError(f"{paths[0].parent}: its files do not fit each other ({short(error)})") from error


def from_hub(library: Any, params: Params) -> tuple[Tables, tuple[str, ...]]:
    """The splits of a data set of the hub, or of its copy in the cache where HF_HUB_OFFLINE is set; and what to note.

    One short question comes first, for the library asks for half a minute where nobody answers. Raises DataError
    where there is no such data set, EnvironmentProblem where the hub or the copy cannot be had.
    """
    hub = imported("huggingface_hub")
    name = params.name
    try:
        if not hub.constants.is_offline_mode():
            hub.HfApi().dataset_info(name, revision=params.revision, timeout=_ANSWER_S)
        found = library.load_dataset(name, params.config, revision=params.revision)
    except (hub.errors.RepositoryNotFoundError, hub.errors.RevisionNotFoundError) as error:
        revision = f" at revision {params.revision}" if params.revision else ""
        raise DataError(
            f"the hub has no data set {name!r}{revision} that you may read: check data.params.name, or log in"
        ) from error
    except hub.errors.HFValidationError as error:
        raise DataError(f"data.params.name {name!r} is no name of the hub, such as ylecun/mnist") from error
    except (OSError, hub.errors.HfHubHTTPError, *_network_errors()) as error:
        raise EnvironmentProblem(
            f"data set {name}: the Hugging Face hub cannot be reached ({short(error)}); save it where there is a "
            "network with save_to_disk and give data.params.path, or set HF_HUB_OFFLINE=1 to use the copy in the cache"
        ) from error
    except (ValueError, RuntimeError, library.exceptions.DatasetsError) as error:
        raise DataError(f"data set {name}: {short(error)}") from error
    pinned = params.revision is not None and _COMMIT.fullmatch(params.revision)
    note = (
        f"data: {name} is what the hub has as {params.revision or 'its latest'}, which may change and is not seen when "
        "it does: give a commit as data.params.revision"
    )
    return dict(found), () if pinned else (note,)


def _network_errors() -> tuple[type[Exception], ...]:
    httpx = imported("httpx")
    return (httpx.HTTPError,)


def data_set_of(found: Tables, notes: Sequence[str], params: Params) -> MemoryDataSet:
    """The data set of the splits and columns that `params` name."""
    where = str(params.path or params.name)
    splits = _splits(found, params, where)
    names = {"train": params.train, **{split: name for split, (name, _) in splits.items()}}
    tables = {split: table for split, (_, table) in splits.items()}
    input_name, is_image = _input_column(tables["train"].features, params, where)
    label = _label_column(tables["train"].features, params, where) if params.labels else None
    classes = getattr(tables["train"].features[label], "names", None) if label is not None else None
    for split, table in tables.items():
        for column in (input_name, label):
            if column is not None and column not in table.features:
                raise DataError(f"{where}: the split {names[split]} has no column {column!r}")
    if params.test is None and names.get("test") not in (None, "test"):
        notes = (*notes, f"data: there is no split test, {names['test']} is the test split")
    labels = {split: _labels(table, label, f"{where}: {names[split]}") for split, table in tables.items()}
    if is_image:
        check_pillow("the huggingface data set")
        stored = {
            split: _encoded(table, input_name, labels[split], f"{where}: {names[split]}", outside=params.path is None)
            for split, table in tables.items()
        }
        affine_of = partial(normalization, params.normalize, grey=params.mode == "L")
        return image_set(stored, params, affine_of, where, classes=tuple(classes) if classes else None, notes=notes)
    arrays = {split: _numbers(table, input_name, f"{where}: {names[split]}") for split, table in tables.items()}
    return _array_set(arrays, labels, tuple(classes) if classes else None, notes, params)


def _splits(found: Tables, params: Params, where: str) -> dict[str, tuple[str, Any]]:
    """Role to the split's own name and table."""
    if params.train not in found:
        raise DataError(f"{where}: has no split {params.train!r}{did_you_mean(params.train, found)}")
    chosen = {"train": (params.train, found[params.train])}
    if not params.labels:
        return chosen
    for role, name in (("validation", params.validation), ("test", params.test)):
        if name is not None and name not in found:
            raise DataError(f"{where}: has no split {name!r} for data.params.{role}{did_you_mean(name, found)}")
        if name is not None:
            chosen[role] = (name, found[name])
    if params.test is None:
        taken = {name for name, _ in chosen.values()}
        free = [name for name in _TEST_NAMES if name in found and name not in taken]
        if free:
            chosen["test"] = (free[0], found[free[0]])
        elif not params.test_fraction:
            raise DataError(
                f"{where}: has no test split among {', '.join(found)}: name it as data.params.test, or {GET_TEST}"
            )
    named = [name for name, _ in chosen.values()]
    if len(set(named)) < len(named):
        raise DataError(f"{where}: one split has two roles: {', '.join(f'{r} {n}' for r, (n, _) in chosen.items())}")
    return chosen


def _is_image(feature: Any) -> bool:
    if type(feature).__name__ == "Image":
        return True
    fields = set(feature) if isinstance(feature, Mapping) else set()
    return "bytes" in fields or getattr(feature, "dtype", None) in ("binary", "large_binary")


def _input_column(features: Mapping[str, Any], params: Params, where: str) -> tuple[str, bool]:
    """The name of the column of inputs, and whether it holds encoded images."""
    name = params.input
    if name is None:
        images = [each for each, feature in features.items() if _is_image(feature)]
        texts = [each for each, feature in features.items() if _leaf(feature) == "string"]
        if not images and texts:
            raise DataError(
                f"{where}: has no column of images, and text in {', '.join(texts)}: save each split with to_parquet "
                "into one folder and use data.source text, or name a column of numbers as data.params.input"
            )
        if len(images) != 1:
            many = f"{len(images)} columns of images" if images else "no column of images"
            raise DataError(f"{where}: has {many}: name the inputs as data.params.input, one of {', '.join(features)}")
        name = images[0]
    if name not in features:
        raise DataError(f"{where}: no column is called {name!r}{did_you_mean(name, features)}")
    feature = features[name]
    if not _is_image(feature) and _leaf(feature) == "string":
        raise DataError(f"{where}: column {name} holds text: save it with to_parquet and use data.source text")
    return name, _is_image(feature)


def _label_column(features: Mapping[str, Any], params: Params, where: str) -> str:
    name = params.label
    if name is None:
        found = [each for each, feature in features.items() if type(feature).__name__ == "ClassLabel"]
        found = found or [each for each in _LABEL_NAMES if each in features]
        if len(found) != 1:
            many = f"several columns of labels, {', '.join(found)}" if found else "no column of labels"
            raise DataError(
                f"{where}: has {many}: name one as data.params.label, or set data.params.labels false for calibration"
            )
        name = found[0]
    if name not in features:
        raise DataError(f"{where}: no column is called {name!r}{did_you_mean(name, features)}")
    return name


def _leaf(feature: Any) -> str:
    """The type of the numbers in nested lists, `string`, or "" where it cannot be told."""
    while getattr(feature, "feature", None) is not None:
        feature = feature.feature
    return str(getattr(feature, "dtype", ""))


def _labels(table: Any, label: str | None, where: str) -> NDArray[Any] | None:
    if label is None:
        return None
    place = f"{where}: column {label}"
    columns = [batch.column(label) for batch in _batches(table, label, where)]
    values = [_arrow.labels(column, label, where) for column in columns]
    whole = np.concatenate(values) if values else np.empty(0, dtype=np.int64)
    if len(whole) and whole.dtype.kind == "i" and int(whole.max()) == -1:
        raise DataError(f"{where}: every label is -1, which stands for none: this split was published without labels")
    return targets(whole, place)


def _batches(table: Any, column: str, where: str) -> Iterator[Any]:
    """One column as Arrow, `_ROWS` rows a time."""
    import pyarrow as pa

    try:
        yield from table.select_columns([column]).with_format("arrow").iter(batch_size=_ROWS)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{where}: damaged ({short(error)})") from error


def _encoded(table: Any, name: str, labels: NDArray[Any] | None, where: str, *, outside: bool) -> Encoded:
    def place(row: int) -> str:
        return f"{where}: row {row}"

    def batches() -> Iterator[list[bytes | Path]]:
        row = 0
        for batch in _batches(table, name, where):
            shifted: Callable[[int], str] = partial(_shifted, place, row)
            column = batch.column(name).combine_chunks()
            yield _arrow.contents(column, name, shifted, outside=outside)
            row += batch.num_rows

    return Encoded(len(table), labels, batches, place)


def _shifted(place: Callable[[int], str], first: int, row: int) -> str:
    return place(first + row)


def _numbers(table: Any, name: str, where: str) -> NDArray[Any]:
    """A column of equally long lists of numbers `(N, ...)`, uint8 or float32."""
    if not len(table):
        raise DataError(f"{where}: there are no rows")
    kind = _leaf(table.features[name])
    parts: list[NDArray[Any]] = []
    row = 0
    for batch in table.select_columns([name]).with_format("numpy").iter(batch_size=4 * _ROWS):
        part = batch[name]
        if not isinstance(part, np.ndarray) or part.dtype == object or (parts and part.shape[1:] != parts[0].shape[1:]):
            raise DataError(f"{where}: column {name} has rows of several lengths or empty ones at or after row {row}")
        parts.append(part)
        row += len(part)
    values = np.concatenate(parts)
    if kind == "uint8":
        return values.astype(np.uint8)
    if values.dtype.kind != "f":
        raise DataError(f"{where}: column {name} is {kind or values.dtype}, expected uint8 or floats: convert it")
    return floats(values, f"{where}: column {name}")


def _array_set(
    arrays: Mapping[str, NDArray[Any]],
    labels: Mapping[str, NDArray[Any] | None],
    classes: tuple[str, ...] | None,
    notes: Sequence[str],
    params: Params,
) -> MemoryDataSet:
    where = str(params.path or params.name)
    affine: Affine | None = UNIT if arrays["train"].dtype == np.uint8 else None
    pairs = {split: (values, known) for split, values in arrays.items() if (known := labels[split]) is not None}
    if "train" not in pairs:
        return unlabelled(arrays["train"], affine, tuple(notes))
    parts = parted(pairs["train"], pairs.get("test"), pairs.get("validation"), params, where)
    check_alike(parts.train, parts.test, where, parts.validation)
    inputs = parts.test[0]
    scale = numbers(affine) if affine is not None else ((), ())
    described = ArrayInput("input", "uint8" if affine is not None else "float32", inputs.shape[1:], "any", *scale)
    return data_set(
        parts.train,
        parts.test,
        affine,
        classes,
        notes=(*notes, *parts.notes),
        preprocessing=ArraySpec((described,), example=f"column {params.input} of one row", classes=classes),
        raw={i: inputs[i].copy() for i in samples(len(inputs))},
        validation=parts.validation,
    )
