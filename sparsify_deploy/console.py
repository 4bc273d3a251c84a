"""The only module that prints: results on stdout, progress and errors on stderr.

Every text goes out with `soft_wrap=True, markup=False`, or rich would break `file:line:column` and eat brackets, and
through `printable`: names of layers, classes and files are others' text, which a terminal must not obey. Secrets are
taken out by `redaction`. What cannot be written to stderr ends no run: the stream is silent from then on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

from sparsify_deploy.process import streams
from sparsify_deploy.safety.printable import one_line
from sparsify_deploy.safety.redaction import redact, redacted

if TYPE_CHECKING:
    from rich.console import Console

    from sparsify_deploy.checkup.clean import Cleaned
    from sparsify_deploy.checkup.findings import Finding
    from sparsify_deploy.checkup.verify import Verified
    from sparsify_deploy.deploy import Benched, Built, Inspected
    from sparsify_deploy.pipeline import Status
    from sparsify_deploy.predict import Predicted
    from sparsify_deploy.recipe import Recipe
    from sparsify_deploy.reporting.compare import Compared
    from sparsify_deploy.reporting.table import Table
    from sparsify_deploy.reports import RunReport, SensitivityReport
    from sparsify_deploy.starter import Start
    from sparsify_deploy.types import Json, Progress
    from sparsify_deploy.workspace import Forecast


def out(text: str) -> None:
    """One line of a result on stdout."""
    _result(one_line(redact(text)))


def error(text: str) -> None:
    """One line on stderr."""
    _say(f"sparsify-deploy: {text}")


def _result(text: str) -> None:
    stream = streams.results()
    stream.write(_encoded(stream, text))


def _say(text: str) -> None:
    streams.write(sys.stderr, _encoded(sys.stderr, one_line(redact(text))), flush=True)


def _encoded(stream: TextIO, text: str) -> str:
    """A line; characters that the stream's encoding lacks as escapes."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding) + "\n"


def restored() -> None:
    """A terminal as it was before progress that was cut short: the line of the bars gone, the cursor there."""
    if sys.stderr.isatty():
        streams.write(sys.stderr, "\r\x1b[2K\x1b[?25h", flush=True)


def _json(value: Json) -> None:
    """Secrets go before there are quotes: afterwards they would take these along, or stand there in escapes."""
    import json

    _result(json.dumps(redacted(_plain(value)), indent=1, sort_keys=True, allow_nan=False))


def _plain(value: Json) -> Json:
    """`value` in the types of JSON, with null for what is infinite or not a number, which it has no word for."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return float(value) if isfinite(value) else None
    return value if value is None or isinstance(value, bool | int) else str(value)


def _print(table: Table) -> None:
    """A table: drawn by rich and fitted to the width of a terminal, else one unbroken line a row."""
    if streams.results().isatty():
        _draw(table)
    else:
        columns, *rows = [tuple(map(one_line, row)) for row in (table.columns, *table.rows)]
        widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
        if table.title:
            out(table.title)
        for row in (columns, ["-" * width for width in widths], *rows):
            out("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if table.how:
        out(table.how)
    out("")


def _draw(table: Table) -> None:
    from rich import box
    from rich.table import Table as Drawn
    from rich.text import Text

    drawn = Drawn(box=box.SIMPLE_HEAD, title=Text(one_line(table.title)) if table.title else None, title_justify="left")
    for column in table.columns:
        drawn.add_column(Text(one_line(column)), overflow="fold")
    for row in table.rows:
        drawn.add_row(*(Text(one_line(redact(cell))) for cell in row))
    console = _console(streams.results())
    with console.capture() as captured:
        console.print(drawn)
    _result(captured.get().removesuffix("\n"))


def _console(stream: TextIO) -> Console:
    """Rich's, as wide as the terminal behind `stream`: rich itself looks at descriptors that may lead elsewhere."""
    from rich.console import Console, ConsoleDimensions

    class Fitted(Console):
        @property  # type: ignore[misc]
        def size(self) -> ConsoleDimensions:
            if not os.environ.get("COLUMNS", "").isdigit():
                with suppress(OSError, ValueError):
                    columns, lines = os.get_terminal_size(stream.fileno())
                    if columns and lines:
                        return ConsoleDimensions(columns, lines)
            return super().size

    return Fitted(file=stream, highlight=False)


