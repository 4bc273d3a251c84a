"""Deletes from a run directory what nothing needs, and says what and how much. Torch-free.

Only what this program made goes, told by marks that nothing else has: the two endings of what is half written or half
deleted, and folders of the store that are named by a fingerprint and hold a manifest or the parts of one. Links are
never followed; of one with such a name only the name goes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sparsify_deploy.artifacts import durable
from sparsify_deploy.artifacts.store import ArtifactStore, holding
from sparsify_deploy.checkup import run_directory
from sparsify_deploy.checkup.run_directory import Entry, RunDirectory
from sparsify_deploy.errors import UsageError


@dataclass(frozen=True)
class Piece:
    """A file or folder with its size and what it is; `goes`: deleted, or to be deleted."""

    path: Path
    bytes: int
    why: str
    goes: bool


@dataclass(frozen=True)
class Cleaned:
    """What was looked at; `freed_bytes` of what went, or would go where it is a `dry_run`."""

    folder: Path
    dry_run: bool
    pieces: tuple[Piece, ...]

    @property
    def freed_bytes(self) -> int:
        """The sum over what goes."""
        return sum(piece.bytes for piece in self.pieces if piece.goes)


def clean(
    folder: Path, store: Path | None = None, *, unfinished: bool = False, unused: bool = False, dry_run: bool = False
) -> Cleaned:
    """Delete leftovers of killed runs and, where asked for, unfinished attempts and results that no report uses.

    Raises DataError where `folder` is no run directory, `Locked` where a run is at work in it, UsageError where
    `unused` is asked for and no report says what is used, and CorruptArtifact where that cannot be read.
    """
    run = run_directory.find(folder, store)
    if (unused or unfinished) and store is not None:
        option = "--unused" if unused else "--unfinished"
        raise UsageError(f"{option}: {store} may be shared with other recipes, whose results these are: leave it out")
    if unused and run.report is None:
        raise UsageError(f"--unused: {folder} has no report that says which results are used: finish a run first")
    found = tuple(_pieces(run, unfinished=unfinished, unused=unused))
    if not dry_run:
        held = holding(run.folder, ArtifactStore(run.store))  # taking it sweeps the store's leftovers
        with held, durable.explained(run.store):
            doomed = [piece.path for piece in _pieces(run, unfinished=unfinished, unused=unused) if piece.goes]
            for path in doomed:
                _delete(path)
    gone = tuple(piece for piece in found if dry_run or not piece.goes or not os.path.lexists(piece.path))
    return Cleaned(folder, dry_run, gone)


def _pieces(run: RunDirectory, *, unfinished: bool, unused: bool) -> Iterator[Piece]:
    for path in run.strays():
        yield Piece(path, size(path), "left half written or half deleted by a killed process", True)
    for entry in run.entries():
        if not entry.marked:
            yield Piece(entry.path, size(entry.path), "holds no mark of this program: look at it yourself", False)
        elif entry.unfinished:
            why = f"an attempt at {entry.stage} that a run goes on from{'' if unfinished else ' (--unfinished)'}"
            yield Piece(entry.path, size(entry.path), why, unfinished)
        elif run.report is not None and not _is_used(run, entry):
            why = f"a result of {entry.stage} that the last report does not use{'' if unused else ' (--unused)'}"
            yield Piece(entry.path, size(entry.path), why, unused)


def _is_used(run: RunDirectory, entry: Entry) -> bool:
    return entry.fingerprint in run.steps


def _delete(path: Path) -> None:
    """Of a result first its name, so that no crash leaves a part of it under that."""
    if path.is_dir() and not path.is_symlink() and not path.name.endswith((durable.NEW, durable.OLD)):
        durable.delete(path)
    else:
        durable.remove(path)


def size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; links count as themselves."""
    if not path.is_dir() or path.is_symlink():
        return os.lstat(path).st_size
    return sum(os.lstat(Path(inner, name)).st_size for inner, _, names in os.walk(path) for name in names)
