"""The page holds what the report holds, as inert text, and is the same for the same results."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sparsify_deploy.reporting import page
from sparsify_deploy.reporting.tables import tables
from sparsify_deploy.reports import Curve, RunReport, Shipped, StepRow

HOSTILE = "<script>alert(1)</script>\"'&\N{GREEK SMALL LETTER ALPHA}</style>"


class Document(HTMLParser):
    """Tags with their attributes, the text, and the rows of every table by its id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.rows: dict[str, int] = {}
        self._table = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self._table = dict(attrs).get("id") or "legend"
        if tag == "tr":
            self.rows[self._table] = self.rows.get(self._table, -1) + 1  # without the head

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str, **attributes: str) -> int:
        return sum(name == tag and attributes.items() <= found.items() for name, found in self.tags)


@pytest.fixture
def whole(report: RunReport) -> RunReport:
    """A report with curves and a model that is shipped."""
    shipped = Shipped("dense INT8", "openvino", ("model.xml",), 0.89, "how")
    curves = (Curve("sparse/train", ((1, 2.5), (6, 1.0), (12, 0.25))),)
    return dataclasses.replace(report, shipped=shipped, curves=curves)


def render(report: RunReport) -> Document:
    return Document(page.page(report, page.fingerprint(report)))


def test_every_table_note_gate_and_fact_is_on_the_page(whole: RunReport) -> None:
    found = render(whole)
    for table in tables(whole):
        assert table.title in found.text
        assert found.rows[page.slug(table.title)] == len(table.rows)
        assert table.how in found.text
        for row in table.rows:
            for cell in row:
                assert all(part in found.text for part in cell.split(" / "))
    assert whole.verdict in found.text
    assert "a note" in found.text
    assert (found.rows["steps"], found.rows["sparsity"], found.rows["legend"]) == (1, 1, 3)
    assert "torch 2, onnx 1" in found.text
    assert found.text.index(whole.verdict) < found.text.index("From dense FP32 to INT8")


def test_charts_are_drawn_for_what_is_there_and_for_nothing_else(whole: RunReport) -> None:
    found = render(whole)
    assert (found.count("svg", **{"class": "scatter"}), found.count("svg", **{"class": "curve"})) == (1, 1)
    assert found.count("circle", **{"class": "ring"}) == 1, "the shipped model"
    assert found.count("line", **{"class": "asked"}) == 1, "the last sparse model was asked for 60 %"
    bare = dataclasses.replace(whole, rows=(), benchmarks=(), curves=(), gates=(), engines=(), notes=(), steps=())
    assert render(bare).count("svg") == 0


def test_points_lie_where_their_numbers_say(whole: RunReport) -> None:
    (chart,) = page.scatters(whole)
    by_label = {point.label: point for point in chart.points}
    fp32, int8, sparse = (by_label[label] for label in ("dense FP32", "dense INT8", "2:4 INT8"))
    assert int8.x == chart.x.at(1.0) < sparse.x < fp32.x == chart.x.at(3.0)
    assert fp32.y == chart.y.at(0.9) < int8.y == chart.y.at(0.89), "up is better, and pixels count down"
    assert (fp32.how, int8.how, sparse.how) == ("torch", "engine", "torch")
    assert (int8.shipped, sparse.shipped) == (True, False)
    assert sorted(text for _, _, text in chart.numbers) == ["1", "2", "3"]


def test_points_that_lie_close_together_share_a_label(whole: RunReport) -> None:
    last = whole.rows[-1]
    model = dataclasses.replace(last.model, metrics={"accuracy": 0.8895})
    (chart,) = page.scatters(
        dataclasses.replace(whole, rows=(*whole.rows[:-1], dataclasses.replace(last, model=model)))
    )
    assert sorted(text for _, _, text in chart.numbers) == ["1", "2, 3"]


