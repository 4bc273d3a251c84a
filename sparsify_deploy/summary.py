"""The outcomes of a run become its report, and the run directory's `report.json`, `report.md` and engines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from sparsify_deploy import shipping
from sparsify_deploy.artifacts import durable
from sparsify_deploy.artifacts.digests import DigestCache
from sparsify_deploy.artifacts.environment import fact, machine
from sparsify_deploy.artifacts.hashing import algorithm_of
from sparsify_deploy.pipeline import Outcome
from sparsify_deploy.plan import Plan
from sparsify_deploy.prediction.roofline import Layer
from sparsify_deploy.reporting.layer_verdict import Known, chain
from sparsify_deploy.reports import (
    AS_GIVEN,
    IN_FLOAT,
    REPORTS,
    SAME_GRAPH,
    SUMS,
    BenchmarkReport,
    Curve,
    EngineRow,
    Gate,
    LayerChain,
    LayerReport,
    Level,
    ModelReport,
    Prediction,
    Row,
    RunReport,
    SensitivityReport,
    StepRow,
    dump,
    from_json,
    is_report_whole,
    load,
    sums,
)
from sparsify_deploy.stages import predictions
from sparsify_deploy.stages.benchmark import BenchmarkEngines
from sparsify_deploy.stages.build_engine import BuildEngine, engine_file
from sparsify_deploy.stages.export_onnx import ExportOnnx
from sparsify_deploy.stages.flavours import ExportFlavour
from sparsify_deploy.stages.import_onnx import GivenFlavour, ImportOnnx
from sparsify_deploy.stages.import_onnx import notes as import_notes
from sparsify_deploy.stages.sensitivity import Sensitivity
from sparsify_deploy.types import Json
from sparsify_deploy.verdict import Evidence, choice, gates, value_of, verdict


def summarise(plan: Plan, outcomes: Sequence[Outcome], until: str | None) -> RunReport:
    """The report of a run from what its steps left behind."""
    by_id = {outcome.step.id: outcome for outcome in outcomes}
    rows = tuple(_row(by_id, identifier) for identifier in plan.rows if identifier in by_id)
    engines = tuple(_engine(outcome, by_id) for outcome in outcomes if isinstance(outcome.step.stage, BuildEngine))
    benchmarks = tuple(
        load(BenchmarkReport, outcome.record.outputs["benchmark"])
        for outcome in outcomes
        if isinstance(outcome.step.stage, BenchmarkEngines)
    )
    limits = plan.recipe.gates
    metric, direction = _metric(plan, limits.metric)
    dense = [row for row in rows if row.step.startswith("dense/")]
    sparse = [row for row in rows if row.step.startswith("sparse/")]
    given = next((row for row in rows if row.step.startswith("given/")), None)
    if given is not None and any(layer.usable for layer in given.model.layers):
        sparse = [given]
    chains = _chains(by_id, rows, "given" if given is not None else "sparse" if sparse else "dense")
    evidence = Evidence(
        metric=metric,
        direction=direction,
        dense_start=dense[0] if dense else None,
        dense=dense[-1] if dense else None,
        sparse=sparse[-1] if sparse else None,
        engines=engines,
        benchmarks=benchmarks,
        collapsed=tuple(name for outcome in outcomes for name in _collapsed(outcome.record.measured)),
        chain=next((c for c in chains if benchmarks and c.runtime == benchmarks[0].runtime), None),
        given=given,
        fine_tuned=next((row for row in dense if row.step == "dense/fine_tune.report"), None),
    )
    winner = shipping.find(outcomes, choice(evidence, limits.max_drop))
    return RunReport(
        recipe=plan.recipe.name or "",
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=machine(),
        metric=metric,
        direction=direction,
        metrics=_directions(plan),
        rows=rows,
        engines=engines,
        benchmarks=benchmarks,
        gates=(*gates(evidence, limits.model_dump(exclude={"metric"})), *_predicted_gate(plan, by_id))
        if until is None
        else (),
        notes=(
            *dict.fromkeys(note for o in outcomes for note in o.record.measured.get("data_notes", ())),
            *(note for outcome in outcomes for note in _notes(outcome)),
            *_race_notes(benchmarks, engines),
        ),
        verdict=verdict(evidence, limits.max_drop),
        steps=tuple(
            StepRow(o.step.id, "ran" if o.ran else "cached", o.record.seconds, o.record.fingerprint, o.why)
            for o in outcomes
        ),
        sensitivity=next(
            (
                load(SensitivityReport, outcome.record.outputs["sensitivity"])
                for outcome in outcomes
                if isinstance(outcome.step.stage, Sensitivity)
            ),
            None,
        ),
        levels=tuple(level for outcome in outcomes for level in _levels(outcome)),
        chains=chains,
        shipped=winner.shipped(*value_of(evidence, winner.label)) if winner is not None else None,
        predictions=_predictions(plan, by_id, benchmarks, evidence, chains),
        curves=tuple(curve for outcome in outcomes for curve in _curves(outcome)),
    )


def _curves(outcome: Outcome) -> list[Curve]:
    history = outcome.record.measured.get("history") or {}
    losses, measured = (tuple((step, value) for step, value in history.get(name, ())) for name in ("losses", "curve"))
    return [Curve(outcome.step.id, losses, history.get("metric", ""), measured)] if losses else []


def _predictions(
    plan: Plan,
    by_id: Mapping[str, Outcome],
    benchmarks: Sequence[BenchmarkReport],
    evidence: Evidence,
    chains: Sequence[LayerChain],
) -> tuple[Prediction, ...]:
    """What the sparse branch's own file was predicted to gain, beside the race against its dense twin."""
    layers = _file_layers(by_id)
    if layers is None or evidence.sparse is None:
        return ()
    twin = evidence.dense.label if evidence.dense is not None else SAME_GRAPH
    nodes = {layer.weight: layer.layer for layer in chains[0].layers} if chains else {}
    return predictions.rows(plan.recipe, layers, benchmarks, fact("gpu"), (evidence.sparse.label, twin), nodes=nodes)


