"""What a folder that `run` worked in holds, told from the marks in it alone: no recipe, no plan, no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sparsify_deploy.artifacts import durable, layout
from sparsify_deploy.artifacts.store import MANIFEST, PARTS
from sparsify_deploy.errors import DataError
from sparsify_deploy.reports import REPORTS, RunReport, read_report

_RESULT = re.compile(r"(?P<stage>[a-z][a-z0-9_.]*)-(?P<fingerprint>[0-9a-f]{64})(?P<partial>\.partial)?")
_OURS = (durable.NEW, durable.OLD)
"""The endings of what is half written or half deleted, which nothing else has."""

_BEFORE = re.compile(rf"{_RESULT.pattern}\.discarded|digests\.json\.new")
_PUBLISHED_BEFORE = re.compile(r"(report\.(json|md|html)|recipe\.yaml|deploy)\.partial|deploy\.discarded")
"""The same by release 0.1.0, in a store and in a run directory."""


@dataclass(frozen=True)
class Entry:
    """A folder of the store that is named like a result. `unfinished`: an attempt at one."""

    path: Path
    stage: str
    fingerprint: str
    unfinished: bool

    @property
    def marked(self) -> bool:
        """Whether it holds what every folder of a stage holds from its beginning."""
        names = (PARTS, MANIFEST) if self.unfinished else (MANIFEST,)
        return any((self.path / name).is_file() and not (self.path / name).is_symlink() for name in names)


@dataclass(frozen=True)
class RunDirectory:
    """A run directory and its store."""

    folder: Path
    store: Path

    @cached_property
    def report(self) -> RunReport | None:
        """The report of the last run that got so far, None where there is none. Raises `CorruptArtifact`."""
        return read_report(self.folder) if (self.folder / REPORTS[0]).is_file() else None

    @cached_property
    def steps(self) -> Mapping[str, str]:
        """The fingerprints that the report names, with the steps they are of."""
        found: dict[str, str] = {}
        for step in self.report.steps if self.report is not None else ():
            found[step.fingerprint] = f"{found[step.fingerprint]}, {step.id}" if step.fingerprint in found else step.id
        return found

    def entries(self) -> list[Entry]:
        """Every folder of the store that is named like a result, by name; links are none."""
        found = []
        for entry in sorted(os.scandir(self.store), key=lambda entry: entry.name):
            named = _RESULT.fullmatch(entry.name)
            if named is not None and entry.is_dir(follow_symlinks=False):
                unfinished = named["partial"] is not None
                found.append(Entry(Path(entry.path), named["stage"], named["fingerprint"], unfinished))
        return found

    def strays(self) -> Iterator[Path]:
        """What a killed process left half written or half deleted, under names that nothing else has."""
        yield from _named(self.store, _OURS, _BEFORE)
        yield from _named(self.store / "last", (*_OURS, ".json.new"))
        for entry in self.entries():
            if entry.unfinished and entry.marked:
                yield from _named(entry.path, _OURS)
        yield from _named(Path(os.path.realpath(self.folder)), _OURS, _PUBLISHED_BEFORE)
        for kind in ("onnx", "engines", "triton"):
            yield from _named(self.folder / kind, _OURS)
            for inner in _folders(self.folder / kind):
                yield from _named(inner, (*_OURS, ".partial") if kind != "triton" else _OURS)


def find(folder: Path, store: Path | None = None) -> RunDirectory:
    """The run directory `folder`; `store` is where its results lie if not in it.

    Raises `DataError` where it is none, or was laid out by a newer program.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise DataError(f"{folder}: {what}; name a run directory, such as runs/digits")
    place = store or folder / "store"
    found = RunDirectory(folder, place)
    if not place.is_dir() or not (_is_lock(place / ".lock") or found.entries()):
        where = "its store is elsewhere: give it with --store" if (folder / "report.json").is_file() else "no run in it"
        asked = f"{store}: holds no results of a run" if store is not None else f"{folder}: {where}"
        raise DataError(f"{asked}; name a run directory, such as runs/digits")
    layout.check(place)
    return found


def _is_lock(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _named(folder: Path, endings: tuple[str, ...], names: re.Pattern[str] | None = None) -> Iterator[Path]:
    """What lies in `folder` with one of the endings, or is called as `names` says; nothing where that is a link."""
    if folder.is_dir() and not folder.is_symlink():
        for entry in os.scandir(folder):
            if entry.name.endswith(endings) or (names is not None and names.fullmatch(entry.name)):
                yield Path(entry.path)


def _folders(folder: Path) -> Iterator[Path]:
    if folder.is_dir() and not folder.is_symlink():
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False) and not entry.name.endswith(_OURS):
                yield Path(entry.path)
