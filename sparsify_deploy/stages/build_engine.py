"""One engine for one runtime, from the branch's ONNX file; its parity with that and its accuracy where it can run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from sparsify_deploy import menu
from sparsify_deploy.errors import CheckFailed
from sparsify_deploy.layer_verdict import file_part
from sparsify_deploy.recipe import Export
from sparsify_deploy.stages.base import Estimate
from sparsify_deploy.stages.inference import run_all
from sparsify_deploy.stages.subject import Subject, unmet_packages
from sparsify_deploy.types import Context, Facts, Json

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparsify_deploy.export.parity import Parity
    from sparsify_deploy.types import Arrays


_ON_CPU = ("openvino", "onnxruntime")
"""Runtimes that compute FP32 in FP32."""


@dataclass(frozen=True)
class BuildEngine:
    """Build, write the metadata beside the engine, compare it with the ONNX file, evaluate the test examples on it."""

    subject: Subject
    runtime: str
    params: BaseModel
    batch_size: int
    export: Export

    name: ClassVar[str] = "build_engine"
    version: ClassVar[int] = 2
    inputs: ClassVar[tuple[str, ...]] = ("onnx",)
    outputs: ClassVar[Mapping[str, str]] = {"engine": "engine"}

    @property
    def environment(self) -> tuple[str, ...]:
        return (self.runtime, "gpu")

    def methods(self) -> Mapping[str, int]:
        version: int = menu.entry("runtimes", self.runtime).VERSION
        return {**self.subject.methods(), f"runtimes/{self.runtime}": version}

    def files(self) -> Mapping[str, Path]:
        return self.subject.files()

    def unmet(self) -> Sequence[str]:
        reason = menu.entry("runtimes", self.runtime).unavailable_reason()
        return [
            *unmet_packages("build_engine", "torch", "onnxruntime"),
            *([f"{self.runtime}: {reason}"] if reason else []),
        ]

    def preflight(self) -> None:
        """Nothing shows before its inputs are there."""

    def estimate(self) -> Estimate:
        return Estimate()

    def run(self, inputs: Mapping[str, Path], out: Path, context: Context) -> Facts:
        from sparsify_deploy.graph import file
        from sparsify_deploy.graph.layers import weight_layers

        runtime = menu.entry("runtimes", self.runtime)
        layers = file_part(weight_layers(file.load(inputs["onnx"])))
        folder = out / self.outputs["engine"]
        folder.mkdir(exist_ok=True)
        engine = engine_file(folder, self.runtime)
        notes = runtime.build(inputs["onnx"], engine, self.params, progress=context.progress)
        for warning in notes.warnings:
            context.progress.say(f"{self.runtime}: {warning}")
        facts: dict[str, Json] = {
            "build": dataclasses.asdict(notes),
            "bytes": sum((folder / name).stat().st_size for name in notes.files),
            "file_layers": [dataclasses.asdict(layer) for layer in layers],
        }
        reason = runtime.cannot_run_reason()
        if reason is None:
            outputs, batch = engine_outputs(self.subject, self.runtime, self.params, engine, self.batch_size)
            lower = notes.options.get("precision", "f32") not in ("f32", "fp32")
            exact = self.runtime in _ON_CPU and not lower and all(layer.precision == "FP32" for layer in layers)
            facts["parity"] = dataclasses.asdict(self._check_parity(inputs["onnx"], outputs, batch, exact=exact))
            facts["metrics"] = self.subject.opened_task.evaluate(outputs, batch)
        else:
            facts["not_run"] = reason
            context.progress.say(f"{self.runtime}: built, not run here: {reason}")
        return facts

    def _check_parity(self, onnx: Path, outputs: Arrays, batch: Arrays, *, exact: bool) -> Parity:
        """The engine against ONNX Runtime on the file it was built from, on the first test examples.

        Held to the recipe's limits for the export: to the largest difference where it is `exact`, which is FP32 on a
        CPU (GPUs round to TF32), else to the share of equal top-1 answers. Raises CheckFailed beyond them.
        """
        from sparsify_deploy.export.parity import compare

        count = min(self.export.parity_examples, len(next(iter(batch.values()))))
        inputs = {name: batch[name][:count] for name in self.subject.examples.inputs}
        runtime = menu.entry("runtimes", "onnxruntime")
        with runtime.open(onnx, runtime.Params()) as session:
            size = session.inputs[0].shape[0] or count
            reference = run_all(session, inputs, size, fixed=session.inputs[0].shape[0] is not None)
        parity = compare(reference, {name: values[:count] for name, values in outputs.items()})
        what = f"build_engine: the {self.runtime} engine of {onnx}"
        if exact and parity.max_relative > self.export.max_relative_difference:
            raise CheckFailed(
                f"{what} differs from ONNX Runtime by {parity.max_relative:.2e} of the largest output, "
                f"more than export.max_relative_difference {self.export.max_relative_difference:g}"
            )
        agreement = parity.top1_agreement
        if not exact and agreement is not None and agreement < self.export.min_top1_agreement:
            raise CheckFailed(
                f"{what} agrees with ONNX Runtime on {agreement:.2%} of {parity.examples} top-1 answers, "
                f"less than export.min_top1_agreement {self.export.min_top1_agreement:g}"
            )
        return parity


def engine_outputs(
    subject: Subject, name: str, params: BaseModel, engine: Path, batch_size: int
) -> tuple[dict[str, NDArray[Any]], Arrays]:
    """What an engine of runtime `name` answers to the whole test split, and that split."""
    import torch

    split = subject.examples.split("test")
    batch = {k: v.numpy() for k, v in split.take(torch.arange(len(split))).items()}
    with menu.entry("runtimes", name).open(engine, params) as session:
        fixed = session.inputs[0].shape[0]
        inputs = {field: batch[field] for field in subject.examples.inputs}
        return run_all(session, inputs, fixed or batch_size, fixed=fixed is not None), batch


def engine_file(folder: Path, runtime: str) -> Path:
    """Where a build stage's folder holds its engine."""
    return folder / f"model{menu.entry('runtimes', runtime).SUFFIX}"
