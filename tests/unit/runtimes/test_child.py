"""Children that crash, hang, raise or lose their parent."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparsify_deploy.errors import DataError, MissingExtra, ModelError, NativeCrash, OutOfResources, RuntimeUnavailable
from sparsify_deploy.runtimes import _child

FUNCTIONS = """
import os, signal, sys, time
from sparsify_deploy import errors
def echo(request): return {"got": request, "pid": os.getpid()}
def big(request): return "x" * request
def segfault(request): os.kill(os.getpid(), signal.SIGSEGV)
def killed(request): os.kill(os.getpid(), signal.SIGKILL)
def leaves(request):
    print("native text", file=sys.stderr, flush=True)
    os._exit(3)
def sleep(request):
    open(request, "w").write(str(os.getpid()))
    time.sleep(600)
def refuse(request): raise errors.ModelError("node 'x' is odd: drop it")
def extra(request): raise errors.MissingExtra("openvino", "cpu", "building")
def bug(request): return {}["nothing"]
def memory(request): raise MemoryError
def bad_alloc(request):
    os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\\n")
    os.abort()
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    (tmp_path / "child_functions.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    return "child_functions:"


def call(function, request=None, time_limit_s=60.0):
    return _child.call(function, request, what="the builder", time_limit_s=time_limit_s, advice="try another model")


def alive(pid):
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_call_goes_there_and_back_in_another_process(functions):
    answer = call(functions + "echo", {"a": [1, 2.5, None, "ü"]})
    assert answer["got"] == {"a": [1, 2.5, None, "ü"]}
    assert answer["pid"] != os.getpid()


def test_a_large_answer_and_a_large_request_do_not_block(functions):
    assert len(call(functions + "big", 3_000_000)) == 3_000_000
    assert len(call(functions + "echo", "y" * 3_000_000)["got"]) == 3_000_000


def test_a_segfault_is_a_message(functions):
    with pytest.raises(NativeCrash, match=r"^the builder crashed \(SIGSEGV\): try another model"):
        call(functions + "segfault")


def test_a_killed_child_points_at_memory(functions):
    with pytest.raises(OutOfResources, match=r"SIGKILL.*memory"):
        call(functions + "killed")


def test_last_words_on_memory_are_spent_memory(functions):
    with pytest.raises(OutOfResources, match=r"crashed \(SIGABRT\).*it last said: .*bad_alloc"):
        call(functions + "bad_alloc")


def test_an_exit_without_answer_carries_its_last_words(functions):
    with pytest.raises(NativeCrash, match=r"exit code 3 and no answer: .*it last said: native text"):
        call(functions + "leaves")


def test_a_hang_ends_at_the_time_limit_and_leaves_nobody(functions, tmp_path):
    with pytest.raises(NativeCrash, match=r"time limit of 3 s"):
        call(functions + "sleep", str(tmp_path / "pid"), time_limit_s=3.0)
    assert not alive(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize(("name", "kind"), [("refuse", ModelError), ("memory", OutOfResources)])
def test_our_errors_come_back_as_themselves(functions, name, kind):
    with pytest.raises(kind):
        call(functions + name)


def test_an_error_with_its_own_constructor_comes_back_as_its_parent(functions):
    with pytest.raises(RuntimeUnavailable.__mro__[1], match="pip install") as caught:
        call(functions + "extra")
    assert not isinstance(caught.value, (MissingExtra, DataError))


def test_a_bug_brings_the_traceback_of_the_child(functions):
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*KeyError: 'nothing'"):
        call(functions + "bug")


def test_the_working_directory_is_not_imported_from(functions, tmp_path, monkeypatch):
    stray = tmp_path / "elsewhere"
    stray.mkdir()
    (stray / "json.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(stray)
    assert call(functions + "echo", 1)["got"] == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a child that its parent died")
def test_a_child_dies_with_its_parent(functions, tmp_path):
    pid_file = tmp_path / "pid"
    code = (
        "from sparsify_deploy.runtimes import _child\n"
        f"_child.call('child_functions:sleep', {str(pid_file)!r}, what='x', time_limit_s=600)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        deadline = time.monotonic() + 60
        while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
            time.sleep(0.02)
        child = int(pid_file.read_text())
        assert alive(child)
    finally:
        parent.kill()
        parent.wait()
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(child)
