"""A verb that runs native code works in a forked child, so that a crash, a hang or spent memory is one line and a code.

The parent stays light: it forks before anything but the standard library is loaded, holds nothing that the work needs,
hands signals on, and never ends before the child. That ends once its work is done and told of, whatever threads it has
left. On Linux it dies with the parent. It is a process group of its own, so that Ctrl-C, which goes to the whole group
of a terminal, reaches it once: through the parent. What native libraries write goes through the parent too, which shows
it on stderr at once and keeps the end: the last words of a process that died of SIGABRT say whether memory was spent.
Results alone are written to stdout.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn

from sparsify_deploy.errors import DataError, Interrupted, NativeCrash, OutOfResources
from sparsify_deploy.process import limits, memory, streams, watch

_VERBS = frozenset({"run", "sensitivity", "init", "plan", "verify", "build", "bench", "inspect", "predict", "doctor"})
"""The verbs that load torch, a runtime or a model file."""

_FORWARDED = {signal.SIGINT: signal.SIGINT, signal.SIGTERM: signal.SIGTERM, signal.SIGHUP: signal.SIGTERM}
"""What the child gets for a signal to the parent: a terminal that was closed asks for a polite end, like SIGTERM."""

_BLOCKED = {*_FORWARDED, signal.SIGCHLD, signal.SIGTSTP}
_LOOK_EVERY_S = 0.2
_STOPPED_S = 2.0
"""Looks farther apart than this: the parent was stopped in between, and with it the child, so its limit moves."""

_PATIENCE_S = 8.0
"""So long may a child take to end politely after a signal: native code may sit in one call for longer, and a run that
is killed loses no more than the steps since its last checkpoint."""

_LEAVING_S = 10.0
"""So long may a child that is done take to leave: what it registered with `atexit` may wait for ever."""

_KEPT_BYTES = 4096


def wanted(arguments: Sequence[str]) -> bool:
    """Whether this command line works in a child: its verb runs native code, and this process can still be forked.

    Not with --traceback, which is for looking into one process, with a debugger if need be.
    """
    verb = next((each for each in arguments if not each.startswith("-")), "")
    return (
        verb in _VERBS
        and not {"--help", "--traceback"} & set(arguments)
        and sys.platform.startswith("linux")
        and threading.active_count() == 1
        and not {"torch", "numpy"} & sys.modules.keys()
    )


def supervise(work: Callable[[], int]) -> int:
    """Call `work` in a child and return its exit code; where the child dies, that of one line on stderr.

    Raises OutOfResources where there cannot be another process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent, mask = os.getpid(), signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
    try:
        page = watch.Page()
        read, write = os.pipe()
        began, child = time.monotonic(), os.fork()
    except OSError as error:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        raise OutOfResources(limits.line(error) or f"no process could be started: {error.strerror}") from error
    if child == 0:
        os.close(read)
        _work(work, page, parent, write, mask)
    os.close(write)
    with suppress(OSError):  # the child does the same; whoever comes first
        os.setpgid(child, child)
    end = _Watch(child, page, read, began).until_the_end(mask)
    doing = page.read()
    code, line = verdict(end, doing)
    if line:
        from sparsify_deploy import console, logbook

        console.restored()
        if doing.log:
            logbook.append(Path(doing.log), "dies", line)
            console.error(f"log: {doing.log}")
        console.error(line)
    return code


def _work(
    work: Callable[[], int], page: watch.Page, parent: int, stderr: int, mask: set[int | signal.Signals]
) -> NoReturn:
    """The child's side."""
    _become_worker(parent, stderr)
    watch.begin(page)
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        code = work()
    except KeyboardInterrupt:  # in the moment before or after the work could see to it: the parent has the line
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        raise
    streams.write(streams.results(), "", flush=True)
    watch.finished(code, over=True)
    atexit._run_exitfuncs()  # such as remove temporary folders; what threads still do is waited for by nobody
    sys.stderr.flush()
    ctypes.CDLL(None).fflush(None)
    os._exit(code)


