"""Ask a run to stop: at once where nothing is lost by it, at the next safe point where it trains.

Everything that is committed or published is safe against a crash at any moment, so outside of training an exception in
the middle of the work is as good as any other end, and the quickest.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from sparsify_deploy.errors import Interrupted
from sparsify_deploy.process import watch

_asked = threading.Event()
_raised = threading.Event()
"""Set where a signal ended work by an exception, which a library may swallow: numpy imported by torch does."""

_polling = 0


class Stopped(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP came. No Exception, for libraries swallow these."""


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Inside, SIGINT, SIGTERM and SIGHUP end the work by `Interrupted`, which leaves this block.

    Yields a function that says whether one came, for blocks `at_safe_points`, which are left alone; a second SIGINT
    ends these too. Where a library swallowed that end, the next error ends the work in its place. SIGHUP stays ignored
    where the caller, nohup say, has it so. Outside the main thread, where Python allows no handlers, nothing is ever
    asked to stop.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    _forget()
    hung_up = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
    before = {number: signal.signal(number, _ask) for number in (signal.SIGINT, signal.SIGTERM, *hung_up)}
    try:
        yield _asked.is_set
    except Stopped as error:
        raise _interrupted(error) from None
    except Interrupted:
        raise
    except Exception as error:
        if not _raised.is_set():
            raise
        raise _interrupted(error) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _forget()


def _interrupted(error: BaseException) -> Interrupted:
    step = watch.where(error).step
    place = f" in {step}" if step else ""
    return Interrupted(f"stopped{place}; what is finished is kept, the same command goes on from here")


def _forget() -> None:
    _asked.clear()
    _raised.clear()


def check() -> None:
    """Raise `Stopped` where one was raised and a library swallowed it: what that work came to is not to be kept."""
    if _raised.is_set():
        raise Stopped


@contextmanager
def at_safe_points() -> Iterator[None]:
    """Inside, a signal only sets what `stoppable` yields: who asks that ends by itself, with its work saved.

    Where nobody did, it ends with the block.
    """
    check()
    global _polling  # noqa: PLW0603 signals are the process's, and so is what they do
    _polling += 1
    try:
        yield
    finally:
        _polling -= 1
    if _asked.is_set() and not _polling:
        raise Stopped


def _ask(number: int, frame: FrameType | None) -> None:
    again = _asked.is_set() and number == signal.SIGINT
    _asked.set()
    if again or not _polling:
        _raised.set()
        raise Stopped
