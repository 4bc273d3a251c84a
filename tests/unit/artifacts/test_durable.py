"""Files are whole or not there, what is left half written is swept, and sealed JSON notices any changed byte."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from sparsify_deploy.artifacts import durable
from sparsify_deploy.errors import CorruptArtifact, OutOfResources


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    durable.write(path, [b"one", memoryview(b" and two")])
    assert path.read_bytes() == b"one and two"

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    def pieces() -> Any:
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        durable.write(path, pieces())
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        durable.write_text(path, "new")
    assert path.read_bytes() == b"one and two"
    assert names(tmp_path) == ["a"]


def test_a_copy_is_refused_where_the_bytes_are_not_the_promised_ones(tmp_path: Path) -> None:
    import hashlib

    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"x" * 3_000_000)
    target.write_bytes(b"old")
    with pytest.raises(CorruptArtifact, match=r"source is not what was committed .*--again"):
        durable.copy(source, target, "0" * 64)
    assert target.read_bytes() == b"old"
    durable.copy(source, target, hashlib.sha256(source.read_bytes()).hexdigest())
    assert target.read_bytes() == source.read_bytes()
    assert names(tmp_path) == ["source", "target"]


def test_a_folder_is_replaced_whole_or_stays(tmp_path: Path) -> None:
    folder = tmp_path / "deploy"
    with durable.replacing_folder(folder) as fresh:
        (fresh / "a").write_text("1")
    with pytest.raises(FileNotFoundError), durable.replacing_folder(folder) as fresh:
        (fresh / "not there" / "a").write_text("2")
    assert (folder / "a").read_text() == "1"
    with durable.replacing_folder(folder) as fresh:
        (fresh / "b").write_text("2")
    assert names(folder) == ["b"]
    assert names(tmp_path) == ["deploy"]


def test_sweeping_takes_what_is_ours_and_follows_no_link(tmp_path: Path) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    (run / "inner").mkdir(parents=True)
    outside.mkdir()
    mine = [f".a{durable.NEW}", f"inner/.b{durable.OLD}"]
    theirs = ["a.new", "b.tmp", "c.partial", "sparsify-new", f"d{durable.NEW}.txt", "inner/e.old"]
    for name in (*mine, *theirs):
        (run / name).write_text("x")
    (run / f".folder{durable.OLD}").mkdir()
    (run / f".folder{durable.OLD}" / "x").write_text("x")
    (outside / f".kept{durable.NEW}").write_text("x")
    (run / "link").symlink_to(outside)
    (run / f".link{durable.OLD}").symlink_to(outside)
    gone = durable.sweep(run)
    assert sorted(path.name for path in gone) == [f".a{durable.NEW}", f".folder{durable.OLD}", f".link{durable.OLD}"]
    assert [path.name for path in durable.sweep(run, deep=True)] == [f".b{durable.OLD}"]
    assert all((run / name).exists() for name in theirs)
    assert names(outside) == [f".kept{durable.NEW}"]
    assert durable.sweep(tmp_path / "nowhere") == []


def test_deleting_a_link_leaves_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "a").write_text("a")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    durable.delete(tmp_path / "link")
    assert names(tmp_path) == ["kept"]
    assert names(tmp_path / "kept") == ["a"]


@pytest.mark.parametrize("value", [{}, {"a": 1, "b": [1.5, None, "ü", {"c": "</script>"}]}, {"sealed": "x", "n": {}}])
def test_sealed_json_comes_back_and_any_changed_byte_is_noticed(tmp_path: Path, value: dict[str, Any]) -> None:
    path, rng = tmp_path / "a.json", random.Random(0)
    durable.write_json(path, value)
    whole = path.read_bytes()
    assert durable.read_json(path) == value
    assert durable.is_sealed(whole)
    assert {**json.loads(whole)} == {**json.loads(whole), **value}
    for at in range(len(whole)):
        for changed in (
            whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :],
            whole[:at],
            whole[:at] + b" " + whole[at:],
            whole[:at] + whole[at + 1 :],
        ):
            if changed != whole:
                with pytest.raises(CorruptArtifact, match="is damaged"):
                    durable.read_json(path, changed)


def test_space_is_checked_on_the_disk_that_the_folder_will_lie_on(tmp_path: Path) -> None:
    durable.check_space(tmp_path / "a" / "b", 1000, "x")
    with pytest.raises(OutOfResources, match=r"x needs about .* MiB \(estimated\) and .* MiB are free: free some"):
        durable.check_space(tmp_path / "a" / "b", 1 << 62, "x")
