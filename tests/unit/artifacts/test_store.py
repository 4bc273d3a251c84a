"""The store: what is committed is whole and found again, what is not is told why, and a crash leaves no half."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sparsify_deploy.artifacts import durable
from sparsify_deploy.artifacts.fingerprint import digest
from sparsify_deploy.artifacts.lock import locked
from sparsify_deploy.artifacts.store import ArtifactStore, Record, changes, explained, holding
from sparsify_deploy.errors import CorruptArtifact, Locked, OutOfResources, UsageError

PARTS: dict[str, Any] = {"stage": "train", "version": 1, "settings": {"params": {"rounds": 50}, "lr": 0.1}}
OTHER: dict[str, Any] = {"stage": "train", "version": 1, "settings": {"params": {"rounds": 100}, "lr": 0.1}}
OUTPUTS = {"weights": "weights.bin", "engine": "engine", "mask": "deep/er/mask.bin"}


def fill(folder: Path, text: str = "x") -> None:
    (folder / "weights.bin").write_text(text)
    (folder / "engine").mkdir(exist_ok=True)
    (folder / "engine" / "net.xml").write_text("<net/>")
    (folder / "engine" / "net.bin").write_text("12345678")
    (folder / "deep" / "er").mkdir(parents=True, exist_ok=True)
    (folder / "deep" / "er" / "mask.bin").write_text("m")
    (folder / "deep" / "scratch.tmp").write_text("left over")
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "step-1.pt").write_text("left over")


def committed(store: ArtifactStore, parts: dict[str, Any] = PARTS, text: str = "x") -> Record:
    fill(store.begin("train", parts), text)
    return store.commit("train", parts, OUTPUTS, {"accuracy": 0.5}, 1.23456)


ASIDE = (".lock", "digests.json", "layout.json")
"""Files of the store that hold no result."""


def tree(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name not in ASIDE)


def test_a_commit_is_found_whole_by_another_process(tmp_path: Path) -> None:
    made = committed(ArtifactStore(tmp_path))
    found = ArtifactStore(tmp_path).find("train", PARTS)
    assert found == made
    assert found is not None
    name = f"train-{digest(PARTS)}"
    assert found.folder == tmp_path / name
    assert found.outputs == {k: tmp_path / name / v for k, v in OUTPUTS.items()}
    assert found.bytes == {"weights": 1, "engine": 14, "mask": 1}
    assert (found.measured, found.seconds, found.parts) == ({"accuracy": 0.5}, 1.235, PARTS)
    kept = ["deep/er/mask.bin", "engine/net.bin", "engine/net.xml", "manifest.json", "weights.bin"]
    assert tree(tmp_path) == [f"{name}/{file}" for file in kept]
    assert ArtifactStore(tmp_path).find("train", OTHER) is None
    assert ArtifactStore(tmp_path).find("other", PARTS) is None


def test_looking_does_not_write(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    assert store.find("train", PARTS) is None
    assert not store.begun("train", PARTS)
    assert store.reason("sparse/train", PARTS) == "first time"
    assert not (tmp_path / "store").exists()


def test_an_attempt_goes_on_in_the_same_folder(tmp_path: Path) -> None:
    first = ArtifactStore(tmp_path).begin("train", PARTS)
    (first / "step-7.pt").write_text("7")
    store = ArtifactStore(tmp_path)
    assert store.begun("train", PARTS)
    assert not store.begun("train", OTHER)
    assert store.find("train", PARTS) is None
    again = store.begin("train", PARTS)
    assert again == first
    assert (again / "step-7.pt").read_text() == "7"
    assert durable.read_json(again / "parts.json") == PARTS


def test_an_attempt_that_goes_on_is_not_taken_for_finished(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    made = committed(store)
    made.folder.rename(made.folder.with_name(f"{made.folder.name}.partial"))  # a crash just before the last rename
    store.begin("train", PARTS)
    with ArtifactStore(tmp_path).lock():
        assert ArtifactStore(tmp_path).find("train", PARTS) is None


def test_of_two_equal_commits_the_first_stays(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    first = committed(store, text="first")
    second = committed(store, text="second")
    assert second == first
    assert second.outputs["weights"].read_text() == "first"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_commit_that_replaces_wins_over_the_same_result(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    committed(store, text="first")
    out = store.begin("train", PARTS)
    (out / "weights.bin").write_text("second")
    record = store.commit("train", PARTS, {"weights": "weights.bin"}, {}, 1.0, replace=True)
    assert record.outputs["weights"].read_text() == "second"
    assert ArtifactStore(tmp_path).find("train", PARTS) == record
    assert len(list(tmp_path.iterdir())) == 1


def test_abandoning_forgets_the_attempt_alone(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    record = committed(store)
    (store.begin("train", PARTS) / "step-1.pt").write_text("1")
    store.abandon("train", PARTS)
    store.abandon("train", PARTS)
    assert not store.begun("train", PARTS)
    assert store.find("train", PARTS) == record


def test_discard_forgets_the_result_and_the_attempt(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    committed(store)
    (store.begin("train", PARTS) / "step-1.pt").write_text("1")
    store.discard("train", PARTS)
    store.discard("train", PARTS)
    assert list(tmp_path.iterdir()) == []
    assert store.find("train", PARTS) is None


@pytest.mark.parametrize("file", ["weights.bin", "engine/net.bin", "deep/er/mask.bin"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_is_named_with_what_to_do(tmp_path: Path, file: str, damage: str) -> None:
    path = committed(ArtifactStore(tmp_path)).folder / file
    content = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    else:
        content[0] ^= 1
        path.write_bytes(content if damage == "flip" else b"")
    with pytest.raises(CorruptArtifact, match=r"delete the folder .*--again") as caught:
        ArtifactStore(tmp_path).find("train", PARTS)
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"outputs": 3}'])
def test_a_broken_manifest_is_named(tmp_path: Path, content: str) -> None:
    record = committed(ArtifactStore(tmp_path))
    (record.folder / "manifest.json").write_text(content)
    with pytest.raises(CorruptArtifact, match=r"manifest\.json cannot be read.*--again"):
        ArtifactStore(tmp_path).find("train", PARTS)


def test_a_manifest_of_something_else_is_named(tmp_path: Path) -> None:
    record = committed(ArtifactStore(tmp_path))
    shutil.copytree(record.folder, tmp_path / f"train-{digest(OTHER)}")
    with pytest.raises(CorruptArtifact, match="manifest of another result"):
        ArtifactStore(tmp_path).find("train", OTHER)


def test_bytes_are_read_once_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maker, store = ArtifactStore(tmp_path), ArtifactStore(tmp_path)
    committed(maker)
    assert store.find("train", PARTS) is not None

    def fail(paths: list[Path], *_: object) -> list[str]:
        raise AssertionError(f"{paths} were read again")

    monkeypatch.setattr("sparsify_deploy.artifacts.digests.file_digests", fail)
    assert store.find("train", PARTS) is not None
    assert maker.find("train", PARTS) is not None
    with pytest.raises(AssertionError, match="read again"):
        ArtifactStore(tmp_path).find("train", PARTS)


def test_an_output_that_was_not_made_or_lies_outside_is_our_bug(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    store.begin("train", PARTS)
    with pytest.raises(FileNotFoundError):
        store.commit("train", PARTS, {"weights": "weights.bin"}, {}, 0.0)
    for name in ("../x", "/etc/passwd", "", "manifest.json"):
        with pytest.raises(AssertionError):
            store.commit("train", PARTS, {"weights": name}, {}, 0.0)
    assert store.find("train", PARTS) is None


# -- why a step runs


def test_reasons(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    assert store.reason("sparse/train", PARTS) == "first time"
    committed(store)
    store.remember("sparse/train", PARTS)
    assert store.reason("sparse/train", OTHER) == "settings.params.rounds: 50 -> 100"
    assert store.reason("dense/train", OTHER) == "first time"
    store.begin("train", OTHER)
    assert store.reason("sparse/train", OTHER) == "the last attempt did not finish"
    store.discard("train", PARTS)
    assert store.reason("sparse/train", PARTS) == "its result is gone from the store"
    (tmp_path / "last" / "sparse.train.json").write_text("{")
    assert "sparse.train.json, which says what it was made from, cannot be read" in store.reason("sparse/train", PARTS)


def test_remembering_the_same_again_writes_nothing(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    store.remember("sparse/train", PARTS)
    path = tmp_path / "last" / "sparse.train.json"
    before = path.stat()
    store.remember("sparse/train", PARTS)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    store.remember("sparse/train", OTHER)
    assert durable.read_json(path) == OTHER


def test_changes_names_leaves_and_counts_the_rest() -> None:
    before = {"a": {"b": 1, "c": "x"}, "d": [1, 2], "same": 0}
    now = {"a": {"b": 2, "e": None}, "d": [1, 3, 4], "same": 0}
    assert changes(before, now) == 'a.b: 1 -> 2, a.c: "x" -> left out, d.1: 2 -> 3, a.e: new, null, d.2: new, 4'
    many = changes({str(i): 0 for i in range(9)}, {str(i): 1 for i in range(9)})
    assert many == "0: 0 -> 1, 1: 0 -> 1, 2: 0 -> 1, 3: 0 -> 1, 4: 0 -> 1, and 4 more"
    assert changes(now, now) == ""
    assert changes({"a": {}}, {"a": {"b": 1}}) == "a: {} -> left out, a.b: new, 1"
    old, new = "ab" * 32, "ab" * 31 + "cd"
    shown = changes({"files": old}, {"files": new})
    assert shown.count("ab" * 31) == 2, "values that differ late must not be shown alike"
    assert changes({"files": "1" * 64}, {"files": "2" * 64}) == 'files: "11111111111... -> "22222222222...'


# -- crashes


def test_order_of_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each output and the manifest reach the disk before the one rename that makes the commit, its folder after."""
    events: list[tuple[str, str]] = []
    real_fsync, real_rename, real_replace = os.fsync, os.rename, os.replace

    def where(descriptor: int) -> str:
        return str(Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path))

    def fsync(descriptor: int) -> None:
        events.append(("fsync", where(descriptor)))
        real_fsync(descriptor)

    def rename(source: Any, target: Any, **kw: Any) -> None:
        events.append(("rename", str(Path(target).relative_to(tmp_path))))
        real_rename(source, target, **kw)

    def replace(source: Any, target: Any, **kw: Any) -> None:
        events.append(("replace", str(Path(target).relative_to(tmp_path))))
        real_replace(source, target, **kw)

    store = ArtifactStore(tmp_path)
    fill(store.begin("train", PARTS))
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "replace", replace)
    store.commit("train", PARTS, OUTPUTS, {}, 0.0)

    final = f"train-{digest(PARTS)}"
    partial = f"{final}.partial"
    assert [e for e in events if e[0] == "rename"] == [("rename", final)]
    assert events[-2:] == [("rename", final), ("fsync", ".")]
    before = events[:-2]
    manifest_in_place = before.index(("replace", f"{partial}/manifest.json"))
    assert before.index(("fsync", f"{partial}/.manifest.json{durable.NEW}")) < manifest_in_place
    for path in ("weights.bin", "engine/net.xml", "engine/net.bin", "engine", "deep/er/mask.bin", "deep/er", "deep"):
        assert before.index(("fsync", f"{partial}/{path}")) < manifest_in_place, path
    assert before[-1] == ("fsync", partial)
    assert [e for e in before if e[0] == "replace"] == [("replace", f"{partial}/manifest.json")]


