"""Writing what must survive a crash: under its name a file is whole, or it is not there.

Everything is written beside its place under a name that ends in `NEW`, brought to the disk, and renamed. A folder that
goes, or makes way for another, is renamed first to a name that ends in `OLD`. So whatever a crash leaves behind has one
of these two endings, which nobody else uses, and `sweep` may delete it.

A sealed JSON file also says in its first line what its other bytes must be.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from sparsify_deploy.artifacts.hashing import ContentHash, algorithm_of, difference
from sparsify_deploy.errors import CorruptArtifact, OutOfResources, UsageError
from sparsify_deploy.safety import regular

if TYPE_CHECKING:
    from sparsify_deploy.types import Json

    Bytes = bytes | bytearray | memoryview

NEW = ".sparsify-new"
OLD = ".sparsify-old"
_SEALED = b'{"sealed": "'
_BLOCK = 1 << 20
FULL = {
    errno.ENOSPC: "the disk is full: free some",
    errno.EDQUOT: "the disk quota is used up: free some",
    errno.EFBIG: "no file may be that large here: raise the limit (ulimit -f)",
}
"""What keeps a file from being written for want of room, and what to do."""
_UNWRITABLE = frozenset(
    {
        errno.EACCES,
        errno.EEXIST,
        errno.EINVAL,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOTDIR,
        errno.EPERM,
        errno.EROFS,
    }
)


# -- files ---------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields where to write the file that takes the place of `path`; any exception leaves `path` as it is.

    Who writes it brings it to the disk.
    """
    fresh = _aside(path, NEW)
    try:
        yield fresh
        os.replace(fresh, path)
    except BaseException:
        with suppress(OSError):  # the folder itself may be what is wrong
            fresh.unlink()
        raise


def write(path: Path, pieces: Iterable[Bytes]) -> None:
    """Replace a file by `pieces`, one after the other. Raises `OSError`, and then `path` is as it was."""
    with replacing(path) as fresh, fresh.open("wb") as file:
        for piece in pieces:
            file.write(piece)
        flush(file)


def write_text(path: Path, text: str) -> None:
    """Replace a file by UTF-8 text, as `write`."""
    write(path, [text.encode()])


def copy(source: Path, target: Path, digest: str) -> None:
    """Replace `target` by a copy of the file `source`, as `write`.

    Raises `CorruptArtifact`, and leaves `target` as it was, where the bytes that were read are not those of `digest`.
    """
    found = ContentHash(algorithm_of(digest))
    with source.open("rb", buffering=0) as original:

        def read() -> Iterator[bytes]:
            while block := original.read(_BLOCK):
                found.update(block)
                yield block
            if found.text() != digest:
                differs = difference(found.text(), digest)
                raise CorruptArtifact(f"{source} is not what was committed ({differs}): run its stage with --again")

        write(target, read())


def move(fresh: Path, path: Path) -> None:
    """Put a file that another program wrote, on the same file system, into its place."""
    sync(fresh)
    os.replace(fresh, path)


# -- folders -------------------------------------------------------------------------------------------------------


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder to fill, which then takes the place of `path` with all that is in it."""
    fresh = _aside(path, NEW)
    remove(fresh)
    fresh.mkdir(parents=True)
    try:
        yield fresh
        sync_all(fresh)
        if os.path.lexists(path):
            delete(path)
        os.rename(fresh, path)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def delete(folder: Path) -> None:
    """Delete a folder so that a crash never leaves a part of it under its name; of a link or a file only its name."""
    doomed = _aside(folder, OLD)
    remove(doomed)
    os.rename(folder, doomed)
    sync(folder.parent)
    remove(doomed)


def _aside(path: Path, ending: str) -> Path:
    """A hidden name beside `path`: a server that watches the folder must not take it for a model."""
    return path.with_name(f".{path.name}{ending}")


def remove(path: Path) -> None:
    """Delete a file, a link or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sweep(folder: Path, *, deep: bool = False) -> list[Path]:
    """Delete what a killed process left of the functions above in a folder, and with `deep` in all folders below it.

    Only names with our two endings go; links are not followed. Returns what went.
    """
    if not folder.is_dir():
        return []
    gone = []
    for entry in list(os.scandir(folder)):
        path = Path(entry.path)
        if entry.name.endswith((NEW, OLD)):
            remove(path)
            gone.append(path)
        elif deep and entry.is_dir(follow_symlinks=False):
            gone += sweep(path, deep=True)
    return gone


def flush(file: BinaryIO) -> None:
    """Bring all that was written into an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """Bring a folder with all that is in it to the disk; what is inside of a folder before its names."""
    for inner, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(inner, name))
        sync(Path(inner))


# -- sealed JSON ---------------------------------------------------------------------------------------------------


def write_json(path: Path, value: Json) -> None:
    """Replace a JSON file, an object, by one whose first line is the sha256 of the rest; its name is on the disk too.

    `read_json` gives the same value back.
    """
    assert isinstance(value, dict)
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).removeprefix("{")
    rest = ('",' if value else '"').encode() + text.encode() + b"\n"
    write(path, [_SEALED, hashlib.sha256(rest).hexdigest().encode(), rest])
    sync(path.parent)


def is_sealed(content: bytes) -> bool:
    """Whether a file begins as `write_json` has it; an older release wrote plain JSON."""
    return content.startswith(_SEALED)


def read_json(path: Path, content: bytes | None = None) -> Json:
    """The value in a file of `write_json`. Raises `CorruptArtifact` where a byte is not as written, `OSError`.

    `content` is that of the file, where it is known already.
    """
    found = regular.read(path) if content is None else content
    head, seal, rest = found[: len(_SEALED)], found[len(_SEALED) :][:64], found[len(_SEALED) + 64 :]
    if head != _SEALED or hashlib.sha256(rest).hexdigest().encode() != seal:
        raise CorruptArtifact(f"{path} is damaged ({len(found)} bytes, checksum differs)")
    try:
        return json.loads(b"{" + rest.removeprefix(b'"').removeprefix(b","))
    except (ValueError, RecursionError) as error:
        raise CorruptArtifact(f"{path} holds no JSON ({type(error).__name__})") from None


# -- the disk ------------------------------------------------------------------------------------------------------


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn a full disk, spent memory and a folder that cannot be written into errors that say what to do."""
    try:
        yield
    except MemoryError as error:
        raise OutOfResources("memory ran out: use a smaller batch; the same command goes on from here") from error
    except OSError as error:
        where = error.filename or folder
        if error.errno in FULL:
            raise OutOfResources(f"{where}: {FULL[error.errno]}, then the same command goes on from here") from error
        if error.errno in _UNWRITABLE:
            advice = "choose another place with --run-dir or --store, or correct its permissions"
            raise UsageError(f"{where}: cannot be written ({error.strerror}): {advice}") from error
        raise


def check_room(path: Path, size_bytes: int) -> None:
    """Raises `OSError` where a file of that size cannot be written as `path`, which is deleted again."""
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, max(size_bytes, 1))
    finally:
        path.unlink(missing_ok=True)


def check_space(folder: Path, needed_bytes: int, what: str) -> None:
    """`OutOfResources` where the disk of `folder` has less than `needed_bytes` left for `what`."""
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    free = shutil.disk_usage(there).free
    if free < needed_bytes:
        raise OutOfResources(
            f"{folder}: {what} needs about {needed_bytes / 2**20:.1f} MiB (estimated) and {free / 2**20:.1f} MiB are "
            "free: free some, or choose another place with --run-dir or --store; the same command goes on from here"
        )
