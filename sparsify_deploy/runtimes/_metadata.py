"""The record beside every engine, and which runtime opens a file.

An engine is executable code, and none says of itself what it was built from. So every build leaves
`<engine>.json` with the runtime, its version, the options, the sha256 of the ONNX file and of every engine file,
and nothing is opened unless they match or the user says that the file is to be trusted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any
from xml.parsers import expat

from pydantic import BaseModel, Field, ValidationError

from sparsify_deploy import menu
from sparsify_deploy.artifacts import durable, environment
from sparsify_deploy.artifacts.fingerprint import file_digest
from sparsify_deploy.errors import CorruptArtifact, DataError, UsageError
from sparsify_deploy.runtimes import _signature, _tensors
from sparsify_deploy.types import BuildNotes, IOTensor, Json

FORMAT = 2
"""Records of format 1 are plain JSON; later ones are sealed, so that a changed byte shows."""

_UNSEALED = 1

_DATA = frozenset({"onnxruntime", "openvino"})
"""Runtimes whose engines are graphs; those of the others hold code for a GPU, and may hold some for the host."""


def metadata_path(engine: Path) -> Path:
    """`model.engine.json` for `model.engine`."""
    return engine.with_name(engine.name + ".json")


def write_metadata(engine: Path, notes: BuildNotes, onnx_sha256: str, params: Any) -> Path:
    """Write the record of a fresh engine beside it and return its path. `params` is the runtime's `Params`."""
    record = {
        "format": FORMAT,
        "runtime": notes.runtime,
        "version": notes.version,
        "params": params.model_dump(mode="json"),
        "options": notes.options,
        "onnx_sha256": onnx_sha256,
        "files": {name: file_digest(engine.with_name(name)) for name in notes.files},
        "built": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "runs_here": notes.runs_here,
        "label": notes.label,
        "facts": notes.facts,
        "environment": environment.machine(),
    }
    path = metadata_path(engine)
    durable.write_json(path, dict(sorted(_signature.signed(record).items())))
    return path


def check(engine: Path, *, trust: bool) -> Json | None:
    """The record beside `engine` after every hash in it was verified; None for a trusted engine without one.

    Raises DataError for a file that is no engine at all, UsageError where there is no record and `trust` is False,
    CorruptArtifact where a file differs from its record (`trust` does not excuse that).
    """
    runtime, path = runtime_of(engine), metadata_path(engine)
    if not os.path.lexists(path):
        judge(engine)
        if trust:
            return None
        raise UsageError(
            f"{engine}: there is no {path.name} beside it that says where this engine comes from; an engine is "
            "executable code: pass --trust-engine if you built it yourself"
        )
    record = read_record(path)
    if record["runtime"] != runtime or engine.name not in record["files"]:
        raise CorruptArtifact(f"{path}: is the record of another engine than {engine.name}: build the engine again")
    for name, digest in record["files"].items():
        file = engine.with_name(name)
        if len(name.encode("utf-8", "surrogatepass")) > 255 or not file.is_file():
            raise CorruptArtifact(f"{file}: is gone, though {path.name} lists it: build the engine again")
        if file_digest(file) != digest:
            raise CorruptArtifact(f"{file}: its bytes are not the ones {path.name} lists: build the engine again")
    judge(engine)
    return record


def check_own(engine: Path, *, trust: bool) -> None:
    """`UsageError` where an engine is code that was not built here by this user, unless they `trust` it.

    `check` says that a file is what its record lists; whoever made the file may have made the record.
    """
    path = metadata_path(engine)
    if trust or runtime_of(engine) in _DATA or (path.is_file() and _signature.is_own(read_record(path))):
        return
    raise UsageError(
        f"{engine}: was not built here by you, and an engine is executable code: build it again here, or pass "
        "--trust-engine if you trust those who made it"
    )


class _Facts(BaseModel):
    """The facts that are read again; a builder notes more."""

    axis_sizes: dict[str, dict[str, tuple[int, int, int]]] = {}
    architecture: str = ""


