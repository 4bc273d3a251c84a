"""Whether a run directory still holds what was committed, and whether that is what it is said to be. Torch-free.

Bytes are compared with the manifests, the N:M pattern with the records, engines and copies with what they were made
from, and every engine that can run here with its ONNX file. What cannot be told from the files alone is named.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsify_deploy import menu
from sparsify_deploy.artifacts import durable, seal
from sparsify_deploy.artifacts.environment import available_cores
from sparsify_deploy.artifacts.fingerprint import digest, file_digest, files_below
from sparsify_deploy.artifacts.hashing import algorithm_of, difference
from sparsify_deploy.artifacts.store import MANIFEST, Record, record_in
from sparsify_deploy.checkup import pattern_checks, run_directory
from sparsify_deploy.checkup.run_directory import Entry, RunDirectory
from sparsify_deploy.errors import CorruptArtifact, EnvironmentProblem, SparsifyError
from sparsify_deploy.reporting.package import NOTE
from sparsify_deploy.reports import REPORTS, SUMS
from sparsify_deploy.runtimes import _child
from sparsify_deploy.runtimes._metadata import check as check_engine
from sparsify_deploy.types import Json, Progress, Silent

OK, DAMAGED, UNMET, UNCHECKED = "ok", "DAMAGED", "NOT MET", "not checked"

_MIB = 1 << 20
_PARITY_LIMIT_S = 300.0
_UNUSED = "not of the last report"
_UNREAD = "cannot be read"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: the step or part it belongs to, its file, what of it, `state` and the finding."""

    part: str
    file: Path
    what: str
    state: str
    finding: str


@dataclass(frozen=True)
class Verified:
    """All checks, and how many bytes were hashed in how many seconds of wall time."""

    folder: Path
    store: Path
    checks: tuple[Check, ...]
    hashed_bytes: int
    hashing_s: float

    def of(self, state: str) -> tuple[Check, ...]:
        """The checks that ended so."""
        return tuple(check for check in self.checks if check.state == state)

    @property
    def exit_code(self) -> int:
        """9 where bytes differ, else 4 where a pattern or parity is not met, else 0."""
        return 9 if self.of(DAMAGED) else 4 if self.of(UNMET) else 0


def verify(folder: Path, store: Path | None = None, progress: Progress | None = None) -> Verified:
    """Look at everything that the run directory `folder` and its store hold, and go on after what is wrong.

    Raises DataError where it is no run directory.
    """
    run = run_directory.find(folder, store)
    shown = progress or Silent()
    checks = list(_reports(run))
    records: list[Record] = []
    for entry in run.entries():
        if entry.unfinished:
            checks += _unfinished(entry)
            continue
        try:
            records.append(_committed(entry))
        except CorruptArtifact as error:
            checks.append(Check(_part(run, entry.fingerprint), entry.path / MANIFEST, "record", DAMAGED, str(error)))
    began = time.monotonic()
    committed = {path: record.digests[name] for record in records for name, path in record.outputs.items()}
    digests = _digests(committed, shown)
    hashing_s = time.monotonic() - began
    for record in records:
        checks += _bytes(run, record, digests)
    checks += _gone(run, records, [entry.fingerprint for entry in run.entries() if not entry.unfinished])
    sound = {path for path, expected in committed.items() if digests[path] == expected}
    checks += _patterns(run, records, sound)
    checks += _engines(run, records, sound)
    checks += _copies(run, records)
    checks += _parity(run, records, sound, shown)
    hashed = sum(size for record in records for size in record.bytes.values())
    return Verified(folder, run.store, tuple(checks), hashed, hashing_s)


# -- bytes ---------------------------------------------------------------------------------------------------------


def _committed(entry: Entry) -> Record:
    """A record that is one of its own folder. Raises `CorruptArtifact`."""
    record = record_in(entry.path)
    if (record.stage, record.fingerprint) != (entry.stage, entry.fingerprint) or digest(record.parts) != (
        entry.fingerprint
    ):
        raise CorruptArtifact(
            f"{entry.path / MANIFEST} is the manifest of another result: delete the folder {entry.path}, or run its "
            "stage with --again"
        )
    return record


