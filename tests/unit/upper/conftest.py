"""Recipes, races and reports made by hand, for the layers that decide on them. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sparsify_deploy.recipe import Recipe
from sparsify_deploy.reports import BenchmarkReport, EngineRow, LayerReport, ModelReport, Row, RunReport
from sparsify_deploy.timing import LEAST_NOISE, Comparison, Latency, Race, claim

FULL: dict[str, Any] = {
    "version": 1,
    "name": "full",
    "seed": 3,
    "sparsity": 0.6,
    "model": {"source": "builtin", "params": {"name": "resnet8", "width": 16, "in_channels": 1}},
    "data": {"source": "digits", "augment": ["flip"]},
    "training": {"steps": 12, "batch_size": 16},
    "init": {"criterion": "synflow", "params": {"rounds": 5}, "keep_dense": ["conv1"]},
    "train": {"method": "rigl", "params": {"update_every": 3}},
    "nm": {"fine_tune": {"steps": 6}},
    "quantize": {"qat": {"steps": 4}},
    "deploy": [{"runtime": "openvino"}],
}


@pytest.fixture
def recipe() -> Callable[..., Recipe]:
    """A recipe with every section; a keyword replaces a section, None takes it out."""

    def make(**changes: Any) -> Recipe:
        values = {k: v for k, v in {**FULL, **changes}.items() if v is not None}
        return Recipe.model_validate(values)

    return make


def latency(ms: float, batch_size: int = 1) -> Latency:
    """Executions that all took `ms`, more or less."""
    return Latency(
        clock="wall time",
        p50_ms=ms,
        p90_ms=ms * 1.1,
        p95_ms=ms * 1.2,
        p99_ms=ms * 1.3,
        mean_ms=ms,
        cv=0.01,
        steady=True,
        samples=100,
        throughput_per_s=batch_size * 1000.0 / ms,
        batch_size=batch_size,
        threads=1,
    )


@pytest.fixture
def race() -> Callable[..., Race]:
    """A race in which each label took the given ms; every ratio has an interval of +- `spread`."""

    def make(times: Mapping[str, float], *, spread: float = 0.01, batch_size: int = 1) -> Race:
        labels = tuple(times)
        found = []
        for label in labels:
            for baseline in labels:
                ratio = times[baseline] / times[label]
                interval = (ratio, ratio * (1 - spread), ratio * (1 + spread))
                if label != baseline:
                    found.append(Comparison(label, baseline, *interval, claim(*interval, LEAST_NOISE)))
        taken = {label: latency(ms, batch_size) for label, ms in times.items()}
        return Race(
            labels=labels,
            clock="process CPU time",
            rounds=5,
            seed=0,
            batch_size=batch_size,
            threads=1,
            latencies=taken,
            cpu_latencies=taken,
            device_latencies={},
            round_ms={label: (ms,) * 5 for label, ms in times.items()},
            comparisons=tuple(found),
            control=Comparison(labels[0], labels[0], 1.0, 0.99, 1.01, "within the noise"),
            noise=LEAST_NOISE,
        )

    return make


def layer(name: str, *, zeros: int, usable: bool, reason: str = "C_in 64, K 64") -> LayerReport:
    """A layer of 64 x 64 x 3 x 3 INT8 weights."""
    return LayerReport(
        name=name,
        weight=f"{name}.weight",
        op="Conv",
        shape=(64, 64, 3, 3),
        groups=1,
        precision="INT8",
        int8_in=True,
        int8_out=False,
        weights=36864,
        zeros=zeros,
        pattern_possible=True,
        pattern_held=usable,
        usable=usable,
        rule_of_thumb=True,
        reason=reason,
        bytes_stored=36864,
        bytes_compressed=23040 if usable else 36864,
    )


@pytest.fixture
def row() -> Callable[..., Row]:
    """A row of the waterfall with one layer, half of it zeros where `usable`."""

    def make(label: str, step: str, metrics: Mapping[str, float], *, usable: bool = False, **changes: Any) -> Row:
        model = {
            "metrics": dict(metrics),
            "examples": 360,
            "sparsity_asked": None,
            "precision": label[-4:],
            "layers": (layer("conv", zeros=18432 if usable else 0, usable=usable),),
            "onnx_bytes": 2048,
            "latency": (latency(1.5),),
            "runtime": "openvino",
        }
        mine = {k: changes.pop(k) for k in tuple(changes) if k in model}
        return Row(label, step, ModelReport(**{**model, **mine}), **changes)

    return make


@pytest.fixture
def engine() -> Callable[..., EngineRow]:
    """An engine of a branch with the metrics it had itself."""

    def make(branch: str, metrics: Mapping[str, float] | None, runtime: str = "openvino") -> EngineRow:
        measured = dict(metrics) if metrics is not None else None
        return EngineRow(branch, runtime, f"engines/{branch}/{runtime}/model", 4096, "1.0", measured, "", None)

    return make


@pytest.fixture
def report(row: Callable[..., Row], engine: Callable[..., EngineRow], race: Callable[..., Race]) -> RunReport:
    """A whole report: three models, two engines, one race, a gate of each kind."""
    from sparsify_deploy.reports import Gate, StepRow

    rows = (
        row("dense FP32", "dense/train.report", {"accuracy": 0.9}, optimizer_steps=12, flops=1.0, train_s=2.0),
        row("dense INT8", "dense/quantize.report", {"accuracy": 0.89}),
        row("2:4 INT8", "sparse/quantize.report", {"accuracy": 0.88}, usable=True, sparsity_asked=0.6),
    )
    raced = race({"dense FP32": 3.0, "dense INT8": 1.0, "2:4 INT8": 1.005})
    return RunReport(
        recipe="full",
        created="2026-01-01T00:00:00+00:00",
        machine={"cpu": "a cpu", "packages": {"torch": "2", "onnx": "1"}},
        metric="accuracy",
        direction="higher",
        rows=rows,
        engines=(engine("dense", {"accuracy": 0.89}), engine("sparse", None, "tensorrt_rtx")),
        benchmarks=(BenchmarkReport("openvino", 1, None, (raced,)),),
        gates=(
            Gate("max_drop", 0.05, 0.02, True, "how"),
            Gate("min_speedup", 1.5, 1.0, False, "how"),
            Gate("min_sparsity", 0.4, None, None, "how"),
        ),
        notes=("a note",),
        verdict="Verdict: ship it.",
        steps=(StepRow("dense/train", "ran", 2.0, "f" * 64, "first time"),),
    )


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """A recipe of few lines on disk."""
    path = tmp_path / "small.yaml"
    path.write_text(
        "version: 1\nmodel: {params: {name: resnet8, in_channels: 1}}\ndata: {source: digits}\n", encoding="utf-8"
    )
    return path
