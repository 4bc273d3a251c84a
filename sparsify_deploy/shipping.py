"""The run directory's `deploy/`: the engine that the verdict ships, with its record, its ONNX file and the reason."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsify_deploy import triton
from sparsify_deploy.artifacts.digests import DigestCache
from sparsify_deploy.artifacts.fingerprint import files_below
from sparsify_deploy.pipeline import Outcome
from sparsify_deploy.plan import Plan
from sparsify_deploy.reports import RunReport, Shipped
from sparsify_deploy.runtimes._metadata import metadata_path
from sparsify_deploy.stages.benchmark import BenchmarkEngines
from sparsify_deploy.stages.build_engine import BuildEngine, engine_file
from sparsify_deploy.types import Json

NOTE = "deploy.json"


@dataclass(frozen=True)
class Winner:
    """Where the store holds the model that is to be shipped."""

    label: str
    runtime: str
    engine: Path
    onnx: Path

    def files(self) -> dict[str, Path]:
        """What goes into `deploy/`, by name. ONNX Runtime's engine is its ONNX file, which is there once."""
        engine = {str(name): self.engine / name for name in files_below(self.engine)}
        return {"model.onnx": self.onnx, **engine}

    def shipped(self, value: float, how: str) -> Shipped:
        """The same as a report has it."""
        return Shipped(self.label, self.runtime, tuple(sorted((*self.files(), NOTE))), value, how)


def find(outcomes: Sequence[Outcome], label: str | None) -> Winner | None:
    """The model `label` of the first runtime's race; None where there is none."""
    by_id = {outcome.step.id: outcome for outcome in outcomes}
    race = next((outcome for outcome in outcomes if isinstance(outcome.step.stage, BenchmarkEngines)), None)
    if label is None or race is None:
        return None
    stage = race.step.stage
    assert isinstance(stage, BenchmarkEngines)
    (variant,) = [v for v in stage.variants if v.label == label]
    ref = race.step.inputs[variant.source]
    source = by_id[ref.step]
    if variant.kind == "engine":
        made_from = source.step.inputs["onnx"]
        onnx = by_id[made_from.step].record.outputs[made_from.output]
        return Winner(label, stage.runtime, source.record.outputs[ref.output], onnx)
    engine = race.record.outputs["raced"] / variant.folder
    return Winner(label, stage.runtime, engine, source.record.outputs[ref.output])


def publish(folder: Path, report: RunReport, outcomes: Sequence[Outcome], digests: DigestCache) -> None:
    """Make `deploy/` of the run directory hold what the report ships, or nothing; what is the same stays."""
    target = folder / "deploy"
    for left in ("deploy.partial", "deploy.discarded"):  # by a run that was killed here
        shutil.rmtree(folder / left, ignore_errors=True)
    if report.shipped is None:
        if target.exists():
            _delete(target)
        return
    winner = find(outcomes, report.shipped.model)
    assert winner is not None
    sources = winner.files()
    hashes = {name: digests.digest(path) for name, path in sorted(sources.items())}
    text = json.dumps(_note(report, report.shipped, hashes), indent=1, sort_keys=True) + "\n"
    if _is_there(target, hashes, text, digests):
        return
    partial = target.with_name("deploy.partial")
    for name, path in sources.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, partial / name)
    (partial / NOTE).write_text(text, encoding="utf-8")
    if target.exists():
        _delete(target)
    partial.rename(target)


def _note(report: RunReport, shipped: Shipped, hashes: Mapping[str, str]) -> Json:
    races = report.benchmarks[0].races
    taken = [race.latencies[shipped.model] for race in races]
    return {
        "format": 1,
        "recipe": report.recipe,
        "model": shipped.model,
        "runtime": shipped.runtime,
        "why": report.verdict,
        "accuracy": {"metric": report.metric, "value": shipped.value, "how": shipped.how},
        "latency": [
            {
                "clock": latency.clock,
                "batch_size": latency.batch_size,
                "threads": latency.threads,
                "p50_ms": latency.p50_ms,
                "p90_ms": latency.p90_ms,
                "p99_ms": latency.p99_ms,
            }
            for latency in taken
        ],
        "machine": report.machine,
        "sha256": dict(hashes),
    }


