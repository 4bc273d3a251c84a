"""Every way to fail is its exit code and one line a mistake; only with `--traceback` is a bug of ours more."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
        (OSError(errno.EDQUOT, "quota"), 7, "the disk quota is used up"),
        (OSError(errno.EFBIG, "File too large", "/data/x"), 7, "/data/x: no file may be that large here: raise"),
        (OSError(errno.EMFILE, "Too many open files", "/data/x"), 7, "/data/x: too many open files: raise the limit"),
        (OSError(errno.ENFILE, "Too many open files in system"), 7, "too many open files on this machine"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), 7, "processes and threads (ulimit -u)"),
        (RuntimeError("can't start new thread"), 7, "no thread could be started: raise the limit on processes"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "internal error: BrokenPipeError"),
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


def test_code_of_a_recipe_that_leaves_by_a_generators_exit_is_5(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    failing(monkeypatch, GeneratorExit())
    assert main(["version"]) == 5
    assert "ended the program (raise GeneratorExit)" in capsys.readouterr().err


def piped(arguments: list[str], stdout: int) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "sparsify_deploy", *arguments]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, check=False, timeout=60)


def test_a_reader_that_went_away_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    done = piped(["list"], write)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["version"], ["--version"], ["--help"], ["list", "--json"]])
def test_a_result_that_a_full_disk_does_not_take_is_7_and_names_stdout(arguments: list[str], unbuffered: str) -> None:
    if not FULL.exists():
        pytest.skip("no /dev/full on this system")
    command = [sys.executable, "-m", "sparsify_deploy", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with FULL.open("wb") as file:
        done = subprocess.run(
            command, stdout=file, stderr=subprocess.PIPE, check=False, timeout=60, text=True, env=environment
        )
    assert done.returncode == 7
    (line,) = done.stderr.splitlines()
    assert line.startswith("sparsify-deploy: stdout: cannot be written (No space left on device)")


@contextmanager
def taking(how: str) -> Iterator[int]:
    """A descriptor to write to: a pipe nobody reads any more, or a disk without room."""
    if how == "full":
        if not FULL.exists():
            pytest.skip("no /dev/full on this system")
        write = os.open(FULL, os.O_WRONLY)
    else:
        read, write = os.pipe()
        os.close(read)
    yield write
    os.close(write)


FULL = Path("/dev/full")
FAILS = """\
import sys
from sparsify_deploy import __main__, cli, console
from sparsify_deploy.errors import CorruptArtifact

def call(arguments):
    console.out("the result")
    if "raises" in arguments:
        raise CorruptArtifact("what", "where")
    console.error("what is wrong")
    return 9

