"""One run of a grid: its recipe through the pipeline up to the last training, then the test split."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from harness.grid import Grid, Run
from sparsify_deploy import pipeline
from sparsify_deploy.artifacts.environment import fact
from sparsify_deploy.artifacts.store import Record
from sparsify_deploy.plan import Plan
from sparsify_deploy.process.interrupt import stoppable
from sparsify_deploy.stages.measure import Measure
from sparsify_deploy.types import Context, Json, Progress
from sparsify_deploy.workspace import Workspace, open_run

CHECKPOINT_EVERY_S = 30.0


@dataclass(frozen=True)
class Job:
    """What a worker needs to know of a run."""

    name: str
    recipe: Path
    store: Path
    result: Path
    device: str


def jobs(grid: Grid, work: Path, store: Path, device: str) -> dict[str, Job]:
    """Write every run's recipe below `work`, and say where its stages and its result are kept."""
    folders = {name: work / name for name in ("recipes", "results")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for run in grid.runs:
        recipe = folders["recipes"] / f"{run.name}.yaml"
        _replace(recipe, run.recipe)  # JSON is YAML
        lane = store / run.lane if run.lane else store
        found[run.name] = Job(run.name, recipe, lane, folders["results"] / f"{run.name}.json", device)
    return found


def opened(job: Job) -> tuple[Workspace, Plan]:
    """The run's workspace and its plan without reports on the model: no ONNX file, no latency."""
    workspace = open_run(job.recipe, run_dir=job.store, store=job.store)
    steps = tuple(step for step in workspace.plan.steps if not isinstance(step.stage, Measure))
    return workspace, dataclasses.replace(workspace.plan, steps=steps, rows=())


def perform(job: Job, progress: Progress) -> Json:
    """Bring a run up to date, evaluate it on the whole test split and keep the result beside the recipe.

    Stages that are cached are not run again. Raises what the pipeline raises; `Interrupted` when asked to stop.
    """
    workspace, plan = opened(job)
    examples = plan.subject.examples  # opened before anything is timed
    steps: dict[str, Json] = {}
    records: list[Record] = []
    with workspace.store.lock(), stoppable() as stop_requested:
        context = Context(progress, CHECKPOINT_EVERY_S, workspace.recipe.threads, job.device, stop_requested)
        for status in pipeline.survey(plan, workspace.store):
            step, resumed = status.step, status.state == "partial"
            began = time.process_time()
            outcome = pipeline.run(plan, workspace.store, context, until=step.id)[-1]
            whole = outcome.ran and not resumed
            measured = round(time.process_time() - began, 3) if whole else None
            went_on = outcome.record.measured.get("history", {}).get("resumed_from") is not None
            records.append(outcome.record)
            steps[step.id] = {
                "fingerprint": outcome.record.fingerprint,
                "wall_s": None if resumed or went_on else outcome.record.seconds,
                "cpu_s": outcome.record.measured.get("cost", {}).get("cpu_s", measured),
            }
    result = {
        "name": job.name,
        "fingerprint": records[-1].fingerprint,
        "steps": steps,
        "test_examples": len(examples.split("test")),
        **_measured(plan, records, job.device),
        "torch": fact("torch"),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    _replace(job.result, result)
    return result


def _measured(plan: Plan, records: list[Record], device: str) -> dict[str, Json]:
    """Accuracy of the final weights, what is left of them, and what the stages said."""
    from sparsify_deploy.sparsity.layers import prunable
    from sparsify_deploy.sparsity.mask import Mask
    from sparsify_deploy.sparsity.prune import collapsed
    from sparsify_deploy.stages.subject import reproducible
    from sparsify_deploy.training.cost import forward_flops
    from sparsify_deploy.training.evaluation import evaluate

    subject, last = plan.subject, records[-1]
    place = reproducible(Context(threads=plan.recipe.threads, device=device))
    network = subject.network(last.outputs["weights"]).to(place)
    metrics = evaluate(network, subject.opened_task, subject.examples.split("test"), subject.examples.inputs)
    mask = Mask.load(last.outputs["mask"]) if "mask" in last.outputs else Mask.ones(prunable(network))
    at_init = [name for record in records for name in record.measured.get("collapsed", ())]
    histories = [record.measured["history"] for record in records if "history" in record.measured]
    flops = forward_flops(network, subject.example(), subject.examples.inputs)
    return {
        "device": place.type,
        "metrics": metrics,
        "density": mask.density,
        "densities": mask.densities(),
        "collapsed_at_init": at_init,
        "collapsed": list(collapsed(mask)),
        "relative_training_flops": [
            r.measured["cost"]["relative_training_flops"] for r in records if r.measured.get("cost")
        ],
        "levels": [level for history in histories for level in _levels(history, flops)],
        "optimizer_steps": [history["steps"] for history in histories],
        "notes": [note for history in histories for note in history["notes"]],
    }


def _levels(history: Json, flops: Mapping[str, int]) -> list[Json]:
    """Of a method with several fits: each one's test metrics, and the cost up to there over one dense training."""
    from sparsify_deploy.training.cost import relative_training_flops

    found: list[Json] = []
    cost = 0.0
    for number, fit in enumerate(history.get("levels", ())):
        dense = history["levels"][0]["steps"]
        cost += relative_training_flops(flops, fit["densities"], fit["steps"]) * fit["steps"] / dense
        facts = {name: fit[name] for name in ("density", "metrics", "steps", "cpu_s")}
        collapsed = [name for name, density in fit["densities"].items() if density == 0.0]
        found.append({"level": number, **facts, "relative_training_flops": cost, "collapsed": collapsed})
    return found


def finished(run: Run, job: Job) -> Json | None:
    """The kept result of a run whose stages are still what its recipe asks for; None where there is none."""
    if not job.result.is_file():
        return None
    workspace, plan = opened(job)
    record = pipeline.survey(plan, workspace.store)[-1].record
    result: Json = json.loads(job.result.read_text(encoding="utf-8"))
    if record is None or record.fingerprint != result["fingerprint"]:
        return None
    asked = {name: run.recipe[name] for name in ("sparsity", "init", "train", "nm") if name in run.recipe}
    return {**result, "row": run.row, "column": run.column, "seed": run.seed, "recipe": asked}


def _replace(path: Path, value: Mapping[str, Json]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
