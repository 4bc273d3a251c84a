"""A remembered digest is that of the bytes on the disk, or it is not used."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from sparsify_deploy.artifacts import digests
from sparsify_deploy.artifacts.digests import DigestCache
from sparsify_deploy.artifacts.fingerprint import file_digest
from sparsify_deploy.artifacts.hashing import Algorithm


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The paths that were really read."""
    read: list[Path] = []

    def counting(paths: Sequence[Path], algorithm: Algorithm, single: object = None) -> list[str]:
        read.extend(paths)
        return [file_digest(path, algorithm) for path in paths]

    monkeypatch.setattr(digests, "file_digests", counting)
    return read


def settled(path: Path) -> Path:
    """`path`, once its times lie further back than the clock of a file system is coarse."""
    time.sleep(0.03)
    return path


def test_an_unchanged_file_or_folder_is_read_once_even_by_another_process(tmp_path: Path, hashed: list[Path]) -> None:
    file, folder = tmp_path / "a", tmp_path / "f"
    file.write_bytes(b"one")
    (folder / "in").mkdir(parents=True)
    (folder / "in" / "b").write_bytes(b"two")
    settled(file)
    cache = DigestCache(tmp_path / "digests.json")
    for path in (file, folder):
        assert cache.digest(path) == file_digest(path)
    cache.save()
    again = DigestCache(tmp_path / "digests.json")
    for path in (file, folder):
        assert again.digest(path) == file_digest(path)
    assert hashed == [file, folder]


def test_a_changed_byte_is_seen_although_the_size_is_the_same(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"one")
    cache = DigestCache(tmp_path / "digests.json")
    cache.digest(settled(file))
    file.write_bytes(b"two")
    assert cache.digest(file) == file_digest(file)


def test_a_change_with_the_old_modification_time_put_back_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"one")
    cache = DigestCache(tmp_path / "digests.json")
    cache.digest(settled(file))
    times = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert cache.digest(file) == file_digest(file)


def test_a_file_changed_just_before_it_was_hashed_is_hashed_again(tmp_path: Path, hashed: list[Path]) -> None:
    file = tmp_path / "a"
    later = time.time_ns() + 60_000_000_000
    file.write_bytes(b"one")
    os.utime(file, ns=(later, later))
    cache = DigestCache(tmp_path / "digests.json")
    cache.digest(file)
    cache.digest(file)
    assert hashed == [file, file]


def test_a_file_added_to_a_folder_is_seen(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "a").write_bytes(b"one")
    cache = DigestCache(tmp_path / "digests.json")
    before = cache.digest(settled(folder))
    (folder / "b").write_bytes(b"")
    assert cache.digest(folder) == file_digest(folder) != before


def test_a_damaged_memory_is_forgotten(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"one")
    memory = tmp_path / "digests.json"
    for text in ("", "[]", '{"a": 1}', '{"a": {"stamp": "x", "sha256": 1}}'):
        memory.write_text(text)
        assert DigestCache(memory).digest(file) == file_digest(file)


def test_a_renamed_folder_keeps_what_is_known(tmp_path: Path, hashed: list[Path]) -> None:
    old, new = tmp_path / "w.partial", tmp_path / "w"
    old.mkdir()
    (old / "a").write_bytes(b"one")
    cache = DigestCache(tmp_path / "digests.json")
    cache.digest(settled(old / "a"))
    old.rename(new)
    cache.moved(old, new)
    assert cache.digest(new / "a") == file_digest(new / "a")
    assert hashed == [old / "a"]
