"""A worker that ends in every way there is, and what its supervisor makes of that, in real processes."""

from __future__ import annotations

import errno
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparsify_deploy import supervisor
from sparsify_deploy.errors import OutOfResources
from sparsify_deploy.process import watch
from sparsify_deploy.process.watch import Doing
from sparsify_deploy.supervisor import End, verdict

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux ties a child to its parent")

PROGRAM = """\
import ctypes, os, signal, sys, time
from sparsify_deploy import supervisor
from sparsify_deploy.process import streams, watch

def told(text):
    print(text, file=streams.results(), flush=True)

def work():
    {body}
    return 0

sys.exit(supervisor.supervise(work))
"""


def program(body: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM.format(body=body.replace("\n", "\n    "))]


def ends(body: str, **environment: str) -> tuple[int, str, str]:
    done = subprocess.run(
        program(body), capture_output=True, text=True, check=False, timeout=60, env={**os.environ, **environment}
    )
    return done.returncode, done.stdout, done.stderr


def started(body: str, **options: object) -> subprocess.Popen[str]:
    process = subprocess.Popen(  # type: ignore[call-overload]
        program(body), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
    assert process.stdout.readline() == "at work\n"
    return process  # type: ignore[no-any-return]


def worker_of(process: subprocess.Popen[str]) -> int:
    (pid,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(pid)


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pid: int, seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.01)
    return not alive(pid)


@pytest.mark.parametrize("code", [0, 4, 75])
def test_the_exit_code_and_both_outputs_pass_through(code: int) -> None:
    body = f"told('{{}}'); print('a word', file=sys.stderr); os.write(2, b'native\\n'); return {code}"
    status, out, err = ends(body)
    assert (status, out) == (code, "{}\n")
    assert sorted(err.splitlines()) == ["a word", "native"]


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ("ctypes.string_at(0)", "SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGBUS)", "SIGBUS"),
        ("os.kill(os.getpid(), signal.SIGILL)", "SIGILL"),
        ("os.kill(os.getpid(), signal.SIGFPE)", "SIGFPE"),
        ("os.abort()", "SIGABRT"),
    ],
)
def test_a_native_crash_is_3_and_one_line(body: str, name: str) -> None:
    status, out, err = ends(
        f"with watch.step('sparse/measure'), watch.limited('OpenVINO compiling a.xml'):\n    {body}"
    )
    assert (status, out) == (3, "")
    (line,) = err.splitlines()
    assert line.startswith(
        f"sparsify-deploy: the process crashed ({name}) in sparse/measure (OpenVINO compiling a.xml); peak memory "
    )
    assert "doctor" in line


def test_spent_memory_that_ends_in_an_abort_is_7() -> None:
    last = "terminate called after throwing an instance of 'std::bad_alloc'\\n  what():  std::bad_alloc\\n"
    status, _, err = ends(
        "with watch.step('sparse/train'), watch.batch(64, 'training.batch_size'):\n"
        f'    os.write(2, b"{last}"); os.abort()'
    )
    assert status == 7
    line = err.splitlines()[-1]
    assert "out of memory in sparse/train, with batch size 64 (training.batch_size); peak memory " in line
    assert "use a smaller training.batch_size, with training.accumulate" in line
    assert "it last said: terminate called" in line


def test_a_crash_under_a_limit_on_memory_names_the_limit() -> None:
    body = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "with watch.step('sparse/train', 64):\n    os.kill(os.getpid(), signal.SIGSEGV)"
    )
    status, _, err = ends(body)
    assert status == 3
    assert "in sparse/train, with batch size 64 (training.batch_size); peak memory" in err
    assert "its memory was limited to 2.00 GiB (ulimit -v)" in err
    assert "raise the limit, or use a smaller training.batch_size" in err


