"""Call one function in a child process, so that a native crash or a hang is a message and not a dead terminal.

The function is named `package.module:function`; it takes one JSON value and returns one. The child uses the parent's
`sys.path` (never the working directory, where a stray `onnxruntime.py` would be imported) and, on Linux, dies when
the thread that started it does.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from sparsify_deploy import errors
from sparsify_deploy.process import memory
from sparsify_deploy.types import Json

_START = (
    "import sys; sys.path[:] = sys.argv[4:]; from sparsify_deploy.runtimes import _child;"
    " _child.main(sys.argv[1], sys.argv[2], int(sys.argv[3]))"
)
_LOOK_EVERY_S = 0.2


def call(
    function: str,
    request: Json,
    *,
    what: str,
    time_limit_s: float,
    advice: str = "",
    waiting: Callable[[], None] | None = None,
) -> Json:
    """Run `function(request)` in a child process and return its answer.

    `what` names the work as the subject of a sentence ("the TensorRT-RTX builder"); `advice` ends the message of a
    crash; `waiting` is called about five times a second meanwhile, and once at the end. A `SparsifyError` raised there
    is raised here again. Raises NativeCrash where the child dies of a signal, ends without an answer or outruns
    `time_limit_s`, OutOfResources where that was for lack of memory; any other exception in the child is a bug and
    comes back as RuntimeError with the child's traceback.
    """
    with tempfile.TemporaryDirectory(prefix="sparsify-deploy-") as folder:
        answer, printed = Path(folder, "answer.json"), Path(folder, "printed.txt")
        command = [sys.executable, "-c", _START, function, str(answer), str(os.getpid()), *sys.path]
        with printed.open("wb") as output:
            child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=output)
            try:
                _wait(child, json.dumps(request).encode(), time_limit_s, waiting)
            except subprocess.TimeoutExpired:
                raise errors.NativeCrash(
                    f"{what} was stopped after its time limit of {time_limit_s:g} s: raise the limit, "
                    "or try a smaller model"
                ) from None
            finally:
                child.kill()
                child.wait()
        text = printed.read_text(encoding="utf-8", errors="replace")
        if not answer.is_file():
            spent = child.returncode == -signal.SIGKILL or memory.told_of(text)
            raise (errors.OutOfResources if spent else errors.NativeCrash)(_death(what, child.returncode, text, advice))
        return _unpack(json.loads(answer.read_text(encoding="utf-8")), what)


def _wait(child: subprocess.Popen[bytes], said: bytes, time_limit_s: float, waiting: Callable[[], None] | None) -> None:
    """Hand `said` over and wait for the end. Raises TimeoutExpired after `time_limit_s`."""
    if waiting is None:
        child.communicate(said, timeout=time_limit_s)
        return
    deadline = time.monotonic() + time_limit_s
    rest: bytes | None = said
    while True:
        try:
            child.communicate(rest, timeout=min(_LOOK_EVERY_S, max(deadline - time.monotonic(), 0.0)))
        except subprocess.TimeoutExpired:
            if time.monotonic() >= deadline:
                raise
        else:
            waiting()
            return
        rest = None  # communicate goes on with what it was given first
        waiting()


def _death(what: str, code: int, printed: str, advice: str) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        cause = f"{what} crashed ({name})"
        if name == "SIGKILL":
            cause = f"{what} was killed (SIGKILL), most likely because memory ran out"
    else:
        cause = f"{what} ended with exit code {code} and no answer"
    last = " | ".join([line.strip() for line in printed.splitlines() if line.strip()][-3:])
    said = f"; it last said: {last}" if last else ""
    return cause + (f": {advice}" if advice else "") + said


def _unpack(answer: Json, what: str) -> Json:
    if "error" not in answer:
        return answer["result"]
    kind = getattr(errors, answer["error"], None)
    if kind is None:
        raise RuntimeError(f"{what} failed in its child process:\n{answer['message']}")
    # a class with a constructor of its own (RecipeError, MissingExtra) comes back as its parent
    plain = next(c for c in kind.__mro__ if "__init__" not in vars(c) or c is Exception)
    raise plain(answer["message"])


def main(function: str, answer: str, parent: int) -> None:
    """The child's side: read the request from stdin, write the answer to the file `answer`."""
    die_with(parent)
    request = json.loads(sys.stdin.buffer.read())
    module, _, name = function.partition(":")
    try:
        reply: Json = {"result": getattr(importlib.import_module(module), name)(request)}
    except errors.SparsifyError as error:
        reply = {"error": type(error).__name__, "message": str(error)}
    except Exception as error:  # noqa: BLE001 the parent raises it again, with this traceback
        if errors.is_out_of_memory(error):
            message = f"out of memory in {function}; {memory.peak(memory.peak_here_bytes())}"
            reply = {"error": "OutOfResources", "message": f"{message}: try a smaller model or batch"}
        else:
            import traceback

            reply = {"error": "bug", "message": traceback.format_exc()}
    written = Path(answer + ".partial")
    written.write_text(json.dumps(reply), encoding="utf-8")
    written.replace(answer)
    sys.stdout.flush()
    os._exit(0)  # the answer is complete; a native library that crashes in its destructors changes nothing


def die_with(parent: int) -> None:
    """On Linux, end this process at once when the thread of process `parent` that made it does."""
    if not sys.platform.startswith("linux"):
        return
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
