"""Result files of the GPU scripts: going on, other machines, jobs that fail or kill, the time that is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gpu import record
from gpu.record import Record, fingerprint, load, perform

from sparsify_deploy.errors import CorruptArtifact, UsageError


def show(key: str, row: record.Row) -> str:
    return f"{key} is {row['value']}"


@pytest.fixture
def fresh(tmp_path: Path) -> Record:
    return Record(tmp_path / "new" / "rows.json", fingerprint("test", rehearsal=True))


def again(found: Record) -> Record:
    return Record(found.path, fingerprint("test", rehearsal=True))


def test_a_second_call_does_only_what_is_missing(fresh: Record, capsys: pytest.CaptureFixture[str]) -> None:
    assert perform(fresh, {"a": lambda: {"value": 1}}, budget_s=None, show=show) == 0

    def never() -> record.Row:
        raise AssertionError("was measured already")

    later = again(fresh)
    assert perform(later, {"a": never, "b": lambda: {"value": 2}}, budget_s=None, show=show) == 0
    assert capsys.readouterr().out == "a is 1\nb is 2\n"
    kept = load(fresh.path)
    assert {key: row["value"] for key, row in kept["rows"].items()} == {"a": 1, "b": 2}
    assert kept["fingerprint"]["created"] == fresh.fingerprint["created"]
    assert all(row["measured"] and row["commit"] for row in kept["rows"].values())


@pytest.mark.parametrize("field", ["gpu", "driver", "cuda", "kind", "rehearsal"])
def test_rows_of_another_machine_are_never_mixed(fresh: Record, field: str) -> None:
    fresh.put("a", {"value": 1})
    other = {**fingerprint("test", rehearsal=True), field: "another"}
    with pytest.raises(UsageError, match=f"was measured with {field} .*; give another --out"):
        Record(fresh.path, other)


def test_another_commit_goes_on_and_every_row_says_its_own(fresh: Record) -> None:
    fresh.put("a", {"value": 1})
    later = Record(fresh.path, {**fingerprint("test", rehearsal=True), "commit": "another"})
    later.put("b", {"value": 2})
    rows = load(fresh.path)["rows"]
    assert rows["b"]["commit"] == "another" != rows["a"]["commit"]


def test_a_job_that_fails_costs_the_others_nothing(fresh: Record, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> record.Row:
        raise ZeroDivisionError("by zero")

    jobs = {"a": broken, "b": lambda: {"value": 2}}
    assert perform(fresh, jobs, budget_s=None, show=show) == 1
    out, err = capsys.readouterr()
    assert out == "b is 2\n"
    assert "a FAILED" in err
    assert "ZeroDivisionError: by zero" in err
    assert load(fresh.path)["attempts"] == {"a": 1}


class Killed(BaseException):
    """What no script catches."""


def test_what_killed_the_process_comes_last_next_time(fresh: Record, capsys: pytest.CaptureFixture[str]) -> None:
    def killed() -> record.Row:
        raise Killed

    with pytest.raises(Killed):
        perform(fresh, {"a": killed, "b": lambda: {"value": 2}}, budget_s=None, show=show)
    jobs = {"a": lambda: {"value": 1}, "b": lambda: {"value": 2}}
    assert perform(again(fresh), jobs, budget_s=None, show=show) == 0
    assert capsys.readouterr().out == "b is 2\na is 1\n"
    assert load(fresh.path)["attempts"] == {}


def test_an_interrupt_is_not_held_against_a_job(fresh: Record, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> record.Row:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        perform(fresh, {"a": interrupted, "b": lambda: {"value": 2}}, budget_s=None, show=show)
    jobs = {"a": lambda: {"value": 1}, "b": lambda: {"value": 2}}
    assert perform(again(fresh), jobs, budget_s=None, show=show) == 0
    assert capsys.readouterr().out == "a is 1\nb is 2\n"


def test_no_job_is_begun_that_would_not_fit(
    fresh: Record, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(record.time, "monotonic", lambda: now[0])

    def minute() -> record.Row:
        now[0] += 60
        return {"value": now[0]}

    assert perform(fresh, dict.fromkeys("abcd", minute), budget_s=150, show=show) == 75
    assert list(fresh.rows) == ["a", "b"]  # the third would end at 180
    assert "out of time, left for the next call: c, d" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": {}}'])
def test_a_file_that_is_no_result_is_said_so(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(CorruptArtifact, match=r"rows\.json"):
        load(path)


def test_the_fingerprint_names_machine_versions_and_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = fingerprint("test", rehearsal=False, cuda="13.0")
    assert found["cuda"] == "13.0"
    assert {"gpu", "driver", "cpu", "python", "packages", "commit", "created"} <= found.keys()
    assert len(found["commit"].rstrip("+")) == 40 or found["commit"] == "unknown"
    monkeypatch.setenv("COMMIT", "abc")
    assert fingerprint("test", rehearsal=False)["commit"] == "abc"
    json.dumps(found)


def test_what_nvidia_smi_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record.shutil, "which", lambda name: f"/usr/bin/{name}")

    def old_driver(command: list[str]) -> str:
        known = "event" not in command[1]
        return "1980 MHz, 2619 MHz, 41, 310.50 W, 0x0000000000000000" if known else "is not a valid field to query."

    monkeypatch.setattr(record, "_said", old_driver)
    found = record.clocks()
    assert found is not None
    assert (found["clocks.sm"], found["power.draw"]) == ("1980 MHz", "310.50 W")
    assert found["clocks_throttle_reasons.active"] == "0x0000000000000000"
    monkeypatch.setattr(
        record, "_said", lambda command: "| NVIDIA-SMI 580.1  Driver Version: 580.1  CUDA Version: 13.0 |"
    )
    assert record._driver_cuda() == "13.0 (driver)"
    monkeypatch.setattr(record.shutil, "which", lambda name: None)
    assert record.clocks() is None
    assert record._driver_cuda() == "none"
