"""A folder of committed stage outputs, found again by the fingerprint of how they were made.

`STORE/<stage>-<fingerprint>/` holds a stage's outputs and `manifest.json`. While a stage works, the folder ends in
`.partial` and keeps its step checkpoints; finishing is hashing, fsync and one rename. So a crash at any moment leaves
nothing, a `.partial`, or a whole commit.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from sparsify_deploy.artifacts.digests import DigestCache
from sparsify_deploy.artifacts.fingerprint import canonical, digest, files_below
from sparsify_deploy.errors import CorruptArtifact, Locked, OutOfResources, UsageError

if TYPE_CHECKING:
    from sparsify_deploy.types import Facts, Json

MANIFEST = "manifest.json"
DIGESTS = "digests.json"
PARTS = "parts.json"
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
_OWN = frozenset({MANIFEST, PARTS})


@dataclass(frozen=True)
class Record:
    """A committed result. `outputs`, `digests` (sha256) and `bytes` are by logical name; a folder counts as one."""

    stage: str
    fingerprint: str
    parts: Mapping[str, Json]
    folder: Path
    outputs: Mapping[str, Path]
    digests: Mapping[str, str]
    bytes: Mapping[str, int]
    measured: Facts
    seconds: float
    created: str


class ArtifactStore:
    """The store in `folder`, which is made by the first write. Only `find`, `begun` and `reason` need no `lock`."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.digests = DigestCache(self.folder / DIGESTS)
        self._verified: set[Path] = set()

    def find(self, stage: str, parts: Mapping[str, Json]) -> Record | None:
        """The committed result of `stage` made from `parts`, its bytes verified once a process; None: not there.

        A file whose size, times and inode are those of the last hashing is not hashed again; `check` does.
        Raises `CorruptArtifact` where a file is missing or its bytes are not the ones that were committed.
        """
        final = self._final(stage, parts)
        if not final.is_dir():
            return None
        record = _record(final)
        if (record.stage, record.parts) != (stage, canonical(parts)):
            raise CorruptArtifact(f"{final / MANIFEST} is the manifest of another result: {_mend(final)}")
        if final not in self._verified:
            for name, path in record.outputs.items():
                _verify(self.digests.digest, path, record.digests[name], final)
            self._verified.add(final)
        return record

    def check(self, record: Record, output: str) -> Path:
        """The path of an output, hashed now, before something is made from it; raises `CorruptArtifact`."""
        _verify(self.digests.hash, record.outputs[output], record.digests[output], record.folder)
        return record.outputs[output]

    def begun(self, stage: str, parts: Mapping[str, Json]) -> bool:
        """Whether an attempt was begun and did not finish."""
        return self._partial(stage, parts).is_dir()

    def begin(self, stage: str, parts: Mapping[str, Json]) -> Path:
        """The folder to work in: empty at first, after a crash the same one with what was left in it."""
        partial = self._partial(stage, parts)
        with explained(self.folder):
            partial.mkdir(parents=True, exist_ok=True)
            (partial / MANIFEST).unlink(missing_ok=True)
            write_json(partial / PARTS, canonical(parts))
        return partial

    def commit(
        self, stage: str, parts: Mapping[str, Json], outputs: Mapping[str, str], measured: Facts, seconds: float
    ) -> Record:
        """Make `outputs` (logical name to a file or folder in the folder of `begin`) the result; the rest is deleted.

        Where the same result is already committed, that one stays and this attempt is deleted.
        """
        partial, final = self._partial(stage, parts), self._final(stage, parts)
        with explained(self.folder):
            manifest = {
                "stage": stage,
                "fingerprint": digest(parts),
                "parts": canonical(parts),
                "outputs": {name: _sealed(self.digests, partial, file) for name, file in outputs.items()},
                "measured": measured,
                "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "seconds": round(seconds, 3),
            }
            write_json(partial / MANIFEST, manifest)
            self._finish(partial, final)
        self._verified.add(final)
        return _record(final)

    def discard(self, stage: str, parts: Mapping[str, Json]) -> None:
        """Forget a result and an attempt at it, so that the stage starts anew."""
        with explained(self.folder):
            for folder in (self._final(stage, parts), self._partial(stage, parts)):
                self._verified.discard(folder)
                if folder.is_dir():
                    _delete(folder)

    def remember(self, step: str, parts: Mapping[str, Json]) -> None:
        """Note from what a step of a plan was last made, for `reason`."""
        path = self._last(step)
        known = canonical(parts)
        if _read_json(path) == known:
            return
        with explained(self.folder):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, known)

    def reason(self, step: str, parts: Mapping[str, Json]) -> str:
        """Why a step that is not committed has to run: `settings.params.rounds: 100 -> 50`."""
        if any(self.folder.glob(f"*-{digest(parts)}.partial")):
            return "the last attempt did not finish"
        before = _read_json(self._last(step))
        if before is None:
            return "first time"
        return changes(before, canonical(parts)) or "its result is gone from the store"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the store for this process alone; raises `Locked` at once where another has it.

        The lock goes with the process however it ends: child processes do not inherit it. What a killed process left
        half done between two steps of a commit or a deletion is brought to its end here.
        """
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        _held.add(descriptor)
        try:
            _acquire(descriptor, self.folder)
            with explained(self.folder):
                self._recover()
            try:
                yield
            finally:
                self.digests.save()
        finally:
            if descriptor in _held:  # in a forked child it is closed already
                _held.remove(descriptor)
                os.close(descriptor)

    def _recover(self) -> None:
        for folder in self.folder.glob("*.discarded"):
            shutil.rmtree(folder)
        for partial in self.folder.glob("*.partial"):
            if (partial / MANIFEST).exists():
                self._finish(partial, partial.with_suffix(""))

    def _finish(self, partial: Path, final: Path) -> None:
        """From a partial folder whose manifest is on disk to a commit; may be repeated after a crash."""
        listed = json.loads((partial / MANIFEST).read_text(encoding="utf-8"))["outputs"]
        _drop_others(partial, {PurePosixPath(name) for name in (MANIFEST, *(e["file"] for e in listed.values()))})
        _sync(partial)
        if final.is_dir():
            _delete(partial)
        else:
            os.rename(partial, final)
            self.digests.moved(partial, final)
        _sync(self.folder)

    def _final(self, stage: str, parts: Mapping[str, Json]) -> Path:
        return self.folder / f"{stage}-{digest(parts)}"

    def _partial(self, stage: str, parts: Mapping[str, Json]) -> Path:
        return self.folder / f"{stage}-{digest(parts)}.partial"

    def _last(self, step: str) -> Path:
        return self.folder / "last" / f"{step.replace('/', '.')}.json"


def changes(before: Json, now: Json, most: int = 5) -> str:
    """The leaves in which two fingerprints' parts differ, at most `most` and a count of the rest; empty: none."""
    old, new = dict(_leaves(before, "")), dict(_leaves(now, ""))
    found = []
    for path in dict.fromkeys([*old, *new]):
        if path not in new:
            found.append(f"{path}: {old[path]} -> left out")
        elif path not in old:
            found.append(f"{path}: new, {new[path]}")
        elif old[path] != new[path]:
            found.append(f"{path}: {_shown(old[path], new[path])} -> {_shown(new[path], old[path])}")
    rest = f", and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + rest


