"""A report as Markdown, in which whatever a name holds is text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from sparsify_deploy.reporting.tables import tables
from sparsify_deploy.reports import RunReport
from sparsify_deploy.safety.printable import one_line


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