def _become_worker(parent: int, stderr: int) -> None:
    """The child's side, before it works: a group of its own, which dies with the parent and never waits for a key."""
    from sparsify_deploy.runtimes._child import die_with

    os.setpgid(0, 0)
    die_with(parent)
    for number in (signal.SIGTERM, signal.SIGHUP):  # before anything listens, the quickest end is the best
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # or a terminal set to `tostop` stops it when it writes
    if os.isatty(0):  # whose keys belong to the parent's group: reading one would stop this group for ever
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
    streams.divert(stderr)  # Python goes on writing to the terminal
    os.close(stderr)


@dataclass(frozen=True)
class End:
    """How the child ended: its wait status, peak memory, last native words, what it was sent, whether it was killed for
    outrunning a time limit, the limit on its memory, and that on its CPU time where that is used up."""

    status: int
    peak_bytes: int
    words: str
    sent: frozenset[int]
    overran: bool = False
    limit_bytes: int | None = None
    cpu_limit_s: int | None = None


_RESUME = "what is finished is kept, the same command goes on"


def verdict(end: End, doing: watch.Doing) -> tuple[int, str]:
    """The exit code, and the line that explains it where the child could not; "" where it did."""
    if doing.exit_code is not None:
        return doing.exit_code, ""
    place = memory.place(doing)
    if end.overran:
        advice = f"raise {watch.LIMIT_VARIABLE}, or try a smaller model"
        in_step = f" in {doing.step}" if doing.step else ""
        text = f"{doing.call or 'native code'}{in_step} was stopped after its time limit of {doing.limit_s:g} s"
        return NativeCrash.exit_code, f"{text}: {advice}; {_RESUME}{_said(end)}"
    if limits.no_thread(end.words, end.limit_bytes):
        return OutOfResources.exit_code, f"{limits.threads(place)}; {_RESUME}{_said(end)}"
    if not os.WIFEXITED(end.status):
        return _by_signal(end, doing)
    code = os.WEXITSTATUS(end.status)
    if code == 0 and doing.code:  # no library does that
        advice = "let it raise an exception that says why, in place of os._exit"
        return DataError.exit_code, f"code of {doing.code} ended the process{place}: {advice}; {_RESUME}"
    return _crash(end, doing, f"the process ended with exit code {code} before its work was done")


def _by_signal(end: End, doing: watch.Doing) -> tuple[int, str]:
    number, place = os.WTERMSIG(end.status), memory.place(doing)
    if end.cpu_limit_s is not None and number in (signal.SIGXCPU, signal.SIGKILL) and number not in end.sent:
        text = f"the process was stopped at the limit on its CPU time, {end.cpu_limit_s} s (ulimit -t){place}"
        return OutOfResources.exit_code, f"{text}: raise that limit; {_RESUME}"
    if number in end.sent or number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        return Interrupted.exit_code, f"interrupted; {_RESUME}"
    if number == signal.SIGKILL:
        how = f"the process was killed (SIGKILL){place}, most likely because memory ran out"
        return (
            OutOfResources.exit_code,
            f"{how}; {memory.peak(end.peak_bytes)}: {memory.advice(doing)}{_said(end)}",
        )
    return _crash(end, doing, f"the process crashed ({signal.Signals(number).name})")


def _crash(end: End, doing: watch.Doing, how: str) -> tuple[int, str]:
    if end.sent:  # an exception in the middle of native code, of torch's import for one, ends in abort()
        return Interrupted.exit_code, f"interrupted, then {how}; {_RESUME}"
    place, peak = memory.place(doing), memory.peak(end.peak_bytes)
    if memory.told_of(end.words):
        return OutOfResources.exit_code, f"out of memory{place}; {peak}; {how}: {memory.advice(doing)}{_said(end)}"
    return NativeCrash.exit_code, f"{how}{place}; {peak}: {_broke(end, doing)}; {_RESUME}{_said(end)}"


def _said(end: End) -> str:
    return f"; it last said: {end.words}" if end.words else ""


def _broke(end: End, doing: watch.Doing) -> str:
    """What probably broke, and what to do."""
    if end.limit_bytes is not None:
        limited = (
            f"its memory was limited to {end.limit_bytes / 2**30:.2f} GiB (ulimit -v), and few libraries bear that"
        )
        return f"{limited}: raise the limit, or {memory.advice(doing)}"
    either = f"a native library broke, or code of {doing.code} did this" if doing.code else "a native library broke"
    return f"{either}; `sparsify-deploy doctor` shows which are sound here"


