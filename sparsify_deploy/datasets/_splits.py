"""Takes a test or validation split from the train split, each class in proportion, the same for the same seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsify_deploy.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparsify_deploy.datasets._params import WithValidation

    Rows = NDArray[np.int64]
    Pair = tuple[NDArray[Any], NDArray[Any]]


@dataclass(frozen=True)
class HeldOut:
    """Rows of the train split `(n,)`, ascending, by the split they go to; None where nothing was asked for it."""

    train: Rows
    test: Rows | None
    validation: Rows | None
    notes: tuple[str, ...] = ()


def hold_out(labels: NDArray[Any], params: WithValidation, where: str) -> HeldOut:
    """Share out the rows of a train split with `labels` `(N, ...)` as `test_fraction` and `validation_fraction` ask.

    Both are shares of all N. Integer labels `(N,)` are held out class by class, and each class keeps an example; with
    other targets any row may be. Raises DataError, begun by `where`, where a share comes to nothing or to all.
    """
    free = np.arange(len(labels))
    taken: dict[str, Rows | None] = {"test": None, "validation": None}
    notes = []
    for order, split in enumerate(taken):
        fraction = getattr(params, f"{split}_fraction", 0.0)
        if not fraction:
            continue
        count = round(fraction * len(labels))
        field = f"data.params.{split}_fraction"
        if not 0 < count < len(free):
            raise DataError(f"{where}: {field} {fraction:g} is {count} of {len(labels)} training examples: change it")
        # RandomState, because numpy promises its stream for ever, and default_rng's not.
        random = np.random.RandomState((params.split_seed + order * 0x9E3779B9) % 2**32)
        rows = _chosen(labels[free], count, random)
        if not len(rows):
            raise DataError(f"{where}: {field} {fraction:g} leaves no example: no class has one to spare")
        taken[split] = free[rows]
        free = np.delete(free, rows)
        notes.append(
            f"data: the {split} split is {len(rows):,} of {len(labels):,} training examples, held out "
            f"({split}_fraction {fraction:g}, split_seed {params.split_seed})"
        )
    return HeldOut(free, taken["test"], taken["validation"], tuple(notes))


def _chosen(labels: NDArray[Any], count: int, random: np.random.RandomState) -> Rows:
    """`count` rows or fewer, ascending, of each class in proportion; the largest remainders make the total exact."""
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        return np.sort(random.permutation(len(labels))[:count])
    _, classes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    exact = sizes * count / len(labels)
    take = np.floor(exact).astype(np.int64)  # below sizes, for count is below all
    order = np.argsort(take - exact, kind="stable")
    spare = order[take[order] < sizes[order] - 1][: count - int(take.sum())]
    take[spare] += 1
    grouped = np.split(np.argsort(classes, kind="stable"), np.cumsum(sizes)[:-1])
    chosen = [random.permutation(rows)[:some] for rows, some in zip(grouped, take, strict=True)]
    return np.sort(np.concatenate(chosen))


@dataclass(frozen=True)
class Parts:
    """Inputs and targets of each split; `test_rows` are the rows of the train split that testing took, if it did."""

    train: Pair
    test: Pair
    validation: Pair | None
    test_rows: Rows | None
    notes: tuple[str, ...]


def parted(train: Pair, test: Pair | None, validation: Pair | None, params: WithValidation, where: str) -> Parts:
    """The splits of arrays, those that are None taken from `train` where `params` ask for it.

    Raises DataError where there is no test split and none is asked for, or where one is asked for that exists.
    """
    check_asked(params, where, test=test is not None, validation=validation is not None)
    if len(train[0]) != len(train[1]):
        raise DataError(f"{where}: the train split has {len(train[0])} inputs and {len(train[1])} targets")
    held = hold_out(train[1], params, where)
    if held.test is None and held.validation is None:
        assert test is not None
        return Parts(train, test, validation, None, ())

    def rows(which: Rows) -> Pair:
        return train[0][which], train[1][which]

    test = rows(held.test) if held.test is not None else test
    assert test is not None
    validation = rows(held.validation) if held.validation is not None else validation
    return Parts(rows(held.train), test, validation, held.test, held.notes)


def check_asked(params: WithValidation, where: str, *, test: bool, validation: bool) -> None:
    """Refuse a share for a split that is there, and a data set without a test split and a share for it."""
    for split, there in (("test", test), ("validation", validation)):
        asked: float = getattr(params, f"{split}_fraction", 0.0)
        if there and asked:
            raise DataError(f"{where}: has a {split} split of its own: remove data.params.{split}_fraction")
    if not test and not getattr(params, "test_fraction", 0.0):
        raise DataError(f"{where}: has no test split: name it, or {GET_TEST}")


GET_TEST = "set data.params.test_fraction, such as 0.2, to hold out some of the train split"
GET_VALIDATION = "set data.params.validation_fraction, such as 0.1, to hold out some of the train split"
