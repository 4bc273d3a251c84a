"""Which Python objects a torch checkpoint would make when it is unpickled, read off its opcodes: nothing is executed.

A word before a run, for a person; what guards a run is torch's own `weights_only`. Free of torch.
"""

from __future__ import annotations

import io
import pickletools
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from sparsify_deploy.safety.unpickling import is_archive, objection

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar")
"""Of torch's checkpoints, which are pickles; a .safetensors holds no objects."""

_MOST = 100
"""Names of objects that are looked for in a file."""

_DAMAGED = (
    *(ValueError, EOFError, IndexError, KeyError, OSError, OverflowError, MemoryError, RuntimeError),
    *(NotImplementedError, struct.error, zlib.error, zipfile.BadZipFile),
)

_TENSORS = {
    *("torch", "torch._utils", "torch._tensor", "torch.storage", "torch.nn.parameter", "torch.serialization"),
    *("_codecs encode", "collections OrderedDict", "collections Counter", "collections defaultdict"),
    *(f"{module} {name}" for module in ("builtins", "__builtin__") for name in ("set", "bytearray", "complex", "dict")),
}
"""Modules and names that plain tensors, and the containers torch reads without running code, are pickled with."""


def objects_in(path: Path) -> tuple[str, ...]:
    """`module.name` of each object besides tensors, in order; none for a file that holds none, or is no pickle."""
    if path.suffix not in SUFFIXES or not path.is_file():
        return ()
    found: dict[str, None] = {}
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of escapes in what may be a tensor's bytes
            for pickled in _pickles(file):
                for name in _named(pickled):
                    if name not in _TENSORS and name.partition(" ")[0] not in _TENSORS:
                        found[name.replace(" ", ".")] = None
                    if len(found) >= _MOST:
                        return tuple(found)
    except _DAMAGED:
        pass  # said with the reason where it is read
    return tuple(found)


def _pickles(file: IO[bytes]) -> Iterator[IO[bytes]]:
    """The pickle in a zip of today's torch, or the first four of the older format: a number, a version, a note on the
    machine, the objects. None in a zip that would grow when it is unpacked."""
    if is_archive(file):
        if objection(file) is None:
            with zipfile.ZipFile(file) as archive:
                for name in archive.namelist():
                    if name.endswith("data.pkl"):
                        yield io.BytesIO(archive.read(name))
        return
    for _ in range(4):
        yield file


def _named(pickled: IO[bytes]) -> Iterator[str]:
    """`module name` of every global that a pickle asks for."""
    words: list[str] = []
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("GLOBAL", "INST"):
            yield str(argument)
        elif opcode.name == "STACK_GLOBAL":
            yield " ".join(words[-2:])
        elif isinstance(argument, str):
            words.append(argument)
