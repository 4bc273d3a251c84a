"""Digests: frozen for fixed content, blind to order and class, awake to every leaf."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify_deploy.artifacts.fingerprint import canonical, canonical_text, digest, file_digest, files_below
from sparsify_deploy.params import GivenHere, Params


class Sgd(Params):
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)


class Renamed(Params):
    betas: tuple[float, float] = (0.9, 0.999)
    lr: float = 0.1


@dataclasses.dataclass(frozen=True)
class Stage:
    optimizer: Params
    steps: int
    patterns: tuple[str, ...]
    checkpoint: Path | None
    fill: bool


STAGE = Stage(Sgd(), 100, ("conv1", "é"), Path("/somewhere/a.pt"), fill=True)
PARTS = {"stage": "train", "version": 1, "settings": STAGE, "files": {"data": "ab" * 32}, "none": None, "big": 1e22}
TEXT = (
    '{"big":1e+22,"files":{"data":"' + "ab" * 32 + '"},"none":null,"settings":{"checkpoint":"<by content>","fill":true,'
    '"optimizer":{"betas":[0.9,0.999],"lr":0.1},"patterns":["conv1","\\u00e9"],"steps":100},"stage":"train","version":1}'
)


def test_golden_text_and_digest() -> None:
    assert canonical_text(PARTS) == TEXT
    assert digest(PARTS) == "51380f161a84610274d216cce40bf4465b56b5162222852b904f4a7c19f31c3b"


def test_order_and_class_do_not_count_but_number_types_do() -> None:
    assert digest(dict(reversed(list(PARTS.items())))) == digest(PARTS)
    assert digest({**PARTS, "settings": dataclasses.replace(STAGE, optimizer=Renamed())}) == digest(PARTS)
    assert digest({**PARTS, "settings": canonical(STAGE)}) == digest(PARTS)
    assert digest({"a": 1}) != digest({"a": 1.0})
    assert digest({"a": 1}) != digest({"a": True})
    assert digest({"a": "1"}) != digest({"a": 1})
    assert digest({"a": ()}) != digest({"a": {}})


def test_where_a_file_lies_does_not_count_but_whether_there_is_one_does() -> None:
    moved = {**PARTS, "settings": dataclasses.replace(STAGE, checkpoint=Path("b"))}
    absent = {**PARTS, "settings": dataclasses.replace(STAGE, checkpoint=None)}
    assert digest(moved) == digest(PARTS)
    assert digest(absent) != digest(PARTS)


def test_subclasses_of_scalars_count_by_value() -> None:
    assert digest({"a": GivenHere("x")}) == digest({"a": "x"})
    assert type(canonical(GivenHere("x"))) is str


@pytest.mark.parametrize("value", [{1, 2}, object(), b"x", {1: 2}, Stage, 1j, len])
def test_what_has_no_canonical_form_is_a_type_error(value: object) -> None:
    with pytest.raises(TypeError, match="no canonical form"):
        canonical({"a": [value]})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="no canonical form"):
        digest({"a": value})


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12
)


def _leaf_paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict) and value:
        return [p for k, v in value.items() for p in _leaf_paths(v, (*path, k))]
    if isinstance(value, list) and value:
        return [p for k, v in enumerate(value) for p in _leaf_paths(v, (*path, k))]
    return [path]


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(), TREES, min_size=1, max_size=4))
def test_every_leaf_changes_the_digest(parts: dict[str, Any]) -> None:
    whole = digest(parts)
    assert whole == hashlib.sha256(canonical_text(parts).encode()).hexdigest()
    assert digest(json.loads(canonical_text(parts))) == whole
    seen = {whole}
    for path in _leaf_paths(parts):
        changed = json.loads(json.dumps(parts))
        holder = changed
        for piece in path[:-1]:
            holder = holder[piece]
        holder[path[-1]] = ["something else", holder[path[-1]]]
        seen.add(digest(changed))
    assert len(seen) == 1 + len(_leaf_paths(parts))


def test_a_files_digest_is_the_sha256_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    content = os.urandom(3 << 20)
    path.write_bytes(content)
    assert file_digest(path) == hashlib.sha256(content).hexdigest()


def test_a_folders_digest_depends_on_names_and_contents_alone(tmp_path: Path) -> None:
    def folder(name: str, files: dict[str, str]) -> str:
        for file, content in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return file_digest(tmp_path / name)

    files = {"b": "1", "a/c": "2", "a.d": "3"}
    first = folder("one", files)
    assert files_below(tmp_path / "one") == ["a.d", "a/c", "b"]
    assert folder("two", dict(reversed(files.items()))) == first
    assert folder("three", {**files, "b": "x"}) != first
    assert folder("four", {"b": "1", "a/e": "2", "a.d": "3"}) != first
    assert folder("five", {"b": "2", "a/c": "1", "a.d": "3"}) != first
    assert folder("six", {**files, "new": ""}) != first


def test_links_are_followed_and_loops_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_text("1")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "a").symlink_to(tmp_path / "real" / "a")
    assert file_digest(tmp_path / "link") == file_digest(tmp_path / "real")
    (tmp_path / "real" / "self").symlink_to(tmp_path / "real")
    with pytest.raises(OSError, match="links back"):
        file_digest(tmp_path / "real")


def test_a_missing_file_and_a_pipe_raise_instead_of_waiting(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        file_digest(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="neither a file nor a folder"):
        file_digest(tmp_path / "pipe")
