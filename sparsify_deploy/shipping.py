"""The run directory's `deploy/`: the engine that the verdict ships, with its record, its ONNX file and the reason."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsify_deploy.artifacts import durable
from sparsify_deploy.artifacts.digests import DigestCache
from sparsify_deploy.artifacts.fingerprint import files_below
from sparsify_deploy.errors import CorruptArtifact
from sparsify_deploy.pipeline import Outcome
from sparsify_deploy.plan import Plan
from sparsify_deploy.reporting import triton
from sparsify_deploy.reporting.package import FORMAT, NOTE
from sparsify_deploy.reports import RunReport, Shipped
from sparsify_deploy.runtimes._metadata import metadata_path, read_record
from sparsify_deploy.stages.benchmark import FLOAT_FILE, BenchmarkEngines
from sparsify_deploy.stages.build_engine import BuildEngine, engine_file
from sparsify_deploy.types import Json


@dataclass(frozen=True)
class Winner:
    """Where the store holds the model that is to be shipped."""

    label: str
    runtime: str
    engine: Path
    onnx: Path
    built: Outcome
    """The step that built an engine for that runtime and proved the preprocessing with it."""

    def files(self) -> dict[str, Path]:
        """What goes into `deploy/`, by name. ONNX Runtime's engine is its ONNX file, which is there once."""
        engine = {name: path for name, path in _below(self.engine).items() if path != self.onnx}
        return {"model.onnx": self.onnx, **engine, **_preprocessing(self.built)}

    def shipped(self, value: float | None, how: str) -> Shipped:
        """The same as a report has it."""
        files = tuple(sorted((*self.files(), NOTE)))
        return Shipped(self.label, self.runtime, files, value, how, preprocessed(self.built))


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
        return Winner(label, stage.runtime, source.record.outputs[ref.output], onnx, source)
    engine = race.record.outputs["raced"] / variant.folder
    onnx = engine / FLOAT_FILE if variant.kind == "float" else source.record.outputs[ref.output]
    built = _built(outcomes, stage.runtime)
    nearest = next((o for o in built if o.step.branch == source.step.branch), built[-1])
    return Winner(label, stage.runtime, engine, onnx, nearest)


def preprocessed(built: Outcome) -> str:
    """What became of raw examples on their way through what is deployed, in words."""
    facts = built.record.measured["preprocessing"]
    if "own" in facts:
        return str(facts["own"])
    text = f"identical on {facts['examples']} raw test examples ({facts['kind']})"
    if (parity := facts.get("parity")) is None:
        return f"{text}, not run through an engine here"
    share, count = parity["top1_agreement"], parity["examples"]
    equal = f"{share * count:.0f} of {count} top-1 answers equal, " if share is not None else ""
    return (
        f"{text}; the {built.step.branch} branch's engine on them against ONNX Runtime through the data set: {equal}"
        f"largest difference {parity['max_relative']:.1e} of the largest output"
    )


def _built(outcomes: Sequence[Outcome], runtime: str) -> list[Outcome]:
    """The steps that built an engine for a runtime."""
    return [o for o in outcomes if isinstance(o.step.stage, BuildEngine) and o.step.stage.runtime == runtime]


def _preprocessing(built: Outcome) -> dict[str, Path]:
    """What says how raw examples become inputs, by name; empty where that is the user's own."""
    return _below(built.record.outputs["preprocessing"])


def _below(folder: Path) -> dict[str, Path]:
    return {str(name): folder / name for name in files_below(folder)}


def publish(folder: Path, report: RunReport, outcomes: Sequence[Outcome], digests: DigestCache) -> None:
    """Make `deploy/` of the run directory hold what the report ships, or nothing; what is the same stays."""
    target = folder / "deploy"
    for left in ("deploy.partial", "deploy.discarded"):  # by a run of an older release that was killed here
        durable.remove(folder / left)
    if report.shipped is None:
        if target.exists():
            durable.delete(target)
        return
    winner = find(outcomes, report.shipped.model)
    assert winner is not None
    sources = winner.files()
    hashes = {name: digests.digest(path) for name, path in sorted(sources.items())}
    note = _note(report, winner, hashes)
    if _is_there(target, hashes, note, digests):
        return
    with durable.replacing_folder(target) as fresh:
        for name, path in sources.items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            durable.copy(path, fresh / name, hashes[name])
        durable.write_json(fresh / NOTE, note)


