"""The run-or-skip loop on stages that write a word into a file, with the real store."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from sparsify_deploy import pipeline
from sparsify_deploy.artifacts.store import ArtifactStore
from sparsify_deploy.errors import CorruptArtifact, DataError, EnvironmentProblem, Interrupted, UsageError
from sparsify_deploy.pipeline import Outcome, survey
from sparsify_deploy.plan import Plan, PlannedStep, Ref
from sparsify_deploy.process.interrupt import stoppable
from sparsify_deploy.stages.base import Estimate, Stage
from sparsify_deploy.types import Context, Facts, Silent

LOG: list[str] = []
"""What was called, in order: `run NAME`, `unmet NAME` and `preflight NAME`."""

TROUBLE: dict[str, BaseException] = {}
LACKS: dict[str, str] = {}
WRONG: dict[str, Exception] = {}


@dataclass(frozen=True)
class Say:
    """Writes its word and what it was given; `cut` writes only so many characters."""

    word: str
    cut: int | None = None
    file: Path | None = None
    taken: tuple[str, ...] = ("text",)

    name: ClassVar[str] = "say"
    version: ClassVar[int] = 1
    outputs: ClassVar[Mapping[str, str]] = {"text": "text.txt"}
    environment: ClassVar[tuple[str, ...]] = ("python",)

    @property
    def inputs(self) -> tuple[str, ...]:
        return self.taken

    def methods(self) -> Mapping[str, int]:
        return {}

    def files(self) -> Mapping[str, Path]:
        return {"file": self.file} if self.file else {}

    def unmet(self) -> Sequence[str]:
        LOG.append(f"unmet {self.word}")
        return [LACKS[self.word]] if self.word in LACKS else []

    def preflight(self) -> None:
        LOG.append(f"preflight {self.word}")
        if self.word in WRONG:
            raise WRONG[self.word]

    def estimate(self) -> Estimate:
        return Estimate()

    def run(self, inputs: Mapping[str, Path], out: Path, context: Context) -> Facts:
        LOG.append(f"run {self.word}")
        (out / "begun.tmp").write_text(self.word)
        if self.word in TROUBLE:
            raise TROUBLE[self.word]
        text = " ".join([*(inputs[name].read_text() for name in sorted(inputs)), self.word])
        (out / "text.txt").write_text(text[: self.cut])
        return {"length": len(text)}


@dataclass(frozen=True)
class Shout(Say):
    """Another stage by name."""

    name: ClassVar[str] = "shout"


@dataclass
class Line:
    """A plan of steps a, b, c..., each fed by the one before, in one store."""

    folder: Path
    stages: dict[str, Any] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        steps: list[PlannedStep] = []
        before: str | None = None
        for name, stage in self.stages.items():
            inputs: dict[str, Ref] = {"text": Ref(before, "text")} if before else {}
            steps.append(PlannedStep(name, stage, inputs))
            before = name
        return Plan(None, None, tuple(steps), ())  # type: ignore[arg-type]

    def run(self, context: Context | None = None, **options: Any) -> list[Outcome]:
        """In a store opened anew, as another process would."""
        LOG.clear()
        store = ArtifactStore(self.folder / "store")
        with store.lock():
            ticks = itertools.count(0.0, 2.0)
            return pipeline.run(self.plan, store, context or Context(), clock=lambda: next(ticks), **options)

    def why(self) -> dict[str, tuple[str, str]]:
        return {s.step.id: (s.state, s.why) for s in survey(self.plan, ArtifactStore(self.folder / "store"))}

    def folders(self, ending: str = "") -> list[str]:
        found = (self.folder / "store").glob(f"s*-*{ending}")
        return sorted(p.name for p in found if p.name.endswith(ending) and (ending or "." not in p.name))


@pytest.fixture
def line(tmp_path: Path) -> Line:
    LOG.clear()
    TROUBLE.clear()
    LACKS.clear()
    WRONG.clear()
    return Line(tmp_path, {"x/a": Say("a"), "x/b": Say("b"), "y/c": Shout("c")})


def ran() -> list[str]:
    return [entry.removeprefix("run ") for entry in LOG if entry.startswith("run ")]


def test_the_stages_of_this_test_are_stages(line: Line) -> None:
    assert isinstance(Say("a"), Stage)


def test_a_first_run_runs_all_in_order_and_hands_outputs_on(line: Line) -> None:
    outcomes = line.run()
    assert ran() == ["a", "b", "c"]
    assert [o.ran for o in outcomes] == [True] * 3
    assert [o.why for o in outcomes] == ["first time"] * 3
    assert outcomes[2].record.outputs["text"].read_text() == "a b c"
    assert outcomes[2].record.measured == {"length": 5}
    assert {o.record.seconds for o in outcomes} == {2.0}
    assert not list(line.folder.rglob("begun.tmp"))


def test_a_second_run_runs_nothing_and_asks_nothing_of_the_machine(line: Line) -> None:
    first = line.run()
    LACKS["a"] = "no torch"
    second = line.run()
    assert LOG == []
    assert [o.ran for o in second] == [False] * 3
    assert [o.record for o in second] == [o.record for o in first]
    assert line.why() == dict.fromkeys(line.stages, ("cached", ""))


def test_a_changed_setting_runs_its_stage_and_what_follows_and_says_which_field(line: Line) -> None:
    line.run()
    line.stages["x/b"] = Say("B")
    states = line.why()
    assert states["x/b"] == ("to run", 'settings.word: "b" -> "B"')
    assert states["y/c"] == ("follows", "after x/b")
    outcomes = line.run()
    assert ran() == ["B", "c"]
    assert outcomes[1].why == 'settings.word: "b" -> "B"'
    assert outcomes[2].why.startswith('inputs.text: "')
    line.stages["x/b"] = Say("b")
    line.run()
    assert ran() == [], "the earlier result is still in the store"


def test_downstream_is_skipped_where_the_bytes_did_not_change(line: Line) -> None:
    line.stages["x/b"] = Say("b", cut=1)
    line.stages["x/a"] = Say("a word")
    line.run()
    assert ran() == ["a word", "b", "c"]
    line.stages["x/a"] = Say("another word")
    line.run()
    assert ran() == ["another word", "b"]
    line.stages["x/a"] = Say("and one more")
    line.run()
    assert ran() == ["and one more", "b"]


def test_a_changed_file_and_a_changed_version_are_reasons(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    (line.folder / "data").write_text("1")
    line.stages["x/b"] = Say("b", file=line.folder / "data")
    line.run()
    (line.folder / "data").write_text("2")
    assert line.why()["x/b"][1].startswith("files.file: ")
    line.run()
    monkeypatch.setattr(Say, "version", 2)
    assert line.why()["x/a"] == ("to run", "version: 1 -> 2")
    (line.folder / "data").unlink()
    with pytest.raises(DataError, match=r"file: .*data does not exist"):
        line.run()


def test_a_failing_stage_is_not_committed_and_its_partial_folder_goes_on(line: Line) -> None:
    TROUBLE["b"] = DataError("bad data")
    with pytest.raises(DataError, match=r"^bad data$"):
        line.run()
    assert ran() == ["a", "b"]
    (partial,) = line.folders(".partial")
    assert (line.folder / "store" / partial / "begun.tmp").read_text() == "b"
    assert len(line.folders()) == 1
    assert line.why() == {
        "x/a": ("cached", ""),
        "x/b": ("partial", "the last attempt did not finish"),
        "y/c": ("follows", "after x/b"),
    }
    TROUBLE.clear()
    outcomes = line.run()
    assert ran() == ["b", "c"]
    assert outcomes[1].why == "the last attempt did not finish"
    assert line.folders(".partial") == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), ValueError("bug")], ids=repr)
def test_whatever_a_stage_dies_of_nothing_is_committed(line: Line, error: BaseException) -> None:
    TROUBLE["a"] = error
    with pytest.raises(BaseException, match=r".*"):
        line.run()
    assert line.folders() == []
    assert len(line.folders(".partial")) == 1


def test_again_runs_a_stage_anew_and_what_follows_only_if_its_input_changed(line: Line) -> None:
    line.run()
    outcomes = line.run(again=["x/b"])
    assert ran() == ["b"]
    assert [o.ran for o in outcomes] == [False, True, False]
    assert outcomes[1].why == "asked for"
    line.run(again=["say"])
    assert ran() == ["a", "b"], "a stage's name means all its steps"
    line.run(again=["c", "a"])
    assert ran() == ["a", "c"]


def test_again_after_an_attempt_that_broke_off_goes_on_with_it(line: Line) -> None:
    line.run()
    TROUBLE["b"] = DataError("bad data")
    with pytest.raises(DataError):
        line.run(again=["b"])
    (partial,) = line.folders(".partial")
    (line.folder / "store" / partial / "checkpoint").write_text("half")
    TROUBLE["b"] = DataError("again")
    with pytest.raises(DataError, match="again"):
        line.run(again=["b"])
    assert (line.folder / "store" / partial / "checkpoint").read_text() == "half"


def test_the_same_again_after_an_interruption_goes_on(line: Line) -> None:
    line.run()
    TROUBLE["c"] = Interrupted("stopped")
    with pytest.raises(Interrupted):
        line.run(start="x/b")
    assert ran() == ["b", "c"]
    TROUBLE.clear()
    assert [(o.ran, o.why) for o in line.run(start="x/b")] == [(False, ""), (False, ""), (True, "asked for")]
    line.run(start="x/b")  # that one came to its end, so this is a new request
    assert ran() == ["b", "c"]


def test_what_an_interrupted_again_made_is_nothing_to_another_request(line: Line) -> None:
    line.run()
    TROUBLE["c"] = Interrupted("stopped")
    with pytest.raises(Interrupted):
        line.run(start="x/b")
    TROUBLE.clear()
    line.run()
    assert ran() == [], "the old result is there until a new one is"
    line.run(start="x/b")
    assert ran() == ["b", "c"]


def test_an_old_result_goes_when_the_new_one_is_there(line: Line) -> None:
    old = line.run()[1].record
    TROUBLE["b"] = DataError("bad data")
    with pytest.raises(DataError, match="bad data"):
        line.run(again=["b"])
    assert old.outputs["text"].read_text() == "a b"
    old.outputs["text"].write_text("damaged")
    TROUBLE.clear()
    before = old.outputs["text"].stat().st_ino
    (_, again, _) = line.run(again=["b"])
    assert again.ran
    assert (again.record.outputs["text"].read_text(), again.record.outputs["text"].stat().st_ino != before) == (
        "a b",
        True,
    )
    assert line.folders(".partial") == []


def test_from_runs_that_step_and_all_after_it_even_unchanged(line: Line) -> None:
    line.run()
    line.run(start="x/b")
    assert ran() == ["b", "c"]
    line.run(start="shout")
    assert ran() == ["c"]


def test_until_ends_after_the_last_step_of_that_stage(line: Line) -> None:
    assert [o.step.id for o in line.run(until="say")] == ["x/a", "x/b"]
    assert ran() == ["a", "b"]
    assert [o.step.id for o in line.run(until="a")] == ["x/a"]
    assert ran() == []


def test_a_step_that_is_not_there_is_named_with_a_guess(line: Line) -> None:
    for options in ({"again": ["shuot"]}, {"start": "shuot"}, {"until": "shuot"}):
        with pytest.raises(UsageError, match="no stage 'shuot'; did you mean 'shout'"):
            line.run(**options)
    assert ran() == []


def test_two_steps_with_one_fingerprint_run_once_even_when_asked_again(line: Line) -> None:
    line.stages = {"x/a": Say("a"), "x/b": Say("b")}
    twin = PlannedStep("z/a", Say("a"), {})
    both = Plan(None, None, (*line.plan.steps, twin), ())  # type: ignore[arg-type]
    store = ArtifactStore(line.folder / "store")
    with store.lock():
        outcomes = pipeline.run(both, store, Context())
        assert ran() == ["a", "b"]
        assert [o.ran for o in outcomes] == [True, True, False]
        LOG.clear()
        pipeline.run(both, store, Context(), again=["a"])
    assert ran() == ["a"]


def asked() -> set[str]:
    """What was asked before the first stage ran; nothing may be asked after."""
    first = next(i for i, entry in enumerate(LOG) if entry.startswith("run "))
    assert all(entry.startswith("run ") for entry in LOG[first:])
    assert len(set(LOG[:first])) == first
    return set(LOG[:first])


def test_the_environment_is_asked_once_before_anything_runs_and_only_of_what_is_ahead(line: Line) -> None:
    line.run()
    assert asked() == {f"{what} {word}" for what in ("unmet", "preflight") for word in "abc"}
    assert ran() == ["a", "b", "c"]
    line.stages["x/b"] = Say("B")
    line.run()
    assert asked() == {f"{what} {word}" for what in ("unmet", "preflight") for word in "Bc"}
    assert ran() == ["B", "c"]
    line.stages["x/a"] = Say("A")
    line.run(until="x/a")
    assert asked() == {"unmet A", "preflight A"}


def test_what_is_wrong_with_a_late_stage_shows_before_the_first_one_runs(line: Line) -> None:
    WRONG["c"] = DataError("no such layer")
    with pytest.raises(DataError, match="no such layer"):
        line.run()
    assert ran() == []
    assert line.folders(".partial") == []
    assert [o.step.id for o in line.run(until="x/b")] == ["x/a", "x/b"], "c is not ahead of that run"


def test_until_takes_the_report_on_the_stage_with_it(line: Line) -> None:
    line.stages = {"x/a": Say("a"), "x/a.report": Say("r"), "y/c": Shout("c")}
    assert [o.step.id for o in line.run(until="x/a")] == ["x/a", "x/a.report"]


def test_all_that_is_lacking_is_named_at_once_and_nothing_has_run(line: Line) -> None:
    LACKS.update(b="no torch", c="no openvino")
    line.stages["z/d"] = Say("d")
    LACKS["d"] = "no torch"
    with pytest.raises(EnvironmentProblem) as caught:
        line.run()
    assert list(caught.value.lines) == ["no torch", "no openvino"]
    assert ran() == []
    assert line.folders() == line.folders(".partial") == []


def test_a_byte_changed_in_an_input_that_is_used_is_found(line: Line) -> None:
    outcomes = line.run()
    file = outcomes[0].record.outputs["text"]
    file.write_text("e")
    with pytest.raises(CorruptArtifact, match=r"text\.txt is not what was committed"):
        line.run()
    assert ran() == []
    line.run(again=["x/a"])
    assert ran() == ["a"]


def test_an_input_is_hashed_again_at_the_moment_it_is_used(line: Line) -> None:
    line.run()
    line.stages["x/b"] = Say("B")

    class Tamper(Silent):
        """Changes a's text after it was found whole."""

        def say(self, message: str) -> None:
            if message.startswith("x/b"):
                (changed,) = [p for p in line.folder.rglob("text.txt") if p.read_text() == "a"]
                changed.write_text("e")

    with pytest.raises(CorruptArtifact, match=r"text\.txt"):
        line.run(Context(progress=Tamper()))
    assert ran() == []
    assert len(line.folders(".partial")) == 1


