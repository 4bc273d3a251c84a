"""Tables with a row a layer: what ran sparse and why, what each layer alone loses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from sparsify_deploy.reporting.layer_verdict import NAMES
from sparsify_deploy.reporting.table import Table
from sparsify_deploy.reports import LayerChain, LayerSensitivity, RunReport, Score, SensitivityReport
from sparsify_deploy.types import EngineProfile
from sparsify_deploy.verdict import SPARSE_KERNELS


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
