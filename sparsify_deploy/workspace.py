"""A recipe in its run directory: what the verbs `run`, `plan`, `sensitivity`, `status`, ... work on."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from sparsify_deploy import logbook, menu, pipeline, recipe_source, reports
from sparsify_deploy.artifacts.environment import machine
from sparsify_deploy.artifacts.store import ArtifactStore, holding
from sparsify_deploy.errors import UsageError
from sparsify_deploy.plan import Plan, is_given
from sparsify_deploy.plan import plan as plan_of
from sparsify_deploy.prediction.gpus import Gpu, chosen
from sparsify_deploy.prediction.roofline import GpuForecast
from sparsify_deploy.process.interrupt import stoppable
from sparsify_deploy.recipe import Recipe
from sparsify_deploy.recipe_checks import unknown_metric
from sparsify_deploy.reports import Gate, RunReport, SensitivityReport
from sparsify_deploy.safety.redaction import redacted
from sparsify_deploy.stages import predictions
from sparsify_deploy.stages.base import Estimate
from sparsify_deploy.stages.given import Given
from sparsify_deploy.stages.project_nm import LayerForecast, forecast_layers, reach
from sparsify_deploy.stages.trust import UserCode, user_code
from sparsify_deploy.summary import publish, summarise
from sparsify_deploy.types import Context, Progress


@dataclass(frozen=True)
class Forecast:
    """What a run would do: where each step stands, what it is expected to cost, which layers could run sparse.

    `code` names the user's files that it would execute; where they are not `trusted`, nothing but steps is known.
    """

    steps: tuple[tuple[pipeline.Status, Estimate | None], ...]
    layers: tuple[LayerForecast, ...]
    missing: tuple[str, ...]
    keep_worst_dense: int = 0
    predicted: tuple[GpuForecast, ...] = ()
    unskipped: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    gate: Gate | None = None
    code: tuple[str, ...] = ()
    trusted: bool = True


@dataclass(frozen=True)
class Workspace:
    """A recipe, its plan, its run directory and its store."""

    recipe: Recipe
    plan: Plan
    folder: Path
    store: ArtifactStore
    source: Path
    sets: tuple[str, ...] = ()
    code: tuple[UserCode, ...] = ()
    trusted: bool = False

    def code_lines(self) -> tuple[str, ...]:
        """The user's files that would be executed, with their sha256. `DataError` where one is gone."""
        return tuple(code.line() for code in self.code)

    def check_trusted(self) -> None:
        """`UsageError` where the recipe would run code of the user that they have not allowed."""
        if self.code and not self.trusted:
            files = "; ".join(self.code_lines())
            raise UsageError(
                f"{self.source}: runs code that it names, so read that first, then add --trust-code: {files}"
            )

    def _trust(self, progress: Progress) -> None:
        self.check_trusted()
        for code in self.code:
            progress.say(f"trusted: {code.approve()}")

    def _check_metric(self) -> None:
        """`UsageError` where gates name a metric that a user's own task lacks; a recipe check knows all other tasks."""
        task = self.recipe.task.name
        if self.recipe.gates.metric is not None and menu.entry("tasks", task).RUNS_USER_CODE:
            for path, text in unknown_metric(self.recipe, self.plan.subject.opened_task):
                raise UsageError(f"{self.source}: {'.'.join(map(str, path))}: {text}")

    def run(
        self,
        progress: Progress,
        *,
        device: str,
        checkpoint_every_s: float,
        start: str | None = None,
        until: str | None = None,
        again: Sequence[str] = (),
    ) -> RunReport:
        """Bring the plan up to date and write the reports and the engines into the run directory."""
        for name in (*again, *filter(None, (start, until))):
            pipeline.selected(self.plan, name)
        self._trust(progress)
        self._check_metric()
        self._check_predicted()
        with self._held(), self._logged("run", progress) as logged, stoppable() as stop_requested:
            context = Context(logged, checkpoint_every_s, self.recipe.threads, device, stop_requested)
            outcomes = pipeline.run(self.plan, self.store, context, again=again, start=start, until=until)
            outcomes += self._sensitivity_known(outcomes)
            report = redacted(summarise(self.plan, outcomes, until))
            publish(self.folder, report, outcomes, self.source, self.store.digests, sets=self.sets, plan=self.plan)
        return report

    def sensitivity(self, progress: Progress, *, device: str) -> SensitivityReport:
        """Measure each layer alone, running first what that needs and nothing else, and put it into the report.

        The report is made anew from all that the store holds for this recipe; it is whole if the run was.
        """
        if is_given(self.recipe):
            raise UsageError("sensitivity: changes layers of a torch network, and model.source onnx has none")
        self._trust(progress)
        self._check_metric()
        whole = plan_of(self.recipe, sensitivity=True, trusted=self.trusted)
        with self._held(), self._logged("sensitivity", progress) as logged, stoppable() as stop_requested:
            context = Context(logged, threads=self.recipe.threads, device=device, stop_requested=stop_requested)
            ran = {o.step.id: o for o in pipeline.run(whole.leading_to("sensitivity"), self.store, context)}
            outcomes = [
                ran.get(status.step.id) or pipeline.Outcome(status.step, status.record, False, "")
                for status in pipeline.survey(whole, self.store)
                if status.record is not None
            ]
            partly = None if len(outcomes) == len(whole.steps) else "sensitivity"
            report = redacted(summarise(whole, outcomes, partly))
            publish(self.folder, report, outcomes, self.source, self.store.digests, sets=self.sets, plan=whole)
        assert report.sensitivity is not None
        return report.sensitivity

    def _held(self) -> AbstractContextManager[None]:
        """The run directory and the store for this process alone."""
        return holding(self.folder, self.store)

    def _logged(self, verb: str, progress: Progress) -> AbstractContextManager[Progress]:
        """The progress that the run directory's log hears too; the log ends with what ends the run."""
        return logbook.keeping(self.folder, progress, verb, facts=machine)

    def _sensitivity_known(self, outcomes: Sequence[pipeline.Outcome]) -> list[pipeline.Outcome]:
        """The sensitivity of the layers where it was measured for this recipe, though no step of the run needs it."""
        needed = plan_of(self.recipe, sensitivity=True, trusted=self.trusted).leading_to("sensitivity")
        if not needed.steps:
            return []
        last = pipeline.survey(needed, self.store)[-1]
        known = {outcome.step.id for outcome in outcomes}
        if last.record is None or last.step.id in known:
            return []
        return [pipeline.Outcome(last.step, last.record, False, "")]

    def status(self, stage: str | None = None) -> list[pipeline.Status]:
        """Where the steps stand; with `stage` those it means."""
        chosen = pipeline.selected(self.plan, stage) if stage is not None else None
        return [s for s in pipeline.survey(self.plan, self.store) if chosen is None or s.step.id in chosen]

    def _check_predicted(self) -> None:
        """Before any stage: `CheckFailed` where `gates.min_predicted_speedup` is not met.

        What a finished export knows of its layers is not worked out again, so that a re-run needs no torch.
        """
        if self.recipe.gates.min_predicted_speedup is None:
            return
        records = {s.step.id: s.record for s in pipeline.survey(self.plan, self.store)}
        exported = records.get("sparse/export_onnx") or records.get("given/import_onnx")
        layers = predictions.restored(exported.measured) if exported is not None else None
        if layers is None and isinstance(self.plan.subject, Given):
            layers = self.plan.subject.layers()
        elif layers is None:
            from sparsify_deploy.stages.workloads import recipe_layers

            layers = recipe_layers(self.plan.subject, self.recipe.nm, self.recipe.quantize)
        predictions.check_gate(self.recipe, layers)

    def _forecast_given(
        self, subject: Given, steps: Sequence[pipeline.Status], gpus: Sequence[Gpu], batch_sizes: Sequence[int]
    ) -> Forecast:
        """The dry run of a file that was given: nothing is trained, and what is predicted follows from the file."""
        missing = dict.fromkeys(line for s in steps if s.state != "cached" for line in s.step.stage.unmet())
        found = subject.layers()
        return Forecast(
            tuple((step, None) for step in steps),
            (),
            tuple(missing),
            predicted=predictions.forecasts(found, gpus, batch_sizes),
            unskipped=predictions.unskipped(self.recipe),
            gate=predictions.gate(self.recipe, found),
        )

    def forecast(self, gpus: Sequence[str] = (), batch_sizes: Sequence[int] = ()) -> Forecast:
        """The dry run. Where torch or the data are missing, estimates are missing too, and it says so.

        `gpus`, names or files of GPUs, and `batch_sizes` stand in for those of the recipe in what is predicted.
        """
        settings = self.recipe.prediction
        targets = chosen(gpus or settings.gpus)
        steps = pipeline.survey(self.plan, self.store)
        if self.code and not self.trusted:
            return Forecast(tuple((s, None) for s in steps), (), (), code=self.code_lines(), trusted=False)
        code = tuple(code.approve() for code in self.code)
        return replace(self._forecast(steps, targets, batch_sizes or settings.batch_sizes), code=code)

    def _forecast(
        self, steps: Sequence[pipeline.Status], targets: Sequence[Gpu], batch_sizes: Sequence[int]
    ) -> Forecast:
        if isinstance(self.plan.subject, Given):
            return self._forecast_given(self.plan.subject, steps, targets, batch_sizes)
        pending = [s for s in steps if s.state != "cached"]
        missing = tuple(dict.fromkeys(line for s in pending for line in s.step.stage.unmet()))
        able = importlib.util.find_spec("torch") is not None and not missing
        if able:
            for each in pending:  # what a run refuses before its first step is refused here
                each.step.stage.preflight()
        estimates = [s.step.stage.estimate() if able and s.state != "cached" else None for s in steps]
        layers = forecast_layers(self.plan.subject, self.recipe.nm) if able else ()
        worst = self.recipe.nm.keep_worst_dense if self.recipe.nm else 0
        shown = tuple(zip(steps, estimates, strict=True))
        if not able:
            return Forecast(shown, layers, missing, worst)
        from sparsify_deploy.stages.workloads import recipe_layers

        found = recipe_layers(self.plan.subject, self.recipe.nm, self.recipe.quantize)
        predicted = predictions.forecasts(found, targets, batch_sizes)
        warned = (*self.plan.subject.label_notes, *predictions.warnings(self.recipe, found, predicted))
        return Forecast(
            shown,
            layers,
            missing,
            worst,
            predicted,
            predictions.unskipped(self.recipe),
            (*([line] if (line := reach(self.plan.subject).line) else []), *warned),
            predictions.gate(self.recipe, found),
        )


