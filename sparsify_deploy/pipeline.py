"""The run-or-skip loop over a plan: what is cached is not run again, what is run is committed or not there at all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsify_deploy.artifacts.digests import DigestCache, Stamp, stamp
from sparsify_deploy.artifacts.durable import check_space
from sparsify_deploy.artifacts.environment import fact
from sparsify_deploy.artifacts.fingerprint import canonical, digest
from sparsify_deploy.artifacts.store import ArtifactStore, Record, explained
from sparsify_deploy.errors import DataError, EnvironmentProblem, Interrupted, UsageError
from sparsify_deploy.menu import did_you_mean
from sparsify_deploy.plan import Plan, PlannedStep
from sparsify_deploy.process import interrupt, memory, watch
from sparsify_deploy.safety.redaction import redacted
from sparsify_deploy.stages.space import needed_bytes
from sparsify_deploy.types import Context, Json


@dataclass(frozen=True)
class Status:
    """Where one step stands: `cached`, `partial` (begun, not finished), `to run`, `follows` (an input is not there)."""

    step: PlannedStep
    state: str
    why: str
    record: Record | None


@dataclass(frozen=True)
class Outcome:
    """One step of a finished run."""

    step: PlannedStep
    record: Record
    ran: bool
    why: str


class Fingerprints:
    """The parts of a step's fingerprint. File digests are taken once for all steps of a run."""

    def __init__(self, known: DigestCache) -> None:
        self._known = known
        self._digests: dict[Path, str] = {}
        self._stamps: dict[Path, Stamp] = {}

    def parts(self, step: PlannedStep, records: Mapping[str, Record]) -> dict[str, Json]:
        """Everything that may change the result, in named parts; `records` holds the steps it takes inputs from."""
        stage = step.stage
        settings = canonical(stage)
        return {
            "stage": stage.name,
            "version": stage.version,
            "methods": dict(sorted(stage.methods().items())),
            "settings": settings,
            "inputs": {name: records[ref.step].digests[ref.output] for name, ref in sorted(step.inputs.items())},
            "files": {name: self._digest(name, path) for name, path in sorted(stage.files().items())},
            "environment": {name: fact(name) for name in sorted(stage.environment)},
        }

    def _digest(self, name: str, path: Path) -> str:
        if path not in self._digests:
            try:
                self._stamps[path] = stamp(path)
                self._digests[path] = self._known.digest(path)
            except FileNotFoundError as error:
                raise DataError(f"{name}: {path} does not exist; correct the path in the recipe") from error
            except OSError as error:
                raise DataError(f"{name}: {path} cannot be read: {error.strerror or error}") from error
        return self._digests[path]

    def changed(self, step: PlannedStep) -> str | None:
        """The first file of a step that was changed since its digest was taken, by other bytes or by another file of
        the same bytes in its place; None: each is what it was."""
        for name, path in sorted(step.stage.files().items()):
            try:
                now = stamp(path)
                replaced = [inode for *_, inode in now] != [inode for *_, inode in self._stamps[path]]
                if now != self._stamps[path] and (replaced or self._known.hash(path) != self._digests[path]):
                    return f"{name}: {path}"
                self._stamps[path] = now
            except OSError as error:
                return f"{name}: {path} ({error.strerror or error})"
        return None

    def rewritten(self, step: PlannedStep) -> bool:
        """Whether a file of a step may have been written to since its digest was taken; no file is read."""
        for path in step.stage.files().values():
            try:
                now = stamp(path)
            except OSError:
                return True
            if [_written(one) for one in now] != [_written(one) for one in self._stamps[path]]:
                return True
        return False


def _written(one: list[int]) -> tuple[int, int, int]:
    """Of a file's stamp what no change of its mode or of its links touches."""
    size, modified, _, inode = one
    return size, modified, inode


def survey(plan: Plan, store: ArtifactStore) -> list[Status]:
    """Where every step stands, without running any."""
    prints = Fingerprints(store.digests)
    records: dict[str, Record] = {}
    found = []
    for step in plan.steps:
        waits = [ref.step for ref in step.inputs.values() if ref.step not in records]
        if waits:
            found.append(Status(step, "follows", f"after {', '.join(dict.fromkeys(waits))}", None))
            continue
        parts = prints.parts(step, records)
        if (record := store.find(step.stage.name, parts)) is not None:
            records[step.id] = record
            found.append(Status(step, "cached", "", record))
        else:
            state = "partial" if store.begun(step.stage.name, parts) else "to run"
            found.append(Status(step, state, store.reason(step.id, parts), None))
    return found


