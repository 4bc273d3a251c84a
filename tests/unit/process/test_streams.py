"""Streams that fail are silent from then on, in their buffers and descriptors too."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsify_deploy.process import streams


def dead_pipe() -> int:
    read, write = os.pipe()
    os.close(read)
    return write


def test_what_fails_says_why_and_points_nowhere_afterwards(recwarn: pytest.WarningsRecorder) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    stream = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115
    assert streams.write(stream, "words") == ""  # in the buffer
    assert streams.write(stream, "more", flush=True) == "No space left on device"
    assert os.readlink(f"/proc/self/fd/{stream.fileno()}") == os.devnull
    assert streams.write(stream, "again", flush=True) == ""
    stream.close()


def test_a_reader_that_went_away_is_nothing_to_tell() -> None:
    stream = open(dead_pipe(), "w", encoding="utf-8")  # noqa: SIM115
    assert streams.write(stream, "words", flush=True) == ""
    stream.write("what nobody reads")
    stream.close()


def test_a_closed_stream_takes_words_too() -> None:
    stream = io.StringIO()
    stream.close()
    assert streams.write(stream, "words", flush=True) == "I/O operation on closed file"


def test_only_what_fails_is_silenced() -> None:
    stream = io.StringIO()
    assert streams.write(stream, "words", flush=True) == ""
    with pytest.raises(TypeError):
        streams.write(stream, b"bytes")  # type: ignore[arg-type]
    assert stream.getvalue() == "words"


def test_kept_gives_stdout_back_and_tells_what_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = open("/dev/full", "w", encoding="utf-8", buffering=1)  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", stream)
    with streams.kept() as results:
        print("a result")
        assert streams.results() is sys.stdout
    assert sys.stdout is stream
    assert results.lost == "No space left on device"
    with streams.kept() as results:
        print("a result")
    assert results.lost == ""
    stream.close()


def test_closed_descriptors_are_there_again_and_go_to_children() -> None:
    program = (
        "import os, subprocess, sys\n"
        "from sparsify_deploy.process import streams\n"
        "streams.open_closed()\n"
        "assert [os.readlink(f'/proc/self/fd/{n}') for n in range(3)] == [os.devnull] * 3\n"
        "print('x'); print('y', file=sys.stderr)\n"
        "sys.exit(subprocess.run(['sh', '-c', 'echo a && echo b >&2 && cat'], check=False).returncode)\n"
    )
    command = ["sh", "-c", 'exec "$0" -c "$1" 0<&- 1>&- 2>&-', sys.executable, program]
    assert subprocess.run(command, check=False, timeout=60).returncode == 0