def test_a_kill_from_outside_points_at_memory() -> None:
    process = started("with watch.step('sparse/train'):\n    told('at work'); time.sleep(60)")
    os.kill(worker_of(process), signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 7
    assert "was killed (SIGKILL) in sparse/train, most likely because memory ran out; peak memory" in err


def test_the_peak_is_that_of_the_worker() -> None:
    status, _, err = ends("held = bytearray(300 << 20); held[::4096] = b'x' * len(held[::4096]); os.abort()")
    assert status == 3
    peak = float(err.partition("peak memory ")[2].partition(" GiB")[0])
    assert 0.29 < peak < 0.5


def test_a_hang_inside_a_native_call_ends_at_the_limit() -> None:
    body = "with watch.step('a/b'), watch.limited('ONNX Runtime loading m.onnx'):\n    time.sleep(60)"
    status, _, err = ends(body, **{watch.LIMIT_VARIABLE: "0.3"})
    assert status == 3
    (line,) = err.splitlines()
    assert "ONNX Runtime loading m.onnx in a/b was stopped after its time limit of 0.3 s: raise SPARSIFY_TIME" in line


def test_calls_that_renew_their_time_and_work_outside_of_calls_may_take_longer() -> None:
    body = (
        "with watch.limited('timing x') as renew:\n    for _ in range(8):\n        time.sleep(0.1); renew()\n"
        "time.sleep(0.8)"
    )
    assert ends(body, **{watch.LIMIT_VARIABLE: "0.5"}) == (0, "", "")


def test_a_stopped_process_is_not_a_hung_one() -> None:
    """Ctrl-Z for longer than the limit, then `fg`: the clock that went on meanwhile does not count."""
    clock = (
        "import time\nfrom types import SimpleNamespace\nfrom sparsify_deploy import supervisor\n"
        "looks = iter(range(10**6))\n"
        "supervisor.time = SimpleNamespace(monotonic=lambda: time.monotonic() + (1000 if next(looks) > 3 else 0))\n"
    )
    body = "with watch.limited('a call'):\n    told('at work'); time.sleep(2)\ntold('done')"
    command = [sys.executable, "-c", clock + program(body)[2]]
    limit = {**os.environ, watch.LIMIT_VARIABLE: "60"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=limit)
    assert (done.returncode, done.stdout, done.stderr) == (0, "at work\ndone\n", "")


def test_an_exit_behind_our_back_is_3() -> None:
    status, _, err = ends("os.write(2, b'libgomp: fatal\\n'); os._exit(1)")
    assert status == 3
    assert "the process ended with exit code 1 before its work was done; peak" in err
    assert "it last said: libgomp: fatal" in err


def test_a_crash_after_all_work_is_done_spoils_nothing() -> None:
    body = "import atexit; atexit.register(os.abort); told('{}'); return 4"
    assert ends(body) == (4, "{}\n", "")


def test_a_thread_that_is_left_over_holds_nobody_up() -> None:
    body = "import threading; threading.Thread(target=time.sleep, args=[10000]).start(); told('{}'); return 4"
    assert ends(body) == (4, "{}\n", "")


def test_what_runs_at_exit_still_does_and_what_hangs_there_is_cut_short() -> None:
    body = "import atexit; atexit.register(time.sleep, 10000); atexit.register(told, 'leaves'); told('{}'); return 4"
    command = [sys.executable, "-c", program(body)[2].replace("def work", "supervisor._LEAVING_S = 0.5\ndef work")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (4, "{}\nleaves\n", "")


def test_stdout_is_for_results_whoever_else_prints() -> None:
    body = (
        "print('python'); os.write(1, b'native\\n'); ctypes.CDLL(None).puts(b'buffered by C')\n"
        "os.system('echo a child'); told('{}')"
    )
    status, out, err = ends(body)
    assert (status, out) == (0, "{}\n")
    assert sorted(err.splitlines()) == ["a child", "buffered by C", "native", "python"]


@pytest.mark.parametrize("how", ["gone", "full"])
def test_code_that_writes_to_a_dead_stderr_goes_on(how: str) -> None:
    if how == "full":
        write = os.open("/dev/full", os.O_WRONLY)
    else:
        read, write = os.pipe()
        os.close(read)
    body = "for _ in range(3): print('words'); print('words', file=sys.stderr); sys.stderr.flush()\ntold('done')"
    done = subprocess.run(program(body), stdout=subprocess.PIPE, stderr=write, text=True, check=False, timeout=60)
    os.close(write)
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_where_there_can_be_no_other_process_it_is_7(monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with pytest.raises(OutOfResources, match=r"could be started: raise the limit on processes and threads \(ulimit -u"):
        supervisor.supervise(lambda: 0)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


@pytest.mark.parametrize("hard", [1, 600])
def test_the_limit_on_cpu_time_is_named(hard: int) -> None:
    """A process that reaches the hard limit is killed, as one that the system takes for too large."""
    command = ["sh", "-c", f'ulimit -H -t {hard}; ulimit -S -t 1; exec "$@"', "sh", *program("while True: pass")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 7
    assert "stopped at the limit on its CPU time, 1 s (ulimit -t): raise that limit" in done.stderr


def test_code_of_the_user_that_ends_the_process_is_5_and_named() -> None:
    status, _, err = ends("watch.executes('/a/net.py')\nwith watch.step('sparse/train'):\n    os._exit(0)")
    assert status == 5
    assert "code of /a/net.py ended the process in sparse/train: let it raise an exception" in err
    assert ends("os._exit(0)")[0] == 3
    assert "a native library broke, or code of /a/net.py did this" in ends("watch.executes('/a/net.py'); os.abort()")[2]


def test_sigterm_reaches_the_worker_once_and_the_parent_waits_for_it() -> None:
    body = (
        "got = []\n"
        "signal.signal(signal.SIGTERM, lambda n, f: got.append(n))\n"
        "told('at work')\n"
        "while not got: time.sleep(0.01)\n"
        "time.sleep(0.5); told(f'{len(got)} SIGTERM'); return 75"
    )
    for number in (signal.SIGTERM, signal.SIGHUP):
        process = started(body)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out, err) == (75, "1 SIGTERM\n", "")


@pytest.mark.parametrize("to_group", [False, True])
def test_sigint_reaches_the_worker_once_whoever_it_was_sent_to(to_group: bool) -> None:
    body = (
        "got = []\n"
        "signal.signal(signal.SIGINT, lambda n, f: got.append(n))\n"
        "told('at work'); time.sleep(0.7); told(len(got))"
    )
    process = started(body, start_new_session=True)
    (os.killpg if to_group else os.kill)(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "1\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_anyone_listens_is_75_and_one_line(number: int) -> None:
    """As while torch is imported: the worker dies of SIGTERM, or of a KeyboardInterrupt nobody caught."""
    body = "signal.signal(signal.SIGINT, signal.SIG_DFL); told('at work'); time.sleep(60)"
    process = started(body)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75
    assert err == "sparsify-deploy: interrupted; what is finished is kept, the same command goes on\n"


def test_what_the_caller_ignores_stays_ignored() -> None:
    process = started(
        "told('at work'); time.sleep(0.5); told('done')",
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    process.send_signal(signal.SIGHUP)
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "done\n")


def test_a_caller_that_ignores_its_children_still_gets_the_exit_code() -> None:
    process = started("told('at work'); return 9", preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN))
    process.communicate(timeout=30)
    assert process.returncode == 9


def test_kill_9_of_the_parent_takes_the_worker_along() -> None:
    process = started("told('at work'); time.sleep(60)")
    worker = worker_of(process)
    process.kill()
    process.wait()
    assert gone(worker)
    process.communicate()


def test_a_process_that_the_worker_left_behind_holds_nobody_up() -> None:
    body = "import subprocess; told(subprocess.Popen(['sleep', '30']).pid); os.abort()"
    began = time.monotonic()
    process = subprocess.Popen(program(body), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    left = int(process.stdout.readline())
    try:
        assert process.wait(timeout=20) == 3
        assert time.monotonic() - began < 20
    finally:
        os.kill(left, signal.SIGKILL)
        process.communicate()


def test_a_reader_of_stderr_that_went_away_stops_nothing() -> None:
    read, write = os.pipe()
    process = subprocess.Popen(
        program("os.write(2, b'x' * 300000); told('done')"), stdout=subprocess.PIPE, stderr=write, text=True
    )
    os.close(write)
    os.close(read)
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "done\n")


def test_on_a_terminal_a_crash_gives_the_cursor_back_and_keys_stop_nobody() -> None:
    """Progress hides the cursor. A worker that reads the terminal would be stopped for ever: it finds nothing there."""
    body = (
        "sys.stderr.write('\\x1b[?25l'); sys.stderr.flush(); told(f'{sys.stderr.isatty()} {sys.stdin.read()!r}')\n"
        "os.abort()"
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, program(body))
    shown = b""
    while select.select([terminal], (), (), 30)[0]:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # the terminal's other end is closed
            break
        shown += piece
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    assert b"True ''" in shown
    assert shown.index(b"\x1b[?25l") < shown.index(b"\x1b[?25h") < shown.index(b"the process crashed (SIGABRT)")


def test_ctrl_z_stops_both_and_fg_wakes_both() -> None:
    process = started("told('at work'); time.sleep(1); told('done')", start_new_session=True)
    worker = worker_of(process)
    process.send_signal(signal.SIGTSTP)
    until = time.monotonic() + 10
    state = dict.fromkeys((process.pid, worker), "")
    while set(state.values()) != {"T"} and time.monotonic() < until:
        state = {pid: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in state}
    assert set(state.values()) == {"T"}
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=30)[0] == "done\n"
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "forks"),
    [
        (["run", "r.yaml"], True),
        (["-q", "run"], True),
        (["sensitivity", "r.yaml"], True),
        (["bench", "a.onnx"], True),
        (["doctor"], True),
        (["run", "--help"], False),
        (["--traceback", "run", "r.yaml"], False),
        (["validate", "r.yaml"], False),
        (["list"], False),
        (["--version"], False),
        ([], False),
    ],
)
def test_only_verbs_that_run_native_code_work_in_a_child(arguments: list[str], forks: bool) -> None:
    code = f"from sparsify_deploy import supervisor; print(supervisor.wanted({arguments!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == f"{forks}\n"


