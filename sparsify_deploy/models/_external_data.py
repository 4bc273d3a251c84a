"""Which other files an ONNX file keeps its weights in, found without the onnx package."""

from __future__ import annotations

import mmap
from pathlib import Path, PurePosixPath

_KEY = b"\x0a\x08location\x12"
"""The key of a StringStringEntryProto as protobuf writes it, and the tag of the value that follows."""

_LONGEST = 1024


def locations(path: Path) -> tuple[str, ...]:
    """Names of existing files in the folder of `path` that hold its external data, in the order of their mention.

    The bytes are searched for the entries that name them: what happens to look like one among the weights does no harm.
    A file that is missing or lies elsewhere is left out here, for reading the model refuses it.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            named = _named(content)
    except (OSError, ValueError):  # missing or empty: taking its digest, or reading it, says so
        return ()
    return tuple(name for name in named if _inside(name) and (path.parent / name).is_file())


def _named(content: mmap.mmap) -> list[str]:
    found: dict[str, None] = {}
    at = content.find(_KEY)
    while at >= 0:
        start = at + len(_KEY)
        length, start = _varint(content, start)
        if length <= _LONGEST:
            found[content[start : start + length].decode("utf-8", errors="replace")] = None
        at = content.find(_KEY, start)
    return list(found)


def _varint(content: mmap.mmap, at: int) -> tuple[int, int]:
    """A length of at most two bytes and where what it counts begins; a longer one comes back as too long."""
    first = content[at] if at < len(content) else 0
    if first < 0x80:
        return first, at + 1
    second = content[at + 1] if at + 1 < len(content) else 0x80
    return (_LONGEST + 1 if second >= 0x80 else (first & 0x7F) | second << 7), at + 2


def _inside(name: str) -> bool:
    return bool(name) and "\0" not in name and not PurePosixPath(name).is_absolute() and ".." not in name.split("/")
