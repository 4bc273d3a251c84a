"""A recipe in its run directory: what the verbs `run`, `plan`, `sensitivity`, `status`, ... work on."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsify_deploy import pipeline, recipe_source
from sparsify_deploy.artifacts.store import ArtifactStore
from sparsify_deploy.errors import DataError, UsageError
from sparsify_deploy.interrupt import stoppable
from sparsify_deploy.plan import Plan
from sparsify_deploy.plan import plan as plan_of
from sparsify_deploy.prediction.gpus import chosen
from sparsify_deploy.prediction.roofline import GpuForecast
from sparsify_deploy.recipe import Recipe
from sparsify_deploy.reports import Gate, RunReport, SensitivityReport, load
from sparsify_deploy.stages import predictions
from sparsify_deploy.stages.base import Estimate
from sparsify_deploy.stages.project_nm import LayerForecast, forecast_layers
from sparsify_deploy.summary import publish, summarise
from sparsify_deploy.types import Context, Progress


@dataclass(frozen=True)
class Forecast:
    """What a run would do: where each step stands, what it is expected to cost, which layers could run sparse."""

    steps: tuple[tuple[pipeline.Status, Estimate | None], ...]
    layers: tuple[LayerForecast, ...]
    missing: tuple[str, ...]
    keep_worst_dense: int = 0
    predicted: tuple[GpuForecast, ...] = ()
    unskipped: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    gate: Gate | None = None


@dataclass(frozen=True)
class Workspace:
    """A recipe, its plan, its run directory and its store."""

    recipe: Recipe
    plan: Plan
    folder: Path
    store: ArtifactStore
    source: Path
    sets: tuple[str, ...] = ()

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
        self._check_predicted()
        with self.store.lock(), stoppable() as stop_requested:
            context = Context(progress, checkpoint_every_s, self.recipe.threads, device, stop_requested)
            outcomes = pipeline.run(self.plan, self.store, context, again=again, start=start, until=until)
            outcomes += self._sensitivity_known(outcomes)
            report = summarise(self.plan, outcomes, until)
            publish(self.folder, report, outcomes, self.source, self.store.digests, sets=self.sets, plan=self.plan)
        return report

    def sensitivity(self, progress: Progress, *, device: str) -> SensitivityReport:
        """Measure each layer alone, running first what that needs and nothing else, and put it into the report.

        The report is made anew from all that the store holds for this recipe; it is whole if the run was.
        """
        whole = plan_of(self.recipe, sensitivity=True)
        with self.store.lock(), stoppable() as stop_requested:
            context = Context(progress, threads=self.recipe.threads, device=device, stop_requested=stop_requested)
            ran = {o.step.id: o for o in pipeline.run(whole.leading_to("sensitivity"), self.store, context)}
            outcomes = [
                ran.get(status.step.id) or pipeline.Outcome(status.step, status.record, False, "")
                for status in pipeline.survey(whole, self.store)
                if status.record is not None
            ]
            report = summarise(whole, outcomes, None if len(outcomes) == len(whole.steps) else "sensitivity")
            publish(self.folder, report, outcomes, self.source, self.store.digests, sets=self.sets, plan=whole)
        assert report.sensitivity is not None
        return report.sensitivity

    def _sensitivity_known(self, outcomes: Sequence[pipeline.Outcome]) -> list[pipeline.Outcome]:
        """The sensitivity of the layers where it was measured for this recipe, though no step of the run needs it."""
        needed = plan_of(self.recipe, sensitivity=True).leading_to("sensitivity")
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
        exported = records.get("sparse/export_onnx")
        layers = predictions.restored(exported.measured) if exported is not None else None
        if layers is None:
            from sparsify_deploy.stages.workloads import recipe_layers

            layers = recipe_layers(self.plan.subject, self.recipe.nm, self.recipe.quantize)
        predictions.check_gate(self.recipe, layers)

    def forecast(self, gpus: Sequence[str] = (), batch_sizes: Sequence[int] = ()) -> Forecast:
        """The dry run. Where torch or the data are missing, estimates are missing too, and it says so.

        `gpus`, names or files of GPUs, and `batch_sizes` stand in for those of the recipe in what is predicted.
        """
        settings = self.recipe.prediction
        targets = chosen(gpus or settings.gpus)
        steps = pipeline.survey(self.plan, self.store)
        pending = [s for s in steps if s.state != "cached"]
        missing = tuple(dict.fromkeys(line for s in pending for line in s.step.stage.unmet()))
        able = importlib.util.find_spec("torch") is not None and not missing
        estimates = [s.step.stage.estimate() if able and s.state != "cached" else None for s in steps]
        layers = forecast_layers(self.plan.subject, self.recipe.nm) if able else ()
        worst = self.recipe.nm.keep_worst_dense if self.recipe.nm else 0
        shown = tuple(zip(steps, estimates, strict=True))
        if not able:
            return Forecast(shown, layers, missing, worst)
        from sparsify_deploy.stages.workloads import recipe_layers

        found = recipe_layers(self.plan.subject, self.recipe.nm, self.recipe.quantize)
        predicted = predictions.forecasts(found, targets, batch_sizes or settings.batch_sizes)
        return Forecast(
            shown,
            layers,
            missing,
            worst,
            predicted,
            predictions.unskipped(self.recipe),
            predictions.warnings(self.recipe, found, predicted),
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
    """Read a recipe and find its run directory; `trust_code` False refuses one that runs Python files of the user."""
    recipe = recipe_source.load(source, sets)
    plan = plan_of(recipe)
    if trust_code is False and (sections := plan.subject.runs_user_code()):
        named = " and ".join(f"{section}.source file" for section in sections)
        raise UsageError(f"{source}: {named} runs Python code the recipe names: read that file, then add --trust-code")
    folder = run_dir or Path("runs") / (recipe.name or source.stem)
    return Workspace(
        recipe, plan, folder, ArtifactStore(store or recipe.store or folder / "store"), source, tuple(sets)
    )


def read_report(folder: Path) -> RunReport:
    """The report of a run directory."""
    path = folder / "report.json"
    if not path.is_file():
        raise DataError(f"{path}: no report: name a run directory in which `run` has finished")
    return load(RunReport, path)


def exit_code(report: RunReport) -> int:
    """0, or 4 where a gate of the recipe is not met or could not be measured."""
    return 0 if all(gate.met for gate in report.gates) else 4
