"""Every way to fail is its exit code and one line a mistake; only with `--traceback` is a bug of ours more."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from sparsify_deploy import __version__, cli, console, errors
from sparsify_deploy.__main__ import main
from sparsify_deploy.errors import MissingExtra, RecipeError, SparsifyError

Capture = pytest.CaptureFixture[str]


def subclasses(cls: type[SparsifyError]) -> list[type[SparsifyError]]:
    return [cls, *(inner for sub in cls.__subclasses__() for inner in subclasses(sub))]


CODES = {
    "SparsifyError": 1,
    "UsageError": 2,
    "RecipeError": 2,
    "EnvironmentProblem": 3,
    "MissingExtra": 3,
    "RuntimeUnavailable": 3,
    "NativeCrash": 3,
    "CheckFailed": 4,
    "DataError": 5,
    "ModelError": 5,
    "Diverged": 6,
    "OutOfResources": 7,
    "Locked": 8,
    "CorruptArtifact": 9,
    "Interrupted": 75,
}


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let the verb `version` fail, inside the command line's own machinery."""

    def fail(text: str) -> None:
        raise error

    monkeypatch.setattr(console, "out", fail)


def made(cls: type[SparsifyError]) -> SparsifyError:
    if cls is RecipeError:
        return RecipeError(["r.yaml:1:2: a: b, c", "r.yaml:3:4: d: e, f"])
    return MissingExtra("torch", "train", "training") if cls is MissingExtra else cls("what, where", "and more")


def test_the_table_of_exit_codes_is_whole() -> None:
    found = {cls.__name__: cls.exit_code for cls in subclasses(SparsifyError) if cls.__module__ == errors.__name__}
    assert found == CODES


@pytest.mark.parametrize("cls", [c for c in subclasses(SparsifyError) if c.__module__ == errors.__name__])
@pytest.mark.parametrize("flags", [[], ["--traceback"]])
def test_a_known_error_is_its_code_and_a_line_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, cls: type[SparsifyError], flags: list[str]
) -> None:
    error = made(cls)
    failing(monkeypatch, error)
    assert main([*flags, "version"]) == CODES[cls.__name__]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [f"sparsify-deploy: {line}" for line in error.lines]
    assert len(error.lines) == (1 if cls is MissingExtra else 2)


def test_an_error_without_words_still_is_a_line(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    failing(monkeypatch, errors.Diverged())
    assert main(["version"]) == 6
    assert capsys.readouterr().err == "sparsify-deploy: Diverged\n"


class OutOfMemoryError(RuntimeError):
    """Named as torch names its own."""


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (MemoryError(), 7, "GiB: use a smaller batch (training.batch_size)"),
        (RuntimeError("std::bad_alloc"), 7, "out of memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 7, "out of memory"),
        (OutOfMemoryError("CUDA"), 7, "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 7, "out of memory"),
        (OSError(errno.ENOSPC, "No space left", "/data/x"), 7, "/data/x: the disk is full"),
        (OSError(errno.ENOSPC, "No space left"), 7, "sparsify-deploy: the disk is full"),
        (OSError(errno.EDQUOT, "quota"), 7, "the disk is full"),
        (OSError(errno.EIO, "Input/output error"), 1, "internal error: OSError: [Errno 5]"),
        (ZeroDivisionError("division\nby zero"), 1, "internal error: ZeroDivisionError: division; please report"),
        (KeyError(), 1, "internal error: KeyError: ;"),
        (RecursionError("deep"), 1, "internal error: RecursionError"),
    ],
)
def test_what_is_no_error_of_ours_by_name_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, error: BaseException, code: int, text: str
) -> None:
    failing(monkeypatch, error)
    assert main(["version"]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert text in line
    assert ("--traceback" in line) == (code == 1)


@pytest.mark.parametrize("arguments", [["--traceback", "version"], ["version", "--traceback"]])
def test_traceback_raises_a_bug_of_ours(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    def fail(given: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "call", fail)
    with pytest.raises(ZeroDivisionError):
        main(arguments)


def test_an_interrupt_inside_a_verb_is_75_and_a_line(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    assert main(["version"]) == 75
    assert "interrupted; what is finished is kept" in capsys.readouterr().err


def test_an_interrupt_that_reaches_main_is_75_and_a_line(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def fail(given: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "call", fail)
    assert main([]) == 75
    assert capsys.readouterr().err == (
        "sparsify-deploy: interrupted; what is finished is kept, the same command goes on\n"
    )


@pytest.mark.parametrize("code", [None, 0, 3])
def test_code_of_a_recipe_that_exits_does_not_end_well(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, code: int | None
) -> None:
    failing(monkeypatch, SystemExit(code))
    assert main(["version"]) == 5
    assert f"ended the program (sys.exit({code}))" in capsys.readouterr().err


def piped(arguments: list[str], stdout: int) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "sparsify_deploy", *arguments]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, check=False, timeout=60)


def test_a_reader_that_went_away_is_no_error() -> None:
    import os

    read, write = os.pipe()
    os.close(read)
    done = piped(["list"], write)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_output_to_a_full_disk_is_7_and_a_line() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this system")
    with full.open("wb") as file:
        done = piped(["version"], file.fileno())
    assert done.returncode == 7
    assert b"the disk is full" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "Missing command"),
        (["nonsense"], "No such command 'nonsense'"),
        (["run"], "Missing argument 'RECIPE'"),
        (["bench", "x.onnx", "--rounds", "1"], "--rounds"),
        (["run", "x.yaml", "--device", "tpu"], "--device"),
        (["run", "x.yaml", "--checkpoint-every", "soon"], "--checkpoint-every"),
    ],
)
def test_a_wrong_command_line_is_2_and_names_what_is_wrong(capsys: Capture, arguments: list[str], text: str) -> None:
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert text in lines[0]
    assert lines[-1].startswith("sparsify-deploy: try: sparsify-deploy")
    assert lines[-1].endswith("--help")
    assert len(lines) == 2


def test_help_and_version_are_no_errors(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sparsify-deploy {__version__}\n"
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"sparsify-deploy {__version__}\n"
    verbs = (
        "run",
        "validate",
        "plan",
        "status",
        "explain",
        "sensitivity",
        "report",
        "list",
        "build",
        "bench",
        "inspect",
    )
    for verb in verbs:
        assert main([verb, "--help"]) == 0
        assert verb in capsys.readouterr().out


def test_validate_names_every_mistake(capsys: Capture, recipe_file: Path) -> None:
    assert main(["validate", str(recipe_file)]) == 0
    text = recipe_file.read_text() + "sed: 1\ndeploi: []\n"
    recipe_file.write_text(text)
    capsys.readouterr()
    assert main(["validate", str(recipe_file)]) == 2
    lines = capsys.readouterr().err.splitlines()
    places = [line.split(": ")[1] for line in lines]
    assert [place.rpartition("/")[2] for place in places] == ["small.yaml:4:1", "small.yaml:5:1"]


def test_a_stdout_that_the_caller_closed_is_no_error() -> None:
    command = ["sh", "-c", '"$0" -m sparsify_deploy list --json >&-', sys.executable]
    done = subprocess.run(command, stderr=subprocess.PIPE, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
