"""Tables of what 2:4 was predicted to gain."""

from __future__ import annotations

from collections.abc import Sequence

from sparsify_deploy.prediction.roofline import LABEL, GpuForecast
from sparsify_deploy.reporting.table import Table
from sparsify_deploy.reports import RunReport


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
