"""What is printed is what was said: whole lines, no control characters, JSON that parses."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsify_deploy import console
from sparsify_deploy.checkup.findings import Finding
from sparsify_deploy.deploy import Benched, Built, Inspected
from sparsify_deploy.pipeline import Status
from sparsify_deploy.plan import plan
from sparsify_deploy.recipe import Recipe
from sparsify_deploy.reporting.layer_verdict import Known, chain
from sparsify_deploy.reporting.table import Table
from sparsify_deploy.reporting.tables import tables
from sparsify_deploy.reports import LayerReport, LayerSensitivity, RunReport, Score, SensitivityReport
from sparsify_deploy.stages.base import Estimate
from sparsify_deploy.stages.project_nm import LayerForecast
from sparsify_deploy.timing import Copies, Race, Surroundings
from sparsify_deploy.types import BuildNotes, EngineProfile, LayerTime
from sparsify_deploy.workspace import Forecast

Capture = pytest.CaptureFixture[str]
EATEN = "a [bold]b[/bold] [red] file.yaml:3:4 :smile: https://x.org"
LONG = "x" * 300


@pytest.fixture
def steps(recipe: Callable[..., Recipe]) -> list[Status]:
    found = sorted(plan(recipe()).steps, key=lambda step: step.id != "dense/train")
    return [Status(step, "to run", EATEN if i == 0 else "", None) for i, step in enumerate(found)]


def test_a_table_without_a_terminal_is_one_line_a_row(capsys: Capture) -> None:
    console._print(Table(EATEN, ("name", "value"), ((EATEN, LONG), ("short", "2")), LONG))
    lines = capsys.readouterr().out.splitlines()
    width = len(EATEN)
    assert lines == [
        EATEN,
        f"{'name':<{width}}  value",
        f"{'-' * width}  {'-' * 300}",
        f"{EATEN}  {LONG}",
        f"{'short':<{width}}  2",
        LONG,
        "",
    ]


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "60", **variables}.items():
        monkeypatch.setenv(name, value)


def test_a_table_on_a_terminal_fits_its_width_and_eats_nothing(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_terminal(monkeypatch, NO_COLOR="1")
    console._print(
        Table("[bold]", ("[red]", "v"), (("[bold]x[/bold]", "file.yaml:3:4"), ("z" * 150, ":smile:")), "how")
    )
    out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert all(len(line) <= 60 for line in out.splitlines())
    for text in ("[bold]x[/bold]", "file.yaml:3:4", ":smile:", "[red]"):
        assert text in out
    assert out.count("z") == 150
    assert out.endswith("how\n\n")


def test_no_color_means_no_escape_codes_for_colours(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_terminal(monkeypatch, NO_COLOR="1")
    console._print(Table("title", ("a",), (("1",),)))
    out = capsys.readouterr().out
    assert "\x1b[3" not in out.replace("\x1b[3m", "")


@pytest.mark.parametrize("quiet", [True, False])
def test_progress_without_a_terminal_is_plain_lines_on_stderr_or_nothing(capsys: Capture, quiet: bool) -> None:
    with console.progress(quiet=quiet, verbose=True) as progress:
        progress.say(EATEN)
        progress.say(LONG)
        progress.update("train", 1, 10)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == ([] if quiet else [EATEN, LONG])


def test_a_line_of_progress_now_and_then(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    lines = console._Lines(every_s=10.0)
    for second in range(31):
        now[0] = 100.0 + second
        lines.update("train", 5 + 2 * second, 105, "loss 1")
    assert capsys.readouterr().err.splitlines() == [
        "  train 25/105 (2.0/s, 40 s left) loss 1",
        "  train 45/105 (2.0/s, 30 s left) loss 1",
        "  train 65/105 (2.0/s, 20 s left) loss 1",
    ]
    lines.update("fine_tune", 0, 5)
    now[0] += 11
    lines.update("fine_tune", 0, 5)
    assert capsys.readouterr().err == "  fine_tune 0/5 (0.0/s) \n"


def test_errors_are_lines_on_stderr(capsys: Capture) -> None:
    console.error(EATEN)
    assert capsys.readouterr() == ("", f"sparsify-deploy: {EATEN}\n")


def as_json(capsys: Capture) -> Any:
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out, parse_constant=pytest.fail)


def test_a_reports_last_line_is_the_verdict_and_its_json_is_the_report(report: RunReport, capsys: Capture) -> None:
    console.run_report(report, as_json=False)
    out = capsys.readouterr().out
    assert out.splitlines()[-2:] == ["a note", "Verdict: ship it."]
    assert "\x1b" not in out
    for table in tables(report):
        assert table.title in out
        for row in table.rows:
            assert any(all(cell in line for cell in row) for line in out.splitlines()), row
    console.run_report(report, as_json=True)
    found = as_json(capsys)
    assert found["verdict"] == report.verdict
    assert found["rows"][2]["model"]["usable_sparsity"] == 0.5


def test_status_and_explain_are_a_line_a_step(steps: list[Status], capsys: Capture) -> None:
    console.status(steps, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(steps)
    assert lines[0].split(maxsplit=3) == ["dense/train", "to", "run", EATEN]
    console.explained(steps, as_json=False)
    assert capsys.readouterr().out.splitlines()[0] == f"dense/train: to run: {EATEN}"
    console.status(steps, as_json=True)
    assert as_json(capsys)[0] == {"step": "dense/train", "state": "to run", "why": EATEN}
    console.explained(steps, as_json=True)
    assert as_json(capsys)[1]["fingerprint"] is None


def test_a_forecast_shows_costs_layers_and_what_is_missing(steps: list[Status], capsys: Capture) -> None:
    pairs = [(s, Estimate(12, 2.5e12) if i == 0 else None) for i, s in enumerate(steps)]
    layers = (LayerForecast("conv[1]", (16, 1, 3, 3), False, "C_in 1"), LayerForecast("fc", (8, 16), True, "ok"))
    found = Forecast(tuple(pairs), layers, ("train needs torch: pip install 'sparsify-deploy[train]'",))
    console.forecast(found, as_json=False)
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("dense/train ")]
    assert line.split()[:5] == ["dense/train", "to", "run", "12", "2.50"]
    assert "conv[1]  16x1x3x3  no         C_in 1" in out
    assert "1 of 2 layers would be projected" in out
    assert out.splitlines()[-1] == "missing: train needs torch: pip install 'sparsify-deploy[train]'"
    console.forecast(found, as_json=True)
    data = as_json(capsys)
    assert data["steps"][0]["optimizer_steps"] == 12
    assert data["layers"][0]["shape"] == [16, 1, 3, 3]


def test_the_other_results_print_as_text_and_as_json(
    race: Callable[..., Race], recipe: Callable[..., Recipe], capsys: Capture
) -> None:
    notes = BuildNotes("openvino", "1.0", ("m.xml", "m.bin"), 1.25, {}, True, "[label]", ("[warning]",))
    layer = LayerReport(
        name="/conv[1]",
        weight="w",
        op="Conv",
        shape=(8, 8),
        groups=1,
        precision="INT8",
        int8_in=True,
        int8_out=False,
        weights=64,
        zeros=32,
        pattern_possible=True,
        pattern_held=True,
        usable=True,
        rule_of_thumb=False,
        reason="r",
        bytes_stored=64,
        bytes_compressed=40,
        violations=0,
        blocks=16,
        float_reader="Add /add[1]",
    )
    row = LayerSensitivity("fc[1]", "fc.weight", (8, 16), Score(0.5, 0.25, 1.0), 1, "", None, "[why]")
    alone = SensitivityReport("accuracy", "higher", "train", 40, "2:4", 0.75, 0.5, None, None, "[why]", (row,))
    look = Inspected(Path("m.onnx"), "", "2:4", None, chain("m.onnx", [layer], Known()), None)
    profile = EngineProfile((LayerTime("/conv[1]", (), "jit[1]", 0.25), LayerTime("b", (), "jit", 0.75)), 60)
    record = {"version": "[1]", "label": "", "facts": {}, "runs_here": True, "options": {"fp16": False, "sm": ["86"]}}
    engine = Inspected(Path("m.xml"), "openvino", "2:4", record, None, profile)
    calm = Surroundings(0.5, "")
    benched = Benched(
        races=(race({"a[b].onnx": 2.0, "c": 1.0}),),
        copies=(Copies("a[b].onnx", 1, 0.25, 0.125, 5),),
        sha256={"a[b].onnx": "0a1b"},
        inputs="random",
        machine={"packages": {"numpy": "2"}, "cpu": "[cpu]", "cores": 2, "gpu": "none"},
        before=calm,
        after=calm,
    )
    calls: list[tuple[Callable[..., None], Any, str]] = [
        (console.menus, {"methods": {"rigl": "[x] it"}}, "  rigl  [x] it"),
        (console.diagnosis, [Finding("torch", "missing", "[d]", "do x")], "missing torch  [d]: do x"),
        (console.built, Built(Path("a [b].xml"), notes), "a [b].xml: openvino 1.0, 1.2 s, [label]"),
        (console.raced, benched, "2.00x [1.98, 2.02] faster"),
        (console.raced, benched, "a[b].onnx at batch 1: inputs in 0.250 ms, outputs out 0.125 ms"),
        (console.raced, benched, "sha256 0a1b  a[b].onnx"),
        (console.sensitivity, alone, "1     fc[1]  8x16   0.5000               +0.2500 / +1.0000"),
        (console.sensitivity, alone, "INT8 was not measured: [why]."),
        (console.inspected, look, "layer by layer: m.onnx; 1 of 1 hold 2:4"),
        (console.inspected, engine, "  options: fp16 no, sm 86\n  runs here: yes\n  version: [1]\n"),
        (console.inspected, engine, "/conv[1]  jit[1]  -          0.2500  25%"),
    ]
    for call, value, text in calls:
        call(value, as_json=False)
        assert text in capsys.readouterr().out, call
        call(value, as_json=True)
        assert as_json(capsys), call
    console.validated(Path("r.yaml"), recipe(), as_json=False)
    assert capsys.readouterr().out == "r.yaml: valid\n"
    console.validated(Path("r.yaml"), recipe(), as_json=True)
    assert as_json(capsys) == {"recipe": "r.yaml", "name": "full", "valid": True}


def test_each_verb_of_the_help_fits_in_80_columns(capsys: Capture) -> None:
    from sparsify_deploy.__main__ import main

    for verb in ((), ("run",), ("sensitivity",), ("plan",), ("bench",)):
        assert main([*verb, "--help"]) == 0
        assert all(len(line) <= 80 for line in capsys.readouterr().out.splitlines()), verb
    assert main(["--help"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  sensitivity ")]
    assert line.endswith("."), "its summary is cut off"


def test_the_bars_of_a_terminal_take_any_text(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    with console.progress(quiet=False, verbose=False) as progress:
        progress.update("train [bold]", 1, 10, "[/red]")
        progress.say(EATEN + LONG)
        progress.update("other", 1, 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert EATEN + LONG in captured.err
    assert "[/red]" in captured.err
    assert "train [bold]" in captured.err


HOSTILE = (
    'password="hunter22" x',
    'a": 1, "b',
    "line\nbreak\x1b[2J",
    "\u202e\u2028\x7f",
    "back\\slash",
    "\udcff",
    'token=\\"q',
)


def test_json_is_json_whatever_names_and_secrets_hold(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digits of a number are no secret, and a secret is one however JSON would write it."""
    monkeypatch.setenv("CI_JOB_TOKEN", "00000000")
    monkeypatch.setenv("DB_PASSWORD", 'pä"ss\\word1')
    value = {name: [name, {"inner": name}] for name in HOSTILE}
    numbers = [1e100, 100000000001, float("nan"), float("-inf"), True, None, Path("a/b")]
    console._json({**value, "numbers": numbers, 'in pä"ss\\word1 key': 'x pä"ss\\word1.yaml'})
    captured = capsys.readouterr().out
    found = json.loads(captured, parse_constant=pytest.fail)
    assert found.pop("numbers") == [1e100, 100000000001, None, None, True, None, "a/b"]
    assert found.pop("in [hidden] key") == "x [hidden].yaml"
    assert len(found) == len(HOSTILE)
    assert found[HOSTILE[1]] == [HOSTILE[1], {"inner": HOSTILE[1]}]
    assert "hunter22" not in captured
    assert "word1" not in captured
    assert captured.isascii()


class Dead(io.StringIO):
    """A terminal that was closed, as text streams tell of it."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(5, "EIO"), ValueError("closed file")])
def test_progress_and_messages_to_a_dead_stderr_end_nothing(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(sys, "stderr", Dead(error))
    monkeypatch.setenv("TERM", "xterm")
    with console.progress(quiet=False, verbose=True) as bars:
        bars.update("train", 1, 10, "loss 1")
        bars.say("a message")
        bars.update("other", 1, 2)
    lines = console._Lines(every_s=1e-9)
    lines.update("train", 0, 10)
    lines.update("train", 1, 10)
    lines.say("a message")
    console.error("what, where")
    console.restored()
    assert capsys.readouterr().out == ""