def _leaves(value: Json, path: str) -> Iterator[tuple[str, str]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not value or not isinstance(value, (dict, list)):
        yield path, json.dumps(value)
    for key, item in inner:
        yield from _leaves(item, f"{path}.{key}" if path else str(key))


def _shown(text: str, other: str) -> str:
    """`text` shortened, but not so far that it looks like `other`."""
    limit = next((n for n in (12, 40) if text[:n] != other[:n]), len(text))
    return text if len(text) <= max(limit, 40) else f"{text[:limit]}..."


# -- errors and the disk -------------------------------------------------------------------------------------------


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn a full disk, spent memory and a folder that cannot be written into errors that say what to do."""
    try:
        yield
    except MemoryError as error:
        raise OutOfResources("memory ran out: use a smaller batch; the same command goes on from here") from error
    except OSError as error:
        where = error.filename or folder
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = "the disk is full" if error.errno == errno.ENOSPC else "the disk quota is used up"
            raise OutOfResources(f"{where}: {what}: free some, then the same command goes on from here") from error
        if error.errno in _UNWRITABLE:
            advice = "choose another place with --run-dir or --store, or correct its permissions"
            raise UsageError(f"{where}: cannot be written ({error.strerror}): {advice}") from error
        raise


def _mend(final: Path) -> str:
    return f"delete the folder {final}, or run its stage with --again"


def _verify(hashed: Callable[[Path], str], path: Path, expected: str, final: Path) -> None:
    try:
        actual = hashed(path)
    except OSError as error:
        raise CorruptArtifact(f"{path} cannot be read ({error.strerror or error}): {_mend(final)}") from error
    if actual != expected:
        differs = f"sha256 {actual[:12]}, not {expected[:12]}"
        raise CorruptArtifact(f"{path} is not what was committed ({differs}): {_mend(final)}")


def _record(final: Path) -> Record:
    path = final / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        outputs = manifest["outputs"]
        return Record(
            stage=manifest["stage"],
            fingerprint=manifest["fingerprint"],
            parts=manifest["parts"],
            folder=final,
            outputs={name: final / entry["file"] for name, entry in outputs.items()},
            digests={name: entry["sha256"] for name, entry in outputs.items()},
            bytes={name: entry["bytes"] for name, entry in outputs.items()},
            measured=manifest["measured"],
            seconds=manifest["seconds"],
            created=manifest["created"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptArtifact(f"{path} cannot be read ({error!r}): {_mend(final)}") from error


def _sealed(digests: DigestCache, partial: Path, file: str) -> dict[str, Json]:
    """Bring an output to the disk, folders with all that is in them, and hash it."""
    name = PurePosixPath(file)
    inside = not name.is_absolute() and ".." not in name.parts and name.parts
    assert inside, f"output {file!r} lies outside its folder"
    assert file not in _OWN, f"output name {file!r} is taken by the store"
    path = partial / name
    files = [path / inner for inner in files_below(path)] if path.is_dir() else [path]
    folders = {parent for one in files for parent in one.parents if partial in parent.parents}
    for one in (*files, *sorted(folders, reverse=True)):
        _sync(one)
    return {"file": str(name), "sha256": digests.hash(path), "bytes": sum(one.stat().st_size for one in files)}


def _drop_others(folder: Path, keep: set[PurePosixPath], prefix: str = "") -> None:
    for entry in list(os.scandir(folder)):
        name = PurePosixPath(prefix, entry.name)
        if name in keep:
            continue
        inside = Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            if any(name in kept.parents for kept in keep):
                _drop_others(inside, keep, str(name))
            else:
                shutil.rmtree(inside)
        else:
            inside.unlink()


def _delete(folder: Path) -> None:
    """Delete a folder so that a crash never leaves a part of it under its name."""
    doomed = folder.with_name(f"{folder.name}.discarded")
    if doomed.exists():
        shutil.rmtree(doomed)
    os.rename(folder, doomed)
    _sync(folder.parent)
    shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Json) -> None:
    """Replace a JSON file so that a crash leaves the old one or the new one, never a part."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    fresh = path.with_name(f"{path.name}.new")
    with fresh.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
    _sync(path.parent)


def _read_json(path: Path) -> Json:
    """A JSON file's value; None where it is missing or broken: a lost note costs a reason, not a result."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


# -- the lock ------------------------------------------------------------------------------------------------------

_held: set[int] = set()
"""Descriptors of the locks this process holds."""


def _close_in_child() -> None:
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


def _acquire(descriptor: int, folder: Path) -> None:
    me = f"process {os.getpid()} on {socket.gethostname()}"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
        advice = "wait for it to end, stop it, or choose another --run-dir"
        raise Locked(f"{folder} is in use by {holder}: {advice}") from error
    except OSError as error:
        why = f"its file system has no locks ({error.strerror})"
        raise UsageError(f"{folder}: {why}: choose another place with --run-dir or --store") from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{me}\n".encode(), 0)
