"""What the process that supervises this one sees of it: where it is, and until when that may take.

Both share a page of memory, made before the fork: unlike a pipe it cannot fill up and stop the worker, and a write
costs about a microsecond. Without a supervisor the calls here change what `current` says, and no time limit holds.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

from sparsify_deploy.errors import UsageError

LIMIT_VARIABLE = "SPARSIFY_TIME_LIMIT_S"
"""The environment variable with the longest that one native call may take, s; 0: as long as it likes."""

_DEFAULT_LIMIT_S = 600.0
_HEAD = struct.Struct("<dI")
_BYTES = 1 << 16
_TEXT = 500


@dataclass(frozen=True)
class Doing:
    """Where a process is: the step of the plan, the batch size in use with the recipe's field it comes from ("" where
    no field sets it), and the native call under way. `exit_code` is there once all work is done, `log` is the file
    that tells what was done, `code` the user's file that was executed last; "" where there is none."""

    step: str = ""
    batch_size: int = 0
    batch_field: str = ""
    call: str = ""
    limit_s: float = 0.0
    exit_code: int | None = None
    log: str = ""
    code: str = ""


class Page:
    """The shared memory: a deadline by the monotonic clock (0: none, below 0: all is done), and `Doing` as JSON."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _BYTES)

    def write(self, doing: Doing, deadline: float) -> None:
        """Replace what it says; a process killed in here leaves "" behind, not a part."""
        text = json.dumps(asdict(doing)).encode()
        _HEAD.pack_into(self._memory, 0, 0.0, 0)
        self._memory[_HEAD.size : _HEAD.size + len(text)] = text
        _HEAD.pack_into(self._memory, 0, deadline, len(text))

    def read(self) -> Doing:
        """What was written last."""
        _, length = _HEAD.unpack_from(self._memory, 0)
        return Doing(**json.loads(self._memory[_HEAD.size : _HEAD.size + length])) if length else Doing()

    def deadline(self) -> float:
        """Until when the call under way may take, by the monotonic clock; 0: no limit."""
        return max(self._head(), 0.0)

    def over(self) -> bool:
        """Whether the process has nothing left to do or to say."""
        return self._head() < 0.0

    def _head(self) -> float:
        found: float = _HEAD.unpack_from(self._memory, 0)[0]
        return found


_page: Page | None = None
_doing = Doing()
_deadline = 0.0
_failed: tuple[int, Doing] = (0, Doing())
_log = _code = ""


def begin(page: Page) -> None:
    """From here on this process tells where it is on `page`."""
    global _page  # noqa: PLW0603 one process is in one place
    _page = page


def logs_to(log: str) -> None:
    """From here on the file `log` tells what was done."""
    global _log  # noqa: PLW0603
    _log = log
    _put(_doing, _deadline)


def executes(code: str) -> None:
    """From here on code of the user's file `code` may do whatever it likes to this process."""
    global _code  # noqa: PLW0603
    _code = code[:_TEXT]
    _put(_doing, _deadline)


def current() -> Doing:
    """Where this process is."""
    return _doing


def where(error: BaseException) -> Doing:
    """Where `error` was raised, as far as that was inside of one of the blocks below; else where this process is."""
    return _failed[1] if _failed[0] == id(error) else _doing


def finished(exit_code: int, *, over: bool = False) -> None:
    """All work is done: a crash from here on, in the destructors of a library, spoils nothing.

    Once it is `over`, all is said as well, and a process that does not end can be killed.
    """
    _put(replace(_doing, exit_code=exit_code), -1.0 if over else 0.0)


@contextmanager
def step(name: str, batch_size: int = 0) -> Iterator[None]:
    """Inside, the step `name` of the plan is under way, whose examples come `training.batch_size` at a time, if any."""
    with _inside(Doing(step=name, batch_size=batch_size, batch_field="training.batch_size" if batch_size else ""), 0.0):
        yield


@contextmanager
def batch(size: int, field: str = "") -> Iterator[None]:
    """Inside, examples are taken `size` at a time, as the recipe's `field` says."""
    with _inside(replace(_doing, batch_size=size, batch_field=field), _deadline):
        yield


@contextmanager
def limited(call: str, batch_size: int = 0) -> Iterator[Callable[[], None]]:
    """Inside, native code runs that may crash or hang; `call` names it as the subject of a sentence.

    The supervisor ends a process that stays here for longer than `time_limit_s`. Yields a function that starts that
    time anew, for many calls in a row.
    """
    limit_s = time_limit_s()
    doing = replace(_doing, call=call[:_TEXT], limit_s=limit_s)
    if batch_size:
        doing = replace(doing, batch_size=batch_size, batch_field="")

    def renew() -> None:
        _put(doing, time.monotonic() + limit_s if limit_s else 0.0)

    with _inside(doing, 0.0):
        renew()
        yield renew


def time_limit_s() -> float:
    """The longest that one native call may take, s; 0: no limit. UsageError where the variable says nonsense."""
    text = os.environ.get(LIMIT_VARIABLE, "")
    try:
        limit_s = float(text) if text else _DEFAULT_LIMIT_S
    except ValueError:
        limit_s = -1.0
    if not 0.0 <= limit_s < float("inf"):
        raise UsageError(f"{LIMIT_VARIABLE}={text}: expected seconds, as in {LIMIT_VARIABLE}=600, or 0 for no limit")
    return limit_s


@contextmanager
def _inside(doing: Doing, deadline: float) -> Iterator[None]:
    global _failed  # noqa: PLW0603
    before = _doing, _deadline
    _put(doing, deadline)
    try:
        yield
    except BaseException as error:
        if _failed[0] != id(error):  # the innermost block knows best
            _failed = (id(error), doing)
        raise
    finally:
        _put(*before)


def _put(doing: Doing, deadline: float) -> None:
    global _doing, _deadline
    _doing, _deadline = doing, deadline
    if _page is not None:
        _page.write(replace(doing, log=_log, code=_code), deadline)
