"""Variants of one network through the package's own runtimes: built, compared, raced with an A/A control, profiled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu import implicit
from gpu.record import clocks
from sparsify_deploy import menu
from sparsify_deploy.artifacts.fingerprint import file_digest
from sparsify_deploy.errors import RuntimeUnavailable, SparsifyError
from sparsify_deploy.graph import file
from sparsify_deploy.graph.eligibility import pattern_possible
from sparsify_deploy.graph.layers import weight_layers
from sparsify_deploy.graph.nm import violations
from sparsify_deploy.timing import race
from sparsify_deploy.types import BuildNotes, IOTensor, Json

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx import ModelProto
    from pydantic import BaseModel

FP32, FP16, DENSE, SPARSE = "FP32", "FP16", "dense INT8", "2:4 INT8"
"""The labels that the targets speak of."""


@dataclass(frozen=True)
class Variant:
    """One plan for a network. `half`: what is not quantised runs in FP16; `kernels`: sparse ones may be picked;
    `implicit`: INT8 without Q/DQ, see `gpu.implicit`."""

    label: str
    onnx: Path
    half: bool
    kernels: bool = True
    implicit: bool = False


@dataclass(frozen=True)
class Setting:
    """How variants are measured. `work` keeps ONNX files and engines, so that a second call finds them."""

    runtime: str
    work: Path
    rounds: int = 20
    round_ms: float = 30.0
    time_limit_s: float = 300.0
    optimization_level: int | None = None


@dataclass(frozen=True)
class Plan:
    """A variant that was built; `takes` is what its network is fed."""

    variant: Variant
    takes: tuple[IOTensor, ...]
    engine: Path
    params: BaseModel
    notes: BuildNotes


def measure(setting: Setting, variants: Sequence[Variant], batch: int) -> dict[str, Json]:
    """A row: each variant's build, its layers and agreement with the first; the race; profiles, the baseline's twice.

    A variant that the runtime refuses or cannot compute in is in the row with its reason.
    """
    row: dict[str, Json] = {"runtime": setting.runtime, "batch": batch, "clocks_before": clocks(), "variants": {}}
    plans = []
    for variant in variants:
        model = file.load(variant.onnx)
        row["variants"][variant.label] = described = _describe(variant.onnx, model)
        try:
            plan = build(setting, variant, file.inputs(model), batch)
        except SparsifyError as error:
            described["refused"] = str(error)
            continue
        plans.append(plan)
        described |= asdict(plan.notes)
    runtime = menu.entry("runtimes", setting.runtime)
    if (reason := runtime.cannot_run_reason()) is not None:
        return {**row, "not_run": reason}
    if plans:
        row |= _raced(setting, plans, batch)
        for plan in plans:
            row["variants"][plan.variant.label] |= _profiled(runtime, plan, batch)
        row["control_profile"] = {
            plan.variant.label: _profiled(runtime, plan, batch) for plan in plans if plan.variant.label == DENSE
        }
    return {**row, "clocks_after": clocks()}


def build(setting: Setting, variant: Variant, takes: tuple[IOTensor, ...], batch: int) -> Plan:
    """Build a variant for one batch size, or take the engine that an earlier call left with the same bytes and words.

    Raises what the runtime's `build` raises, and RuntimeUnavailable where it cannot compute in FP16.
    """
    runtime = menu.entry("runtimes", setting.runtime)
    params = params_for(setting, variant, batch)
    said = [file_digest(variant.onnx), batch, params.model_dump(mode="json"), variant.implicit]
    asked = json.dumps(said, sort_keys=True)
    key = hashlib.sha256(asked.encode()).hexdigest()[:16]
    folder = setting.work / "engines"
    folder.mkdir(parents=True, exist_ok=True)
    engine, kept = folder / f"{key}{runtime.SUFFIX}", folder / f"{key}.notes.json"
    if kept.is_file():
        found = json.loads(kept.read_text(encoding="utf-8"))
        notes = BuildNotes(**{**found, "files": tuple(found["files"]), "warnings": tuple(found["warnings"])})
        return Plan(variant, takes, engine, params, notes)
    if variant.implicit:
        notes = implicit.build(variant.onnx, engine, sparse=variant.kernels, time_limit_s=setting.time_limit_s)
    else:
        notes = runtime.build(variant.onnx, engine, params)
    kept.write_text(json.dumps(asdict(notes)), encoding="utf-8")
    return Plan(variant, takes, engine, params, notes)


def params_for(setting: Setting, variant: Variant, batch: int) -> BaseModel:
    """The runtime's parameters for a variant. Raises RuntimeUnavailable where it has no FP16."""
    runtime = menu.entry("runtimes", setting.runtime)
    if not setting.runtime.startswith("tensorrt"):
        if FP16 in variant.label or variant.implicit:
            raise RuntimeUnavailable(
                f"{setting.runtime} has no {'INT8 without Q/DQ' if variant.implicit else FP16} here"
            )
        plain: BaseModel = runtime.Params()
        return plain
    fields: dict[str, Json] = {
        "sparse": variant.kernels,
        **dict.fromkeys(("min_batch", "opt_batch", "max_batch"), batch),
        "time_limit_s": setting.time_limit_s,
        "optimization_level": setting.optimization_level,
        "timing_cache": str(setting.work / "timing"),
        "precision": "fp16" if variant.half else "fp32",
    }
    params: BaseModel = runtime.Params(**fields)
    return params