@pytest.mark.parametrize(
    "before",
    ["import numpy", "import threading, time; threading.Thread(target=time.sleep, args=[9], daemon=True).start()"],
)
def test_a_process_that_loaded_numpy_or_has_threads_is_not_forked(before: str) -> None:
    ask = "from sparsify_deploy import supervisor; print(supervisor.wanted(['run']))"
    done = subprocess.run(
        [sys.executable, "-c", f"{before}\n{ask}"], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "False\n"


def test_the_command_line_called_as_a_function_never_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsify_deploy.__main__ import main

    monkeypatch.setattr(supervisor, "wanted", lambda arguments: pytest.fail("asked"))
    assert main(["run", "nothing.yaml"]) == 2


def end(status: int, words: str = "", sent: frozenset[int] = frozenset(), *, overran: bool = False) -> End:
    return End(status, 1 << 30, words, sent, overran)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("std::bad_alloc", 7),
        ("memory allocation of 1073741824 bytes failed", 7),
        ("Fatal Python error: _PyErr_NormalizeException: Cannot recover from MemoryErrors", 7),
        ("libgomp: Thread creation failed: Resource temporarily unavailable", 7),
        ("Assertion `x' failed.", 3),
        ("", 3),
    ],
)
def test_the_last_words_decide_what_an_abort_means(words: str, code: int) -> None:
    assert verdict(end(int(signal.SIGABRT), words), Doing())[0] == code


def test_no_thread_is_lack_of_memory_only_where_that_is_limited() -> None:
    words = "libgomp: Thread creation failed: Resource temporarily unavailable"
    code, line = verdict(end(256, words), Doing(step="sparse/train"))
    assert code == 7
    assert line.startswith("no thread could be started in sparse/train: raise the limit on processes and threads")
    limited = End(256, 1 << 30, words, frozenset(), limit_bytes=1 << 30)
    assert verdict(limited, Doing())[1].startswith("out of memory; ")


def test_what_was_done_before_the_crash_counts() -> None:
    assert verdict(end(int(signal.SIGSEGV)), Doing(exit_code=0)) == (0, "")
    assert verdict(end(int(signal.SIGTERM)), Doing())[0] == 75
    asked = frozenset({signal.SIGINT})
    for status, how in (
        (int(signal.SIGABRT), "the process crashed (SIGABRT)"),
        (256, "the process ended with exit code 1"),
    ):
        code, line = verdict(end(status, "terminate called", asked), Doing(step="sparse/train"))
        assert (code, line.startswith(f"interrupted, then {how}")) == (75, True)
    assert verdict(end(int(signal.SIGKILL), sent=asked), Doing())[0] == 7
