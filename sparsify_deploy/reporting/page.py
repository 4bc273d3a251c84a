"""The report as one self-contained HTML page: tables as text has them, charts as inline SVG, no script, no network.

Charts are worked out here and drawn by `page.html`; Jinja2 escapes whatever a recipe or a layer is called.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sparsify_deploy.reporting.table import Table
from sparsify_deploy.reporting.tables import tables
from sparsify_deploy.reports import LayerReport, RunReport, to_json
from sparsify_deploy.safety.printable import printable
from sparsify_deploy.types import Json

TEMPLATE = Path(__file__).with_name("page.html")
WIDTH, HEIGHT = 640, 340
LEFT, RIGHT, TOP, BOTTOM = 100, 24, 36, 52
NEAR_X, NEAR_Y = 26, 34
_NUMBER = re.compile(r"[-+]?\d")
_MARKS = {
    **dict.fromkeys(("yes", "held", "met"), ("\N{CHECK MARK}", "good")),
    **dict.fromkeys(("no", "NOT MET"), ("\N{BALLOT X}", "bad")),
    **dict.fromkeys(("not told", "NOT MEASURED"), ("?", "unknown")),
}
"""Words of the tables to a mark that reads without colour, and the class that colours it."""


@dataclass(frozen=True)
class Axis:
    """From data to pixels: `ticks` are (pixel, text) pairs."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[tuple[float, str], ...]

    def at(self, value: float) -> float:
        """The pixel of a value."""
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 2)


@dataclass(frozen=True)
class Point:
    """A raced model in the scatter: its place, its interval along x, and what the legend says."""

    number: int
    label: str
    x: float
    y: float
    low: float
    high: float
    value: str
    span: str
    how: str
    shipped: bool


@dataclass(frozen=True)
class Scatter:
    """Accuracy over latency of the models of one race."""

    title: str
    x: Axis
    y: Axis
    x_label: str
    y_label: str
    points: tuple[Point, ...]
    numbers: tuple[tuple[float, float, str], ...]
    how: str


@dataclass(frozen=True)
class Line:
    """The loss of one training stage over its steps, or a metric on the validation split; `of` says which."""

    title: str
    of: str
    x: Axis
    y: Axis
    path: str
    dots: tuple[tuple[float, float], ...]
    first: str
    last: str


@dataclass(frozen=True)
class Bar:
    """The sparsity of one layer of the final model; shares are from 0 to 1."""

    layer: str
    shape: str
    precision: str
    weights: int
    measured: float
    usable: float


def fingerprint(report: RunReport) -> str:
    """What a page shows, as a digest: two reports of one digest make the same page but for the time of making.

    Whether this call or an earlier one ran a step is no result, so it is left out of the page.
    """
    steps = tuple(replace(step, state="", why="") for step in report.steps)
    shown = json.dumps(to_json(replace(report, created="", steps=steps)), sort_keys=True)
    return hashlib.sha256(TEMPLATE.read_bytes() + Path(__file__).read_bytes() + shown.encode()).hexdigest()


def is_current(path: Path, digest: str) -> bool:
    """Whether the file `path` is the page of a report of that digest."""
    if not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return f'content="{digest}"' in file.read(2000)