@contextmanager
def progress(*, quiet: bool, verbose: bool) -> Iterator[Progress]:
    """Progress on stderr: bars with rate and ETA on a terminal, a line now and then elsewhere, nothing if `quiet`."""
    from sparsify_deploy.types import Silent

    if quiet:
        yield Silent()
        return
    if not sys.stderr.isatty():
        yield _Lines(every_s=2.0 if verbose else 10.0)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bars = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=_console(cast("TextIO", streams.Shown(sys.stderr))),
        transient=True,
    )
    with bars:
        yield _Bars(bars)


class _Lines:
    """Progress where there is no terminal: a line when something starts, and at most one every so often after."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._label = ""
        self._began = self._last = 0.0
        self._first = 0

    def update(self, label: str, done: int, total: int, note: str = "") -> None:
        from time import monotonic

        now = monotonic()
        if label != self._label or done < self._first:
            self._label, self._began, self._last, self._first = label, now, now, done
        if now - self._last < self._every_s:
            return
        self._last = now
        rate = (done - self._first) / (now - self._began)
        left = f", {(total - done) / rate:.0f} s left" if rate else ""
        _say(f"  {label} {done}/{total} ({rate:.1f}/s{left}) {note}")

    def say(self, message: str) -> None:
        _say(message)


class _Bars:
    """Progress on a terminal: one bar, for what is under way."""

    def __init__(self, bars: object) -> None:
        from rich.progress import Progress, TaskID

        assert isinstance(bars, Progress)
        self._bars = bars
        self._label = ""
        self._task: TaskID | None = None

    def update(self, label: str, done: int, total: int, note: str = "") -> None:
        label, note = one_line(redact(label)), one_line(redact(note))
        if label != self._label or self._task is None:
            if self._task is not None:
                self._bars.remove_task(self._task)
            self._task = self._bars.add_task(label, total=total, completed=done, note=note, rate="")
            self._label = label
        speed = self._bars.tasks[-1].speed
        rate = f"{speed:.1f}/s" if speed else ""
        self._bars.update(self._task, completed=done, total=total, note=note, rate=rate)

    def say(self, message: str) -> None:
        from rich.text import Text

        self._bars.console.print(Text(one_line(redact(message))), soft_wrap=True)


def version(number: str, *, as_json: bool) -> None:
    """The program's version."""
    if as_json:
        _json({"version": number})
    else:
        out(f"sparsify-deploy {number}")


def menus(found: Mapping[str, Mapping[str, str]], *, as_json: bool) -> None:
    """What a recipe may name."""
    if as_json:
        _json(found)
        return
    for menu, entries in found.items():
        out(menu)
        width = max((len(name) for name in entries), default=0)
        for name, summary in entries.items():
            out(f"  {name:<{width}}  {summary}")


def started(found: Start, *, as_json: bool) -> None:
    """A recipe that was written."""
    from shlex import quote

    projected = sum(layer.projected for layer in found.layers)
    if as_json:
        layers = [vars(layer) for layer in found.layers]
        _json({"recipe": str(found.recipe), "examples": found.examples, "layers": layers, "notes": list(found.notes)})
        return
    examples = f"{found.examples} training examples" if found.examples else "no data"
    out(f"{found.recipe}: 2:4 for {projected} of {len(found.layers)} layers, {examples}")
    for note in found.notes:
        out(f"note: {note}")
    out(f"next: sparsify-deploy plan {quote(str(found.recipe))}{' --trust-code' if found.runs_code else ''}")


