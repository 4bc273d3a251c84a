"""The report on a model as it stands: accuracy, sparsity, bytes and latency, after every stage that changes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel

from sparsify_deploy import menu
from sparsify_deploy.recipe import NM, Benchmark, Export
from sparsify_deploy.recipe import Quantize as QuantizeSection
from sparsify_deploy.reporting.layer_verdict import file_part
from sparsify_deploy.reports import ModelReport, dump
from sparsify_deploy.stages.base import Estimate
from sparsify_deploy.stages.export_onnx import network_of, write_onnx
from sparsify_deploy.stages.subject import Subject, reproducible, unmet_packages
from sparsify_deploy.timing import Latency, measure
from sparsify_deploy.types import Context, Facts


@dataclass(frozen=True)
class Measure:
    """Evaluate in torch, export, read the sparsity off the ONNX file, time it in the recipe's first runtime.

    A stage of its own, so that another runtime or benchmark setting repeats the measurement and not the training.
    """

    subject: Subject
    export: Export
    quantize: QuantizeSection | None
    nm: NM | None
    sparsity: float | None
    runtime: str | None
    params: BaseModel | None
    benchmark: Benchmark

    name: ClassVar[str] = "measure"
    version: ClassVar[int] = 3
    inputs: ClassVar[tuple[str, ...]] = ("weights", "quantized", "mask")
    outputs: ClassVar[Mapping[str, str]] = {"report": "report.json", "measured_onnx": "model.onnx"}

    @property
    def environment(self) -> tuple[str, ...]:
        return ("torch", "onnx", "cpu", "gpu", "driver", *((self.runtime,) if self.runtime else ()))

    def methods(self) -> Mapping[str, int]:
        used = {f"runtimes/{self.runtime}": menu.entry("runtimes", self.runtime).VERSION} if self.runtime else {}
        return {**self.subject.methods(), **used}

    def files(self) -> Mapping[str, Path]:
        return self.subject.files()

    def unmet(self) -> Sequence[str]:
        quantised = ("modelopt",) if self.quantize is not None else ()
        reason = menu.entry("runtimes", self.runtime).unavailable_reason() if self.runtime else None
        return [*unmet_packages("measure", "torch", *quantised), *([f"{self.runtime}: {reason}"] if reason else [])]

    def preflight(self) -> None:
        self.subject.check_traceable()

    def estimate(self) -> Estimate:
        return Estimate()

    def run(self, inputs: Mapping[str, Path], out: Path, context: Context) -> Facts:
        from sparsify_deploy.graph import file
        from sparsify_deploy.graph.layers import all_layers
        from sparsify_deploy.training.loop import evaluate

        device = reproducible(context)
        model = network_of(self.subject, self.quantize, inputs)
        onnx = out / self.outputs["measured_onnx"]
        write_onnx(self.subject, self.export, model, onnx)
        test = self.subject.examples.split("test")
        metrics = evaluate(model.to(device), self.subject.opened_task, test, self.subject.examples.inputs)
        report = ModelReport(
            metrics=metrics,
            examples=len(test),
            sparsity_asked=self.sparsity,
            precision="INT8" if self.quantize is not None else "FP32",
            layers=file_part(all_layers(file.load(onnx)), *(self.nm.nm if self.nm is not None else (2, 4))),
            onnx_bytes=onnx.stat().st_size,
            latency=tuple(self._latencies(onnx, out, context)),
            runtime=self.runtime,
        )
        (out / self.outputs["report"]).write_text(dump(report), encoding="utf-8")
        context.progress.say(_line(report))
        loaded = self.subject.loaded
        return {
            "metrics": metrics,
            "sparsity": report.sparsity,
            "usable_sparsity": report.usable_sparsity,
            "data_notes": [
                *self.subject.data_notes,
                *self._timed_sizes(),
                *([loaded.line] if loaded else []),
                *getattr(model, "meta", {}).get("notes", ()),
                *other_order(getattr(model, "meta", {}).get("classes", ()), self.subject.examples.classes or ()),
            ],
            "checkpoint": loaded.facts if loaded else None,
        }

    def _timed_sizes(self) -> list[str]:
        """Which size of each free axis latencies are of."""
        return [
            f"data: {name} differs between batches, {size.least} to {size.largest}; latencies, costs and "
            f"predictions are of {size.typical}, the typical one"
            for name, size in self.subject.free_axes.sizes.items()
        ]

    def _latencies(self, onnx: Path, out: Path, context: Context) -> list[Latency]:
        """Latency at each batch size in the recipe's first runtime; none where that cannot run here."""
        if self.runtime is None:
            return []
        runtime = menu.entry("runtimes", self.runtime)
        if (reason := runtime.cannot_run_reason()) is not None:
            context.progress.say(f"no latency: {self.runtime}: {reason}")
            return []
        engine = out / f"measured{runtime.SUFFIX}"
        runtime.build(onnx, engine, self.params)
        example = self.subject.timed_arrays(max(self.benchmark.batch_sizes))
        found = []
        for size in self.benchmark.batch_sizes:
            inputs = {name: example[name][:size] for name in self.subject.examples.inputs}
            shapes = {name: values.shape for name, values in inputs.items()}
            with runtime.open(engine, self.params, threads=self.benchmark.threads, shapes=shapes) as session:
                session.bind(inputs)
                found.append(
                    measure(
                        session.execute,
                        batch_size=size,
                        threads=self.benchmark.threads,
                        warmup_ms=self.benchmark.warmup_ms,
                        min_ms=self.benchmark.round_ms * 10,
                    )
                )
        return found


def _line(report: ModelReport) -> str:
    """What a person wants to see of a report while the run goes on."""
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in sorted(report.metrics.items()))
    text = f"  {metrics}; zeros {report.sparsity:.1%}, usable by 2:4 hardware {report.usable_sparsity:.1%}"
    for latency in report.latency:
        text += f"; {report.runtime} batch {latency.batch_size}: p50 {latency.p50_ms:.3f} ms"
    return text


def other_order(model: Sequence[str], data: Sequence[str]) -> list[str]:
    """What to say where the weights of a network were trained on the data's classes in another order."""
    told = [[name.casefold() for name in names] for names in (model, data)]
    if told[0] == told[1] or sorted(told[0]) != sorted(told[1]):
        return []
    return [
        f"data: the model's config.json has the classes {', '.join(model)} and the data {', '.join(data)}: in this "
        "order the weights' own answers count as wrong; number the labels as the model does"
    ]
