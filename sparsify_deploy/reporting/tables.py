"""Reports as tables of text, for the terminal and for Markdown alike, each with a line on how it was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparsify_deploy.reporting.forecast_tables import predictions
from sparsify_deploy.reporting.layer_tables import layers, sensitivity
from sparsify_deploy.reporting.table import Table
from sparsify_deploy.reports import BenchmarkReport, Row, RunReport
from sparsify_deploy.runtimes._tensors import RANDOM_INPUTS
from sparsify_deploy.timing import Race


def tables(report: RunReport) -> tuple[Table, ...]:
    """All tables of a run, without the empty ones."""
    measured = (sensitivity(report.sensitivity),) if report.sensitivity is not None else ()
    found = (
        waterfall(report),
        all_metrics(report),
        *levels(report),
        engines(report),
        *races(report.benchmarks),
        *layers(report),
        *measured,
        predictions(report),
        gates(report),
    )
    return tuple(table for table in found if table.rows)


def waterfall(report: RunReport) -> Table:
    """One row a model: accuracy, sparsity, size, latency, training cost."""
    if report.rows and report.rows[0].step.startswith("given/"):
        return _given(report, report.rows[0])
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
    how += (
        "FLOPs (2 x MACs of convolutions and matrix products): of this stage's training over one dense training; "
        "backward is twice forward, both counted by density, with a dense weight gradient in the steps that need one, "
        "as RigL's authors count (Evci 2020, app. H); all levels of IMP together. Torch skips no "
        "zeros: FLOPs are what hardware that does could save, train s is the time it took."
    )
    columns = ("model", report.metric, "sparsity asked/measured/usable", "ONNX", "weights", "p50 / p90 / p99 ms")
    return Table(
        "From dense FP32 to INT8",
        (*columns, f"speed-up over {start}", "steps", "FLOPs", "train s"),
        tuple(_waterfall_row(report, row, race, start) for row in report.rows),
        how,
    )


def _given(report: RunReport, row: Row) -> Table:
    """A file that was not made here, as it is, and its variants of known accuracy."""
    race = report.benchmarks[0].races[0] if report.benchmarks and report.benchmarks[0].races else None
    start = race.labels[0] if race is not None else row.label
    model = row.model
    own = next((engine.metrics for engine in report.engines if engine.metrics), None)
    shown = f"{own[report.metric]:.4f}" if own else "-"
    columns = ["model", f"{report.metric} in ONNX Runtime", "of the engine"]
    columns += ["sparsity measured/usable", "ONNX", "weights"]
    cells = [
        f"{row.label} ({model.precision})",
        _metric(model.metrics, report.metric),
        shown,
        f"{model.sparsity:.1%} / {model.usable_sparsity:.1%}",
        kib(model.onnx_bytes),
        kib(model.bytes_compressed),
    ]
    rows = [cells]
    raced = report.benchmarks[0].metrics if report.benchmarks else {}
    rows += [[label, "-", _metric(metrics, report.metric), "-", "-", "-"] for label, metrics in raced.items()]
    if race is not None:
        columns += ["p50 / p90 / p99 ms", f"speed-up over {start}"]
        for label, line in zip((row.label, *raced), rows, strict=True):
            line += [_percentiles(race, label), _over(race, label, start)]
    how = "Sparsity: zeros in the ONNX file / what 2:4 hardware can skip. ONNX: bytes on disk. Weights: computed at "
    how += "the layer's precision, 2:4 layers compressed with metadata. "
    if model.metrics:
        how += f"{report.metric}: all {model.examples} test examples; what the network was before is not known. "
    else:
        how += f"{report.metric}: not measured, the recipe has no data; inputs are drawn: {RANDOM_INPUTS}. "
    if race is not None:
        how += (
            f"Latency: {report.benchmarks[0].runtime}, batch {race.batch_size}, wall time, all interleaved. "
            f"Speed-up: the same rounds, {race.clock}, median with 95 % interval, over {start}. "
        )
    return Table("The file as given", tuple(columns), tuple(map(tuple, rows)), how.strip())


def all_metrics(report: RunReport) -> Table:
    """Every metric of every model, where there is more than the one the other tables show; else no rows."""
    known = {name for row in report.rows for name in row.model.metrics} - {"loss"}
    measured = sorted(
        (name for name in report.metrics if name in known), key=lambda name: (name != report.metric, name)
    )
    given = bool(report.rows) and report.rows[0].step.startswith("given/")
    rows = tuple(
        (row.label, *(_metric(row.model.metrics, name) for name in (*measured, "loss")))
        for row in report.rows
        if len(measured) > 1
    )
    heads = (f"{name} ({report.metrics[name]} is better)" for name in measured)
    return Table(
        "All metrics",
        ("model", *heads, "loss (lower is better)"),
        rows,
        f"{'ONNX Runtime' if given else 'Torch'}, all test examples; loss without what shapes training alone.",
    )


def _metric(metrics: Mapping[str, float], name: str) -> str:
    return f"{metrics[name]:.4f}" if name in metrics else "-"


def _over(race: Race, label: str, start: str) -> str:
    """The speed-up of one label in a race, with its interval."""
    if label == start:
        return "1"
    if label not in race.labels or start not in race.labels:
        return "-"
    found = race.compare(label, start)
    noise = " (noise)" if found.claim == "within the noise" else ""
    return f"{found.median:.2f}x [{found.low:.2f}, {found.high:.2f}]{noise}"


def _percentiles(race: Race, label: str) -> str:
    if label not in race.labels:
        return "-"
    first = race.latencies[label]
    return f"{first.p50_ms:.3f} / {first.p90_ms:.3f} / {first.p99_ms:.3f}"


def _waterfall_row(report: RunReport, row: Row, race: Race | None, start: str) -> tuple[str, ...]:
    model = row.model
    asked = f"{100 * model.sparsity_asked:.4g}%" if model.sparsity_asked is not None else "-"
    return (
        row.label,
        f"{model.metrics[report.metric]:.4f}",
        f"{asked} / {model.sparsity:.1%} / {model.usable_sparsity:.1%}",
        kib(model.onnx_bytes),
        kib(model.bytes_compressed),
        _latency(row, race),
        _over(race, row.label, start) if race is not None else "-",
        str(row.optimizer_steps) if row.optimizer_steps is not None else "-",
        f"{row.flops:.2f}x" if row.flops is not None else "-",
        f"{row.train_s:.1f}" if row.train_s is not None else "-",
    )


def _latency(row: Row, race: Race | None) -> str:
    """From the race where the model took part, else as it was timed after its stage."""
    if race is not None and row.label in race.labels:
        return _percentiles(race, row.label)
    if not row.model.latency:
        return "-"
    first = row.model.latency[0]
    return f"{first.p50_ms:.3f} / {first.p90_ms:.3f} / {first.p99_ms:.3f}"


def levels(report: RunReport) -> tuple[Table, ...]:
    """One table a step that trained several times, such as lottery tickets, one row a level."""
    found = []
    for step in dict.fromkeys(level.step for level in report.levels):
        own = [level for level in report.levels if level.step == step]
        measured = [report.metric] if any(report.metric in level.metrics for level in own) else []
        rows = tuple(
            (
                level.name,
                f"{level.density:.4f}",
                *(f"{level.metrics[metric]:.4f}" if metric in level.metrics else "-" for metric in measured),
                str(level.start),
                str(level.optimizer_steps),
                f"{level.train_s:.1f}",
            )
            for level in own
        )
        how = "Density: kept weights over all weights of the masked layers while the level trained. "
        how += "".join(f"{metric}: torch, all test examples, after it. " for metric in measured)
        how += "From step: where the learning rate's schedule went on."
        columns = ("level", "density", *measured, "from step", "steps", "train s")
        found.append(Table(f"Levels of {step}", columns, rows, how))
    return tuple(found)


def kib(size: int) -> str:
    """Bytes as KiB or MiB."""
    return f"{size / 1024:.0f} KiB" if size < 1 << 20 else f"{size / (1 << 20):.2f} MiB"


def engines(report: RunReport) -> Table:
    """One row an engine file."""
    rows = tuple(
        (
            engine.file,
            f"{engine.runtime} {engine.version}",
            engine.flavour,
            kib(engine.bytes),
            f"{engine.metrics[report.metric]:.4f}" if engine.metrics else "-",
            engine.label or "built and run here",
        )
        for engine in report.engines
    )
    return Table(
        "Engines",
        ("file", "runtime", "Q/DQ for", "size", report.metric, "state"),
        rows,
        f"{report.metric}: computed by the engine itself, all test examples. Files are in the run directory; "
        + _deploy(report),
    )


def _deploy(report: RunReport) -> str:
    if report.shipped is None:
        return "there is no deploy/, for the verdict recommends no model."
    shipped = report.shipped
    text = f"deploy/ holds what the verdict ships: {shipped.model} for {shipped.runtime}."
    return f"{text} Preprocessing: {shipped.preprocessing}." if shipped.preprocessing else text


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
        + (f"nothing within {race.noise:.1%} of 1 is claimed." if race.noise < 1 else "too loud to claim anything.")
    )
    return Table(
        f"{runtime}, batch {race.batch_size}, {race.threads} thread{'s' if race.threads > 1 else ''}",
        ("model", "p50 ms", "p90 ms", "p99 ms", "examples/s", f"speed-up over {first}"),
        tuple(rows),
        how,
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
    return Table("Gates", ("gate", "limit", "found", "", "how"), rows)
