"""Reports as tables of text, for the terminal and for Markdown alike, each with a line on how it was measured."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from sparsify_deploy.prediction.roofline import LABEL, GpuForecast
from sparsify_deploy.reporting.layer_verdict import NAMES
from sparsify_deploy.reports import (
    BenchmarkReport,
    LayerChain,
    LayerSensitivity,
    Row,
    RunReport,
    Score,
    SensitivityReport,
)
from sparsify_deploy.runtimes._tensors import RANDOM_INPUTS
from sparsify_deploy.safety.printable import one_line
from sparsify_deploy.timing import Race
from sparsify_deploy.types import EngineProfile
from sparsify_deploy.verdict import SPARSE_KERNELS


@dataclass(frozen=True)
class Table:
    """Column heads, rows of as many cells, and how the numbers came about."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    how: str = ""


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


def markdown(report: RunReport) -> str:
    """The whole report as Markdown, in which names of layers, classes and files are text whatever they hold."""
    return "\n".join(_lines(report)) + "\n"


_MARKUP = re.compile(
    r"[\\`<>|&]|\](?=[(\[:])|!(?=\[)"  # an element, code, a cell, a link or an image
    r"|[*~]+(?=\S)|(?<![A-Za-z0-9])_+(?=\S)|(?<=\S)_+(?![A-Za-z0-9_])"  # emphasis, not a product or a name_of_words
    r"|^\s*(?:[#=]|[+-](?=\s)|[0-9]+[.)](?=\s))"  # a heading, a list
)
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}


def literal(text: str) -> str:
    """`text` on one line that Markdown shows as it is."""
    return _MARKUP.sub(_escaped, one_line(text))


def _escaped(found: re.Match[str]) -> str:
    marks = found.group()
    if marks in _ENTITIES:
        return _ENTITIES[marks]
    # of `1.` the full stop, of a run of asterisks each
    return "".join(f"\\{mark}" if mark in "*~_" else mark for mark in marks[:-1]) + f"\\{marks[-1]}"


def _lines(report: RunReport) -> Iterator[str]:
    yield f"# {literal(str(report.recipe))}\n"
    yield literal(report.verdict) + "\n"
    for table in tables(report):
        yield f"## {literal(table.title)}\n"
        yield from _grid(table.columns, table.rows)
        yield f"\n{literal(table.how)}\n" if table.how else ""
    if report.notes:
        yield "## Notes\n"
        yield from (f"- {literal(note)}" for note in report.notes)
        yield ""
    yield "## Steps\n"
    steps = [(s.id, s.state, f"{s.seconds:.1f}", s.fingerprint[:12], s.why) for s in report.steps]
    yield from _grid(("step", "state", "s", "fingerprint", "why"), steps)
    yield "\n## Machine\n"
    for name, value in sorted(report.machine.items()):
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        yield f"- {literal(name)}: {literal(str(shown))}"


