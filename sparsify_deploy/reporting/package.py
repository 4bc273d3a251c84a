"""The folder that is deployed: an engine, its record, and how a raw example becomes its inputs. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from sparsify_deploy import menu
from sparsify_deploy.artifacts import durable
from sparsify_deploy.artifacts.fingerprint import file_digest
from sparsify_deploy.errors import CorruptArtifact, DataError, RuntimeUnavailable
from sparsify_deploy.preprocessing.spec import FILE, Spec
from sparsify_deploy.preprocessing.spec import read as read_spec
from sparsify_deploy.types import Json

NOTE = "deploy.json"
FORMAT = 3
"""Raised when `deploy.json` would mean something else. From 3 on it is sealed, so that a changed byte shows."""

_UNSEALED = 2

_AGAIN = "run the recipe again, or copy the whole folder again"


@dataclass(frozen=True)
class Package:
    """A folder whose files are those that its note lists. `spec` None: preprocessing is the user's own."""

    folder: Path
    note: Mapping[str, Json]
    engine: Path
    runtime: str
    params: BaseModel
    spec: Spec | None


def read(folder: Path) -> Package:
    """What `run` left in the folder `deploy/`, with every hash verified.

    Raises DataError where the folder is none of ours, CorruptArtifact where a file is not the one it lists.
    """
    note = _note(folder)
    for name, digest in note["sha256"].items():
        path = folder / name
        if not path.is_file():
            raise CorruptArtifact(f"{path}: is gone, though {NOTE} lists it: {_AGAIN}")
        if file_digest(path) != digest:
            raise CorruptArtifact(f"{path}: its bytes are not the ones {NOTE} lists: {_AGAIN}")
    runtime = note["runtime"]
    if runtime not in menu.names("runtimes"):
        raise DataError(f"{folder / NOTE}: runtime {runtime!r}{menu.did_you_mean(runtime, menu.names('runtimes'))}")
    spec = read_spec(folder / FILE) if FILE in note["sha256"] else None
    engine = folder / note["engine"]
    return Package(folder, note, engine, runtime, _params(engine, menu.entry("runtimes", runtime)), spec)


def check_runs(package: Package) -> None:
    """Raises RuntimeUnavailable where the runtime of its engine cannot run here."""
    runtime = menu.entry("runtimes", package.runtime)
    if (reason := runtime.unavailable_reason() or runtime.cannot_run_reason()) is not None:
        raise RuntimeUnavailable(f"{package.folder}: its engine is one of {package.runtime}: {reason}")


def _note(folder: Path) -> Mapping[str, Json]:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise DataError(f"{folder}: {what}; name the folder deploy/ of a finished run")
    path = folder / NOTE
    if not path.is_file():
        inner = folder / "deploy"
        hint = f"did you mean {inner}?" if (inner / NOTE).is_file() else "name the folder deploy/ of a finished run"
        raise DataError(f"{folder}: holds no deployed model (no {NOTE}): {hint}")
    try:
        content = path.read_bytes()
        sealed = durable.is_sealed(content)
        note = durable.read_json(path, content) if sealed else json.loads(content)
        found = note["format"]
    except CorruptArtifact as error:
        raise CorruptArtifact(f"{error}: {_AGAIN}") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptArtifact(f"{path}: cannot be read ({type(error).__name__}): {_AGAIN}") from None
    if found == FORMAT and not sealed:
        raise CorruptArtifact(f"{path}: its seal is broken: {_AGAIN}")
    if found not in (_UNSEALED, FORMAT):
        raise DataError(f"{path}: format {found!r}, this program reads {FORMAT}: run the recipe again with it")
    _check_note(path, note)
    checked: Mapping[str, Json] = note
    return checked


def _check_note(path: Path, note: Mapping[str, Any]) -> None:
    """The parts that are read later have their types, and name files of the folder alone."""
    task, listed = note.get("task"), note.get("sha256")
    right = (
        all(isinstance(note.get(key), str) for key in ("runtime", "engine", "model"))
        and isinstance(task, dict)
        and isinstance(task.get("name"), str)
        and isinstance(listed, dict)
        and all(isinstance(digest, str) and _is_plain(name) for name, digest in listed.items())
        and note["engine"] in listed
    )
    if not right:
        raise CorruptArtifact(f"{path}: does not list what a deployed model has: {_AGAIN}")


def _is_plain(name: str) -> bool:
    """Whether a file of the folder itself can have this name."""
    size = len(name.encode("utf-8", "surrogatepass"))
    return Path(name).name == name and name not in ("", "..") and size <= 255 and "\0" not in name


def _params(engine: Path, runtime: Any) -> BaseModel:
    """The parameters the engine was built with, from its own record, which is verified too."""
    from sparsify_deploy.runtimes._metadata import check

    record = check(engine, trust=False)
    assert record is not None
    try:
        found: BaseModel = runtime.Params.model_validate(record["params"], strict=False)
    except (KeyError, ValidationError):
        raise CorruptArtifact(f"{engine}: the record beside it names no parameters: {_AGAIN}") from None
    return found
