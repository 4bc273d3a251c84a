"""The log of a run directory: whole lines, bounded, without secrets, and never a reason for a run to fail."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from sparsify_deploy import __version__, logbook
from sparsify_deploy.errors import DataError, Interrupted, UsageError
from sparsify_deploy.logbook import Logbook, keeping

LINE = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z \d+ (begins|machine|says|progress|warning|error|trace|ends|dies) .*"
)


class Shown:
    """A progress that keeps what it was told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.updates = 0

    def update(self, label: str, done: int, total: int, note: str = "") -> None:
        self.updates += 1

    def say(self, message: str) -> None:
        self.said.append(message)


def lines(folder: Path) -> list[str]:
    text = (folder / "run.log").read_text(encoding="utf-8")
    assert text.endswith("\n")
    assert [line for line in text.splitlines() if not LINE.fullmatch(line)] == []
    return [line.split(" ", 2)[2] for line in text.splitlines()]


def test_a_run_is_told_from_its_beginning_to_its_end(tmp_path: Path) -> None:
    shown = Shown()
    with keeping(tmp_path, shown, "run", facts=lambda: {"cpu": "a cpu"}, arguments=["x", "run", "a b"]) as progress:
        progress.say("sparse/train: first time")
        for done in range(1, 5):
            progress.update("train", done, 4, f"loss {done}")
        progress.update("fine_tune", 0, 2)
    found = lines(tmp_path)
    assert [line.split(None, 1)[0] for line in found] == [
        *("begins", "machine", "says", "progress", "progress", "progress", "ends")
    ]
    assert found[0] == f"begins   run: sparsify-deploy {__version__}: x run 'a b'"
    assert found[1:3] == ["machine  cpu: a cpu", "says     sparse/train: first time"]
    assert found[3:6] == ["progress train 1/4 loss 1", "progress train 4/4 loss 4", "progress fine_tune 0/2"]
    assert re.fullmatch(r"ends     run: done after \d+\.\d s", found[6])
    assert (shown.said, shown.updates) == (["sparse/train: first time"], 5)
    assert logbook.take_failed() is None


def test_what_is_under_way_is_logged_now_and_then(tmp_path: Path) -> None:
    now = [0.0]
    with keeping(tmp_path, Shown(), "run", clock=lambda: now[0]) as progress:
        for done in range(100):
            now[0] = done * 1.0
            progress.update("train", done, 100)
    logged = [line for line in lines(tmp_path) if line.startswith("progress")]
    assert logged == [f"progress train {done}/100" for done in (*range(0, 100, 10), 99)]


def test_an_error_leaves_its_line_and_its_whole_traceback(tmp_path: Path) -> None:
    def fails() -> None:
        raise DataError("data.npz: broken", "data.npz: and more")

    with pytest.raises(DataError), keeping(tmp_path, Shown(), "run"):
        fails()
    text = "\n".join(lines(tmp_path))
    assert "error    data.npz: broken\nerror    data.npz: and more\ntrace    Traceback" in text
    assert "in fails" in text
    assert "trace    sparsify_deploy.errors.DataError: data.npz: broken" in text
    assert "ends     run: exit code 5 after" in text
    assert logbook.take_failed() == tmp_path / "run.log"
    assert logbook.take_failed() is None


@pytest.mark.parametrize(
    ("error", "end"), [(Interrupted("stopped"), "exit code 75"), (KeyboardInterrupt(), "KeyboardInterrupt")]
)
def test_whatever_ends_a_run_is_logged(tmp_path: Path, error: BaseException, end: str) -> None:
    with pytest.raises(type(error)), keeping(tmp_path, Shown(), "run"):
        raise error
    assert f"ends     run: {end} after" in lines(tmp_path)[-1]


def test_warnings_are_logged_and_shown(tmp_path: Path) -> None:
    shown: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show = lambda message, *rest: shown.append(str(message))  # type: ignore[assignment]
        with keeping(tmp_path, Shown(), "run"):
            warnings.warn("this is old", FutureWarning, stacklevel=1)
        assert warnings.showwarning is show
    assert any(re.search(r"warning  .*test_logbook\.py:\d+: FutureWarning: this is old", x) for x in lines(tmp_path))
    assert shown == ["this is old"]


def test_lines_hold_no_secret_and_nothing_that_a_terminal_obeys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "correct-horse")
    secret = "https://ann:pa55@h/x"

    def fails() -> None:
        with keeping(tmp_path, Shown(), "run", arguments=["x", f"--set=a={secret}"]) as progress:
            progress.say("with correct-horse\x1b[2J\x07 and\nnewline")
            raise DataError(f"{secret}: correct-horse is refused")

    with pytest.raises(DataError):
        fails()
    text = (tmp_path / "run.log").read_text(encoding="utf-8")
    assert "correct-horse" not in text
    assert "pa55" not in text
    assert "\x1b" not in text
    assert r"\x1b[2J\x07" in text
    lines(tmp_path)