def validated(path: Path, recipe: Recipe, *, as_json: bool) -> None:
    """A recipe without mistakes."""
    if as_json:
        _json({"recipe": str(path), "name": recipe.name, "valid": True})
    else:
        out(f"{path}: valid")


def status(found: Sequence[Status], *, as_json: bool) -> None:
    """Where the steps stand."""
    if as_json:
        _json([{"step": s.step.id, "state": s.state, "why": s.why} for s in found])
        return
    width = max(len(s.step.id) for s in found)
    for s in found:
        out(f"{s.step.id:<{width}}  {s.state:<8}  {s.why}".rstrip())


def explained(found: Sequence[Status], *, as_json: bool) -> None:
    """Why each step would run, or the fingerprint it is cached under."""
    if as_json:
        _json(
            [
                {
                    "step": s.step.id,
                    "state": s.state,
                    "why": s.why,
                    "fingerprint": s.record.fingerprint if s.record else None,
                    "folder": str(s.record.folder) if s.record else None,
                }
                for s in found
            ]
        )
        return
    for s in found:
        out(f"{s.step.id}: {s.state}{f': {s.why}' if s.why else ''}")
        if s.record is not None:
            out(f"  {s.record.folder}")


def forecast(found: Forecast, *, as_json: bool) -> None:
    """The dry run."""
    from dataclasses import asdict

    from sparsify_deploy.prediction.roofline import LABEL
    from sparsify_deploy.reporting.forecast_tables import forecasts
    from sparsify_deploy.reporting.table import Table

    if as_json:
        _json(
            {
                "steps": [
                    {
                        "step": s.step.id,
                        "state": s.state,
                        "why": s.why,
                        "optimizer_steps": e.optimizer_steps if e else None,
                        "dense_training_flops": e.training_flops if e else None,
                    }
                    for s, e in found.steps
                ],
                "layers": [vars(layer) for layer in found.layers],
                "keep_worst_dense": found.keep_worst_dense,
                "missing": list(found.missing),
                "code": list(found.code),
                "trusted": found.trusted,
                "predicted": [
                    {
                        **asdict(one),
                        "how": LABEL,
                        "realistic": one.gain("realistic"),
                        "ideal": one.gain("ideal"),
                        "realistic_over_fp16": one.gain("realistic", "fp16"),
                        "ideal_over_fp16": one.gain("ideal", "fp16"),
                    }
                    for one in found.predicted
                ],
                "unskipped": list(found.unskipped),
                "warnings": list(found.warnings),
                "predicted_gate": asdict(found.gate) if found.gate is not None else None,
            }
        )
        return
    rows = []
    for s, estimate in found.steps:
        steps = estimate.optimizer_steps if estimate else None
        flops = estimate.training_flops if estimate else None
        rows.append((s.step.id, s.state, str(steps or ""), f"{flops / 1e12:.2f}" if flops else "", s.why))
    _print(Table("", ("step", "state", "optimizer steps", "TFLOP if dense", "why"), tuple(rows)))
    if found.layers:
        layers = tuple(
            (layer.name, "x".join(map(str, layer.shape)), "yes" if layer.projected else "no", layer.reason)
            for layer in found.layers
        )
        chosen = sum(layer.projected for layer in found.layers)
        how = f"{chosen} of {len(layers)} layers would be projected"
        if found.keep_worst_dense:
            how += f", less the {found.keep_worst_dense} that lose most when projected alone (nm.keep_worst_dense)"
        _print(Table("Which layers could run sparse", ("layer", "shape", "projected", "reason"), layers, how))
    for table in forecasts(found.predicted):
        _print(table)
    for line in found.unskipped:
        out(line)
    for line in found.warnings:
        out(f"warning: {line}")
    if found.gate is not None:
        met = "met" if found.gate.met else "NOT MET: run would stop before its first stage"
        out(f"gates.min_predicted_speedup {found.gate.limit:g}: {found.gate.value:.3f}x, {met} ({found.gate.how})")
    for line in found.missing:
        out(f"missing: {line}")
    for line in found.code:
        out(f"{'trusted' if found.trusted else 'costs and layers are known with --trust-code'}: {line}")