def test_the_interval_of_a_point_is_that_of_its_rounds(whole: RunReport) -> None:
    race = whole.benchmarks[0].races[0]
    rounds = {**race.round_ms, "dense FP32": (2.0, 4.0, 3.0, 2.5, 3.5)}
    changed = dataclasses.replace(
        whole,
        benchmarks=(dataclasses.replace(whole.benchmarks[0], races=(dataclasses.replace(race, round_ms=rounds),)),),
    )
    (chart,) = page.scatters(changed)
    assert (chart.points[0].low, chart.points[0].x, chart.points[0].high) == tuple(map(chart.x.at, (2.5, 3.0, 3.5)))
    assert chart.points[0].span == "3 ms [2.5, 3.5]"


def test_bars_show_measured_and_usable(whole: RunReport) -> None:
    (bar,), asked, model = page.sparsity(whole)
    assert (bar.layer, bar.measured, bar.usable, asked, model) == ("conv", 0.5, 0.5, 0.6, "2:4 INT8")
    text = page.page(whole, "d")
    assert 'class="measured" x="0" y="2" width="100.00"' in text
    assert 'class="asked" x1="120.00"' in text


@pytest.mark.parametrize("field", ["recipe", "verdict", "layer", "note", "step", "machine", "label"])
def test_hostile_names_are_text(whole: RunReport, field: str) -> None:
    row = whole.rows[-1]
    layers = (dataclasses.replace(row.model.layers[0], name=HOSTILE),)
    changes = {
        "recipe": {"recipe": HOSTILE},
        "verdict": {"verdict": HOSTILE},
        "layer": {
            "rows": (*whole.rows[:-1], dataclasses.replace(row, model=dataclasses.replace(row.model, layers=layers)))
        },
        "note": {"notes": (HOSTILE,)},
        "step": {"steps": (StepRow(HOSTILE, "ran", 1.0, "f", ""),)},
        "machine": {"machine": {HOSTILE: HOSTILE}},
        "label": {"rows": (*whole.rows[:-1], dataclasses.replace(row, label=HOSTILE))},
    }[field]
    found = render(dataclasses.replace(whole, **changes))
    assert found.count("script") == 0
    assert found.count("style") == 1
    assert HOSTILE in found.text


def test_nothing_is_fetched_and_nothing_runs(whole: RunReport) -> None:
    text = page.page(whole, "d")
    assert not re.search(r"https?:|url\(|@import|src=|href=|<script|javascript:", text)
    assert "default-src 'none'" in text


def test_the_page_stays_until_a_result_changes(whole: RunReport, tmp_path: Path) -> None:
    digest = page.fingerprint(whole)
    path = tmp_path / "report.html"
    assert not page.is_current(path, digest)
    path.write_text(page.page(whole, digest), encoding="utf-8")
    assert page.is_current(path, digest)
    again = dataclasses.replace(
        whole,
        created="2027-01-01T00:00:00+00:00",
        steps=tuple(dataclasses.replace(step, state="cached", why="") for step in whole.steps),
    )
    assert page.fingerprint(again) == digest
    assert not page.is_current(path, page.fingerprint(dataclasses.replace(whole, notes=("another",))))
    path.write_text("<html>damaged")
    assert not page.is_current(path, digest)


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (0.0, 4.0, ["0", "1", "2", "3", "4"]),
        (0.88, 0.9, ["0.880", "0.885", "0.890", "0.895", "0.900"]),
        (0.0, 0.25, ["0.0", "0.1", "0.2", "0.3"]),
        (0.9778, 0.9833, ["0.976", "0.978", "0.980", "0.982", "0.984"]),
    ],
)
def test_ticks_are_round_and_cover_the_data(low: float, high: float, texts: list[str]) -> None:
    axis = page.axis(low, high, 0.0, 100.0)
    assert [text for _, text in axis.ticks] == texts
    assert axis.low <= low < high <= axis.high
    assert (axis.ticks[0][0], axis.ticks[-1][0]) == (0.0, 100.0)


def test_an_axis_of_one_value_has_a_span() -> None:
    axis = page.axis(0.5, 0.5, 0.0, 100.0, least=0.01)
    assert axis.low < 0.5 < axis.high
    assert len(axis.ticks) >= 2
