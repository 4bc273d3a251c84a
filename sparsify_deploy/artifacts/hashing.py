"""The two hash functions that files are named by.

SHA-256 names what people and other programs may want to compare: the files that a recipe names, those that engines'
records and `deploy/` list. BLAKE3 names what only a store reads: it is hashed often, and where a processor has no
instructions for SHA this is ten times as fast.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from blake3 import blake3

Algorithm = Literal["sha256", "blake3"]
_PREFIX = "blake3:"


class ContentHash:
    """A digest in the making. Its text is 64 hex digits, after `blake3:` where they are of BLAKE3."""

    def __init__(self, algorithm: Algorithm) -> None:
        self._algorithm = algorithm
        self._hash: hashlib._Hash | blake3 = hashlib.sha256() if algorithm == "sha256" else _blake3()()

    def update(self, block: bytes | bytearray | memoryview) -> None:
        """Take in the bytes that follow."""
        self._hash.update(block)

    def text(self) -> str:
        """The digest of all bytes up to now."""
        return (_PREFIX if self._algorithm == "blake3" else "") + self._hash.hexdigest()


def _blake3() -> Callable[[], blake3]:
    from blake3 import blake3

    return blake3


def bytes_digest(content: bytes | memoryview, algorithm: Algorithm) -> str:
    """The digest of bytes in memory."""
    found = ContentHash(algorithm)
    found.update(content)
    return found.text()


def algorithm_of(digest: str) -> Algorithm:
    """The function that a digest is of; where its text is none at all, sha256, which then does not match."""
    return "blake3" if digest.startswith(_PREFIX) else "sha256"


def difference(found: str, expected: str) -> str:
    """Two digests of one function for a message, as far as they tell one from another by eye."""
    return f"{algorithm_of(expected)} {_start(found)}, not {_start(expected)}"


def _start(digest: str) -> str:
    return digest.removeprefix(_PREFIX)[:12]
