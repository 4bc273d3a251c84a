"""A folder of committed stage outputs, found again by the fingerprint of how they were made.

`STORE/<stage>-<fingerprint>/` holds a stage's outputs and `manifest.json`. While a stage works, the folder ends in
`.partial` and keeps its step checkpoints; finishing is hashing, fsync and one rename. So a crash at any moment leaves
nothing, a `.partial`, or a whole commit.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from sparsify_deploy.artifacts import durable, layout
from sparsify_deploy.artifacts.digests import DigestCache
from sparsify_deploy.artifacts.durable import explained
from sparsify_deploy.artifacts.fingerprint import canonical, digest, file_digest, files_below
from sparsify_deploy.artifacts.hashing import algorithm_of, difference
from sparsify_deploy.artifacts.lock import NAME as LOCK
from sparsify_deploy.artifacts.lock import locked
from sparsify_deploy.errors import CorruptArtifact
from sparsify_deploy.safety import regular

if TYPE_CHECKING:
    from sparsify_deploy.artifacts.hashing import Algorithm
    from sparsify_deploy.types import Facts, Json

__all__ = ["DIGESTS", "MANIFEST", "PARTS", "ArtifactStore", "Record", "changes", "explained", "holding", "record_in"]

MANIFEST = "manifest.json"
DIGESTS = "digests.json"
PARTS = "parts.json"
AGAIN = "again.json"
_OWN = frozenset({MANIFEST, PARTS})
_FIELDS = frozenset({"stage", "fingerprint", "parts", "outputs", "measured", "created", "seconds"})
_NAMED = re.compile(r"[a-z][a-z0-9_.]*-[0-9a-f]{64}(\.partial)?")
_ALWAYS_HASHED_BYTES = 1 << 20


@dataclass(frozen=True)
class Record:
    """A committed result. `outputs`, `digests` and `bytes` are by logical name; a folder counts as one."""

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
    files: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """For an output that is a folder, the digest of each file in it; none by an older release."""


class ArtifactStore:
    """The store in `folder`, which is made by the first write. Only `find`, `begun` and `reason` need no `lock`."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.digests = DigestCache(self.folder / DIGESTS)
        self._verified: set[Path] = set()
        self._layout_known = False

    def find(self, stage: str, parts: Mapping[str, Json]) -> Record | None:
        """The committed result of `stage` made from `parts`, its bytes verified once a process; None: not there.

        A file of more than a MiB whose size, times and inode are those of the last hashing is not hashed again; `check`
        does. Raises `CorruptArtifact` where a file is missing or its bytes are not the ones that were committed.
        """
        self._check_layout()
        final = self._final(stage, parts)
        if not os.path.lexists(final):
            return None
        record = _record(final)
        if (record.stage, record.parts) != (stage, canonical(parts)):
            raise CorruptArtifact(f"{final / MANIFEST} is the manifest of another result: {_mend(final)}")
        if final not in self._verified:
            for name, path in record.outputs.items():
                small = record.bytes[name] <= _ALWAYS_HASHED_BYTES
                _verify(self.digests.hash if small else self.digests.digest, path, record, name)
            self._verified.add(final)
        return record

    def check(self, record: Record, output: str) -> Path:
        """The path of an output, hashed now, before something is made from it; raises `CorruptArtifact`."""
        _verify(self.digests.hash, record.outputs[output], record, output)
        return record.outputs[output]

    def begun(self, stage: str, parts: Mapping[str, Json]) -> bool:
        """Whether an attempt was begun and did not finish."""
        return self._partial(stage, parts).is_dir()

    def begin(self, stage: str, parts: Mapping[str, Json]) -> Path:
        """The folder to work in: empty at first, after a crash the same one with what was left in it."""
        partial = self._partial(stage, parts)
        if os.path.lexists(partial) and not partial.is_dir():
            raise CorruptArtifact(f"{partial} is no folder any more: delete it, then its stage starts over")
        with explained(self.folder):
            partial.mkdir(parents=True, exist_ok=True)
            (partial / MANIFEST).unlink(missing_ok=True)
            durable.write_json(partial / PARTS, canonical(parts))
        return partial

    def commit(
        self,
        stage: str,
        parts: Mapping[str, Json],
        outputs: Mapping[str, str],
        measured: Facts,
        seconds: float,
        *,
        replace: bool = False,
    ) -> Record:
        """Make `outputs` (logical name to a file or folder in the folder of `begin`) the result; the rest is deleted.

        Where the same result is already committed, that one stays and this attempt is deleted; with `replace` this one
        takes its place. After a crash it is one of the two.
        """
        partial, final = self._partial(stage, parts), self._final(stage, parts)
        with explained(self.folder):
            manifest = {
                "stage": stage,
                "fingerprint": digest(parts),
                "parts": canonical(parts),
                "outputs": _sealed(self.digests, partial, outputs),
                "measured": measured,
                "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "seconds": round(seconds, 3),
            }
            durable.write_json(partial / MANIFEST, manifest)
            if replace and os.path.lexists(final):  # the new one is on the disk, and recovery finishes it
                durable.delete(final)
            self._finish(partial, final)
        self._verified.add(final)
        return _record(final)

    def discard(self, stage: str, parts: Mapping[str, Json]) -> None:
        """Forget a result and an attempt at it, so that the stage starts anew."""
        self.abandon(stage, parts)
        final = self._final(stage, parts)
        with explained(self.folder):
            self._verified.discard(final)
            if os.path.lexists(final):
                durable.delete(final)

    def abandon(self, stage: str, parts: Mapping[str, Json]) -> None:
        """Forget an attempt with its checkpoints; a result stays."""
        partial = self._partial(stage, parts)
        with explained(self.folder):
            if os.path.lexists(partial):
                durable.delete(partial)

    def made_again(self, request: Sequence[str]) -> frozenset[str]:
        """The fingerprints of what an interrupted run had made anew when it was asked for just these steps; what is
        noted of any other request is forgotten."""
        path = self.folder / AGAIN
        if not os.path.lexists(path):
            return frozenset()
        noted = _read_json(path)
        if request and isinstance(noted, dict) and noted.get("request") == list(request):
            return frozenset(noted["made"])
        with explained(self.folder):
            path.unlink(missing_ok=True)
        return frozenset()

    def note_again(self, request: Sequence[str], made: Collection[str]) -> None:
        """Note for `made_again` what was made of a request."""
        with explained(self.folder):
            durable.write_json(self.folder / AGAIN, {"request": list(request), "made": sorted(made)})

    def remember(self, step: str, parts: Mapping[str, Json]) -> None:
        """Note from what a step of a plan was last made, for `reason`."""
        path = self._last(step)
        known = canonical(parts)
        if _read_json(path) == known:
            return
        with explained(self.folder):
            path.parent.mkdir(parents=True, exist_ok=True)
            durable.write_json(path, known)

    def reason(self, step: str, parts: Mapping[str, Json]) -> str:
        """Why a step that is not committed has to run: `settings.params.rounds: 100 -> 50`."""
        if any(self.folder.glob(f"*-{digest(parts)}.partial")):
            return "the last attempt did not finish"
        path = self._last(step)
        before = _read_json(path)
        if before is None:
            return f"{path}, which says what it was made from, cannot be read" if path.exists() else "first time"
        return changes(before, canonical(parts)) or "its result is gone from the store"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the store for this process alone; raises `Locked` where another has it.

        The lock goes with the process however it ends: child processes do not inherit it. What a killed process left
        half done between two steps of a commit or a deletion is brought to its end here, and what it left half written
        is deleted.
        """
        self._check_layout()
        with locked(self.folder):
            with explained(self.folder):
                layout.mark(self.folder)
                self._recover()
            try:
                yield
            except BaseException:
                with suppress(OSError):  # what is remembered there can be computed again: the error is the news
                    self.digests.save()
                raise
            with explained(self.folder):
                self.digests.save()

    def _check_layout(self) -> None:
        """`DataError` where a newer program laid the store out."""
        if not self._layout_known:
            layout.check(self.folder)
            self._layout_known = True

    def _recover(self) -> None:
        for folder in self.folder.glob("*.discarded"):  # by a release before the endings of `durable`
            if _NAMED.fullmatch(folder.stem):
                durable.remove(folder)
        durable.sweep(self.folder)
        durable.sweep(self.folder / "last")
        for partial in self.folder.glob("*.partial"):
            if not _NAMED.fullmatch(partial.stem) or partial.is_symlink():  # not ours, or the way to what is not
                continue
            durable.sweep(partial, deep=True)
            if (partial / MANIFEST).exists():
                self._finish(partial, partial.with_suffix(""))

    def _finish(self, partial: Path, final: Path) -> None:
        """From a partial folder whose manifest is on disk to a commit; may be repeated after a crash."""
        listed = _manifest(partial)["outputs"]
        _drop_others(partial, {PurePosixPath(name) for name in (MANIFEST, *(e["file"] for e in listed.values()))})
        durable.sync(partial)
        if final.is_dir():
            durable.delete(partial)
        else:
            os.rename(partial, final)
            self.digests.moved(partial, final)
        durable.sync(self.folder)

    def _final(self, stage: str, parts: Mapping[str, Json]) -> Path:
        return self.folder / f"{stage}-{digest(parts)}"

    def _partial(self, stage: str, parts: Mapping[str, Json]) -> Path:
        return self.folder / f"{stage}-{digest(parts)}.partial"

    def _last(self, step: str) -> Path:
        return self.folder / "last" / f"{step.replace('/', '.')}.json"


@contextmanager
def holding(folder: Path, store: ArtifactStore) -> Iterator[None]:
    """Hold a run directory and its store, the run directory first; raises `Locked` where another process has one.

    A store inside has the one lock for both. A run whose store lies elsewhere locks the run directory besides, and the
    store inside where there is one, as a run with that store locks the run directory where one of the former has made
    a lock. Of two first ones at the same moment each may see the other, and neither works.
    """
    inside, own = folder / "store", store.folder.resolve()
    default = own == inside.resolve()
    with ExitStack() as held:
        known = (folder / LOCK).is_file()
        if own != folder.resolve() and (known or not default):
            held.enter_context(locked(folder))
        if not default and (inside / LOCK).is_file():
            held.enter_context(locked(inside))
        held.enter_context(store.lock())
        if default and not known and (folder / LOCK).is_file():  # made since
            held.enter_context(locked(folder))
        yield


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


def record_in(final: Path) -> Record:
    """The result that was committed as a folder, its outputs' bytes not verified. Raises `CorruptArtifact`."""
    return _record(final)