def selected(plan: Plan, name: str) -> tuple[str, ...]:
    """The ids of the steps `name` means; `UsageError` where it means none."""
    if not (ids := plan.select(name)):
        known = sorted({s.id for s in plan.steps} | {s.stage.name for s in plan.steps})
        raise UsageError(f"this recipe has no stage {name!r}{did_you_mean(name, known)}")
    return ids


def run(
    plan: Plan,
    store: ArtifactStore,
    context: Context,
    *,
    again: Sequence[str] = (),
    start: str | None = None,
    until: str | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Bring every step up to date, in order.

    `again` runs these stages although they are cached, `start` that stage and all after it; what follows a stage runs
    again only if its input changed. Where such a run was interrupted, the same request goes on; an old result goes when
    the new one is there. `until` ends after the last step of that stage and the report on it. A failing step is not
    committed, and starts over where a file that it reads was written to meanwhile.
    """
    order = [step.id for step in plan.steps]
    anew = {identifier for name in again for identifier in selected(plan, name)}
    if start is not None:
        anew |= set(order[order.index(selected(plan, start)[0]) :])
    last = order.index(selected(plan, until)[-1]) if until is not None else len(order) - 1
    while last + 1 < len(order) and order[last + 1] == f"{order[last]}.report":
        last += 1
    prints, records, outcomes = Fingerprints(store.digests), dict[str, Record](), list[Outcome]()
    request, checked = sorted(anew), False
    made_again = store.made_again(request)
    for step in plan.steps[: last + 1]:
        parts = prints.parts(step, records)
        asked = step.id in anew and digest(parts) not in made_again
        made = next((o.record for o in outcomes if o.ran and o.record.parts == parts), None)
        record = made or (None if asked else store.find(step.stage.name, parts))
        why = ""
        if record is None:
            if not checked:
                check_before_running(plan.steps[order.index(step.id) : last + 1])
                if (loaded := getattr(plan.subject, "loaded", None)) is not None:
                    context.progress.say(loaded.line)
                checked = True
            why = "asked for" if asked else store.reason(step.id, parts)
            if context.stop_requested():
                raise Interrupted(f"stopped before {step.id}; the same command goes on from here")
            context.progress.say(f"{step.id}: {why}")
            with watch.step(step.id, _batch_size(step)):
                out, began = store.begin(step.stage.name, parts), clock()
                inputs = {name: store.check(records[ref.step], ref.output) for name, ref in step.inputs.items()}
                try:
                    with explained(out), memory.explained():
                        check_space(out, needed_bytes(step.stage, inputs, out), step.id)
                        facts = redacted(step.stage.run(inputs, out, context))
                    interrupt.check()
                except BaseException:
                    if prints.rewritten(step):  # its checkpoints may be of other bytes
                        store.abandon(step.stage.name, parts)
                    raise
                if (changed := prints.changed(step)) is not None:
                    store.abandon(step.stage.name, parts)
                    raise DataError(
                        f"{changed} was changed while {step.id} worked, which may have read either: what it made is "
                        "deleted; the same command makes it of what is there now"
                    )
                seconds = clock() - began
                record = store.commit(step.stage.name, parts, step.stage.outputs, facts, seconds, replace=asked)
            if asked:
                store.note_again(request, made_again := made_again | {digest(parts)})
        ran = bool(why)
        store.remember(step.id, parts)
        records[step.id] = record
        outcomes.append(Outcome(step, record, ran, why))
    store.made_again(())
    return outcomes


def _batch_size(step: PlannedStep) -> int:
    """That of training, in a stage that takes its examples as training does; 0 in the others."""
    trains = getattr(step.stage, "fit", None)
    found: int = trains.training.batch_size if trains is not None else getattr(step.stage, "batch_size", 0)
    return found


def check_before_running(steps: Sequence[PlannedStep]) -> None:
    """Before anything runs: name all that this machine lacks for these steps, and what cannot work in any of them."""
    unmet = dict.fromkeys(line for step in steps for line in step.stage.unmet())
    if unmet:
        raise EnvironmentProblem(*unmet)
    for step in steps:
        step.stage.preflight()
