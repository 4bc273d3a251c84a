"""Results as JSON and as Markdown. Free of torch."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone

from harness.claims import HOW, Judged, judge
from harness.grid import Grid, Row
from sparsify_deploy.artifacts.environment import machine
from sparsify_deploy.types import Json


@dataclass(frozen=True)
class Point:
    """One network's accuracy on the test split, in %, and what training it cost, relative to dense training."""

    row: str
    column: str
    seed: int
    accuracy: float
    cost: float | None
    collapsed: tuple[str, ...] = ()


def points(grid: Grid, results: Sequence[Json]) -> list[Point]:
    """What the results say for the table; a run with levels has one point for each level of a column."""
    by_level = {column.level: column.key for column in grid.columns if column.level is not None}
    found = []
    for result in results:
        row, seed = result["row"], result["seed"]
        if result["levels"]:
            found += [
                Point(
                    row,
                    by_level[level["level"]],
                    seed,
                    100 * level["metrics"]["accuracy"],
                    level["relative_training_flops"],
                    tuple(level["collapsed"]),
                )
                for level in result["levels"]
                if level["level"] in by_level
            ]
            continue
        costs = result["relative_training_flops"]
        names = tuple(dict.fromkeys([*result["collapsed_at_init"], *result["collapsed"]]))
        accuracy = 100 * result["metrics"]["accuracy"]
        # A fine-tuning after the training has a dense twin of its own: the sum would compare with nothing.
        found.append(Point(row, result["column"], seed, accuracy, costs[0] if len(costs) == 1 else None, names))
    return found


def report(grid: Grid, results: Sequence[Json], failures: Collection[str]) -> dict[str, Json]:
    """Everything that was measured, for the file beside the table; holds no path."""
    judged = judge_all(grid, points(grid, results))
    return {
        "table": grid.title,
        "how": grid.how,
        "settings": dict(grid.settings),
        "machine": machine(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "runs_planned": len(grid.runs),
        "runs_done": len(results),
        "failed": sorted(failures),
        "claims": [{**asdict(one), "claim": one.claim.text} for one in judged],
        "runs": list(results),
    }


def judge_all(grid: Grid, found: Sequence[Point]) -> list[Judged]:
    """Every claim of the grid on the points there are."""
    accuracies: dict[tuple[str, str], list[float]] = {}
    for point in found:
        accuracies.setdefault((point.row, point.column), []).append(point.accuracy)
    return [judge(claim, accuracies) for claim in grid.claims]


def markdown(grid: Grid, results: Sequence[Json], failures: Collection[str]) -> str:
    """The table, what it rests on, collapsed layers, claims, what failed."""
    return "\n".join(_lines(grid, results, failures)) + "\n"


def _lines(grid: Grid, results: Sequence[Json], failures: Collection[str]) -> Iterator[str]:
    found = points(grid, results)
    yield f"{grid.title}. {grid.how}\n"
    heads = ("method", *(column.head for column in grid.columns), "training FLOPs", "CPU s")
    yield from _rows(heads, [_row(grid, row, found, results) for row in grid.rows])
    yield f"\n{len(results)} of {len(grid.runs)} runs are in this table; sd needs two seeds.\n"
    collapsed = dict.fromkeys(
        f"- {point.row}, density {_head(grid, point.column)}: no weight is left in {', '.join(point.collapsed)}"
        for point in found
        if point.collapsed
    )
    yield from ("Layer collapse:\n", *collapsed, "") if collapsed else ("No layer collapsed.\n",) if found else ()
    if grid.published:
        yield grid.published + "\n"
    if grid.claims:
        yield from _claim_lines(judge_all(grid, found))
    if failures:
        yield f"Failed: {', '.join(failures)}.\n"


def _row(grid: Grid, row: Row, found: Sequence[Point], results: Sequence[Json]) -> tuple[str, ...]:
    own = [point for point in found if point.row == row.key]
    planned = {column for run in grid.runs if run.row == row.key for column in (run.column, *run.also)}
    cells = []
    costs = []
    for column in grid.columns:
        here = [point for point in own if point.column == column.key]
        if here:
            cells.append(_mean([point.accuracy for point in here]))
            costs += _cost([point.cost for point in here if point.cost is not None])
        else:
            cells.append("not run" if column.key in planned else "")
    return (row.label, *cells, " / ".join(costs), _cpu([r for r in results if r["row"] == row.key]))


def _mean(accuracies: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
    return f"{statistics.fmean(accuracies):.2f}{spread} ({len(accuracies)})"


def _cost(costs: Sequence[float]) -> list[str]:
    return [f"{statistics.fmean(costs):.2g}x"] if costs else []


def _cpu(results: Sequence[Json]) -> str:
    """Of the last step, which is the training or the fine-tuning, where it ran in one go."""
    last = [list(result["steps"].values())[-1] for result in results]
    for clock, word in (("cpu_s", ""), ("wall_s", " wall")):
        if measured := [step[clock] for step in last if step[clock] is not None]:
            return f"{statistics.median(measured):.0f}{word}"
    return ""


def _claim_lines(judged: Sequence[Judged]) -> Iterator[str]:
    yield f"Claims. {HOW}\n"
    rows = [
        (
            one.claim.text,
            *(_points(value) for value in (one.better, one.worse)),
            "" if one.surplus is None else f"{one.surplus:+.2f}",
            _points(one.spread),
            f"{one.seeds[0]}, {one.seeds[1]}",
            one.verdict,
        )
        for one in judged
    ]
    yield from _rows(("claim", "first", "second", "surplus", "spread", "seeds", ""), rows)
    yield ""


def _points(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _head(grid: Grid, key: str) -> str:
    return next(column.head for column in grid.columns if column.key == key)


def _rows(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(heads) + " |"
    yield "| --- |" + " --: |" * (len(heads) - 1)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