@pytest.mark.parametrize("call", ["fsync", "rename", "replace", "unlink"])
def test_a_commit_that_stops_at_any_call_is_finished_or_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Stop at the n-th system call of each kind, as a crash would; what is left must be nothing, partial or whole."""

    class Crash(BaseException):
        pass

    for stop_at in range(40):
        folder = tmp_path / f"{call}-{stop_at}"
        store = ArtifactStore(folder)
        fill(store.begin("train", PARTS))
        counted = 0
        real = getattr(os, call)

        def crashing(*args: Any, **kw: Any) -> Any:
            nonlocal counted
            counted += 1
            if counted > stop_at:  # noqa: B023 - called in this turn of the loop only
                raise Crash
            return real(*args, **kw)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(os, call, crashing)
            try:
                store.commit("train", PARTS, OUTPUTS, {"n": 1}, 0.0)
                return
            except Crash:
                pass
        after = ArtifactStore(folder)
        with after.lock():
            record = after.find("train", PARTS)
            if record is None:
                assert after.begun("train", PARTS)
                record = committed(after)
        assert record.outputs["weights"].read_text() == "x"
        assert [p.name for p in folder.iterdir() if p.name not in ASIDE] == [f"train-{digest(PARTS)}"]
        assert len(tree(folder)) == 5
    raise AssertionError("a commit makes fewer calls")


CHILD = """
import os, sys
from pathlib import Path
from sparsify_deploy.artifacts.store import ArtifactStore
store = ArtifactStore(Path(sys.argv[1]))
print("ready", flush=True)
n = 0
with store.lock():
    while True:
        parts = {"n": n % 7}
        found = store.find("work", parts)
        if found is not None:
            store.discard("work", parts)
        out = store.begin("work", parts)
        (out / "a.bin").write_bytes(bytes([n % 7]) * 20000)
        (out / "b").mkdir(exist_ok=True)
        (out / "b" / "c.bin").write_bytes(bytes([n % 7]) * 20000)
        (out / "step.pt").write_bytes(b"c" * 5000)
        store.commit("work", parts, {"a": "a.bin", "b": "b"}, {"n": n % 7}, 0.1)
        store.remember("x/work", parts)
        n += 1
        if n == 1:
            print("committed", flush=True)
