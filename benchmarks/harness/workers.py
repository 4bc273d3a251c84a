"""Worker processes that import torch once and take runs from a queue; they stop, saved, when the parent is asked to."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Literal

from harness.work import Job, perform
from sparsify_deploy.errors import Interrupted, SparsifyError
from sparsify_deploy.process.interrupt import stoppable
from sparsify_deploy.types import Json

_PROGRESS_EVERY_S = 0.5


@dataclass(frozen=True)
class Event:
    """What a worker says of its run. `done` ends with a result, `failed` and `stopped` with a line."""

    kind: Literal["began", "progress", "done", "failed", "stopped"]
    worker: int
    run: str
    text: str = ""
    done: int = 0
    total: int = 0
    result: Json = None


@dataclass
class _Reporter:
    """A `Progress` that sends its updates to the parent."""

    connection: Connection
    worker: int
    run: str
    _last: float = field(default=-1.0, init=False)

    def update(self, label: str, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if now - self._last >= _PROGRESS_EVERY_S:
            self._last = now
            with suppress(BrokenPipeError):  # the parent is gone: the watcher has asked this run to stop
                self.connection.send(Event("progress", self.worker, self.run, f"{label} {note}", done, total))

    def say(self, message: str) -> None:
        """Whatever a reader of the table needs to know is in the result."""


def _serve(connection: Connection, worker: int) -> None:
    """The life of a worker. A terminal's Ctrl-C reaches it too, and is left to the parent to pass on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            job: Job = connection.recv()
        except EOFError:
            return
        with suppress(BrokenPipeError):
            connection.send(_attempt(job, _Reporter(connection, worker, job.name)))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _attempt(job: Job, reporter: _Reporter) -> Event:
    try:
        return Event("done", reporter.worker, job.name, result=perform(job, reporter))
    except Interrupted as error:
        return Event("stopped", reporter.worker, job.name, str(error))
    except SparsifyError as error:
        return Event("failed", reporter.worker, job.name, "; ".join(error.lines))
    except Exception as error:  # noqa: BLE001 reported by name; the other runs go on
        job.result.with_suffix(".error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        return Event("failed", reporter.worker, job.name, f"{type(error).__name__}: {error}".splitlines()[0])


@dataclass
class _Worker:
    process: SpawnProcess
    connection: Connection
    job: Job | None = None


def run_all(pending: Iterable[Job], count: int, on_event: Callable[[Event], None]) -> bool:
    """Work through `pending` with `count` processes, at most one in each store; True where all had their turn.

    SIGINT and SIGTERM end it once every worker has saved. Events arrive in the caller's thread.
    """
    queue = list(pending)
    workers: list[_Worker] = []
    with stoppable() as stop_requested:
        try:
            while queue or any(worker.job for worker in workers):
                if stop_requested():
                    return _stop(workers, on_event)
                _hand_out(queue, workers, count, on_event)
                _listen(workers, on_event)
            return True
        finally:
            for worker in workers:
                worker.connection.close()
            for worker in workers:
                worker.process.join()


def _hand_out(queue: list[Job], workers: list[_Worker], count: int, on_event: Callable[[Event], None]) -> None:
    """Give every idle worker the first run whose store is free; start workers while there are too few."""
    for place in range(count):
        busy = {worker.job.store for worker in workers if worker.job}
        job = next((job for job in queue if job.store not in busy), None)
        if job is None:
            return
        if place == len(workers):
            workers.append(_start(place))
        worker = workers[place]
        if worker.job is None:
            if not worker.process.is_alive():
                worker = workers[place] = _start(place)
            queue.remove(job)
            worker.job = job
            worker.connection.send(job)
            on_event(Event("began", place, job.name))


def _start(place: int) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, place), name=f"worker-{place}")
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _listen(workers: list[_Worker], on_event: Callable[[Event], None], timeout_s: float = 0.5) -> None:
    """Pass on what has come in; a worker that died is an event of its run."""
    by_connection = {worker.connection: worker for worker in workers if worker.job}
    for connection in wait(list(by_connection), timeout_s):
        assert isinstance(connection, Connection)
        worker = by_connection[connection]
        assert worker.job is not None
        try:
            event: Event = connection.recv()
        except EOFError:
            worker.process.join()
            code = worker.process.exitcode
            kind: Literal["stopped", "failed"] = "stopped" if code == -signal.SIGTERM else "failed"
            event = Event(kind, workers.index(worker), worker.job.name, f"its process ended with exit code {code}")
        if event.kind != "progress":
            worker.job = None
        on_event(event)


def _stop(workers: list[_Worker], on_event: Callable[[Event], None]) -> bool:
    """Ask every worker to save and end; an idle one just ends."""
    for worker in workers:
        worker.process.terminate()
    while any(worker.job for worker in workers):
        _listen(workers, on_event)
    return False
