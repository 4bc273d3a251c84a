"""The race of the final engines against their dense twin and the models they came from, interleaved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel

from sparsify_deploy import menu
from sparsify_deploy.recipe import Benchmark
from sparsify_deploy.reports import BenchmarkReport, dump
from sparsify_deploy.stages.base import Estimate
from sparsify_deploy.stages.build_engine import engine_file
from sparsify_deploy.stages.subject import Subject, unmet_packages
from sparsify_deploy.timing import Race, race
from sparsify_deploy.types import Context, Facts


@dataclass(frozen=True)
class Variant:
    """One runner: its label in the reports, the input it comes from, and what that is."""

    label: str
    source: str
    kind: Literal["onnx", "engine"]


@dataclass(frozen=True)
class BenchmarkEngines:
    """Time all variants in one runtime, round by round, at each batch size."""

    subject: Subject
    runtime: str
    params: BaseModel
    benchmark: Benchmark
    variants: tuple[Variant, ...]

    name: ClassVar[str] = "benchmark"
    version: ClassVar[int] = 1
    outputs: ClassVar[Mapping[str, str]] = {"benchmark": "benchmark.json"}

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(variant.source for variant in self.variants)

    @property
    def environment(self) -> tuple[str, ...]:
        return (self.runtime, "cpu", "gpu", "driver")

    def methods(self) -> Mapping[str, int]:
        version: int = menu.entry("runtimes", self.runtime).VERSION
        return {**self.subject.methods(), f"runtimes/{self.runtime}": version}

    def files(self) -> Mapping[str, Path]:
        return self.subject.files()

    def unmet(self) -> Sequence[str]:
        reason = menu.entry("runtimes", self.runtime).unavailable_reason()
        return [*unmet_packages("benchmark", "torch"), *([f"{self.runtime}: {reason}"] if reason else [])]

    def preflight(self) -> None:
        """Nothing shows before its inputs are there."""

    def estimate(self) -> Estimate:
        return Estimate()

    def run(self, inputs: Mapping[str, Path], out: Path, context: Context) -> Facts:
        runtime = menu.entry("runtimes", self.runtime)
        reason = runtime.cannot_run_reason()
        races = () if reason is not None else tuple(self._races(inputs, out, context))
        if reason is not None:
            context.progress.say(f"benchmark of {self.runtime} not run: {reason}")
        report = BenchmarkReport(self.runtime, self.benchmark.threads, reason, races)
        (out / self.outputs["benchmark"]).write_text(dump(report), encoding="utf-8")
        return {"not_run": reason}

    def _races(self, inputs: Mapping[str, Path], out: Path, context: Context) -> list[Race]:
        runtime = menu.entry("runtimes", self.runtime)
        engines = {}
        for i, variant in enumerate(self.variants):
            if variant.kind == "engine":
                engines[variant.label] = engine_file(inputs[variant.source], self.runtime)
            else:
                engines[variant.label] = out / f"variant{i}{runtime.SUFFIX}"
                runtime.build(inputs[variant.source], engines[variant.label], self.params)
        races = []
        sizes = self.benchmark.batch_sizes
        example = {k: v.numpy() for k, v in self.subject.example(max(sizes)).items()}
        for done, size in enumerate(sizes):
            context.progress.update(f"benchmark {self.runtime}", done, len(sizes), f"batch {size}")
            batch = {name: example[name][:size] for name in self.subject.examples.inputs}
            shapes = {name: values.shape for name, values in batch.items()}
            with ExitStack() as stack:
                opened = []
                for engine in (*engines.values(), next(iter(engines.values()))):
                    session = runtime.open(engine, self.params, threads=self.benchmark.threads, shapes=shapes)
                    opened.append(stack.enter_context(session))
                    opened[-1].bind(batch)
                races.append(
                    race(
                        dict(zip(engines, opened, strict=False)),
                        control=opened[-1],
                        batch_size=size,
                        threads=self.benchmark.threads,
                        rounds=self.benchmark.rounds,
                        round_ms=self.benchmark.round_ms,
                        warmup_ms=self.benchmark.warmup_ms,
                        seed=self.subject.seed,
                    )
                )
        return races