# -- what a commit holds -------------------------------------------------------------------------------------------


def _mend(final: Path) -> str:
    return f"delete the folder {final}, or run its stage with --again"


def _verify(hashed: Callable[[Path, Algorithm], str], path: Path, record: Record, name: str) -> None:
    mend, expected = _mend(record.folder), record.digests[name]
    try:
        actual = hashed(path, algorithm_of(expected))
    except OSError as error:
        where = _differing(path, record, name)
        raise CorruptArtifact(f"{where} cannot be read ({error.strerror or error}): {mend}") from error
    if actual != expected:
        differs = difference(actual, expected)
        raise CorruptArtifact(f"{_differing(path, record, name)} is not what was committed ({differs}): {mend}")


def _differing(path: Path, record: Record, name: str) -> Path:
    """The file of a folder that is another by now, or is gone; the folder itself where nothing says which."""
    for file, expected in sorted(record.files.get(name, {}).items()):
        if not (path / file).is_file() or file_digest(path / file, algorithm_of(expected)) != expected:
            return path / file
    return path


def _manifest(folder: Path) -> dict[str, Json]:
    """What a manifest says, every byte of it verified; one of an older release, which is not sealed, as it stands."""
    path = folder / MANIFEST
    try:
        content = regular.read(path)
        found = durable.read_json(path, content) if durable.is_sealed(content) else json.loads(content)
        if found.keys() != _FIELDS:
            raise ValueError("it has other fields")
        _check_outputs(found["outputs"])
    except CorruptArtifact as error:
        raise CorruptArtifact(f"{error}: {_mend(folder)}") from None
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise CorruptArtifact(f"{path} cannot be read ({error!r}): {_mend(folder)}") from error
    return dict(found)