def _file_layers(by_id: Mapping[str, Outcome]) -> tuple[Layer, ...] | None:
    """The layers of the sparse branch's exported file, or of the one given, as predictions take them."""
    exported = by_id.get("sparse/export_onnx") or by_id.get("given/import_onnx")
    return predictions.restored(exported.record.measured) if exported is not None else None


def _predicted_gate(plan: Plan, by_id: Mapping[str, Outcome]) -> tuple[Gate, ...]:
    """The gate that let the run begin, on the file it ended in."""
    layers = _file_layers(by_id)
    found = predictions.gate(plan.recipe, layers) if layers is not None else None
    return (found,) if found is not None else ()


def _metric(plan: Plan, asked: str | None) -> tuple[str, Literal["higher", "lower"]]:
    """The metric that gates and the verdict speak of."""
    metrics = plan.subject.opened_task.metrics
    name = asked or next(iter(metrics))
    return name, metrics[name]


def _directions(plan: Plan) -> dict[str, str]:
    """Every metric of the task with the direction of better."""
    if not plan.subject.measured:
        return {}
    task = plan.subject.opened_task
    return {**task.metrics, **getattr(task, "also_measured", {})}


def _row(by_id: Mapping[str, Outcome], identifier: str) -> Row:
    outcome = by_id[identifier]
    model = load(ModelReport, outcome.record.outputs["report"])
    stage = by_id.get(identifier.removesuffix(".report"))
    facts = stage.record.measured if stage is not None else {}
    history, cost = facts.get("history"), facts.get("cost")
    return Row(
        label=outcome.step.label,
        step=identifier,
        model=model,
        optimizer_steps=history["steps"] if history else None,
        flops=cost["relative_training_flops"] if cost else None,
        train_s=cost.get("train_s") if cost else None,
    )


def _chains(by_id: Mapping[str, Outcome], rows: Sequence[Row], branch: str) -> tuple[LayerChain, ...]:
    """What ran sparse in each engine of a branch, layer by layer; without engines, its last model's file."""
    found = []
    for outcome in by_id.values():
        stage, facts = outcome.step.stage, outcome.record.measured
        if not isinstance(stage, BuildEngine) or outcome.step.branch != branch or "file_layers" not in facts:
            continue
        layers: tuple[LayerReport, ...] = from_json(tuple[LayerReport, ...], facts["file_layers"])
        known = Known(runtime=stage.runtime, facts=facts["build"].get("facts", {}), projectable=_projectable(by_id))
        label, twin, race = rows[-1].label, "", by_id.get(f"benchmark/{stage.runtime}")
        if race is not None and isinstance(race.step.stage, BenchmarkEngines):
            variants = race.step.stage.variants
            label = next(v.label for v in variants if v.source == f"{branch}_engine")
            others = [v.label for v in variants if v.label == SAME_GRAPH or v.source == "dense_engine"]
            timed = load(BenchmarkReport, race.record.outputs["benchmark"])
            raced = {*(other for one in timed.races for other in one.labels)} or {*others}
            twin = next((other for other in others if other != label and other in raced), "")
            known = replace(
                known,
                dense=timed.profiles.get(twin),
                sparse=timed.profiles.get(label),
                batch_size=timed.races[0].batch_size if timed.races else None,
            )
        found.append(chain(label, layers, known, twin))
    if not found and rows:
        found.append(chain(rows[-1].label, rows[-1].model.layers, Known(projectable=_projectable(by_id))))
    return tuple(found)


