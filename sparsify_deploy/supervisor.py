"""A verb that runs native code works in a forked child, so that a crash, a hang or spent memory is one line and a code.

The parent stays light: it forks before anything but the standard library is loaded, holds nothing that the work needs,
hands signals on, and never ends before the child. On Linux the child dies with it. The child is a process group of its
own, so that Ctrl-C, which goes to the whole group of a terminal, reaches it once: through the parent. What native
libraries write to stderr goes through the parent too, which shows it at once and keeps the end: the last words of a
process that died of SIGABRT say whether memory was spent.
"""

from __future__ import annotations

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

from sparsify_deploy.errors import Interrupted, NativeCrash, OutOfResources
from sparsify_deploy.process import memory, watch

_VERBS = frozenset({"run", "sensitivity", "init", "plan", "verify", "build", "bench", "inspect", "predict"})
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
    """Call `work` in a child and return its exit code, in both processes; where it dies, that of one line on stderr."""
    page = watch.Page()
    read, write = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    parent, mask = os.getpid(), signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
    began, child = time.monotonic(), os.fork()
    if child == 0:
        os.close(read)
        _become_worker(parent, write)
        watch.begin(page)
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            code = work()
        except KeyboardInterrupt:  # in the moment before or after the work could see to it: the parent has the line
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
            raise
        watch.finished(code)
        return code
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


def _become_worker(parent: int, stderr: int) -> None:
    """The child's side, before it works: a group of its own, which dies with the parent and never waits for a key."""
    from sparsify_deploy.runtimes._child import die_with

    os.setpgid(0, 0)
    die_with(parent)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # or a terminal set to `tostop` stops it when it writes
    if os.isatty(0):  # whose keys belong to the parent's group: reading one would stop this group for ever
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
    own = sys.stderr
    if own.fileno() == 2:  # Python goes on writing to the terminal; what is native writes to descriptor 2
        sys.stderr = open(os.dup(2), "w", buffering=1, encoding=own.encoding, errors=own.errors)  # noqa: SIM115
        os.dup2(stderr, 2)
    os.close(stderr)


@dataclass(frozen=True)
class End:
    """How the child ended: its wait status, peak memory, last native words, what it was sent, whether it was killed for
    outrunning a time limit, and the limit on its memory."""

    status: int
    peak_bytes: int
    words: str
    sent: frozenset[int]
    overran: bool = False
    limit_bytes: int | None = None


def verdict(end: End, doing: watch.Doing) -> tuple[int, str]:
    """The exit code, and the line that explains it where the child could not; "" where it did."""
    if doing.exit_code is not None:
        return doing.exit_code, ""
    place, peak = memory.place(doing), memory.peak(end.peak_bytes)
    said = f"; it last said: {end.words}" if end.words else ""
    resume = "what is finished is kept, the same command goes on"
    if end.overran:
        advice = f"raise {watch.LIMIT_VARIABLE}, or try a smaller model"
        text = f"{doing.call or 'native code'}{_in(doing)} was stopped after its time limit of {doing.limit_s:g} s"
        return NativeCrash.exit_code, f"{text}: {advice}; {resume}{said}"
    if os.WIFEXITED(end.status):
        how = f"the process ended with exit code {os.WEXITSTATUS(end.status)} before its work was done"
    else:
        number = os.WTERMSIG(end.status)
        if number in end.sent or number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            return Interrupted.exit_code, f"interrupted; {resume}"
        how = f"the process crashed ({signal.Signals(number).name})"
        if number == signal.SIGKILL:
            how = f"the process was killed (SIGKILL){place}, most likely because memory ran out; {peak}"
            return OutOfResources.exit_code, f"{how}: {memory.advice(doing)}{said}"
    if memory.told_of(end.words):
        return OutOfResources.exit_code, f"out of memory{place}; {peak}; {how}: {memory.advice(doing)}{said}"
    advice = "a native library broke; `sparsify-deploy doctor` shows which are sound here"
    if end.limit_bytes is not None:
        limited = (
            f"its memory was limited to {end.limit_bytes / 2**30:.2f} GiB (ulimit -v), and few libraries bear that"
        )
        advice = f"{limited}: raise the limit, or {memory.advice(doing)}"
    return NativeCrash.exit_code, f"{how}{place}; {peak}: {advice}; {resume}{said}"


def _in(doing: watch.Doing) -> str:
    return f" in {doing.step}" if doing.step else ""


@dataclass
class _Watch:
    """The parent's side: hands on signals and native words until the child is gone."""

    child: int
    page: watch.Page
    words: int
    looked: float
    _sent: set[int] = field(default_factory=set)
    _asked_at: float | None = None
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
        os.set_blocking(self.words, False)  # a process that the child left behind may hold the other end
        while self.words in sources and self._relay():
            pass
        os.close(self.words)
        last = [each.strip() for each in self._tail.decode(errors="replace").splitlines() if each.strip()]
        peak = memory.in_bytes(usage.ru_maxrss)
        return End(status, peak, " | ".join(last[-3:]), frozenset(self._sent), overran, limit)

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
