"""Encoded images of any source become a data set: decoded by several threads, those that are none named and counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsify_deploy.datasets._arrow import check_rows
from sparsify_deploy.datasets._memory import Affine, MemoryDataSet, check_splits, data_set, numbers, unlabelled
from sparsify_deploy.datasets._splits import check_asked, hold_out
from sparsify_deploy.errors import DataError
from sparsify_deploy.preprocessing.images import Decoder, threads
from sparsify_deploy.preprocessing.spec import ImageSpec, samples

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparsify_deploy.datasets._params import Images
    from sparsify_deploy.datasets._splits import Rows

_A_JOB = 64
_NAMED = 5


@dataclass(frozen=True)
class Encoded:
    """One split as it is stored: `labels` `(count, ...)`, None where there are none, and images in the same order.

    `batches` gives them anew at each call, as bytes or as paths of files; `where` begins an error about a row.
    """

    count: int
    labels: NDArray[Any] | None
    batches: Callable[[], Iterable[Sequence[bytes | Path]]]
    where: Callable[[int], str]


@dataclass(frozen=True)
class _Decoded:
    pixels: NDArray[np.uint8]
    good: NDArray[np.bool_]
    kept: Mapping[int, bytes]
    """Some still encoded, by row."""


def image_set(
    stored: Mapping[str, Encoded],
    params: Images,
    affine_of: Callable[[NDArray[np.uint8]], Affine],
    where: str,
    *,
    classes: tuple[str, ...] | None = None,
    notes: Sequence[str] = (),
) -> MemoryDataSet:
    """The data set of the splits `stored`, of which `train` is one; the others are taken from it where `params` ask.

    Images `(N, C, H, W)`, uint8 in memory. Raises DataError for a split that is missing or asked for twice, images of
    several sizes where `params.size` is None, and images that cannot be decoded as `params.unreadable` says.
    """
    train = stored["train"]
    if train.labels is None:
        found, said = _decoded(train, "train", params, where)
        pixels = found.pixels if found.good.all() else found.pixels[found.good]
        affine = affine_of(pixels)
        return unlabelled(pixels, affine, (*notes, *said), _spec(params, affine, None))
    check_asked(params, where, test="test" in stored, validation="validation" in stored)
    held = hold_out(train.labels, params, where)
    home: dict[str, tuple[str, Rows]] = {"train": ("train", held.train)}
    for name, rows in (("test", held.test), ("validation", held.validation)):
        if rows is not None:
            home[name] = ("train", rows)
        elif name in stored:
            home[name] = (name, np.arange(stored[name].count))
    raw_from, raw_rows = home["test"]
    wanted = [int(raw_rows[i]) for i in samples(len(raw_rows))]
    decoded = {}
    notes = list(notes)
    for name, split in stored.items():
        decoded[name], said = _decoded(split, name, params, where, wanted if name == raw_from else ())
        notes += said
    pairs = {name: _rows(decoded[source], stored[source].labels, rows) for name, (source, rows) in home.items()}
    check_splits(pairs["train"], pairs["test"], where, pairs.get("validation"))
    affine = affine_of(pairs["train"][0])
    new = {int(row): i for i, row in enumerate(raw_rows[decoded[raw_from].good[raw_rows]])}
    return data_set(
        pairs["train"],
        pairs["test"],
        affine,
        classes,
        notes=(*notes, *held.notes),
        preprocessing=_spec(params, affine, classes),
        raw={new[row]: content for row, content in decoded[raw_from].kept.items()},
        validation=pairs.get("validation"),
    )


def _spec(params: Images, affine: Affine, classes: tuple[str, ...] | None) -> ImageSpec:
    return ImageSpec(params.mode, params.size, params.fit, *numbers(affine), classes=classes)


def _rows(found: _Decoded, labels: NDArray[Any] | None, rows: Rows) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    assert labels is not None
    if len(rows) == len(labels) and found.good.all():
        return found.pixels, labels
    kept = rows[found.good[rows]]
    return found.pixels[kept], labels[kept]


def _decoded(
    split: Encoded, name: str, params: Images, where: str, wanted: Sequence[int] = ()
) -> tuple[_Decoded, list[str]]:
    """All images of a split, and a line where some are left out; the rows `wanted` are kept encoded as well."""
    decode = Decoder(params.mode, params.size, params.fit)
    if not split.count:
        raise DataError(f"{where}: the {name} split is empty")
    pixels: NDArray[np.uint8] | None = None
    failed: dict[int, DataError] = {}
    kept: dict[int, bytes] = {}
    row = 0
    with ThreadPoolExecutor(max_workers=threads()) as pool:
        for contents in split.batches():
            starts = range(0, len(contents), _A_JOB)
            jobs = [pool.submit(_job, decode, contents[k : k + _A_JOB], split.where, row + k) for k in starts]
            for i, image in enumerate((image for job in jobs for image in job.result()), row):
                if isinstance(image, DataError):
                    failed[i] = image
                    if params.unreadable == "raise":
                        raise DataError(f"{image}; remove it, or set data.params.unreadable: skip")
                    continue
                if pixels is None:
                    check_rows(split.count, image.nbytes, f"{where}: the {name} split")
                    pixels = np.empty((split.count, *image.shape), dtype=np.uint8)
                if image.shape != pixels.shape[1:]:
                    raise DataError(
                        f"{split.where(i)}: an image of {image.shape[1:]}, the first is of {pixels.shape[2:]}: "
                        "set size to resize them all"
                    )
                pixels[i] = image
            kept |= {i: _bytes(contents[i - row]) for i in wanted if row <= i < row + len(contents) and i not in failed}
            row += len(contents)
    assert row == split.count
    if pixels is None or len(failed) > params.max_unreadable * split.count:
        raise DataError(
            f"{where}: {len(failed)} of {split.count} images of the {name} split cannot be read, more than "
            f"data.params.max_unreadable {params.max_unreadable:g} allows; the first: {next(iter(failed.values()))}"
        )
    good = np.ones(split.count, dtype=bool)
    good[list(failed)] = False
    found = _Decoded(pixels, good, kept)
    if not failed:
        return found, []
    names = ", ".join(split.where(i).removeprefix(f"{where}/") for i in sorted(failed)[:_NAMED])
    more = ", ..." if len(failed) > _NAMED else ""
    line = f"data: the {name} split leaves out {len(failed)} of {split.count} images that cannot be read: {names}{more}"
    return found, [line]


def _job(
    decode: Decoder, contents: Sequence[bytes | Path], where: Callable[[int], str], first_row: int
) -> list[NDArray[np.uint8] | DataError]:
    """Each image `(C, H, W)`, or why there is none."""
    found: list[NDArray[np.uint8] | DataError] = []
    for i, content in enumerate(contents, first_row):
        try:
            found.append(decode(_bytes(content), where(i)))
        except OSError as error:
            found.append(DataError(f"{where(i)}: cannot be read ({error.strerror})"))
        except DataError as error:
            found.append(error)
    return found


def _bytes(content: bytes | Path) -> bytes:
    return content.read_bytes() if isinstance(content, Path) else content


def batched(items: Sequence[bytes | Path], size: int = 256) -> Iterator[Sequence[bytes | Path]]:
    """`items` in runs of `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