def diagnosis(findings: Sequence[Finding], *, as_json: bool) -> None:
    """What `doctor` found."""
    if as_json:
        _json([vars(finding) for finding in findings])
        return
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        advice = f": {finding.advice}" if finding.advice else ""
        out(f"{finding.state:<7} {finding.name:<{width}}  {finding.detail}{advice}")


def built(result: Built, *, as_json: bool) -> None:
    """An engine on disk."""
    from dataclasses import asdict

    if as_json:
        served = {"triton": str(result.triton)} if result.triton is not None else {}
        _json({"engine": str(result.engine), **asdict(result.notes), **served})
        return
    label = f", {result.notes.label}" if result.notes.label else ""
    out(f"{result.engine}: {result.notes.runtime} {result.notes.version}, {result.notes.seconds:.1f} s{label}")
    if result.triton is not None:
        out(f"{result.triton}: for Triton, written and not served here; its config.pbtxt says which container it needs")
    for warning in result.notes.warnings:
        error(warning)


def predicted(found: Predicted, *, as_json: bool) -> None:
    """What a deployed model says to examples."""
    from dataclasses import asdict

    from sparsify_deploy.predict import table

    if as_json:
        _json(asdict(found))
    else:
        _print(table(found))


def run_report(report: RunReport, *, as_json: bool) -> None:
    """The tables of a run, its notes, and the verdict last."""
    from sparsify_deploy.reporting.tables import tables
    from sparsify_deploy.reports import to_json

    if as_json:
        _json(to_json(report))
        return
    for table in tables(report):
        _print(table)
    for note in report.notes:
        out(note)
    out(report.verdict)


def verified(found: Verified, *, as_json: bool) -> None:
    """What a run directory holds, checked; what is wrong stands on stderr as well, a line each with the remedy."""
    from dataclasses import asdict

    from sparsify_deploy.reporting.table import Table

    wrong = [check for state in ("DAMAGED", "NOT MET") for check in found.of(state)]
    if as_json:
        _json({**asdict(found), "exit_code": found.exit_code})
    else:
        rows = tuple(
            (c.part, _shortened(c.file, found.folder, found.store), c.what, c.state, c.finding) for c in found.checks
        )
        _print(Table(f"{found.folder}", ("of", "file", "checked", "result", "finding"), rows))
        states = ", ".join(f"{len(found.of(state))} {state}" for state in ("ok", "NOT MET", "DAMAGED", "not checked"))
        speed = f" in {found.hashing_s:.2f} s" if found.hashing_s else ""
        out(f"{states}; {found.hashed_bytes / 2**20:.1f} MiB of results hashed{speed}")
    for check in wrong:
        error(check.finding)


def _shortened(path: Path, *folders: Path) -> str:
    """A path in one of the folders without that, and with fingerprints cut to what tells them apart."""
    import re

    for folder in folders:
        if path.is_relative_to(folder):
            path = path.relative_to(folder)
            break
    return re.sub(r"-([0-9a-f]{8})[0-9a-f]{56}", r"-\1", str(path))


def cleaned(found: Cleaned, *, as_json: bool) -> None:
    """What `clean` deleted, or would, and what it leaves with the option that takes it."""
    from dataclasses import asdict

    if as_json:
        _json(asdict(found))
        return
    for piece in found.pieces:
        what = ("would delete" if found.dry_run else "deleted") if piece.goes else "kept"
        out(f"{what:<12}  {piece.bytes / 2**20:9.2f} MiB  {_shortened(piece.path, found.folder)}: {piece.why}")
    out(f"{'would free' if found.dry_run else 'freed'} {found.freed_bytes / 2**20:.2f} MiB")


