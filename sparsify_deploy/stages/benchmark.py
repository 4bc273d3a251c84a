"""The race of the final engines against their dense twin and the models they came from, interleaved."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel

from sparsify_deploy import menu
from sparsify_deploy.recipe import Benchmark
from sparsify_deploy.reports import BenchmarkReport, dump
from sparsify_deploy.stages.base import Estimate
from sparsify_deploy.stages.build_engine import engine_file, engine_outputs
from sparsify_deploy.stages.subject import Subject, unmet_packages
from sparsify_deploy.timing import Race, race
from sparsify_deploy.types import BuildNotes, Context, EngineProfile, Facts

if TYPE_CHECKING:
    from numpy.typing import NDArray


FLOAT_FILE = "float.onnx"
"""The ONNX file of a `float` variant, beside its engine."""


@dataclass(frozen=True)
class Variant:
    """One runner: its label in the reports, the input it comes from, and what that is.

    An engine is raced as it is. An ONNX file is built here: as it is, at the runtime's lower float precision, with its
    zeros replaced (`dense_weights`), or without Q/DQ (`float`). `kept`: the verdict may ship it, so its engine is left
    as an output.
    """

    label: str
    source: str
    kind: Literal["onnx", "engine", "lower_precision", "dense_weights", "float"]
    kept: bool = False

    @property
    def folder(self) -> str:
        """Where a kept engine lies in the output."""
        return re.sub("[^a-z0-9]+", "-", self.label.lower())


@dataclass(frozen=True)
class _Raced:
    """An engine that takes part, and the parameters it is opened with."""

    engine: Path
    params: BaseModel


@dataclass(frozen=True)
class BenchmarkEngines:
    """Time all variants in one runtime, round by round, at each batch size; then profile the final ones."""

    subject: Subject
    runtime: str
    params: BaseModel
    benchmark: Benchmark
    variants: tuple[Variant, ...]

    name: ClassVar[str] = "benchmark"
    version: ClassVar[int] = 2
    outputs: ClassVar[Mapping[str, str]] = {"benchmark": "benchmark.json", "raced": "raced"}

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
        packages = unmet_packages("benchmark", *self.subject.packages)
        return [*packages, *([f"{self.runtime}: {reason}"] if reason else [])]

    def preflight(self) -> None:
        """Nothing shows before its inputs are there."""

    def estimate(self) -> Estimate:
        return Estimate()

    def run(self, inputs: Mapping[str, Path], out: Path, context: Context) -> Facts:
        runtime = menu.entry("runtimes", self.runtime)
        (out / self.outputs["raced"]).mkdir(exist_ok=True)
        reason = runtime.cannot_run_reason()
        if reason is not None:
            context.progress.say(f"benchmark of {self.runtime} not run: {reason}")
            report = BenchmarkReport(self.runtime, self.benchmark.threads, reason, ())
        else:
            report = self._report(inputs, out, context)
        (out / self.outputs["benchmark"]).write_text(dump(report), encoding="utf-8")
        return {"not_run": reason}

    def _report(self, inputs: Mapping[str, Path], out: Path, context: Context) -> BenchmarkReport:
        engines: dict[str, _Raced] = {}
        left_out: dict[str, str] = {}
        for variant in self.variants:
            made = self._made(variant, inputs[variant.source], out, context)
            if isinstance(made, str):
                left_out[variant.label] = made
                context.progress.say(f"benchmark {self.runtime}: {variant.label} left out: {made}")
            else:
                engines[variant.label] = made
        return BenchmarkReport(
            runtime=self.runtime,
            threads=self.benchmark.threads,
            not_run=None,
            races=tuple(self._race(engines, size, done, context) for done, size in enumerate(self._sizes)),
            metrics={
                v.label: self._metrics(engines[v.label])
                for v in self.variants
                if v.kind in ("lower_precision", "float") and v.label in engines and self.subject.measured
            },
            left_out=left_out,
            profiles={
                v.label: self._profile(engines[v.label]) for v in self.variants if v.kind in ("engine", "dense_weights")
            },
        )

    @property
    def _sizes(self) -> tuple[int, ...]:
        return self.benchmark.batch_sizes

    def _made(self, variant: Variant, source: Path, out: Path, context: Context) -> _Raced | str:
        """The engine of a variant, built where it is none yet; a line where this machine cannot run it."""
        from sparsify_deploy.graph import file
        from sparsify_deploy.graph.dense_weights import fill_zeros_
        from sparsify_deploy.graph.dequantized import without_quantizers_

        runtime = menu.entry("runtimes", self.runtime)
        if variant.kind == "engine":
            return _Raced(engine_file(source, self.runtime), self.params)
        params = self.params
        if variant.kind == "lower_precision":
            params = runtime.lower_precision(self.params)[1]
        folder = out / (self.outputs["raced"] if variant.kept else "scratch") / variant.folder
        folder.mkdir(parents=True, exist_ok=True)
        if variant.kind == "dense_weights":
            model = file.load(source)
            fill_zeros_(model, self.subject.seed)
            source = folder / "dense_weights.onnx"
            file.save(model, source)
        elif variant.kind == "float":
            model = file.load(source)
            without_quantizers_(model)
            source = folder / FLOAT_FILE
            file.check(model, source)
            file.save(model, source)
        engine = engine_file(folder, self.runtime)
        notes: BuildNotes = runtime.build(source, engine, params, progress=context.progress)
        if not notes.runs_here:
            shutil.rmtree(folder)
            return notes.warnings[0] if notes.warnings else notes.label or "it does not run here"
        return _Raced(engine, params)

    def _batch(self, size: int) -> dict[str, NDArray[Any]]:
        example = self.subject.timed_arrays(max(self._sizes))
        return {name: example[name][:size] for name in self.subject.examples.inputs}

    def _race(self, engines: Mapping[str, _Raced], size: int, done: int, context: Context) -> Race:
        runtime = menu.entry("runtimes", self.runtime)
        context.progress.update(f"benchmark {self.runtime}", done, len(self._sizes), f"batch {size}")
        batch = self._batch(size)
        shapes = {name: values.shape for name, values in batch.items()}
        with ExitStack() as stack:
            opened = []
            for one in (*engines.values(), next(iter(engines.values()))):
                session = runtime.open(one.engine, one.params, threads=self.benchmark.threads, shapes=shapes)
                opened.append(stack.enter_context(session))
                opened[-1].bind(batch)
            return race(
                dict(zip(engines, opened, strict=False)),
                control=opened[-1],
                batch_size=size,
                threads=self.benchmark.threads,
                rounds=self.benchmark.rounds,
                round_ms=self.benchmark.round_ms,
                warmup_ms=self.benchmark.warmup_ms,
                seed=self.subject.seed,
            )

    def _profile(self, one: _Raced) -> EngineProfile:
        """Where an engine spends its time at the first batch size."""
        runtime = menu.entry("runtimes", self.runtime)
        batch = self._batch(self._sizes[0])
        found: EngineProfile = runtime.profile(one.engine, one.params, batch, threads=self.benchmark.threads)
        return found

    def _metrics(self, one: _Raced) -> dict[str, float]:
        """The task's metrics over the whole test split, computed by the engine."""
        outputs, batch = engine_outputs(self.subject, self.runtime, one.params, one.engine, max(self._sizes))
        return self.subject.opened_task.evaluate(outputs, batch)
