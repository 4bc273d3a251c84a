"""The first line of a step checkpoint, which says what its other bytes must be. Torch-free: `verify` reads it too."""

from __future__ import annotations

from sparsify_deploy.artifacts.hashing import bytes_digest

_START = b"sparsify-deploy checkpoint "
_LONGEST = 128


def line(digest: str) -> bytes:
    """What goes before a payload of that BLAKE3 digest."""
    return _START + f"2 {digest}\n".encode()


def payload(content: bytes) -> memoryview | None:
    """What follows the first line of a checkpoint; None where a byte is not as written, or it is no checkpoint.

    Release 0.1.0 wrote a 1 and a SHA-256.
    """
    start = content.find(b"\n", 0, _LONGEST) + 1
    rest = memoryview(content)[start:]
    older = content.startswith(_START + b"1 ")
    expected = _START + f"1 {bytes_digest(rest, 'sha256')}\n".encode() if older else line(bytes_digest(rest, "blake3"))
    return rest if content[:start] == expected else None
