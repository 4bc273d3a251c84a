"""The store at its edges: recovery syncs before it renames, notes are replaced whole, checks read the bytes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from sparsify_deploy.artifacts import durable
from sparsify_deploy.artifacts import store as module
from sparsify_deploy.artifacts.digests import DigestCache
from sparsify_deploy.artifacts.fingerprint import digest, file_digest
from sparsify_deploy.artifacts.store import ArtifactStore
from sparsify_deploy.errors import CorruptArtifact

PARTS = {"stage": "train", "settings": {"lr": 0.1}}


def committed(folder: Path) -> ArtifactStore:
    """A store with one result, `weights.bin`."""
    store = ArtifactStore(folder)
    with store.lock():
        (store.begin("train", PARTS) / "weights.bin").write_bytes(b"weights")
        store.commit("train", PARTS, {"weights": "weights.bin"}, {}, 0.0)
    return store


def test_what_a_kill_left_between_manifest_and_rename_is_synced_before_it_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The killed process may not have synced the folder: a manifest may be seen that is not on the disk yet."""
    store = ArtifactStore(tmp_path)
    partial = store.begin("train", PARTS)
    (partial / "weights.bin").write_bytes(b"weights")
    with monkeypatch.context() as killed:
        killed.setattr(ArtifactStore, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.commit("train", PARTS, {"weights": "weights.bin"}, {}, 0.0)
    assert (partial / module.MANIFEST).exists()
    events: list[tuple[str, Path]] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        real_fsync(descriptor)

    def rename(source: Any, target: Any, **kw: Any) -> None:
        events.append(("rename", Path(target)))
        real_rename(source, target, **kw)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    with ArtifactStore(tmp_path).lock():
        final = tmp_path / f"train-{digest(PARTS)}"
        assert events.index(("fsync", partial)) < events.index(("rename", final))
        assert ("fsync", tmp_path) in events[events.index(("rename", final)) :]


def test_an_output_is_read_before_something_is_made_from_it_although_its_stamp_is_the_known_one(tmp_path: Path) -> None:
    """A disk may change a byte without changing any time of the file."""
    store = committed(tmp_path)
    record = store.find("train", PARTS)
    assert record is not None
    path = record.outputs["weights"]
    path.write_bytes(b"weightz")
    known = store.digests
    known._entries()[str(path.absolute())] = {  # the memory as it would be, had the times not moved
        "stamp": [[status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino] for status in [path.stat()]],
        "blake3": record.digests["weights"],
    }
    assert known.digest(path, "blake3") == record.digests["weights"]
    with pytest.raises(CorruptArtifact, match=r"weights\.bin is not what was committed"):
        store.check(record, "weights")


def test_the_memory_of_digests_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up while it is written leaves the old memory, which a later process still reads."""
    file, old, new = tmp_path / "digests.json", tmp_path / "old", tmp_path / "new"
    for path in (old, new):
        path.write_bytes(path.name.encode())
        os.utime(path, (1, 1))
    monkeypatch.setattr("sparsify_deploy.artifacts.digests._COARSEST_CLOCK_NS", -(10**18))
    first = DigestCache(file)
    first.hash(old)
    first.save()
    before = file.read_bytes()
    assert list(durable.read_json(file)["files"]) == [str(old)]

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    second = DigestCache(file)
    second.hash(new)
    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            second.save()
    assert file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digests.json", "new", "old"]
    second.save()
    assert sorted(durable.read_json(file)["files"]) == sorted([str(old), str(new)])


def test_a_link_turned_to_another_file_of_the_same_size_and_times_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the clock of a file system is coarse, two files written together share their times."""
    first, second, link = tmp_path / "first.bin", tmp_path / "other.bin", tmp_path / "data"
    for path in (first, second):
        path.write_bytes(path.stem.encode())
    real, then = Path.stat, 10**18

    def coarse(path: Path, **kw: Any) -> os.stat_result:
        found = real(path, **kw)
        if path != link:
            return found
        return os.stat_result(tuple(found)[:10], {"st_mtime_ns": then, "st_ctime_ns": then})

    monkeypatch.setattr(Path, "stat", coarse)
    link.symlink_to(first)
    cache = DigestCache(tmp_path / "digests.json")
    assert cache.digest(link) == file_digest(first)
    link.unlink()
    link.symlink_to(second)
    assert cache.digest(link) == file_digest(second)