def _projectable(by_id: Mapping[str, Outcome]) -> frozenset[str] | None:
    """The weights that the projection chose from, whether or not it took them; None where there was none."""
    projected = by_id.get("sparse/project_nm")
    rows = projected.record.measured.get("layers", ()) if projected is not None else ()
    return frozenset(f"{row['layer']}.weight".removeprefix(".") for row in rows) or None


def _levels(outcome: Outcome) -> list[Level]:
    """The single fits of a step that had several."""
    facts = outcome.record.measured
    fits = (facts.get("history") or {}).get("levels", ())
    names = [str(i) for i in range(len(fits))]
    if "via" in facts:
        names = [*(table["pattern"] for table in facts["via"]), facts["pattern"]]
    return [
        Level(outcome.step.id, name, fit["density"], dict(fit["metrics"]), fit["start"], fit["steps"], fit["train_s"])
        for name, fit in zip(names, fits, strict=True)
    ]


def _collapsed(facts: Mapping[str, Json]) -> list[str]:
    """The layers that a step left without a weight: as it says, and those that training emptied."""
    history = facts.get("history") or {}
    before, updates = history.get("densities", {}), history.get("updates", ())
    after = updates[-1]["densities"] if updates else {}
    emptied = [name.removesuffix(".weight") for name in after if after[name] == 0.0 < before.get(name, 1.0)]
    return list(dict.fromkeys([*(name.removesuffix(".weight") for name in facts.get("collapsed", ())), *emptied]))


def _repeats(note: str, collapsed: Sequence[str]) -> bool:
    """Whether a method's own note says no more than that some of the layers `collapsed` are empty."""
    start, _, layers = note.partition(" no weight is left in ")
    return start == "layer collapse:" and {n.removesuffix(".weight") for n in layers.split(", ")} <= {*collapsed}


def _engine(outcome: Outcome, by_id: Mapping[str, Outcome]) -> EngineRow:
    stage = outcome.step.stage
    assert isinstance(stage, BuildEngine)
    facts = outcome.record.measured
    return EngineRow(
        branch=outcome.step.branch,
        runtime=stage.runtime,
        file=str(_published(outcome).relative_to(".")),
        bytes=facts["bytes"],
        version=facts["build"]["version"],
        metrics=facts.get("metrics"),
        label=facts["build"]["label"],
        not_run=facts.get("not_run"),
        flavour=by_id[outcome.step.inputs["onnx"].step].record.measured.get("flavour", "none"),
    )


def _published(outcome: Outcome) -> Path:
    """Where in the run directory an engine is put."""
    stage = outcome.step.stage
    assert isinstance(stage, BuildEngine)
    return engine_file(Path("engines") / outcome.step.branch / stage.runtime, stage.runtime)


