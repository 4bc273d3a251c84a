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
from typing import Any
from xml.parsers import expat

from sparsify_deploy import menu
from sparsify_deploy.artifacts import environment
from sparsify_deploy.artifacts.fingerprint import file_digest
from sparsify_deploy.errors import CorruptArtifact, DataError, UsageError
from sparsify_deploy.runtimes import _tensors
from sparsify_deploy.types import BuildNotes, IOTensor, Json

FORMAT = 1


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
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def check(engine: Path, *, trust: bool) -> Json | None:
    """The record beside `engine` after every hash in it was verified; None for a trusted engine without one.

    Raises DataError for a file that is no engine at all, UsageError where there is no record and `trust` is False,
    CorruptArtifact where a file differs from its record (`trust` does not excuse that).
    """
    runtime = judge(engine)
    path = metadata_path(engine)
    if not path.is_file():
        if trust:
            return None
        raise UsageError(
            f"{engine}: there is no {path.name} beside it that says where this engine comes from; an engine is "
            "executable code: pass --trust-engine if you built it yourself"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        files, named = dict(record["files"]), record["runtime"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptArtifact(f"{path}: not a record of an engine ({error!r}): build the engine again") from None
    if named != runtime or engine.name not in files:
        raise CorruptArtifact(f"{path}: is the record of another engine than {engine.name}: build the engine again")
    for name, digest in files.items():
        file = engine.with_name(Path(name).name)
        if not file.is_file():
            raise CorruptArtifact(f"{file}: is gone, though {path.name} lists it: build the engine again")
        if file_digest(file) != digest:
            raise CorruptArtifact(f"{file}: its bytes are not the ones {path.name} lists: build the engine again")
    return record


def typical_shapes(engine: Path, tensors: Sequence[IOTensor], batch: int) -> dict[str, tuple[int, ...]]:
    """`_tensors.typical_shapes` by the sizes that the record beside `engine` lists, if there is one."""
    path = metadata_path(engine)
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
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