def open_run(
    source: Path,
    sets: Sequence[str] = (),
    run_dir: Path | None = None,
    store: Path | None = None,
    *,
    trust_code: bool | None = None,
) -> Workspace:
    """Read a recipe and find its run directory, without running code of the user's.

    `trust_code` False refuses a recipe that would run some at all; None leaves that to the verbs that do, `run` and
    `sensitivity`, and `forecast` then tells what is known without.
    """
    recipe = recipe_source.load(source, sets)
    folder = run_dir or Path("runs") / (recipe.name or source.stem)
    trusted = trust_code is True
    if trusted and user_code(recipe):  # which may change the working directory
        source, folder, store = source.absolute(), folder.absolute(), store.absolute() if store else None
        recipe = recipe_source.load(source, sets)
    opened = Workspace(
        recipe,
        plan_of(recipe, trusted=trusted),
        folder,
        ArtifactStore(store or recipe.store or folder / "store"),
        source,
        tuple(sets),
        user_code(recipe),
        trusted,
    )
    if trust_code is False:
        opened.check_trusted()
    if trusted:
        for code in opened.code:
            code.approve()
    return opened


def read_report(folder: Path) -> RunReport:
    """The report of a run directory, as `reports.read_report` reads it."""
    return reports.read_report(folder)


def exit_code(report: RunReport) -> int:
    """0, or 4 where a gate of the recipe is not met or could not be measured."""
    return 0 if all(gate.met for gate in report.gates) else 4