def _notes(outcome: Outcome) -> list[str]:
    """What a reader must know of a step besides its numbers: what was left out, and why."""
    facts, name = outcome.record.measured, outcome.step.id
    notes = import_notes(name, facts) if isinstance(outcome.step.stage, ImportOnnx) else []
    collapsed = _collapsed(facts)
    if collapsed:
        notes.append(f"{name}: layer collapse, no weight is left in {', '.join(collapsed)}")
    if kept := facts.get("kept_dense"):
        notes.append(f"{name}: kept dense by the recipe: {', '.join(kept)}")
    notes += [f"{name}: {layer} stays dense: {reason}" for layer, reason in facts.get("no_pattern", {}).items()]
    if taught := facts.get("distillation"):
        features, warmth = ", ".join(taught["features"]), f"{taught['temperature']:g}"
        what = f"the features of {features}" if features else f"logits, temperature {warmth}"
        notes.append(
            f"{name}: distilled from a dense teacher by {what}, weight {taught['weight']:g}; its forward pass adds "
            f"{taught['relative_flops']:.0%} of a dense step, which the FLOPs leave out"
        )
    if permutation := facts.get("permutation"):
        notes += _permutation_notes(name, facts["pattern"], permutation)
    if between := facts.get("between_flavours"):
        ranged, batches = len(facts["outputs_with_measured_range"]), facts["calibration_batches"]
        what = f"{ranged} more outputs, without a trained scale, are quantised by their range over {batches} "
        how = f"{what}calibration batches; " if ranged else ""
        notes.append(
            f"{name}: {how}the same trained scales as in the file for TensorRT, answers within "
            f"{between['max_relative']:.1e} of its largest output"
        )
    notes += [f"{name}: {layer} runs in float: {why}" for layer, why in facts.get("float_layers", {}).items()]
    notes += [f"{name}: {note}" for note in facts.get("calibration_notes", ())]
    own = (facts.get("history") or {}).get("notes", ())
    notes += [f"{name}: {note}" for note in own if not _repeats(note, collapsed)]
    layers: Sequence[Mapping[str, Json]] = facts.get("layers", ())
    if layers:
        notes.append(f"{name}: {facts['projected']} of {len(layers)} layers projected on {facts['pattern']}")
    notes += [f"{name}: {row['layer']} not projected: {row['reason']}" for row in layers if not row["projected"]]
    notes += [
        f"{name}: {row['name']} not quantised: {row['rule']}"
        for row in facts.get("placement", ())
        if not row["quantised"]
    ]
    if reason := facts.get("not_predicted"):
        notes.append(f"{name}: nothing predicted: {reason}")
    if reason := facts.get("not_run"):
        notes.append(f"{name}: not run here: {reason}")
    return notes


def _permutation_notes(name: str, pattern: str, facts: Mapping[str, Json]) -> list[str]:
    """What permuting channels won before the projection, and the layers where it was not possible."""
    if not facts["layers"]:
        return [f"{name}: no channels permuted: no layer is to be projected on {pattern}"]
    whole = facts["whole"] or 1.0
    before, after = facts["kept_before"] / whole, facts["kept_after"] / whole
    won = (
        f"{name}: channels of {facts['permuted']} of {len(facts['layers'])} layers permuted: {pattern} keeps "
        f"{after:.2%} of their L1 magnitude, without {before:.2%}; outputs differ by {facts['max_difference']:.1e} "
        "in float64"
    )
    left = [row for row in facts["layers"] if not row["permuted"] and row["reason"]]
    return [won, *(f"{name}: {row['layer']} not permuted: {row['reason']}" for row in left)]


def _race_notes(benchmarks: Sequence[BenchmarkReport], engines: Sequence[EngineRow]) -> list[str]:
    """Where a runtime made an INT8 model slower than the float one it came from, and the usual reason."""
    notes = []
    foreign = {e.runtime for e in engines if e.runtime == "onnxruntime" and e.flavour == "tensorrt"}
    for benchmark in benchmarks:
        notes += [
            f"benchmark/{benchmark.runtime}: {label} not raced: {why}" for label, why in benchmark.left_out.items()
        ]
        flavour = next((e.flavour for e in engines if e.runtime == benchmark.runtime), "")
        notes += _given_race_notes(benchmark, flavour)
        for race in benchmark.races:
            for label in race.labels[1:]:
                if (
                    not label.endswith("INT8")
                    or race.labels[0] == SAME_GRAPH
                    or (found := race.compare(label, race.labels[0])).claim != "slower"
                ):
                    continue
                notes.append(
                    f"benchmark/{benchmark.runtime}: {label} is {found.median:.2f}x of {race.labels[0]} at batch "
                    f"{race.batch_size}, slower: this file's Q/DQ is placed for TensorRT and OpenVINO"
                    if benchmark.runtime in foreign
                    else f"benchmark/{benchmark.runtime}: {label} is slower than {race.labels[0]} at batch "
                    f"{race.batch_size} ({found.median:.2f}x)"
                )
    return notes