def sensitivity(found: SensitivityReport, *, as_json: bool) -> None:
    """What each layer alone costs, the worst first."""
    from sparsify_deploy.reporting.layer_tables import sensitivity as table
    from sparsify_deploy.reports import to_json

    if as_json:
        _json(to_json(found))
    else:
        _print(table(found))


def raced(found: Benched, *, as_json: bool) -> None:
    """What `bench` measured, and on what."""
    from dataclasses import asdict

    from sparsify_deploy.reporting.tables import race_table

    if as_json:
        _json(asdict(found))
        return
    for race in found.races:
        _print(race_table("bench", race))
    for copied in found.copies:
        out(
            f"copies, not in the times above: {copied.label} at batch {copied.batch_size}: inputs in "
            f"{copied.bind_ms:.3f} ms, outputs out {copied.fetch_ms:.3f} ms (wall time, median of {copied.samples})"
        )
    packages = ", ".join(f"{name} {version}" for name, version in found.machine["packages"].items())
    out(f"machine: {found.machine['cpu']}, {found.machine['cores']} cores; GPU {found.machine['gpu']}; {packages}")
    threads = found.races[0].threads if found.races else 0
    load = " -> ".join("unknown" if s.load is None else f"{s.load:.2f}" for s in (found.before, found.after))
    clocks = f"; clocks {found.before.gpu_clocks} -> {found.after.gpu_clocks}" if found.before.gpu_clocks else ""
    out(f"threads {threads}; load average {load}; inputs {found.inputs}{clocks}")
    for label, digest in found.sha256.items():
        out(f"sha256 {digest}  {label}")


def compared(found: Compared, *, as_json: bool) -> None:
    """How far two files of one network are apart, and where that begins."""
    from dataclasses import asdict

    from sparsify_deploy.reporting.table import Table

    if as_json:
        _json({**asdict(found), "differ": found.differ})
        return
    outputs = tuple(
        (
            output.name,
            f"{output.max_absolute:.3g}",
            f"{output.max_relative:.2e}",
            f"{output.relative:.2e}",
            f"{output.cosine:.6f}",
            "-" if output.top1_agreement is None else f"{output.top1_agreement:.2%}",
        )
        for output in found.outputs
    )
    columns = ("output", "largest difference", "of the largest value", "relative L2", "cosine", "same top-1")
    _print(Table(f"{found.other} against {found.reference}", columns, outputs, f"Inputs: {found.inputs}"))
    layers = tuple(
        (layer.layer, layer.op, f"{layer.relative:.2e}", "" if layer.relative <= found.tolerance else "beyond")
        for layer in found.layers
    )
    how = f"Relative L2 difference of what each layer returns, in graph order; tolerance {found.tolerance:g}"
    _print(Table("Layers that both files have", ("layer", "operator", "difference", ""), layers, how))
    if found.first is not None:
        out(f"the first layer that differs by more than {found.tolerance:g}: {found.first}")
    elif found.differ:
        out(f"the outputs differ by more than {found.tolerance:g}, and none of {len(layers)} layers in both files does")
    else:
        out(f"no output and none of {len(layers)} layers differs by more than {found.tolerance:g}")


def _words(value: Json) -> str:
    """A value of a record on one line, as words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(part)}" for key, part in value.items() if part not in ("", [], {}))
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)


def inspected(found: Inspected, *, as_json: bool) -> None:
    """What a model file holds, and what is known of which layers run sparse."""
    from dataclasses import asdict

    from sparsify_deploy.reporting.layer_tables import layer_table, profile_table

    if as_json:
        _json(asdict(found))
        return
    if found.runtime:
        out(f"{found.file}: an engine of {found.runtime}")
        for key, value in sorted((found.record or {}).items()):
            if value not in ("", [], {}):
                out(f"  {key.replace('_', ' ')}: {_words(value)}")
    if found.chain is not None:
        _print(layer_table(found.chain))
    elif found.profile is not None:
        _print(profile_table(found.file.name, found.profile))
    if found.runtime and found.chain is None:
        out("pass --onnx FILE, the one it was built from, for the verdict layer by layer")
