"""Digests of files that have not changed since they were last hashed, told from size, times and inode as git does."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparsify_deploy.artifacts import durable
from sparsify_deploy.artifacts.fingerprint import file_digests, files_below
from sparsify_deploy.errors import CorruptArtifact

if TYPE_CHECKING:
    from sparsify_deploy.artifacts.hashing import Algorithm
    from sparsify_deploy.types import Json

_COARSEST_CLOCK_NS = 10_000_000
"""File times may be this coarse: a file changed that shortly before it was hashed could change again unseen."""


Stamp = list[list[int]]


class DigestCache:
    """Digests of files and folders by path, kept in `file`. A file whose stamp differs is hashed again."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: dict[str, Json] | None = None
        self._changed = False

    def digest(self, path: Path, algorithm: Algorithm = "sha256") -> str:
        """`file_digest` of a path, read from memory where nothing changed. Raises `OSError` as that does."""
        entry = self._entries().get(str(path.absolute()), {})
        if algorithm in entry and entry["stamp"] == stamp(path):
            return str(entry[algorithm])
        return self.hash(path, algorithm)

    def hash(self, path: Path, algorithm: Algorithm = "sha256") -> str:
        """`file_digest` of a path, read now and remembered. Raises `OSError`."""
        return self.hash_all([path], algorithm)[0]

    def hash_all(
        self, paths: Sequence[Path], algorithm: Algorithm = "sha256", single: dict[Path, str] | None = None
    ) -> list[str]:
        """`hash` of each path, several files at a time; into `single` go those of each file."""
        before, began = [stamp(path) for path in paths], time.time_ns()
        found = file_digests(paths, algorithm, single)
        for path, then, digest in zip(paths, before, found, strict=True):
            newest = max((max(modified, changed) for _, modified, changed, _ in then), default=0)
            if stamp(path) == then and newest < began - _COARSEST_CLOCK_NS:
                known = self._entries().get(str(path.absolute()), {})
                others = known if known.get("stamp") == then else {}
                self._entries()[str(path.absolute())] = {**others, "stamp": then, algorithm: digest}
                self._changed = True
        return found

    def moved(self, old: Path, new: Path) -> None:
        """A folder was renamed, which changes no file in it."""
        entries, prefix = self._entries(), f"{old.absolute()}{os.sep}"
        for name in [name for name in entries if name.startswith(prefix)]:
            entries[str(new.absolute() / name[len(prefix) :])] = entries.pop(name)
            self._changed = True

    def save(self) -> None:
        """Write what is known of files that still exist."""
        if not self._changed:
            return
        kept = {name: entry for name, entry in self._entries().items() if os.path.exists(name)}
        durable.write_json(self._file, {"files": kept})
        self._changed = False

    def _entries(self) -> dict[str, Json]:
        if self._known is None:
            self._known = _read(self._file)
        return self._known


def _read(file: Path) -> dict[str, Json]:
    """The saved entries; none where the file is missing or damaged, for all in it can be computed again."""
    try:
        entries = durable.read_json(file)["files"]
        return {
            str(name): {
                "stamp": [list(map(int, one)) for one in entry["stamp"]],
                **{kind: str(entry[kind]) for kind in ("sha256", "blake3") if kind in entry},
            }
            for name, entry in entries.items()
        }
    except (OSError, CorruptArtifact, ValueError, KeyError, TypeError, AttributeError):
        return {}


def stamp(path: Path) -> Stamp:
    """Size, times of change (ns) and inode of a file, or of every file in a folder in the order of their names.

    Raises `OSError`.
    """
    files = [path / name for name in files_below(path)] if path.is_dir() else [path]
    found = []
    for file in files:
        status = file.stat()
        found.append([status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino])
    return found