def _given_race_notes(benchmark: BenchmarkReport, flavour: str) -> Iterator[str]:
    """Where a file that was given is slower than its own graph in float, and what may be done."""
    for race in benchmark.races:
        if not {AS_GIVEN, IN_FLOAT} <= {*race.labels}:
            continue
        found = race.compare(AS_GIVEN, IN_FLOAT)
        if found.claim != "slower":
            continue
        text = f"benchmark/{benchmark.runtime}: the file {AS_GIVEN} is {found.median:.2f}x of the {IN_FLOAT} at batch "
        text += f"{race.batch_size}, slower"
        if benchmark.runtime == "onnxruntime" and flavour == AS_GIVEN:
            text += ": its Q/DQ may be placed for TensorRT; flavour onnxruntime on this target places them anew"
        yield text


def publish(
    folder: Path,
    report: RunReport,
    outcomes: Sequence[Outcome],
    recipe: Path,
    digests: DigestCache,
    *,
    sets: Sequence[str] = (),
    plan: Plan | None = None,
) -> None:
    """Write the reports, copy ONNX files, engines and the recipe; what is there with the same bytes stays.

    ONNX files and engines that the report does not know go: they are those of another recipe, and in the store.

    `plan` is the one whose Triton model repositories are written as well.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for inner in (folder, *folder.glob("onnx/*"), *folder.glob("engines/*"), folder / "triton"):
        durable.sweep(inner)
    kept = [_copy(folder, outcome, digests) for outcome in outcomes]
    for stale in {*folder.glob("onnx/*/*"), *folder.glob("engines/*/*")} - {*kept}:
        durable.delete(stale)
    shipping.publish(folder, report, outcomes, digests)
    if any(outcome.ran for outcome in outcomes) or not _is_published(folder, report):
        _write_reports(folder, report)
    if plan is not None:
        shipping.serve(folder / "triton", plan, report, outcomes, digests)
    text = recipe.read_text(encoding="utf-8") + "".join(f"# run with --set {change}\n" for change in sets)
    durable.write_text(folder / "recipe.yaml", text)


def _is_published(folder: Path, report: RunReport) -> bool:
    """Whether the reports in `folder` are of the same results: they hold then when and why those were made."""
    try:
        if not is_report_whole(folder):
            return False
        old = json.loads((folder / REPORTS[0]).read_text(encoding="utf-8"))
        same = [(step["id"], step["fingerprint"]) for step in old["steps"]]
    except (OSError, ValueError, KeyError, TypeError):  # written by another version, or by hand
        return False
    steps = [(step.id, step.fingerprint) for step in report.steps]
    parts = ("recipe", "machine", "metric", "direction", "gates", "predictions", "shipped", "notes", "verdict")
    return same == steps and all(old.get(part) == _plain(getattr(report, part)) for part in parts)


def _plain(part: object) -> Json:
    """A part of a report as it comes back from JSON."""
    return json.loads(json.dumps(part, default=asdict))


def _write_reports(folder: Path, report: RunReport) -> None:
    from sparsify_deploy.reporting.markdown import markdown
    from sparsify_deploy.reporting.page import fingerprint, is_current, page

    shown = fingerprint(report)
    durable.write_text(folder / REPORTS[0], dump(report))
    durable.write_text(folder / REPORTS[1], markdown(report))
    if not is_current(folder / REPORTS[2], shown):
        durable.write_text(folder / REPORTS[2], page(report, shown))
    durable.write_text(folder / SUMS, sums(folder))


def _copy(folder: Path, outcome: Outcome, digests: DigestCache) -> Path | None:
    """Put what a step made for the user into the run directory; returns where, None for a step that made nothing."""
    stage, onnx = outcome.step.stage, folder / "onnx" / outcome.step.branch
    if isinstance(stage, (ExportOnnx, ImportOnnx)):
        return _copy_onnx(outcome, onnx / "model.onnx", digests)
    if isinstance(stage, (ExportFlavour, GivenFlavour)):
        return _copy_onnx(outcome, onnx / "model.onnxruntime.onnx", digests)
    if isinstance(stage, BuildEngine):
        target = (folder / _published(outcome)).parent
        committed = outcome.record.digests["engine"]
        if not target.is_dir() or digests.digest(target, algorithm_of(committed)) != committed:
            shipping.copy_folder(outcome.record.outputs["engine"], target, digests)
        return target
    return None


def _copy_onnx(outcome: Outcome, target: Path, digests: DigestCache) -> Path:
    committed = outcome.record.digests["onnx"]
    if not target.is_file() or digests.digest(target, algorithm_of(committed)) != committed:
        target.parent.mkdir(parents=True, exist_ok=True)
        durable.copy(outcome.record.outputs["onnx"], target, committed)
    return target