def serve(folder: Path, plan: Plan, report: RunReport, outcomes: Sequence[Outcome], digests: DigestCache) -> None:
    """Make the Triton model repository `folder` hold the engines that the recipe wants served, and nothing else."""
    wanted = [target.runtime for target in plan.recipe.deploy if target.triton]
    found = {
        triton.model_name(plan.recipe.name or "model", runtime): served
        for runtime in wanted
        if (served := _to_serve(runtime, report, outcomes)) is not None
    }
    for left in [entry for entry in folder.iterdir() if entry.name not in found] if folder.is_dir() else []:
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    if not found and folder.is_dir():
        folder.rmdir()
    for name, chosen in found.items():
        _serve_one(folder / name, chosen, plan, digests)


@dataclass(frozen=True)
class _Served:
    """An engine for Triton, the ONNX file it was built from, and the reason for serving it."""

    engine: Path
    onnx: Path
    why: str


def _to_serve(runtime: str, report: RunReport, outcomes: Sequence[Outcome]) -> _Served | None:
    """What the verdict ships for this runtime, else the final model in it; None where a run stopped before that."""
    by_id = {outcome.step.id: outcome for outcome in outcomes}
    shipped = report.shipped
    if shipped is not None and shipped.runtime == runtime:
        winner = find(outcomes, shipped.model)
        assert winner is not None
        why = f"{shipped.model}: the model that the verdict ships."
        return _Served(engine_file(winner.engine, runtime), winner.onnx, why)
    built = [o for o in outcomes if isinstance(o.step.stage, BuildEngine) and o.step.stage.runtime == runtime]
    if not built:
        return None
    final = next((o for o in built if o.step.branch == "sparse"), built[-1])
    ref = final.step.inputs["onnx"]
    what = f"ships {shipped.model} for {shipped.runtime}" if shipped is not None else "recommends no model"
    why = f"The final model of the {final.step.branch} branch; the verdict {what}."
    onnx = by_id[ref.step].record.outputs[ref.output]
    return _Served(engine_file(final.record.outputs["engine"], runtime), onnx, why)


def _serve_one(target: Path, chosen: _Served, plan: Plan, digests: DigestCache) -> None:
    """Write one model; what is the same stays, and then neither onnx nor the data set is opened."""
    largest = max(triton.LARGEST_BATCH, *plan.recipe.benchmark.batch_sizes)
    record = json.loads(metadata_path(chosen.engine).read_text(encoding="utf-8"))
    files = triton.served_files(chosen.engine, record)
    parts: dict[str, Json] = {"format": triton.FORMAT, "name": target.name, "why": chosen.why, "largest": largest}
    parts["onnx"] = digests.digest(chosen.onnx)
    parts |= {file: digests.digest(path) for file, path in files.items()}
    made_from = f"made from {hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()}"
    same = triton.is_made_from(target, made_from) and all(
        (target / "1" / file).is_file() and digests.digest(target / "1" / file) == parts[file] for file in files
    )
    if same:
        return
    classes = plan.subject.examples.classes or ()
    model = triton.described(chosen.engine, record, chosen.onnx, why=chosen.why, labels=classes, largest_batch=largest)
    triton.write(target.parent, target.name, model, made_from=made_from)


def _is_there(target: Path, hashes: Mapping[str, str], text: str, digests: DigestCache) -> bool:
    if not target.is_dir() or {str(name) for name in files_below(target)} != {*hashes, NOTE}:
        return False
    same = all(digests.digest(target / name) == sha256 for name, sha256 in hashes.items())
    return same and (target / NOTE).read_text(encoding="utf-8") == text


def _delete(folder: Path) -> None:
    """Take a folder away under another name first, so that a crash leaves no part of it under its own."""
    doomed = folder.with_name(f"{folder.name}.discarded")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)
