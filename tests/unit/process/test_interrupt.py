"""A signal ends the work, at once or at a safe point, and the handlers of before come back.

Signals are sent to a child: what other tests loaded into this process may have left a signal stack of its own.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sparsify_deploy.process.interrupt import stoppable

HEAD = """\
import os, signal
from sparsify_deploy.process.interrupt import at_safe_points, stoppable

def send(number):
    os.kill(os.getpid(), number)

"""


def child(program: str, *arguments: str) -> tuple[int, list[str]]:
    """The exit code of a program in a process of its own, and the lines it printed."""
    command = [sys.executable, "-c", HEAD + program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_work_at_once_and_names_the_step(number: str) -> None:
    program = f"""
from sparsify_deploy.process import watch
from sparsify_deploy.errors import Interrupted
try:
    with stoppable(), watch.step("sparse/benchmark"):
        try:
            send(signal.{number})
        except Exception:
            print("a library swallowed it")
        print("not here")
except Interrupted as error:
    print(error.exit_code, error)
"""
    said = "75 stopped in sparse/benchmark; what is finished is kept, the same command goes on from here"
    assert child(program) == (0, [said])


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_at_safe_points_a_signal_only_asks_and_what_nobody_asked_for_ends_with_the_block(number: str) -> None:
    program = f"""
from sparsify_deploy.errors import Interrupted
from sparsify_deploy.process.interrupt import at_safe_points
try:
    with stoppable() as asked:
        with at_safe_points():
            print(asked())
            send(signal.{number})
            print(asked())
            send(signal.SIGTERM)
            with at_safe_points():
                pass
            print("still here")
        print("not here")
except Interrupted as error:
    print(error)
with stoppable() as asked, at_safe_points():
    print(asked())
"""
    said = "stopped; what is finished is kept, the same command goes on from here"
    assert child(program) == (0, ["False", "True", "still here", said, "False"])


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_sigint_after_it_ends_also_what_polls(number: str) -> None:
    program = f"""
from sparsify_deploy.errors import Interrupted
from sparsify_deploy.process.interrupt import at_safe_points
try:
    with stoppable() as asked, at_safe_points():
        send(signal.{number})
        print("still here")
        send(signal.SIGINT)
        print("not here")
except Interrupted:
    print("ended")
"""
    assert child(program) == (0, ["still here", "ended"])


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize(
    ("then", "said"),
    [
        ("raise AttributeError('half imported')", "stopped in sparse/train; "),
        ("check(); print('not here')", "stopped in sparse/train; "),
        ("with at_safe_points(): print('not here')", "stopped in sparse/train; "),
        ("raise Interrupted('stopped at step 3')", "stopped at step 3"),
        ("print('done')", "done"),
    ],
)
def test_an_end_that_a_library_swallows_comes_with_the_next_error_or_look(number: str, then: str, said: str) -> None:
    program = f"""
from sparsify_deploy.process import watch
from sparsify_deploy.process.interrupt import check
from sparsify_deploy.errors import Interrupted
try:
    with stoppable(), watch.step("sparse/train"):
        try:
            send(signal.{number})
        except BaseException:
            pass
        {then}
except Interrupted as error:
    print(error)
check()
"""
    code, lines = child(program)
    assert code == 0
    assert len(lines) == 1
    assert lines[0].startswith(said)


def test_an_error_after_a_signal_that_only_asked_is_itself() -> None:
    program = """
try:
    with stoppable(), at_safe_points():
        send(signal.SIGTERM)
        raise OSError("the disk is full")
except OSError as error:
    print(error)
"""
    assert child(program) == (0, ["the disk is full"])


def test_a_signal_after_a_race_in_openvino_still_asks_to_stop(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from sparsify_deploy import deploy
from sparsify_deploy.types import Silent

weight = numpy_helper.from_array(np.ones((8, 16, 1, 1), np.float32), "w")
ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ("b", c, 4, 4)) for n, c in (("x", 16), ("y", 8))]
graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"])], "net", ends[:1], ends[1:], [weight])
model = Path(sys.argv[1]) / "net.onnx"
onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), model)
timing = dict(batch_sizes=(1,), threads=1, rounds=5, round_ms=1.0, trust=False, progress=Silent())
deploy.bench([model], runtime="openvino", **timing)
with stoppable() as asked, at_safe_points():
    send(signal.SIGINT)
    print(asked())
    sys.stdout.flush()
    os._exit(0)
"""
    assert child(program, str(tmp_path)) == (0, ["True"])


def test_the_handlers_of_before_come_back_even_after_an_error() -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def fail() -> None:
        with stoppable():
            assert signal.getsignal(signal.SIGINT) is not before[signal.SIGINT]
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fail()
    assert {n: signal.getsignal(n) for n in before} == before


def test_in_a_thread_nothing_is_asked_and_no_handler_moves() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[bool] = []

    def work() -> None:
        with stoppable() as asked:
            seen.extend([asked(), signal.getsignal(signal.SIGINT) is before])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False, True]


def test_sighup_that_the_caller_ignores_stays_ignored() -> None:
    program = """
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with stoppable() as asked:
    send(signal.SIGHUP)
    print(asked())
print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)
"""
    assert child(program) == (0, ["False", "True"])