cli.call = call
sys.exit(__main__.main())
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("verb", ["list", "raises"])
@pytest.mark.parametrize(
    ("stdout", "stderr"), [("gone", ""), ("", "gone"), ("", "full"), ("full", ""), ("gone", "full")]
)
def test_the_verbs_own_code_stands_whatever_becomes_of_its_words(
    stdout: str, stderr: str, verb: str, unbuffered: str
) -> None:
    with taking(stdout) as out, taking(stderr) as err:
        done = subprocess.run(
            [sys.executable, "-c", FAILS, verb],
            stdout=out if stdout else subprocess.PIPE,
            stderr=err if stderr else subprocess.PIPE,
            check=False,
            timeout=60,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert done.returncode == 9
    assert done.stdout == (None if stdout else b"the result\n")
    assert ("stdout: cannot be written" in (done.stderr or b"").decode()) == (stdout == "full")


def test_a_mistake_that_cannot_be_told_is_its_code_all_the_same() -> None:
    for how in ("gone", "full"):
        with taking(how) as err:
            command = [sys.executable, "-m", "sparsify_deploy", "validate", "no-such.yaml"]
            assert subprocess.run(command, stderr=err, check=False, timeout=60).returncode == 2


def test_files_get_no_descriptor_that_the_caller_closed(tmp_path: Path) -> None:
    """Or what is written to stderr would be written into them."""
    program = (
        "import os, sys\nfrom sparsify_deploy import __main__, cli, console\n"
        "def call(arguments):\n"
        "    with open('file', 'wb') as file:\n"
        "        os.write(2, b'native words'); console.error('words'); console.out('result')\n"
        "        file.write(str(file.fileno()).encode())\n"
        "cli.call = call\nsys.exit(__main__.main())\n"
    )
    for closed in ("0<&-", "2>&-", "0<&- 2>&-", "1>&-", "0<&- 1>&- 2>&-"):
        command = ["sh", "-c", f'exec {closed}; "$0" -c "$1" list', sys.executable, program]
        subprocess.run(command, cwd=tmp_path, capture_output=True, check=False, timeout=60)
        assert int((tmp_path / "file").read_text()) > 2, closed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_light_verb_by_75_too(number: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPS, "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (75, "")
    assert err == "sparsify-deploy: interrupted; what is finished is kept, the same command goes on\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_a_library_swallows_is_no_bug_of_ours(number: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SWALLOWS, "list", str(int(number))],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (75, ""), done.stderr
    assert done.stderr == "sparsify-deploy: interrupted; what is finished is kept, the same command goes on\n"


SWALLOWS = """\
import contextlib, os, sys
from sparsify_deploy import __main__, cli

def listed(arguments):
    with contextlib.suppress(BaseException):
        os.kill(os.getpid(), int(sys.argv[2]))
    raise AttributeError("module 'numpy' has no attribute 'matrix'")

cli.call = listed
sys.exit(__main__.main())
"""


SLEEPS = """\
import sys, time
from sparsify_deploy import __main__, cli

def listed(*arguments):
    print("at work", flush=True)
    time.sleep(float(sys.argv[2]) if len(sys.argv) > 2 else 60)
    assert "sparsify_deploy.supervisor" not in sys.modules
    return 0

cli.call = listed
sys.exit(__main__.main())
"""


def test_what_the_caller_ignores_a_light_verb_ignores_too() -> None:
    command = ["sh", "-c", 'trap "" HUP; exec "$0" -c "$1" list 0.5', sys.executable, SLEEPS]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    process.send_signal(signal.SIGHUP)
    assert (process.communicate(timeout=60)[1], process.returncode) == ("", 0)


def test_called_as_a_function_it_changes_no_handler(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(signal, "signal", lambda *arguments: pytest.fail("changed"))
    assert main(["version"]) == 0


def test_a_working_directory_that_is_gone_is_2_and_a_line(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    command = ["sh", "-c", 'cd gone && rmdir ../gone && exec "$0" -m sparsify_deploy doctor', sys.executable]
    root = str(Path(__file__).resolve().parents[3])
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "sparsify-deploy: the working directory is gone: cd to one that is there, and call again\n"


def test_a_user_without_a_home_is_told_to_name_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    monkeypatch.setattr(sys, "argv", ["sparsify-deploy", "doctor"])
    assert main() == 3
    assert capsys.readouterr().err == (
        "sparsify-deploy: this user has no home folder, and libraries ask for one: set HOME, as in `export HOME=/tmp`\n"
    )


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


COLLECTS = """\
import gc, sys
from sparsify_deploy import __main__, cli

def listed(arguments):
    seen = [gc.get_threshold()[0]]
    kept = [[] for _ in range(50_000)]
    seen.append(sum(each["collections"] for each in gc.get_stats()) - before)
    kept += [[] for _ in range(300_000)]
    print(seen, gc.isenabled(), gc.get_threshold() == usual, gc.callbacks)
    return 0

gc.collect()
usual, before = gc.get_threshold(), sum(each["collections"] for each in gc.get_stats())
cli.call = listed
sys.exit(__main__.main())
"""


def test_garbage_is_collected_as_usual_once_a_verb_makes_more_than_a_light_one_does() -> None:
    command = [sys.executable, "-c", COLLECTS, "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "[200000, 0] True True []\n"), done.stderr
