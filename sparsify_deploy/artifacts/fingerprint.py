"""Settings to canonical JSON to sha256: two results with one digest were made in the same way. Digests of files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from sparsify_deploy.artifacts.environment import available_cores
from sparsify_deploy.artifacts.hashing import ContentHash, bytes_digest

if TYPE_CHECKING:
    from sparsify_deploy.artifacts.hashing import Algorithm
    from sparsify_deploy.types import Json

BY_CONTENT = "<by content>"
"""Stands for a path: what is read from it enters a fingerprint by its digest, not by where it lies."""

_PLAIN = frozenset({type(None), bool, int, str})
_WORTH_A_THREAD_BYTES = 8 << 20


def canonical(obj: object) -> Json:
    """`obj` as JSON values that depend on its content alone, not on its class or the order of its fields.

    Dataclasses, pydantic models and mappings become dicts, tuples and lists become lists, a path becomes `BY_CONTENT`.
    Raises `TypeError` for any other type and `ValueError` for NaN and infinities.
    """
    if type(obj) in _PLAIN:
        return obj
    if isinstance(obj, (str, int, float, PurePath)):
        return _scalar(obj)
    if isinstance(obj, (tuple, list)):
        return [canonical(item) for item in obj]
    if isinstance(obj, BaseModel):
        return {name: canonical(getattr(obj, name)) for name in type(obj).model_fields}
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {f.name: canonical(getattr(obj, f.name)) for f in dataclasses.fields(obj)}
    if isinstance(obj, Mapping):
        if wrong := [key for key in obj if not isinstance(key, str)]:
            raise TypeError(f"key {wrong[0]!r} is not text, so its mapping has no canonical form")
        return {str(key): canonical(obj[key]) for key in sorted(obj)}
    raise TypeError(f"{type(obj).__module__}.{type(obj).__qualname__} has no canonical form")


def _scalar(obj: str | int | float | PurePath) -> Json:
    if isinstance(obj, PurePath):
        return BY_CONTENT
    if isinstance(obj, float) and not math.isfinite(obj):
        raise ValueError(f"{obj} has no canonical form")
    plain = next(kind for kind in (str, int, float) if isinstance(obj, kind))
    return plain(obj)  # of a subclass only the value counts


def canonical_text(obj: object) -> str:
    """Canonical JSON: sorted keys, no spaces, ASCII, floats by their shortest repr."""
    return json.dumps(canonical(obj), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(parts: Mapping[str, Any]) -> str:
    """The sha256, 64 hex digits, of a fingerprint's parts."""
    return hashlib.sha256(canonical_text(parts).encode("ascii")).hexdigest()


def file_digest(path: Path, algorithm: Algorithm = "sha256") -> str:
    """The digest of a file's bytes, or of a folder's relative file names and their digests, as `hashing` writes it.

    Links are followed. Raises `OSError` where something is missing, unreadable, or a loop of links.
    """
    return file_digests([path], algorithm)[0]


def file_digests(
    paths: Sequence[Path], algorithm: Algorithm = "sha256", single: dict[Path, str] | None = None
) -> list[str]:
    """`file_digest` of each path, with as many files at a time as there are cores; into `single` go those of files."""
    files = [[path / name for name in files_below(path)] if path.is_dir() else [path] for path in paths]
    flat = [one for each in files for one in each]
    threads = min(len(flat), available_cores())
    if threads > 1 and sum(one.stat().st_size for one in flat) > _WORTH_A_THREAD_BYTES:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(threads) as pool:
            digests = dict(zip(flat, pool.map(lambda one: _read_digest(one, algorithm), flat), strict=True))
    else:
        digests = {one: _read_digest(one, algorithm) for one in flat}
    if single is not None:
        single.update(digests)
    return [
        _folder_digest(path, each, digests, algorithm) if path.is_dir() else digests[path]
        for path, each in zip(paths, files, strict=True)
    ]


def _folder_digest(folder: Path, files: Sequence[Path], digests: Mapping[Path, str], algorithm: Algorithm) -> str:
    listed = [[one.relative_to(folder).as_posix(), digests[one]] for one in files]
    return bytes_digest(b"folder\0" + canonical_text(listed).encode("ascii"), algorithm)


def files_below(folder: Path) -> list[str]:
    """Relative names, with forward slashes and sorted, of all files in a folder and the folders in it."""
    names: list[str] = []

    def walk(inner: Path, prefix: str, above: tuple[tuple[int, int], ...]) -> None:
        status = inner.stat()
        here = (status.st_dev, status.st_ino)
        if here in above:
            raise OSError(f"{inner} links back to a folder that holds it")
        with os.scandir(inner) as entries:
            for entry in entries:
                if entry.is_dir():
                    walk(inner / entry.name, f"{prefix}{entry.name}/", (*above, here))
                else:
                    names.append(prefix + entry.name)

    walk(folder, "", ())
    return sorted(names)


def _read_digest(path: Path, algorithm: Algorithm) -> str:
    found = ContentHash(algorithm)
    if path.exists() and not path.is_file():  # reading a pipe or a device might never end
        raise OSError(f"{path} is neither a file nor a folder")
    with path.open("rb", buffering=0) as file:
        block = memoryview(bytearray(1 << 20))
        while size := file.readinto(block):
            found.update(block[:size])
    return found.text()