@dataclass
class _Watch:
    """The parent's side: hands on signals and native words until the child is gone."""

    child: int
    page: watch.Page
    words: int
    looked: float
    _sent: set[int] = field(default_factory=set)
    _asked_at: float | None = None
    _over_at: float | None = None
    _tail: bytes = b""

    def until_the_end(self, mask: set[int | signal.Signals]) -> End:
        """Wait for the child. `mask` are the signals that were blocked before the fork."""
        with self._signals() as woken:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            return self._wait([woken, self.words])

    def _wait(self, sources: list[int]) -> End:
        overran, allowed = False, 0.0
        while True:
            ready = select.select(sources, (), (), _LOOK_EVERY_S)[0]
            if self.words in ready and not self._relay():
                sources.remove(self.words)
            if sources[0] in ready:
                os.read(sources[0], 512)
            if os.waitid(os.P_PID, self.child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                break
            now = time.monotonic()
            allowed += now - self.looked if now - self.looked > _STOPPED_S else 0.0
            self.looked, deadline = now, self.page.deadline()
            if self._left_too_late(now):
                with suppress(ProcessLookupError):  # it may have left its group
                    os.killpg(self.child, signal.SIGKILL)
                os.kill(self.child, signal.SIGKILL)
            if not deadline:
                allowed = 0.0
            elif now > deadline + allowed and self._asked_at is None:
                overran = True
                os.kill(self.child, signal.SIGKILL)
            if self._asked_at is not None and now > self._asked_at + _PATIENCE_S:
                self._sent.add(signal.SIGKILL)
                os.kill(self.child, signal.SIGKILL)
        limit = memory.limit_bytes(self.child)  # told as long as nobody has waited for it
        _, status, usage = os.wait4(self.child, 0)
        cpu_s = limits.cpu_time()
        if cpu_s is not None and usage.ru_utime + usage.ru_stime < cpu_s - 1:
            cpu_s = None
        os.set_blocking(self.words, False)  # a process that the child left behind may hold the other end
        while self.words in sources and self._relay():
            pass
        os.close(self.words)
        last = [each.strip() for each in self._tail.decode(errors="replace").splitlines() if each.strip()]
        peak = memory.in_bytes(usage.ru_maxrss)
        return End(status, peak, " | ".join(last[-3:]), frozenset(self._sent), overran, limit, cpu_s)

    def _left_too_late(self, now: float) -> bool:
        """Whether the child is done for so long that it will not end by itself."""
        if self._over_at is None and self.page.over():
            self._over_at = now
        return self._over_at is not None and now > self._over_at + _LEAVING_S

    def _relay(self) -> bool:
        """Show what the child's libraries said; False once there is no more."""
        try:
            words = os.read(self.words, 1 << 16)
        except BlockingIOError:
            return False
        self._tail = (self._tail + words)[-_KEPT_BYTES:]
        shown = 0
        with suppress(OSError):  # nobody reads our stderr any more
            while shown < len(words):
                shown += os.write(2, words[shown:])
        return words != b""

    @contextmanager
    def _signals(self) -> Iterator[int]:
        """Hand signals on to the child; yields a descriptor that can be read when one came."""
        woken, wake = os.pipe()
        os.set_blocking(wake, False)
        handlers = {**dict.fromkeys(_FORWARDED, self._forward), signal.SIGTSTP: self._stop, signal.SIGCHLD: _look}
        for number, handler in handlers.items():
            # what the caller has us ignore (nohup, a job in the background) stays so, but we must hear of the child
            if number == signal.SIGCHLD or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, handler)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        try:
            yield woken
        finally:
            signal.set_wakeup_fd(-1)
            for number in _FORWARDED:  # nothing is left to hand them to, but a line to write
                signal.signal(number, signal.SIG_IGN)
            os.close(woken)
            os.close(wake)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        to_child = _FORWARDED[signal.Signals(number)]
        self._sent.add(to_child)
        self._asked_at = self._asked_at or time.monotonic()
        with suppress(ProcessLookupError):
            os.kill(self.child, to_child)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-Z: first the child's group, then this process; `fg` and `bg` wake both."""
        with suppress(ProcessLookupError):
            os.killpg(self.child, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        with suppress(ProcessLookupError):
            os.killpg(self.child, signal.SIGCONT)


def _look(number: int, frame: FrameType | None) -> None:
    """SIGCHLD: select returns, and the loop looks."""