def _check_outputs(outputs: Mapping[str, Mapping[str, Json]]) -> None:
    """Raises ValueError where a manifest lists what no commit does, such as a file that lies elsewhere."""
    for entry in outputs.values():
        name = PurePosixPath(entry["file"])
        if name.is_absolute() or ".." in name.parts or not name.parts or "\0" in str(name) or str(name) in _OWN:
            raise ValueError(f"output {str(name)!r} lies outside its folder")
        if not isinstance(_digest_in(entry), str) or not isinstance(entry["bytes"], int):
            raise TypeError("an output without digest and bytes")


def _digest_in(entry: Mapping[str, Json]) -> Json:
    """That of an output in a manifest; release 0.1.0 had another name for it."""
    return entry["digest"] if "digest" in entry else entry["sha256"]


def _record(final: Path) -> Record:
    manifest = _manifest(final)
    try:
        outputs = manifest["outputs"]
        return Record(
            stage=manifest["stage"],
            fingerprint=manifest["fingerprint"],
            parts=manifest["parts"],
            folder=final,
            outputs={name: final / entry["file"] for name, entry in outputs.items()},
            digests={name: _digest_in(entry) for name, entry in outputs.items()},
            bytes={name: entry["bytes"] for name, entry in outputs.items()},
            measured=manifest["measured"],
            seconds=manifest["seconds"],
            created=manifest["created"],
            files={name: entry["files"] for name, entry in outputs.items() if "files" in entry},
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptArtifact(f"{final / MANIFEST} cannot be read ({error!r}): {_mend(final)}") from error


def _sealed(digests: DigestCache, partial: Path, outputs: Mapping[str, str]) -> dict[str, dict[str, Json]]:
    """Bring the outputs to the disk, folders with all that is in them, and hash them meanwhile."""
    from concurrent.futures import ThreadPoolExecutor

    paths = {name: partial / _inside(file) for name, file in outputs.items()}
    files = {name: [p / i for i in files_below(p)] if p.is_dir() else [p] for name, p in paths.items()}
    flat = list(dict.fromkeys(one for each in files.values() for one in each))
    folders = {parent for one in flat for parent in one.parents if partial in parent.parents}

    def bring_to_disk() -> None:
        for one in (*flat, *sorted(folders, reverse=True)):
            durable.sync(one)

    with ThreadPoolExecutor(1) as disk:
        synced = disk.submit(bring_to_disk)
        single: dict[Path, str] = {}
        found = dict(zip(outputs, digests.hash_all(list(paths.values()), "blake3", single), strict=True))
        synced.result()
    entries: dict[str, dict[str, Json]] = {}
    for name, path in paths.items():
        size = sum(one.stat().st_size for one in files[name])
        entries[name] = {"file": path.relative_to(partial).as_posix(), "digest": found[name], "bytes": size}
        if path.is_dir():
            entries[name]["files"] = {one.relative_to(path).as_posix(): single[one] for one in files[name]}
    return entries


def _inside(file: str) -> PurePosixPath:
    name = PurePosixPath(file)
    inside = not name.is_absolute() and ".." not in name.parts and name.parts
    assert inside, f"output {file!r} lies outside its folder"
    assert file not in _OWN, f"output name {file!r} is taken by the store"
    return name


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


def _read_json(path: Path) -> Json:
    """A note's value; None where it is missing or damaged: that costs a reason, not a result."""
    try:
        content = regular.read(path)
        return durable.read_json(path, content) if durable.is_sealed(content) else json.loads(content)
    except (OSError, CorruptArtifact, ValueError, RecursionError):  # one of release 0.1.0 is not sealed
        return None
