"""Reports as tables of text, for the terminal and for Markdown alike, each with a line on how it was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sparsify_deploy.reports import BenchmarkReport, Row, RunReport
from sparsify_deploy.timing import Race


@dataclass(frozen=True)
class Table:
    """Column heads, rows of as many cells, and how the numbers came about."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    how: str = ""


def tables(report: RunReport) -> tuple[Table, ...]:
    """All tables of a run, without the empty ones."""
    found = (waterfall(report), engines(report), *races(report.benchmarks), layers(report), gates(report))
    return tuple(table for table in found if table.rows)


def markdown(report: RunReport) -> str:
    """The whole report as Markdown."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: RunReport) -> Iterator[str]:
    yield f"# {report.recipe}\n"
    yield report.verdict + "\n"
    for table in tables(report):
        yield f"## {table.title}\n"
        yield from _grid(table.columns, table.rows)
        yield f"\n{table.how}\n" if table.how else ""
    if report.notes:
        yield "## Notes\n"
        yield from (f"- {note}" for note in report.notes)
        yield ""
    yield "## Steps\n"
    steps = [(s.id, s.state, f"{s.seconds:.1f}", s.fingerprint[:12], s.why) for s in report.steps]
    yield from _grid(("step", "state", "s", "fingerprint", "why"), steps)
    yield "\n## Machine\n"
    for name, value in sorted(report.machine.items()):
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        yield f"- {name}: {shown}"


def _grid(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a Markdown table."""
    yield "| " + " | ".join(columns) + " |"
    yield "|" + " --- |" * len(columns)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


def waterfall(report: RunReport) -> Table:
    """One row a model: accuracy, sparsity, size, latency, training cost."""
    race = report.benchmarks[0].races[0] if report.benchmarks and report.benchmarks[0].races else None
    start = race.labels[0] if race is not None else "dense FP32"
    runtime = report.rows[0].model.runtime if report.rows else None
    how = (
        f"{report.metric}: torch, all {report.rows[0].model.examples if report.rows else 0} test examples. "
        "Sparsity: asked / zeros in the ONNX file / what 2:4 hardware can skip. "
        "ONNX: bytes on disk. Weights: computed at the layer's precision, 2:4 layers compressed with metadata. "
    )
    if race is not None:
        how += (
            f"Latency: {runtime}, batch {race.batch_size}, wall time, all models interleaved. "
            f"Speed-up: the same rounds, {race.clock}, median with 95 % interval, over {start}. "
        )
    elif report.rows and report.rows[0].model.latency:
        size = report.rows[0].model.latency[0].batch_size
        how += f"Latency: {runtime}, batch {size}, wall time, each model timed alone after its stage. "
    how += "FLOPs: of this stage's training, relative to the same steps dense."
    columns = ("model", report.metric, "sparsity asked/measured/usable", "ONNX", "weights", "p50 / p90 / p99 ms")
    return Table(
        "From dense FP32 to INT8",
        (*columns, f"speed-up over {start}", "steps", "FLOPs", "train s"),
        tuple(_waterfall_row(report, row, race, start) for row in report.rows),
        how,
    )


def _waterfall_row(report: RunReport, row: Row, race: Race | None, start: str) -> tuple[str, ...]:
    model = row.model
    asked = f"{model.sparsity_asked:.0%}" if model.sparsity_asked is not None else "-"
    speed = "-"
    if race is not None and row.label == start:
        speed = "1"
    elif race is not None and start in race.labels and row.label in race.labels:
        found = race.compare(row.label, start)
        speed = f"{found.median:.2f}x [{found.low:.2f}, {found.high:.2f}]" + (
            " (noise)" if found.claim == "within the noise" else ""
        )
    return (
        row.label,
        f"{model.metrics[report.metric]:.4f}",
        f"{asked} / {model.sparsity:.1%} / {model.usable_sparsity:.1%}",
        kib(model.onnx_bytes),
        kib(model.bytes_compressed),
        _latency(row, race),
        speed,
        str(row.optimizer_steps) if row.optimizer_steps is not None else "-",
        f"{row.flops:.2f}x" if row.flops is not None else "-",
        f"{row.train_s:.1f}" if row.train_s is not None else "-",
    )