def test_a_request_to_stop_ends_the_run_between_two_steps(line: Line) -> None:
    with pytest.raises(Interrupted, match="stopped before x/b; the same command goes on"):
        line.run(Context(stop_requested=lambda: "run a" in LOG))
    assert ran() == ["a"]
    assert line.folders(".partial") == []
    line.run()
    assert ran() == ["b", "c"]


def test_what_a_stage_made_after_a_library_swallowed_a_signal_is_not_kept(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swallowing(self: Say, inputs: Mapping[str, Path], out: Path, context: Context) -> Facts:
        LOG.append(f"run {self.word}")
        with pytest.raises(KeyboardInterrupt):
            signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)  # type: ignore[operator, misc, arg-type]
        (out / "text.txt").write_text("what comes of it")
        return {}

    monkeypatch.setattr(Say, "run", swallowing)
    with pytest.raises(Interrupted, match="stopped in x/a; "), stoppable():
        line.run()
    monkeypatch.undo()
    assert ran() == ["a"]
    assert line.folders() == []
    line.run()
    assert ran() == ["a", "b", "c"]


def test_a_request_to_stop_does_not_matter_where_all_is_cached(line: Line) -> None:
    line.run()
    assert len(line.run(Context(stop_requested=lambda: True))) == 3


def test_each_step_that_runs_is_told_with_its_reason(line: Line) -> None:
    told: list[str] = []

    class Ear(Silent):
        def say(self, message: str) -> None:
            told.append(message)

    line.run(Context(progress=Ear()))
    assert told == ["x/a: first time", "x/b: first time", "y/c: first time"]
    told.clear()
    line.run(Context(progress=Ear()), start="y/c")
    assert told == ["y/c: asked for"]