def _describe(onnx: Path, model: ModelProto) -> dict[str, Json]:
    """The file's hash and its layers with constant weights."""
    layers = [
        {
            "name": layer.name,
            "weight": layer.weight,
            "op": layer.op,
            "shape": list(layer.shape),
            "groups": layer.groups,
            "precision": layer.precision,
            "int8_in": layer.int8_in,
            "int8_out": layer.int8_out,
            "holds_2_4": pattern_possible(layer.shape, layer.groups, 4).ok and violations(layer.values, 2, 4) == 0,
        }
        for layer in weight_layers(model)
    ]
    return {"onnx": onnx.name, "onnx_sha256": file_digest(onnx), "onnx_layers": layers}


def _raced(setting: Setting, plans: Sequence[Plan], batch: int) -> dict[str, Json]:
    """The race of all plans, the first opened twice, and each one's cosine to the first on the same inputs."""
    runtime = menu.entry("runtimes", setting.runtime)
    with ExitStack() as stack:
        sessions = []
        for plan in (*plans, plans[0]):
            inputs = inputs_for(plan, batch)
            shapes = {name: values.shape for name, values in inputs.items()}
            session = stack.enter_context(runtime.open(plan.engine, plan.params, threads=1, shapes=shapes))
            session.bind(inputs)
            session.execute()
            sessions.append(session)
        reference, *others = (_flat(session.fetch()) for session in sessions)
        outcome = race(
            {plan.variant.label: session for plan, session in zip(plans, sessions, strict=False)},
            control=sessions[-1],
            rounds=setting.rounds,
            round_ms=setting.round_ms,
            batch_size=batch,
        )
    agreement = {plan.variant.label: _cosine(reference, other) for plan, other in zip(plans[1:], others, strict=False)}
    return {"race": asdict(outcome), "cosine_to_first": agreement}


def _profiled(runtime: Any, plan: Plan, batch: int) -> dict[str, Json]:
    found = runtime.profile(plan.engine, plan.params, inputs_for(plan, batch), threads=1)
    return {"profile": asdict(found), "sparse_kernels": sum("sparse" in layer.kernel.lower() for layer in found.layers)}


def inputs_for(plan: Plan, batch: int) -> dict[str, NDArray[Any]]:
    """Standard-normal inputs, zeros for integers; the same for every variant of a network."""
    random = np.random.default_rng(0)
    found = {}
    for tensor in plan.takes:
        kind = np.dtype(tensor.dtype)
        values = random.standard_normal((batch, *(axis or 1 for axis in tensor.shape[1:])))
        found[tensor.name] = values.astype(kind) if kind.kind == "f" else np.zeros_like(values, kind)
    return found


def _flat(outputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
    return np.concatenate([outputs[name].ravel().astype(np.float64) for name in sorted(outputs)])


def _cosine(one: NDArray[np.float64], other: NDArray[np.float64]) -> float | None:
    """None where an output holds what is no number."""
    value = float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))
    return value if np.isfinite(value) else None


def summary(key: str, row: Mapping[str, Json]) -> str:
    """A few lines of what a row says."""
    lines = [f"{key}: {row['runtime']}, batch {row['batch']}"]
    raced = row.get("race")
    for label, each in row["variants"].items():
        if "refused" in each:
            lines.append(f"  {label:<34} not measured: {each['refused'][:160]}")
            continue
        facts = each["facts"]
        said = [f"built in {each['seconds']:.1f} s"]
        if raced is not None:
            latencies = raced["device_latencies"] or raced["latencies"]
            said.append(f"{latencies[label]['p50_ms']:.4f} ms")
        for word in ("eligible", "picked"):
            names = facts.get(f"sparse_{word}")
            said.append(f"{word} {'unsaid' if names is None else len(names)}")
        lines.append(f"  {label:<34} {', '.join(said)}, sparse kernels {each.get('sparse_kernels', 'unsaid')}")
    if raced is not None:
        control = raced["control"]
        lines.append(f"  A/A {control['median']:.4f}  [{control['low']:.4f}, {control['high']:.4f}], {raced['clock']}")
    return "\n".join(lines)