def _latency(row: Row, race: Race | None) -> str:
    """From the race where the model took part, else as it was timed after its stage."""
    if race is not None and row.label in race.labels:
        first = race.latencies[row.label]
    elif row.model.latency:
        first = row.model.latency[0]
    else:
        return "-"
    return f"{first.p50_ms:.3f} / {first.p90_ms:.3f} / {first.p99_ms:.3f}"


def kib(size: int) -> str:
    """Bytes as KiB or MiB."""
    return f"{size / 1024:.0f} KiB" if size < 1 << 20 else f"{size / (1 << 20):.2f} MiB"


def engines(report: RunReport) -> Table:
    """One row an engine file."""
    rows = tuple(
        (
            engine.file,
            f"{engine.runtime} {engine.version}",
            kib(engine.bytes),
            f"{engine.metrics[report.metric]:.4f}" if engine.metrics else "-",
            engine.label or "built and run here",
        )
        for engine in report.engines
    )
    return Table(
        "Engines",
        ("file", "runtime", "size", report.metric, "state"),
        rows,
        f"{report.metric}: computed by the engine itself, all test examples. Files are in the run directory.",
    )


def races(benchmarks: Sequence[BenchmarkReport]) -> tuple[Table, ...]:
    """One table a runtime and batch size."""
    return tuple(race_table(benchmark.runtime, race) for benchmark in benchmarks for race in benchmark.races)


def race_table(runtime: str, race: Race) -> Table:
    """Latencies of interleaved variants, and their ratio to the first."""
    first = race.labels[0]
    rows = []
    for label in race.labels:
        latency = race.latencies[label]
        found = race.compare(label, first) if label != first else None
        rows.append(
            (
                label,
                f"{latency.p50_ms:.3f}",
                f"{latency.p90_ms:.3f}",
                f"{latency.p99_ms:.3f}",
                f"{latency.throughput_per_s:.0f}",
                f"{found.median:.2f}x [{found.low:.2f}, {found.high:.2f}] {found.claim}" if found else "1",
            )
        )
    how = (
        f"Interleaved rounds, latencies in wall time, ratios in {race.clock}; the noise floor is an A/A control of "
        f"{first}: {race.control.median:.3f}x [{race.control.low:.3f}, {race.control.high:.3f}]; "
        f"nothing within {race.noise:.1%} of 1 is claimed."
    )
    return Table(
        f"{runtime}, batch {race.batch_size}, {race.threads} thread{'s' if race.threads > 1 else ''}",
        ("model", "p50 ms", "p90 ms", "p99 ms", "examples/s", f"speed-up over {first}"),
        tuple(rows),
        how,
    )


def layers(report: RunReport) -> Table:
    """One row a layer of the final model: whether it is, or could be, 2:4-sparse INT8, and why."""
    if not report.rows:
        return Table("Layers", (), ())
    final = report.rows[-1]
    rows = tuple(
        (
            layer.weight,
            "x".join(map(str, layer.shape)),
            layer.precision,
            ("in+out" if layer.int8_in and layer.int8_out else "in" if layer.int8_in else "-"),
            f"{layer.zeros / layer.weights:.0%}",
            "yes" if layer.pattern_held else "no",
            layer.reason,
        )
        for layer in final.model.layers
    )
    held = sum(layer.pattern_held for layer in final.model.layers)
    return Table(
        f"Layers of {final.label}: {held} of {len(rows)} hold the pattern",
        ("weight", "shape", "precision", "INT8", "zeros", "pattern held", "eligibility by shape"),
        rows,
        "Read off the final ONNX file. The builder's own word on what ran sparse needs TensorRT on a GPU.",
    )


def gates(report: RunReport) -> Table:
    """The recipe's limits."""
    rows = tuple(
        (
            gate.name,
            f"{gate.limit:g}",
            "-" if gate.value is None else f"{gate.value:.4f}",
            {True: "met", False: "NOT MET", None: "NOT MEASURED"}[gate.met],
            gate.how,
        )
        for gate in report.gates
    )
    return Table("Gates", ("gate", "limit", "measured", "", "how"), rows)