def _digests(committed: Mapping[Path, str], progress: Progress) -> dict[Path, str]:
    """The digest of each file or folder, several at a time, the largest first; of what cannot be read the reason."""
    sizes = {path: _size(path) for path in committed}
    order = sorted(sizes, key=lambda path: -sizes[path])
    total, done = sum(sizes.values()), 0
    found = {}
    with ThreadPoolExecutor(min(4, available_cores())) as pool:
        for path, found[path] in zip(order, pool.map(lambda one: _digest(one, committed[one]), order), strict=True):
            done += sizes[path]
            progress.update("hashing, MiB", done // _MIB, total // _MIB)
    return found


def _size(path: Path) -> int:
    try:
        files = [path / name for name in files_below(path)] if path.is_dir() else [path]
        return sum(file.stat().st_size for file in files)
    except OSError:
        return 0


def _digest(path: Path, expected: str) -> str:
    """The digest of a file or folder, of the kind of `expected`, or why there is none."""
    try:
        return file_digest(path, algorithm_of(expected))
    except OSError as error:
        return f"{_UNREAD} ({error.strerror or error})"


def _unread(found: str) -> bool:
    return found.startswith(_UNREAD)


def _bytes(run: RunDirectory, record: Record, digests: Mapping[Path, str]) -> Iterator[Check]:
    part, wrong = _part(run, record.fingerprint), False
    for name, path in record.outputs.items():
        found, expected = digests[path], record.digests[name]
        if found == expected:
            continue
        wrong = True
        mend = f"delete the folder {record.folder}, or run its stage with --again"
        for inner, now, then in _inside(path, record.files.get(name, {})) or [(path, found, expected)]:
            what = now if _unread(now) else f"is not what was committed ({difference(now, then)})"
            yield Check(part, inner, "bytes", DAMAGED, f"{inner} {what}: {mend}")
    if not wrong:
        size = sum(record.bytes.values()) / _MIB
        count = f"{len(record.outputs)} output{'s' if len(record.outputs) > 1 else ''}"
        yield Check(part, record.folder, "bytes", OK, f"{count}, {size:.2f} MiB, as committed")


def _inside(folder: Path, files: Mapping[str, str]) -> list[tuple[Path, str, str]]:
    """The files of a folder that are not as committed, each with what it is and what it was."""
    each = [(folder / name, _digest(folder / name, expected), expected) for name, expected in sorted(files.items())]
    return [(path, found, expected) for path, found, expected in each if found != expected]


def _unfinished(entry: Entry) -> Iterator[Check]:
    """An attempt that a run goes on from: its step checkpoints say themselves what their bytes must be."""
    part = f"{entry.stage}, unfinished"
    for path in sorted([*entry.path.glob("*.checkpoint"), *entry.path.glob("*.checkpoint.before")]):
        try:
            content = path.read_bytes()
        except OSError as error:
            yield Check(part, path, "bytes", DAMAGED, f"{path} cannot be read ({error.strerror}): delete that file")
            continue
        if seal.payload(content) is not None:
            yield Check(part, path, "bytes", OK, f"step checkpoint, {len(content) / _MIB:.2f} MiB, as written")
        else:
            text = (
                f"{path} is damaged: delete that file, then training goes on from the checkpoint before, or starts over"
            )
            yield Check(part, path, "bytes", DAMAGED, text)


def _gone(run: RunDirectory, records: Sequence[Record], there: Sequence[str]) -> Iterator[Check]:
    try:
        steps = run.steps
    except CorruptArtifact:
        return
    for fingerprint, step in steps.items():
        if fingerprint not in there:
            text = f"{step}: its result, which the report names, is gone from {run.store}: `run` makes it again"
            yield Check(step, run.store, "bytes", DAMAGED, text)


def _reports(run: RunDirectory) -> Iterator[Check]:
    path, sums = run.folder / REPORTS[0], run.folder / SUMS
    if not path.is_file() and not sums.is_file():
        yield Check("report", path, "bytes", UNCHECKED, "there is none: no run has finished here")
        return
    listed = {}
    if sums.is_file():
        listed = {name: sha for sha, _, name in (line.partition("  ") for line in _text(sums).splitlines())}
    for name in REPORTS:
        found = _digest(run.folder / name, listed.get(name, ""))
        if not sums.is_file():
            text = "not compared: the release that wrote it left no sums of its reports"
            yield Check("report", run.folder / name, "bytes", UNCHECKED, text)
        elif listed.get(name) == found:
            yield Check("report", run.folder / name, "bytes", OK, f"as {SUMS} lists it")
        else:
            what = found if _unread(found) else f"is not what {SUMS} lists"
            text = f"{run.folder / name} {what}: `run` writes it again"
            yield Check("report", run.folder / name, "bytes", DAMAGED, text)
    try:
        _ = run.report
    except CorruptArtifact as error:
        if listed.get(path.name) in (None, _digest(path, "")):
            yield Check("report", path, "report", DAMAGED, str(error))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _part(run: RunDirectory, fingerprint: str) -> str:
    try:
        return run.steps.get(fingerprint, _UNUSED)
    except CorruptArtifact:
        return _UNUSED


# -- what the bytes mean -------------------------------------------------------------------------------------------


def _patterns(run: RunDirectory, records: Sequence[Record], sound: set[Path]) -> Iterator[Check]:
    for held in pattern_checks.held(records, sound):
        part, what = _part(run, held.record.fingerprint), f"{held.pattern or 'N:M'} of {held.what}"
        if held.unread:
            yield Check(part, held.file, what, UNCHECKED, held.unread)
        elif held.broken:
            text = f"{held.file}: breaks {held.pattern} along input channels: {', '.join(held.broken)}"
            yield Check(part, held.file, what, UNMET, f"{text}: run its stage with --again")
        else:
            yield Check(part, held.file, what, OK, f"{held.layers} layers, no group breaks it")


def _engines(run: RunDirectory, records: Sequence[Record], sound: set[Path]) -> Iterator[Check]:
    """Every engine against the record beside it, and that against the ONNX file it was built from."""
    sources = {r.digests["onnx"]: r.outputs["onnx"] for r in records if r.outputs.get("onnx") in sound}
    for record in records:
        engine = _engine(record)
        if engine is None or record.outputs["engine"] not in sound:
            continue
        part = _part(run, record.fingerprint)
        try:
            beside = check_engine(engine, trust=False)
        except SparsifyError as error:
            yield Check(part, engine, "engine's record", DAMAGED, str(error))
            continue
        assert beside is not None
        source = sources.get(record.parts["inputs"].get("onnx", ""))
        if source is None:
            text = "the ONNX file that it was built from is damaged or gone"
            yield Check(part, engine, "engine's record", UNCHECKED, text)
        elif beside["onnx_sha256"] != _digest(source, beside["onnx_sha256"]):
            text = f"{engine}: was built from another ONNX file than the one its step was given: run it with --again"
            yield Check(part, engine, "engine's record", DAMAGED, text)
        else:
            yield Check(
                part, engine, "engine's record", OK, f"{beside['runtime']} {beside['version']}, of its ONNX file"
            )


def _engine(record: Record) -> Path | None:
    """The engine of a build stage."""
    if record.stage != "build_engine" or record.parts["settings"].get("runtime") not in menu.names("runtimes"):
        return None
    return record.outputs["engine"] / f"model{menu.entry('runtimes', record.parts['settings']['runtime']).SUFFIX}"


# -- what the user takes away --------------------------------------------------------------------------------------


def _copies(run: RunDirectory, records: Sequence[Record]) -> Iterator[Check]:
    """`onnx/` and `engines/` against the store, `deploy/` against its own note and the report."""
    try:
        report, steps = run.report, run.steps
    except CorruptArtifact:
        report, steps = None, {}
    if report is None:
        if (run.folder / "deploy").is_dir():
            yield from _deployed(run.folder / "deploy", None)
        if (run.folder / "engines").is_dir() or (run.folder / "onnx").is_dir():
            text = "not compared: which results they are copies of stands in the report"
            yield Check("onnx, engines", run.folder, "copy", UNCHECKED, text)
        return
    by_step = {step: record for record in records for step in steps.get(record.fingerprint, "").split(", ") if step}
    for step, record in by_step.items():
        target, output = _copy_of(run.folder, step, record)
        if target is None:
            continue
        found = _digest(target, record.digests[output])
        if found == record.digests[output]:
            yield Check(step, target, "copy", OK, "as in the store")
        else:
            yield Check(step, target, "copy", DAMAGED, f"{target}: {_differs(target, found)}: `run` copies it again")
    if report.shipped is not None:
        yield from _deployed(run.folder / "deploy", report.shipped.files)


def _copy_of(folder: Path, step: str, record: Record) -> tuple[Path | None, str]:
    branch = step.partition("/")[0]
    if record.stage in ("export_onnx", "import_onnx"):
        return folder / "onnx" / branch / "model.onnx", "onnx"
    if record.stage == "export_onnx.onnxruntime":
        return folder / "onnx" / branch / "model.onnxruntime.onnx", "onnx"
    if record.stage == "build_engine":
        return folder / "engines" / branch / record.parts["settings"]["runtime"], "engine"
    return None, ""


def _differs(path: Path, found: str) -> str:
    return found if _unread(found) else "is not the one in the store"


def _deployed(folder: Path, files: Sequence[str] | None) -> Iterator[Check]:
    """`files` are those that the report names, None where that cannot be read."""
    path = folder / NOTE
    try:
        content = path.read_bytes()
        note = durable.read_json(path, content) if durable.is_sealed(content) else _json(content)
        listed: Mapping[str, str] = note["sha256"]
    except (OSError, CorruptArtifact, ValueError, KeyError, TypeError) as error:
        reason = str(error) if isinstance(error, SparsifyError) else f"{path} cannot be read ({error!r})"
        yield Check("deploy", path, "copy", DAMAGED, f"{reason}: `run` copies the folder again")
        return
    if files is not None and sorted([*listed, NOTE]) != sorted(files):
        yield Check(
            "deploy", path, "copy", DAMAGED, f"{path}: lists other files than the report: `run` copies it again"
        )
    for name, expected in sorted(listed.items()):
        found = _digest(folder / name, expected)
        if found == expected:
            yield Check("deploy", folder / name, "copy", OK, f"as {NOTE} lists it")
        else:
            what = found if _unread(found) else f"its bytes are not those that {NOTE} lists"
            yield Check("deploy", folder / name, "copy", DAMAGED, f"{folder / name}: {what}: `run` copies it again")


def _json(content: bytes) -> Json:
    import json

    return json.loads(content)


# -- parity --------------------------------------------------------------------------------------------------------


def _parity(run: RunDirectory, records: Sequence[Record], sound: set[Path], progress: Progress) -> Iterator[Check]:
    """Each engine of the report that can run here against its ONNX file, on random inputs, each in a child process."""
    by_digest = {record.digests["onnx"]: record for record in records if "onnx" in record.digests}
    for record in records:
        part, engine = _part(run, record.fingerprint), _engine(record)
        if "parity" in record.measured and record.stage.startswith("export_onnx"):
            yield Check(
                part, record.outputs["onnx"], "parity with torch", UNCHECKED, _recorded(record.measured["parity"])
            )
        if engine is None or part == _UNUSED:
            continue
        source = by_digest.get(record.parts["inputs"].get("onnx", ""))
        reason = _cannot(record, source, sound)
        if reason is not None:
            yield Check(part, engine, "parity with ONNX", UNCHECKED, reason)
            continue
        assert source is not None
        progress.say(f"{part}: comparing {engine.name} with its ONNX file")
        yield _compared(part, engine, source.outputs["onnx"], record)


def _recorded(parity: Mapping[str, Any]) -> str:
    return (
        f"torch's answers are not stored; when exported: largest difference {parity['max_relative']:.1e} of the "
        f"largest output on {parity['examples']} test examples"
    )


def _cannot(record: Record, source: Record | None, sound: set[Path]) -> str | None:
    """Why an engine is not compared."""
    if record.outputs["engine"] not in sound:
        return "the engine is damaged"
    if source is None or source.outputs["onnx"] not in sound:
        return "its ONNX file is damaged or gone"
    runtime = menu.entry("runtimes", record.parts["settings"]["runtime"])
    missing: str | None = runtime.unavailable_reason() or runtime.cannot_run_reason()
    reference: str | None = menu.entry("runtimes", "onnxruntime").unavailable_reason()
    return missing or reference


def _compared(part: str, engine: Path, onnx: Path, record: Record) -> Check:
    """`NOT MET` beyond the tolerance of `inspect --compare`, or three times what the build itself had recorded."""
    recorded = record.measured.get("parity", {}).get("max_relative", 0.0)
    try:
        found = _child.call(
            "sparsify_deploy.checkup.verify:compare_in_child",
            {"onnx": str(onnx), "engine": str(engine)},
            what=f"running {engine}",
            time_limit_s=_PARITY_LIMIT_S,
        )
    except EnvironmentProblem as error:
        return Check(part, engine, "parity with ONNX", UNMET, str(error))
    except SparsifyError as error:
        return Check(part, engine, "parity with ONNX", UNCHECKED, str(error))
    limit = max(found["tolerance"], 3.0 * recorded)
    text = f"relative L2 difference {found['relative']:.1e} on inputs ({found['inputs']}), at most {limit:.1g} allowed"
    if found["relative"] <= limit:
        return Check(part, engine, "parity with ONNX", OK, text)
    return Check(part, engine, "parity with ONNX", UNMET, f"{engine}: {text}: build it again with --again")


def compare_in_child(request: Json) -> Json:
    """The child's side: the worst output of an engine against its ONNX file in ONNX Runtime."""
    from sparsify_deploy.reporting.compare import compare

    found = compare(Path(request["onnx"]), Path(request["engine"]), layers=False)
    worst = max(output.relative for output in found.outputs)
    return {"relative": worst, "inputs": found.inputs, "tolerance": found.tolerance}