class _Record(BaseModel):
    """What is read of a record, in the types that `write_metadata` gives it."""

    runtime: str
    version: str = ""
    params: dict[str, Any] = {}
    options: dict[str, Any] = {}
    onnx_sha256: str = ""
    files: dict[Annotated[str, Field(pattern=r"^[^/\x00]*[^/\x00.][^/\x00]*$")], str]
    facts: _Facts = _Facts()


def read_record(path: Path) -> dict[str, Json]:
    """The record in a file. Raises CorruptArtifact where it is none."""
    try:
        content = path.read_bytes()
        sealed = durable.is_sealed(content)
        record: dict[str, Json] = durable.read_json(path, content) if sealed else json.loads(content)
        _Record.model_validate(record)
        number = record.get("format", _UNSEALED)
        if not isinstance(number, int) or (not sealed and number != _UNSEALED):
            raise ValueError("its seal is broken")
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except CorruptArtifact as error:
        raise CorruptArtifact(f"{error}: build the engine again") from None
    except (OSError, ValueError, RecursionError) as error:
        what = repr(error)
    else:
        if number > FORMAT:
            raise DataError(
                f"{path}: is of format {number}, and this program reads those up to {FORMAT}: use the release that "
                "built the engine, or build it again"
            )
        return record
    raise CorruptArtifact(f"{path}: not a record of an engine ({what[:200]}): build the engine again")


def typical_shapes(engine: Path, tensors: Sequence[IOTensor], batch: int) -> dict[str, tuple[int, ...]]:
    """`_tensors.typical_shapes` by the sizes that the record beside `engine` lists, if there is one."""
    path = metadata_path(engine)
    record = read_record(path) if path.is_file() else {}
    return _tensors.typical_shapes(tensors, batch, record.get("facts", {}).get("axis_sizes", {}))


def runtime_of(engine: Path) -> str:
    """The name of the runtime that opens this file, by its suffix. Raises DataError naming the known suffixes."""
    known = {menu.entry("runtimes", name).SUFFIX: name for name in menu.names("runtimes")}
    for suffix in sorted(known, key=len, reverse=True):
        if engine.name.endswith(suffix):
            return known[suffix]
    listed = ", ".join(f"{suffix} ({name})" for suffix, name in sorted(known.items()))
    raise DataError(f"{engine}: no runtime opens files of this kind; the known ones are {listed}")


def judge(engine: Path) -> str:
    """`runtime_of(engine)` after a look at the content that needs no runtime.

    Raises DataError for a file that is missing, empty or plainly something else.
    """
    runtime = runtime_of(engine)
    if not engine.is_file():
        raise DataError(f"{engine}: there is no such file")
    if engine.stat().st_size == 0:
        raise DataError(f"{engine}: the file is empty: build the engine again")
    if engine.suffix == ".xml":
        _judge_xml(engine)
    elif engine.suffix == ".onnx":
        from sparsify_deploy.graph.file import load

        load(engine)
    elif _is_text(engine):
        raise DataError(f"{engine}: holds plain text, not a serialised engine")
    return runtime


def _is_text(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(512)
    return b"\0" not in start and all(byte >= 32 or byte in b"\t\r\n\f\b" for byte in start)


class _Refused(Exception):
    pass


def _judge_xml(path: Path) -> None:
    """An OpenVINO IR has the root element <net> and no document type (so no entities to expand)."""
    root: list[str] = []

    def start(name: str, attributes: dict[str, str]) -> None:
        if not root:
            root.append(name)
            if name != "net":
                raise _Refused(f"its root element is <{name}>, not <net>")

    def doctype(*arguments: object) -> None:
        raise _Refused("it has a document type declaration, which an IR never has")

    parser = expat.ParserCreate()
    parser.StartElementHandler = start
    parser.StartDoctypeDeclHandler = doctype
    try:
        with path.open("rb") as file:
            parser.ParseFile(file)
    except _Refused as refused:
        raise DataError(f"{path}: is not an OpenVINO IR: {refused}") from None
    except (expat.ExpatError, ValueError) as error:
        raise DataError(f"{path}: is not an OpenVINO IR: not well-formed XML ({error})") from None
    if not path.with_suffix(".bin").is_file():
        raise DataError(f"{path}: its weights {path.with_suffix('.bin').name} are not beside it")