def copy_folder(source: Path, target: Path, digests: DigestCache) -> None:
    """Replace `target` by a copy of a folder of the store; `CorruptArtifact` where a file there is another by now."""
    with durable.replacing_folder(target) as fresh:
        for name in files_below(source):
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            durable.copy(source / name, fresh / name, digests.digest(source / name, "blake3"))


def _note(report: RunReport, winner: Winner, hashes: Mapping[str, str]) -> Json:
    """What `predict` and a reader need to know of the folder."""
    shipped, stage = report.shipped, winner.built.step.stage
    assert shipped is not None
    assert isinstance(stage, BuildEngine)
    races = report.benchmarks[0].races
    taken = [race.latencies[shipped.model] for race in races]
    return {
        "format": FORMAT,
        "recipe": report.recipe,
        "model": shipped.model,
        "runtime": shipped.runtime,
        "engine": engine_file(winner.engine, winner.runtime).name,
        "task": {"name": stage.subject.task.name, "output": getattr(stage.subject.task.params, "output", None)},
        "preprocessing": shipped.preprocessing,
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
        durable.delete(left)
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
    preprocessing: Mapping[str, Path]


def _to_serve(runtime: str, report: RunReport, outcomes: Sequence[Outcome]) -> _Served | None:
    """What the verdict ships for this runtime, else the final model in it; None where a run stopped before that."""
    by_id = {outcome.step.id: outcome for outcome in outcomes}
    shipped = report.shipped
    if shipped is not None and shipped.runtime == runtime:
        winner = find(outcomes, shipped.model)
        assert winner is not None
        why = f"{shipped.model}: the model that the verdict ships."
        return _Served(engine_file(winner.engine, runtime), winner.onnx, why, _preprocessing(winner.built))
    built = _built(outcomes, runtime)
    if not built:
        return None
    final = next((o for o in built if o.step.branch == "sparse"), built[-1])
    ref = final.step.inputs["onnx"]
    what = f"ships {shipped.model} for {shipped.runtime}" if shipped is not None else "recommends no model"
    why = f"The final model of the {final.step.branch} branch; the verdict {what}."
    onnx = by_id[ref.step].record.outputs[ref.output]
    return _Served(engine_file(final.record.outputs["engine"], runtime), onnx, why, _preprocessing(final))


def _serve_one(target: Path, chosen: _Served, plan: Plan, digests: DigestCache) -> None:
    """Write one model; what is the same stays, and then neither onnx nor the data set is opened."""
    largest = max(triton.LARGEST_BATCH, *plan.recipe.benchmark.batch_sizes)
    record = read_record(metadata_path(chosen.engine))
    files = triton.served_files(chosen.engine, record)
    parts: dict[str, Json] = {"format": triton.FORMAT, "name": target.name, "why": chosen.why, "largest": largest}
    parts["onnx"] = digests.digest(chosen.onnx, "blake3")
    beside = {f"../{name}": path for name, path in chosen.preprocessing.items()}
    parts |= {file: digests.digest(path, "blake3") for file, path in {**files, **beside}.items()}
    made_from = f"made from {hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()}"
    same = triton.is_made_from(target, made_from) and all(
        (target / "1" / file).is_file() and digests.digest(target / "1" / file, "blake3") == parts[file]
        for file in (*files, *beside)
    )
    if same:
        return
    classes = plan.subject.examples.classes or ()
    model = triton.described(
        chosen.engine,
        record,
        chosen.onnx,
        why=chosen.why,
        labels=classes,
        largest_batch=largest,
        preprocessing=chosen.preprocessing,
    )
    triton.write(target.parent, target.name, model, made_from=made_from)


def _is_there(target: Path, hashes: Mapping[str, str], note: Json, digests: DigestCache) -> bool:
    if not target.is_dir() or {str(name) for name in files_below(target)} != {*hashes, NOTE}:
        return False
    same = all(digests.digest(target / name) == sha256 for name, sha256 in hashes.items())
    try:
        return same and durable.read_json(target / NOTE) == note
    except (OSError, CorruptArtifact):  # it is written anew
        return False