"""


def test_kill_9_at_random_moments_leaves_only_whole_commits(tmp_path: Path) -> None:
    rng = random.Random(0)
    whole = 0
    rounds = 16
    for _ in range(rounds):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        began = time.monotonic()
        assert child.stdout.readline() == "committed\n"
        time.sleep(rng.uniform(0, 3 * (time.monotonic() - began)))  # within the next three commits or so
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        store = ArtifactStore(tmp_path)
        for n in range(7):
            record = store.find("work", {"n": n})  # raises CorruptArtifact where a commit is not whole
            if record is not None:
                whole += 1
                assert record.outputs["a"].read_bytes() == bytes([n]) * 20000
                assert (record.outputs["b"] / "c.bin").read_bytes() == bytes([n]) * 20000
                assert sorted(p.name for p in record.folder.iterdir()) == ["a.bin", "b", "manifest.json"]
        with store.lock():
            assert not [p for p in tmp_path.glob("*.partial") if (p / "manifest.json").exists()]
            assert not list(tmp_path.rglob(f".*{durable.OLD}"))
            assert not list(tmp_path.rglob(f".*{durable.NEW}"))
    assert whole >= rounds, "each round left at least its first commit"


def test_what_a_killed_process_left_half_written_is_swept_when_the_store_is_locked_and_nothing_else(
    tmp_path: Path,
) -> None:
    store = ArtifactStore(tmp_path)
    partial = store.begin("train", PARTS)
    store.remember("sparse/train", PARTS)
    (partial / "inner").mkdir()
    ours = [tmp_path, tmp_path / "last", partial, partial / "inner"]
    for folder in ours:
        (folder / f".left{durable.NEW}").write_text("half")
        (folder / "kept.tmp").write_text("whoever's")
    with ArtifactStore(tmp_path).lock():
        pass
    for folder in ours:
        assert not (folder / f".left{durable.NEW}").exists()
        assert (folder / "kept.tmp").exists()


# -- the lock


def test_a_second_process_is_told_who_holds_the_store(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom sparsify_deploy.artifacts.store import ArtifactStore\n"
        "from sparsify_deploy.errors import Locked\n"
        "try:\n    with ArtifactStore(Path(sys.argv[1])).lock(): print('got it')\n"
        "except Locked as error: print(error)\n"
    )

    def attempt() -> str:
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    store = ArtifactStore(tmp_path)
    with store.lock():
        said = attempt()
        assert f"{tmp_path} is in use by process {os.getpid()} on " in said
        assert "wait for it to end" in said
        with pytest.raises(Locked), store.lock():
            pass
    assert attempt() == "got it"


@pytest.mark.parametrize("kind", ["subprocess", "fork"])
def test_a_child_does_not_keep_the_lock_of_a_killed_parent(tmp_path: Path, kind: str) -> None:
    program = (
        "import os, subprocess, sys, time\nfrom pathlib import Path\n"
        "from sparsify_deploy.artifacts.store import ArtifactStore\n"
        "with ArtifactStore(Path(sys.argv[1])).lock():\n"
        "    if sys.argv[2] == 'fork':\n"
        "        child = os.fork()\n"
        "        if child == 0: time.sleep(60); os._exit(0)\n"
        "    else:\n"
        "        child = subprocess.Popen(['sleep', '60'], close_fds=False).pid\n"
        "    print(child, flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "store"), kind]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    try:
        store = ArtifactStore(tmp_path / "store")
        with pytest.raises(Locked), store.lock():
            pass
        parent.kill()
        parent.wait()
        os.kill(child, 0)  # it lives on
        until = time.monotonic() + 30
        while True:  # a forked child lets go as soon as it is given a core
            try:
                with store.lock():
                    break
            except Locked:
                assert time.monotonic() < until
                time.sleep(0.01)
    finally:
        os.kill(child, signal.SIGKILL)
        parent.stdout.close()


def test_the_lock_is_free_after_an_error(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    with pytest.raises(KeyError), store.lock():
        raise KeyError
    with store.lock():
        pass


# -- the disk


@pytest.mark.parametrize(
    ("number", "expected", "words"),
    [
        (errno.ENOSPC, OutOfResources, "the disk is full"),
        (errno.EDQUOT, OutOfResources, "quota"),
        (errno.EFBIG, OutOfResources, "ulimit -f"),
        (errno.EACCES, UsageError, "--run-dir"),
        (errno.EROFS, UsageError, "--run-dir"),
    ],
)
def test_disk_errors_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: type[Exception], words: str
) -> None:
    store = ArtifactStore(tmp_path)
    fill(store.begin("train", PARTS))

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(expected, match=words) as caught:
            store.commit("train", PARTS, OUTPUTS, {}, 0.0)
    assert str(tmp_path) in str(caught.value)
    assert store.find("train", PARTS) is None
    assert committed(store).outputs["weights"].read_text() == "x"


def test_a_store_that_cannot_be_written_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        store = ArtifactStore(folder)
        with pytest.raises(UsageError, match="cannot be written"):
            store.begin("train", PARTS)
        with pytest.raises(UsageError, match="cannot be written"), store.lock():
            pass


def test_other_errors_pass_and_spent_memory_is_explained(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), explained(tmp_path):
        (tmp_path / "none").read_text()
    with pytest.raises(OutOfResources, match="memory ran out"), explained(tmp_path):
        raise MemoryError


def test_a_run_directory_is_held_too_where_its_store_lies_elsewhere(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with (
        holding(run, ArtifactStore(tmp_path / "a")),
        pytest.raises(Locked, match=r"run is in use by process"),
        holding(run, ArtifactStore(tmp_path / "b")),
    ):
        pytest.fail("it was held twice")
    with holding(run, ArtifactStore(tmp_path / "a")), pytest.raises(Locked), ArtifactStore(tmp_path / "a").lock():
        pytest.fail("the store was not held")
    inside = tmp_path / "inside"
    with holding(inside, ArtifactStore(inside / "store")):
        assert not (inside / ".lock").exists()
    with holding(run, ArtifactStore(tmp_path / "b")):
        assert (run / ".lock").exists()


def test_a_run_with_the_store_inside_and_one_with_a_store_elsewhere_hold_one_run_directory(tmp_path: Path) -> None:
    run = tmp_path / "run"
    inside, elsewhere = ArtifactStore(run / "store"), ArtifactStore(tmp_path / "elsewhere")
    for _ in range(2):  # with and without the other's lock file there before
        with holding(run, inside), pytest.raises(Locked, match=r"run(/store)? is in use by"), holding(run, elsewhere):
            pytest.fail("it was held twice")
        with holding(run, elsewhere), pytest.raises(Locked, match=r"run is in use by"), holding(run, inside):
            pytest.fail("it was held twice")
    with holding(run, inside), holding(tmp_path / "other", elsewhere):
        pass


def test_a_lock_that_is_made_meanwhile_is_seen(tmp_path: Path) -> None:
    run = tmp_path / "run"

    class Late(ArtifactStore):
        """Another run takes the run directory just before this one has its store."""

        @contextmanager
        def lock(self) -> Iterator[None]:
            with locked(run), super().lock():
                yield

    with pytest.raises(Locked, match=r"run is in use by"), holding(run, Late(run / "store")):
        pytest.fail("it was held twice")


def test_a_run_directory_may_be_its_own_store_and_a_link(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "link").symlink_to(run)
    for folder, store in ((run, run), (tmp_path / "link", run), (run, tmp_path / "link"), (run / "store", run)):
        with holding(folder, ArtifactStore(store)):
            pass