def test_a_log_is_appended_to_and_moves_aside_when_it_is_large(tmp_path: Path) -> None:
    log = Logbook(tmp_path, bound_bytes=2000)
    log.open()
    for number in range(100):
        log.write("says", f"line {number}")
    log.close()
    last = (tmp_path / "run.log").read_text(encoding="utf-8")
    before = (tmp_path / "run.log.1").read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {"run.log", "run.log.1"}
    assert max(len(last), len(before)) <= 2000
    numbers = [int(line.rpartition(" ")[2]) for line in (before + last).splitlines()]
    assert numbers == list(range(numbers[0], 100))
    log.open()
    log.write("says", "later")
    assert (tmp_path / "run.log").read_text(encoding="utf-8").startswith(last)
    log.close()


def test_a_full_disk_costs_the_log_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, written = Shown(), []

    def full(descriptor: int, data: bytes) -> int:
        written.append(data)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with keeping(tmp_path, shown, "run") as progress:
        monkeypatch.setattr(logbook.os, "write", full)
        for number in range(3):
            progress.say(f"line {number}")
        monkeypatch.undo()
    assert [said for said in shown.said if "line" not in said] == [
        f"{tmp_path / 'run.log'}: cannot be written any more (No space left on device); the run goes on"
    ]
    assert len(written) == 1


def test_a_disk_that_is_full_from_the_start_is_no_reason_to_refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def full(path: object, *rest: int) -> int:
        if str(path).endswith("run.log"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, *rest)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(logbook.os, "open", full)
    shown = Shown()
    with keeping(tmp_path, shown, "run") as progress:
        progress.say("goes on")
    assert [line.rpartition(": ")[2] for line in shown.said] == [
        "cannot be written any more (No space left on device); the run goes on",
        "goes on",
    ]


@pytest.mark.parametrize("kind", ["link", "folder", "pipe", "under a file"])
def test_what_is_no_file_of_the_folder_is_refused_and_left_alone(tmp_path: Path, kind: str) -> None:
    folder, other = tmp_path / "run", tmp_path / "other"
    other.write_text("other", encoding="utf-8")
    if kind == "under a file":
        folder.write_text("a file", encoding="utf-8")
    else:
        folder.mkdir()
        make = {"link": lambda p: p.symlink_to(other), "folder": Path.mkdir, "pipe": os.mkfifo}
        make[kind](folder / "run.log")  # type: ignore[operator]
    with (
        pytest.raises(UsageError, match=r"run\.log: cannot be written \(.*\): choose another place"),
        keeping(folder, Shown(), "run"),
    ):
        pytest.fail("it was opened")
    assert other.read_text(encoding="utf-8") == "other"


def test_a_secret_that_a_shell_would_quote_is_not_in_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DB_PASSWORD", "pa'ss word1")
    with keeping(tmp_path, Shown(), "run", arguments=["sparsify-deploy", "run", "--run-dir", "x-pa'ss word1"]):
        pass
    text = (tmp_path / "run.log").read_text(encoding="utf-8")
    assert "sparsify-deploy run --run-dir 'x-[hidden]'" in text
    assert "word1" not in text


KILLED = """
import sys
from pathlib import Path
from sparsify_deploy.logbook import keeping
from sparsify_deploy.types import Silent
with keeping(Path(sys.argv[1]), Silent(), "run") as progress:
    number = 0
    while True:
        progress.say(f"line {number} " + "x" * 200)
        number += 1
        if number == 50:
            print("ready", flush=True)
"""


def test_a_killed_process_leaves_whole_lines_and_its_supervisor_adds_the_last(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert len(lines(tmp_path)) >= 50
    logbook.append(tmp_path / "run.log", "dies", "the process was killed (SIGKILL)")
    assert lines(tmp_path)[-1] == "dies     the process was killed (SIGKILL)"


def test_nothing_is_appended_where_there_is_no_log(tmp_path: Path) -> None:
    (tmp_path / "run.log").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text("", encoding="utf-8")
    logbook.append(tmp_path / "run.log", "dies", "x")
    logbook.append(tmp_path / "other", "dies", "x")
    assert (tmp_path / "elsewhere").read_text(encoding="utf-8") == ""
    assert not (tmp_path / "other").exists()