def _grid(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a Markdown table."""
    yield "| " + " | ".join(map(literal, columns)) + " |"
    yield "|" + " --- |" * len(columns)
    for row in rows:
        yield "| " + " | ".join(map(literal, row)) + " |"


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


def layers(report: RunReport) -> tuple[Table, ...]:
    """What ran sparse in the first runtime, and in every other one that has sparse kernels."""
    shown = [c for i, c in enumerate(report.chains) if i == 0 or SPARSE_KERNELS.get(c.runtime, True)]
    others = [NAMES.get(c.runtime, c.runtime) for c in report.chains if c not in shown]
    found = [layer_table(chain) for chain in shown]
    if others and found:
        more = f" The same for {' and '.join(others)} stands in report.json."
        found[-1] = replace(found[-1], how=found[-1].how + more)
    return tuple(found)


_TOLD = {True: "yes", False: "no", None: "not told"}


def layer_table(chain: LayerChain) -> Table:
    """One row a layer: from the final values in the file to the kernel that ran, and the first obstacle."""
    timed = any(row.sparse_ms is not None or row.dense_ms is not None for row in chain.layers)
    columns = ["layer", "shape", chain.pattern, "shape rule", "INT8 in / out"]
    columns += ["eligible / picked", "kernel"] if chain.runtime else []
    columns += ["dense / sparse ms"] if timed else []
    rows = []
    for row in chain.layers:
        cells = [
            row.layer,
            "x".join(map(str, row.shape)) + (f", {row.groups} groups" if row.groups != 1 else ""),
            "held"
            if row.pattern_held
            else f"{row.violations}/{row.blocks} break it"
            if row.violations
            else "does not fit",
            "yes" if row.shape_rule else "no",
            f"{_TOLD[row.int8_in]} / {_TOLD[row.int8_out]}" if row.precision == "INT8" else f"- ({row.precision})",
        ]
        cells += [f"{_TOLD[row.eligible]} / {_TOLD[row.picked]}", row.kernel or "-"] if chain.runtime else []
        cells += [f"{_ms(row.dense_ms)} / {_ms(row.sparse_ms)}"] if timed else []
        rows.append((*cells, row.reason, row.advice or "-"))
    ran = [row.picked for row in chain.layers]
    held = sum(row.pattern_held for row in chain.layers)
    title = f"What ran sparse, layer by layer: {chain.model}"
    if chain.runtime:
        told = "not told" if None in ran and not any(ran) else f"{sum(bool(r) for r in ran)} of {len(ran)}"
        title += f" in {NAMES.get(chain.runtime, chain.runtime)}: {told}"
    title += f"; {held} of {len(chain.layers)} hold {chain.pattern}"
    return Table(title, (*columns, "why", "advice"), tuple(rows), " ".join(_how_judged(chain, timed)))


def profile_table(name: str, profile: EngineProfile) -> Table:
    """One row an engine layer, the slowest first."""
    whole = sum(layer.ms for layer in profile.layers) or 1.0
    rows = tuple(
        (layer.name, layer.kernel, layer.precision or "-", f"{layer.ms:.4f}", f"{layer.ms / whole:.0%}")
        for layer in sorted(profile.layers, key=lambda layer: -layer.ms)
    )
    how = f"Profiler on, wall time, batch 1 or the engine's own, mean over {profile.runs} runs. {profile.note}"
    return Table(f"Where {name} spends its time", ("layer", "kernel", "precision", "ms", "share"), rows, how.strip())


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _how_judged(chain: LayerChain, timed: bool) -> Iterator[str]:
    yield (
        f"{chain.pattern}, shape rule (C_out % 8, C_in % 16) and INT8 in / out: read off the final ONNX file; they say "
        "whether hardware could use it (that INT8 on both sides is needed is likely, not proven)."
    )
    if chain.runtime:
        name = NAMES.get(chain.runtime, chain.runtime)
        if SPARSE_KERNELS.get(chain.runtime, True):
            yield f"Eligible, picked: the word of {name}'s builder. Kernel: what ran."
        else:
            yield f"Eligible, picked: {name} says nothing of sparse kernels" + (
                "." if any(row.picked is None for row in chain.layers) else ", for it has none. Kernel: what ran."
            )
    if timed:
        both = f"{chain.twin} / {chain.model}" if chain.twin else f"no dense twin / {chain.model}"
        yield (
            f"ms: {both}, profiler on, wall time, batch {chain.batch_size}, mean over {chain.profiled_runs} runs: it "
            "slows layers down, so no speed-up is claimed from them."
        )
    yield from chain.notes


def sensitivity(found: SensitivityReport) -> Table:
    """One row a prunable layer, worst first: what is lost when it alone is projected, and when it alone is INT8."""
    rows = tuple(
        (
            str(row.rank or "-"),
            row.layer,
            "x".join(map(str, row.shape)),
            *_score(row.projected),
            *_score(row.quantized),
            "; ".join(_left_out(found, row)),
        )
        for row in found.worst_first
    )
    metric, lost = found.metric, "drop / loss up"
    columns = (f"{metric}, {found.pattern} alone", lost, f"{metric}, INT8 alone", f"INT8 {lost}", "note")
    how = " ".join((*_how_measured(found), *advice(found)))
    return Table("Sensitivity of the layers", ("rank", "layer", "shape", *columns), rows, how)


def _left_out(found: SensitivityReport, row: LayerSensitivity) -> Iterator[str]:
    """Why a layer was not tried; where INT8 was not measured at all, the line below the table says so."""
    if row.projected is None:
        yield f"not projected: {row.reason}"
    if row.quantized is None and found.int8_all is not None:
        yield f"not INT8: {row.quantized_reason}"


def _score(score: Score | None) -> tuple[str, str]:
    if score is None:
        return ("-", "-")
    return (f"{score.metric:.4f}", f"{score.drop:+.4f} / {score.loss_increase:+.4f}")


def _how_measured(found: SensitivityReport) -> Iterator[str]:
    yield (
        f"One layer changed at a time, all else as it stands before projection: {found.metric} {found.baseline:.4f}, "
        f"loss {found.baseline_loss:.4f} on {found.examples} {found.split} examples without augmentation, "
        "for layers are not chosen on the test split."
    )
    yield (
        "Projected: no refill, no permutation, no fine-tuning, BatchNorm statistics kept. "
        "Drop and loss: how much worse; + is worse."
    )
    if found.int8_all is None:
        yield f"INT8 was not measured: {found.not_quantized}."
    else:
        yield (
            "INT8: weight and input of that layer alone, calibrated and not trained, against the folded float network "
            f"({found.baseline_float:.4f}); all layers at once: {found.int8_all.metric:.4f}."
        )


LEAST_LOSS = 0.01
"""Advice names a layer only if the metric drops and the loss rises by more than this part of itself."""


def advice(found: SensitivityReport, most: int = 2) -> tuple[str, ...]:
    """What a recipe says to spare the layers that lose most; at most `most` of a kind, those alone that do lose."""
    worst = [row.layer for row in found.worst_first if _loses(found, row.projected)][:most]
    lines = []
    if worst:
        keep = f"nm.keep_worst_dense: {len(worst)}, or nm.keep_dense: [{', '.join(worst)}]"
        lines.append(f"To keep the worst dense: {keep}.")
    elif any(row.projected for row in found.layers):
        lines.append("No layer alone loses by projection, so none asks to be kept dense.")
    int8 = [(row.quantized, row.layer) for row in found.layers if row.quantized and _loses(found, row.quantized)]
    int8.sort(key=lambda pair: (-pair[0].drop, -pair[0].loss_increase))
    if int8:
        lines.append(f"To keep the worst in float: quantize.keep_float: [{', '.join(n for _, n in int8[:most])}].")
    elif found.int8_all is not None:
        lines.append("No layer alone loses by INT8.")
    return (*lines, f"(To lose: the metric drops and the loss rises by more than {LEAST_LOSS:.0%}.)")


def _loses(found: SensitivityReport, score: Score | None) -> bool:
    return score is not None and score.drop > 0 and score.loss_increase > LEAST_LOSS * abs(found.baseline_loss)


def predictions(report: RunReport) -> Table:
    """What 2:4 was predicted to gain, beside what a race on the same device measured."""
    rows = tuple(
        (
            row.target,
            str(row.batch_size),
            f"{row.eligible} of {row.weighted}" if row.eligible is not None else "-",
            f"{row.share:.0%}" if row.share is not None else "-",
            _between(row.realistic, row.ideal),
            _between(row.realistic_over_fp16, row.ideal_over_fp16),
            "{:.2f}x [{:.2f}, {:.2f}]".format(*row.measured) if row.measured is not None else "not measured here",
            row.how,
        )
        for row in report.predictions
    )
    columns = ("target", "batch", "2:4 layers", "of the time", "predicted over dense INT8", "over dense FP16")
    return Table(
        "Predicted and measured gain of 2:4 INT8",
        (*columns, "measured over dense INT8", "how predicted"),
        rows,
        "Predicted, not measured: from realistic (1.3x arithmetic) to ideal (2x); a layer takes the longer of maths at "
        "70 % of the peak and bytes at 85 % of the bandwidth, and 2 us. Estimates, not bounds.",
    )


def forecasts(found: Sequence[GpuForecast], most: int = 8) -> tuple[Table, ...]:
    """What a network would gain on each GPU, then the `most` slowest layers of each at the largest batch size."""
    rows = tuple(
        (
            one.gpu,
            str(one.batch_size),
            f"{one.eligible} of {one.weighted}",
            f"{one.share:.0%}",
            f"{one.us['int8'] / 1000:.3f}",
            _between(one.gain("realistic"), one.gain("ideal")),
            _between(one.gain("realistic", "fp16"), one.gain("ideal", "fp16")),
        )
        for one in found
    )
    columns = ("GPU", "batch", "2:4 layers", "of the time", "dense INT8 ms", "2:4 over dense INT8", "over dense FP16")
    how = (
        f"All {LABEL}, nothing measured: from realistic (1.3x arithmetic) to ideal (2x); a layer takes the longer of "
        "maths at 70 % of the peak and bytes at 85 % of the bandwidth, and 2 us; all Conv and Linear in INT8, the rest "
        "in FP16; elementwise work fused, attention one kernel. Estimates, not bounds."
    )
    largest = {one.gpu: one for one in sorted(found, key=lambda one: one.batch_size)}
    return (
        *([Table("Predicted gain of 2:4", columns, rows, how)] if rows else []),
        *(_slowest(one, most) for one in largest.values()),
    )


def _slowest(found: GpuForecast, most: int) -> Table:
    """The slowest layers of the dense INT8 engine, and one row for the rest."""
    order = sorted(found.layers, key=lambda row: -row.us)
    rows = [
        (
            row.name,
            row.op,
            f"{row.share:.1%}",
            row.bound,
            "yes" if row.eligible else "no",
            f"{row.ideal:.2f}x",
            row.reason,
        )
        for row in order[:most]
    ]
    if rest := order[most:]:
        share, ideal = sum(row.share for row in rest), sum(row.us / row.ideal for row in rest)
        gain = f"{sum(row.us for row in rest) / ideal:.2f}x"
        eligible = sum(row.eligible for row in rest)
        rows.append((f"{len(rest)} more", "", f"{share:.1%}", "", f"{eligible} yes", gain, "all of them with --json"))
    return Table(
        f"Slowest layers on {found.gpu} at batch {found.batch_size}, {LABEL}",
        ("layer", "op", "of the time", "bound by", "2:4", "ideal gain", "reason"),
        tuple(rows),
    )


def _between(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{low:.2f}x" if low == high else f"{low:.2f}x to {high:.2f}x"


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