def test_a_result_that_was_deleted_is_made_again_and_says_so(line: Line) -> None:
    import shutil

    outcomes = line.run()
    shutil.rmtree(outcomes[1].record.folder)
    assert line.why()["x/b"] == ("to run", "its result is gone from the store")
    assert line.why()["y/c"] == ("follows", "after x/b")
    line.run()
    assert ran() == ["b"]


def test_looking_writes_nothing_and_runs_nothing(line: Line) -> None:
    assert {state for state, _ in line.why().values()} == {"to run", "follows"}
    assert LOG == []
    assert not (line.folder / "store").exists()


@pytest.mark.parametrize("how", ["other bytes", "another file with the same bytes", "gone"])
def test_a_file_that_changes_while_a_stage_works_is_not_what_it_was_made_from(how: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.write_text("one")

    @dataclass(frozen=True)
    class Reads(Say):
        def run(self, inputs: Mapping[str, Path], out: Path, context: Context) -> Facts:
            (out / "text.txt").write_text(data.read_text())
            (tmp_path / "new").write_text("one")
            if how == "other bytes":
                data.write_text("two")
            elif how == "gone":
                data.unlink()
            else:
                (tmp_path / "new").replace(data)
            return {}

    with pytest.raises(DataError, match=r"file: \S+data.* was changed while x/a worked"):
        Line(tmp_path, {"x/a": Reads("a", file=data)}).run()
    assert not list((tmp_path / "store").glob("say-*"))


@pytest.mark.parametrize("how", ["put back", "chmod"])
def test_an_interrupted_attempt_goes_on_unless_a_file_was_written_to_meanwhile(how: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.write_text("one")

    @dataclass(frozen=True)
    class Stopped(Say):
        def run(self, inputs: Mapping[str, Path], out: Path, context: Context) -> Facts:
            (out / "checkpoint").write_text(data.read_text())
            data.chmod(0o600)
            if how == "put back":
                data.write_text("two")
            raise Interrupted("stopped")

    with pytest.raises(Interrupted, match="stopped"):
        Line(tmp_path, {"x/a": Stopped("a", file=data)}).run()
    data.write_text("one")
    assert [p.name for p in (tmp_path / "store").glob("say-*/checkpoint")] == ["checkpoint"] * (how == "chmod")


def test_a_file_that_changes_under_again_costs_no_result_that_was_there(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.write_text("one")
    line = Line(tmp_path, {"x/a": Say("a", file=data)})
    line.run()

    class Writes(Silent):
        def say(self, message: str) -> None:
            data.write_text("two")

    with pytest.raises(DataError, match="was changed while x/a worked"):
        line.run(Context(progress=Writes()), again=["a"])
    data.write_text("one")
    assert line.why() == {"x/a": ("cached", "")}


def test_a_file_that_is_only_touched_while_a_stage_works_is_the_same(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.write_text("one")

    @dataclass(frozen=True)
    class Touches(Say):
        def run(self, inputs: Mapping[str, Path], out: Path, context: Context) -> Facts:
            data.touch()
            return super().run(inputs, out, context)

    assert [outcome.ran for outcome in Line(tmp_path, {"x/a": Touches("a", file=data)}).run()] == [True]