def page(report: RunReport, digest: str) -> str:
    """The page. `digest` is `fingerprint(report)`; it stands in the page's head."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_shown
    )
    environment.filters |= {"marks": marks, "right": right_aligned, "slug": slug}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    bars, asked, model = sparsity(report)
    return template.render(
        report=report,
        digest=digest,
        size={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM},
        tables=tables(report),
        scatters=tuple(scatters(report)),
        curves=tuple(curves(report)),
        bars=bars,
        asked=asked,
        bars_of=model,
        machine=machine(report.machine),
    )


def _shown(value: object) -> object:
    """A text with what no one sees made visible; what the template itself marks as safe stays."""
    return printable(value) if type(value) is str else value


def marks(cell: str) -> list[tuple[str, str, str]]:
    """The parts of a cell as (mark, class, text); a cell without a word of `_MARKS` is one part without a mark."""
    parts = cell.split(" / ")
    if not any(part in _MARKS for part in parts):
        return [("", "", cell)]
    return [(*_MARKS.get(part, ("", "")), part) for part in parts]


def right_aligned(table: Table) -> list[bool]:
    """Whether each column holds numbers."""
    columns = zip(*table.rows, strict=True)
    return [
        all(cell == "-" or _NUMBER.match(cell) for cell in column)
        and any(_NUMBER.match(cell) for cell in column)
        and max(map(len, column)) < 40
        for column in map(list, columns)
    ]


def slug(text: str) -> str:
    """A fragment identifier."""
    return re.sub("[^a-z0-9]+", "-", text.lower()).strip("-") or "part"


def machine(facts: Mapping[str, Json]) -> list[tuple[str, str]]:
    """The environment as names and texts."""
    return [
        (name, ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value))
        for name, value in sorted(facts.items())
    ]


def scatters(report: RunReport) -> Iterator[Scatter]:
    """One chart a race in which at least two models of known accuracy took part."""
    for benchmark in report.benchmarks:
        for race in benchmark.races:
            known = {label: _value(report, label, benchmark.metrics) for label in race.labels}
            found = {label: value for label, value in known.items() if value is not None}
            if len(found) < 2:
                continue
            spans = {label: _quartiles(race.round_ms[label]) for label in found}
            x = axis(0.0, max(high for _, _, high in spans.values()), LEFT, WIDTH - RIGHT)
            values = [value for value, _ in found.values()]
            y = axis(min(values), max(values), HEIGHT - BOTTOM, TOP, least=0.01)
            points = tuple(
                Point(
                    number=i + 1,
                    label=label,
                    x=x.at(spans[label][1]),
                    y=y.at(value),
                    low=x.at(spans[label][0]),
                    high=x.at(spans[label][2]),
                    value=f"{value:.4f}",
                    span=f"{spans[label][1]:.4g} ms [{spans[label][0]:.4g}, {spans[label][2]:.4g}]",
                    how=how,
                    shipped=report.shipped is not None
                    and (report.shipped.model, report.shipped.runtime) == (label, benchmark.runtime),
                )
                for i, (label, (value, how)) in enumerate(found.items())
            )
            left = [label for label in race.labels if label not in found]
            yield Scatter(
                title=f"{benchmark.runtime}, batch {race.batch_size}, {race.threads} "
                f"thread{'s' if race.threads > 1 else ''}",
                x=x,
                y=y,
                x_label=f"latency, ms ({race.clock}; left is faster)",
                y_label=f"{report.metric} ({report.direction} is better)",
                points=points,
                numbers=tuple(_numbers(points)),
                how=f"Latency: median of {race.rounds} interleaved rounds, bar from the first to the third quartile of "
                f"the rounds. {report.metric}: all test examples, computed by the engine "
                "itself or by the same model in torch."
                + (f" Left out, accuracy unknown: {', '.join(left)}." if left else ""),
            )


def _numbers(points: Sequence[Point]) -> Iterator[tuple[float, float, str]]:
    """Where the numbers of points stand, above them; points that lie close together share one place."""
    groups: list[list[Point]] = []
    for point in sorted(points, key=lambda p: (p.x, p.y)):
        near = [g for g in groups if any(abs(p.x - point.x) < NEAR_X and abs(p.y - point.y) < NEAR_Y for p in g)]
        groups = [g for g in groups if g not in near] + [[point, *(p for g in near for p in g)]]
    for group in groups:
        x = sum(point.x for point in group) / len(group)
        y = min(point.y for point in group) - 13
        yield round(x, 2), round(y, 2), ", ".join(str(p.number) for p in sorted(group, key=lambda p: p.number))


def _value(report: RunReport, label: str, raced: Mapping[str, Mapping[str, float]]) -> tuple[float, str] | None:
    """A model's metric and what computed it: the engine itself where that is known, else torch."""
    if label in raced:
        return raced[label][report.metric], "engine"
    row = report.row(label)
    if row is None:
        return None
    branch = row.step.partition("/")[0]
    last = [other for other in report.rows if other.step.startswith(f"{branch}/")][-1]
    own = [e.metrics for e in report.engines if e.branch == branch and e.metrics is not None]
    if own and last is row:
        return own[0][report.metric], "engine"
    if report.metric not in row.model.metrics:
        return None
    return row.model.metrics[report.metric], "ONNX Runtime" if branch == "given" else "torch"


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The first, second and third quartile, interpolated."""
    ordered = sorted(values)
    found = []
    for share in (0.25, 0.5, 0.75):
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        found.append(ordered[low] + (place - low) * (ordered[high] - ordered[low]))
    return found[0], found[1], found[2]


def sparsity(report: RunReport) -> tuple[tuple[Bar, ...], float | None, str]:
    """The layers of the final sparse model, what sparsity was asked for, and the model's label."""
    rows = [row for row in report.rows if row.step.startswith(("sparse/", "given/"))]
    if not rows or not rows[-1].model.layers:
        return (), None, ""
    model = rows[-1].model
    return tuple(_bar(layer) for layer in model.layers), model.sparsity_asked, rows[-1].label


def _bar(layer: LayerReport) -> Bar:
    return Bar(
        layer=layer.name,
        shape="x".join(map(str, layer.shape)),
        precision=layer.precision,
        weights=layer.weights,
        measured=layer.zeros / layer.weights if layer.weights else 0.0,
        usable=0.5 if layer.usable else 0.0,
    )


def curves(report: RunReport) -> Iterator[Line]:
    """One small chart a training, and one of what was measured on the way."""
    for curve in report.curves:
        yield _line(curve.step, "training loss", curve.losses)
        if curve.measured:
            yield _line(curve.step, f"validation {curve.metric}", curve.measured)


def _line(title: str, of: str, points: Sequence[tuple[int, float]]) -> Line:
    steps, values = [step for step, _ in points], [value for _, value in points]
    x = axis(0.0, float(max(steps)), LEFT, WIDTH - RIGHT, whole=True)
    y = (
        axis(0.0, max(values), HEIGHT - BOTTOM, TOP)
        if min(values) >= 0
        else axis(min(values), max(values), HEIGHT - BOTTOM, TOP)
    )
    places = tuple((x.at(step), y.at(value)) for step, value in points)
    path = "M" + "L".join(f"{a},{b}" for a, b in places)
    dots = places if len(places) <= 40 else ()
    return Line(title, of, x, y, path, dots, f"{values[0]:.4g}", f"{values[-1]:.4g}")


def axis(low: float, high: float, start: float, end: float, *, least: float = 1e-9, whole: bool = False) -> Axis:
    """An axis of about five round ticks over at least `low` to `high`; `least` is its smallest span."""
    if high - low < least:
        middle = (low + high) / 2
        low, high = middle - least / 2, middle + least / 2
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(size * power for size in (1, 2, 2.5, 5, 10) if size * power >= raw * 0.999)
    if whole:
        step = max(1.0, float(round(step)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    if round(step, digits) != step:
        digits += 1
    found = Axis(first * step, last * step, start, end, ())
    ticks = tuple((found.at(i * step), f"{i * step:.{digits}f}") for i in range(first, last + 1))
    return replace(found, ticks=ticks)
