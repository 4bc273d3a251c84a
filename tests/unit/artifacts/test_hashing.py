"""Digests say which function they are of, and a checkpoint's first line what follows it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from sparsify_deploy.artifacts import seal
from sparsify_deploy.artifacts.fingerprint import file_digest
from sparsify_deploy.artifacts.hashing import Algorithm, ContentHash, algorithm_of, bytes_digest, difference

KNOWN: dict[Algorithm, str] = {  # of no bytes at all, by FIPS 180-4 and by the BLAKE3 specification
    "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "blake3": "blake3:af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
}


@pytest.mark.parametrize("algorithm", KNOWN)
def test_known_answers(algorithm: Algorithm, tmp_path: Path) -> None:
    assert bytes_digest(b"", algorithm) == KNOWN[algorithm]
    assert algorithm_of(KNOWN[algorithm]) == algorithm
    (tmp_path / "empty").touch()
    assert file_digest(tmp_path / "empty", algorithm) == KNOWN[algorithm]


@pytest.mark.parametrize("algorithm", KNOWN)
def test_blocks_give_the_digest_of_the_whole(algorithm: Algorithm, tmp_path: Path) -> None:
    content = bytes(range(256)) * 9000  # two blocks and a part of one
    found = ContentHash(algorithm)
    for start in range(0, len(content), 1000):
        found.update(content[start : start + 1000])
    assert found.text() == bytes_digest(content, algorithm)
    (tmp_path / "file").write_bytes(content)
    assert file_digest(tmp_path / "file", algorithm) == found.text()


def test_a_folder_is_named_by_the_function_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_bytes(b"one")
    first = file_digest(tmp_path / "folder", "blake3")
    assert algorithm_of(first) == "blake3"
    (tmp_path / "folder" / "a").rename(tmp_path / "folder" / "b")
    assert file_digest(tmp_path / "folder", "blake3") != first


def test_a_message_shows_what_differs_and_not_what_is_always_the_same() -> None:
    assert difference("blake3:" + "a" * 64, "blake3:" + "b" * 64) == "blake3 aaaaaaaaaaaa, not bbbbbbbbbbbb"


def test_a_sealed_payload_comes_back_and_a_changed_one_does_not() -> None:
    written = seal.line(bytes_digest(b"steps\nof a training", "blake3")) + b"steps\nof a training"
    found = seal.payload(written)
    assert found is not None
    assert bytes(found) == b"steps\nof a training"
    for position in range(len(written)):
        changed = bytearray(written)
        changed[position] ^= 1
        assert seal.payload(bytes(changed)) is None, position
    for length in range(len(written)):
        assert seal.payload(written[:length]) is None, length


def test_a_seal_of_the_first_release_is_read() -> None:
    head = b"sparsify-deploy checkpoint 1 " + hashlib.sha256(b"steps").hexdigest().encode() + b"\n"
    found = seal.payload(head + b"steps")
    assert found is not None
    assert bytes(found) == b"steps"
    assert seal.payload(head + b"stepz") is None
