"""One engine for one runtime, from the branch's ONNX file; its parity with that and its accuracy where it can run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from sparsify_deploy import menu
from sparsify_deploy.errors import CheckFailed
from sparsify_deploy.recipe import Export
from sparsify_deploy.reporting.layer_verdict import file_part
from sparsify_deploy.stages.base import Estimate
from sparsify_deploy.stages.export_onnx import onnx_outputs
from sparsify_deploy.stages.inference import run_all, run_test
from sparsify_deploy.stages.raw_inputs import OWN, RawInputs, write_preprocessing
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
    version: ClassVar[int] = 4
    inputs: ClassVar[tuple[str, ...]] = ("onnx",)
    outputs: ClassVar[Mapping[str, str]] = {"engine": "engine", "preprocessing": "preprocessing"}

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
            *unmet_packages("build_engine", *self.subject.packages, "onnxruntime"),
            *([f"{self.runtime}: {reason}"] if reason else []),
        ]

    def preflight(self) -> None:
        """What the data set says of raw examples must hold; the rest shows when its inputs are there."""
        with TemporaryDirectory(prefix="sparsify-deploy-") as scratch:
            write_preprocessing(self.subject, Path(scratch, "preprocessing"))

    def estimate(self) -> Estimate:
        return Estimate()

    def run(self, inputs: Mapping[str, Path], out: Path, context: Context) -> Facts:
        from sparsify_deploy.graph import file
        from sparsify_deploy.graph.dequantized import integer_operators
        from sparsify_deploy.graph.layers import all_layers

        runtime = menu.entry("runtimes", self.runtime)
        model = file.load(inputs["onnx"])
        layers = file_part(all_layers(model))
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
        raw = write_preprocessing(self.subject, out / self.outputs["preprocessing"])
        facts["preprocessing"] = raw.facts if raw is not None else {"own": OWN}
        reason = runtime.cannot_run_reason()
        if reason is None:
            outputs, batch = engine_outputs(self.subject, self.runtime, self.params, engine, self.batch_size)
            lower = notes.options.get("precision", "f32") not in ("f32", "fp32")
            in_float = all(layer.precision == "FP32" for layer in layers) and not integer_operators(model)
            exact = self.runtime in _ON_CPU and not lower and in_float
            facts["parity"] = dataclasses.asdict(self._check_parity(inputs["onnx"], outputs, batch, exact=exact))
            if self.subject.measured:
                facts["metrics"] = self.subject.opened_task.evaluate(outputs, batch)
            if raw is not None:
                facts["preprocessing"]["parity"] = dataclasses.asdict(self._raw_parity(inputs["onnx"], engine, raw))
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
        runtime = menu.entry("runtimes", "onnxruntime")
        with runtime.open(onnx, runtime.Params()) as session:
            size = self.batch_size if self.subject.free_axes else count
            reference, _ = run_test(session, self.subject, size, count)
        found = {name: values[:count] for name, values in outputs.items()}
        parity = compare(reference, found, self.subject.answers(reference))
        what = f"build_engine: the {self.runtime} engine of {onnx}"
        if exact and parity.max_relative > self.export.max_relative_difference:
            raise CheckFailed(
                f"{what} differs from ONNX Runtime by {parity.max_relative:.2e} of the largest output, "
                f"more than export.max_relative_difference {self.export.max_relative_difference:g}"
            )
        agreement = parity.top1_agreement
        judged = not exact and self.subject.measured  # drawn inputs are all alike to a classifier
        if judged and agreement is not None and agreement < self.export.min_top1_agreement:
            raise CheckFailed(
                f"{what} agrees with ONNX Runtime on {agreement:.2%} of {parity.examples} top-1 answers, "
                f"less than export.min_top1_agreement {self.export.min_top1_agreement:g}"
            )
        return parity

    def _raw_parity(self, onnx: Path, engine: Path, raw: RawInputs) -> Parity:
        """The engine on raw examples through the deployed preprocessing, against ONNX Runtime through the data set.

        No limit: the inputs are the same to the bit, and the engine is held to its limits on more examples than these.
        """
        from sparsify_deploy.export.parity import compare

        reference = onnx_outputs(onnx, {name: raw.batch[name] for name in self.subject.examples.inputs})
        with menu.entry("runtimes", self.runtime).open(engine, self.params) as session:
            fixed = session.inputs[0].shape[0]
            size = fixed or min(self.batch_size, raw.examples)
            found = run_all(session, raw.inputs, size, fixed=fixed is not None)
            return compare(reference, found, self.subject.answers(reference))


def engine_outputs(
    subject: Subject, name: str, params: BaseModel, engine: Path, batch_size: int
) -> tuple[dict[str, NDArray[Any]], Arrays]:
    """What an engine of runtime `name` answers to the whole test split, and that split, as `run_test` has them."""
    with menu.entry("runtimes", name).open(engine, params) as session:
        return run_test(session, subject, batch_size)


def engine_file(folder: Path, runtime: str) -> Path:
    """Where a build stage's folder holds its engine."""
    return folder / f"model{menu.entry('runtimes', runtime).SUFFIX}"
