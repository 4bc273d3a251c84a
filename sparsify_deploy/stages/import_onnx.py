"""An ONNX file as the start of a plan: judged, taken into the store as one file, run on the data; and raced later."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sparsify_deploy import menu
from sparsify_deploy.errors import CheckFailed, DataError, ModelError
from sparsify_deploy.recipe import Export
from sparsify_deploy.reporting.layer_verdict import file_part
from sparsify_deploy.reports import AS_GIVEN, BenchmarkReport, LayerReport, ModelReport, dump
from sparsify_deploy.stages.base import Estimate
from sparsify_deploy.stages.benchmark import BenchmarkEngines, Variant
from sparsify_deploy.stages.flavours import write_onnxruntime
from sparsify_deploy.stages.given import Given
from sparsify_deploy.stages.inference import run_test
from sparsify_deploy.stages.predictions import predictable
from sparsify_deploy.stages.subject import unmet_packages
from sparsify_deploy.tasks._fields import usual_name
from sparsify_deploy.types import Context, Facts, Json

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparsify_deploy.types import Arrays

_BATCH = 64
_LARGEST_FILE = 2**31 - 1
"""Bytes; protobuf writes no message that is larger."""


@dataclass(frozen=True)
class ImportOnnx:
    """Check the file and its shapes, pull in its external data, read N:M off its values, run it in ONNX Runtime."""

    subject: Given

    name: ClassVar[str] = "import_onnx"
    version: ClassVar[int] = 2
    inputs: ClassVar[tuple[str, ...]] = ()
    outputs: ClassVar[Mapping[str, str]] = {"onnx": "model.onnx", "report": "report.json"}
    environment: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime")

    def methods(self) -> Mapping[str, int]:
        version: int = menu.entry("runtimes", "onnxruntime").VERSION
        return {**self.subject.methods(), "runtimes/onnxruntime": version}

    def files(self) -> Mapping[str, Path]:
        return self.subject.files()

    def unmet(self) -> Sequence[str]:
        return unmet_packages("import_onnx", *self.subject.packages, "onnxruntime")

    def preflight(self) -> None:
        """The file can be read and fits the data."""
        _ = self.subject.fixed_batch, self.subject.examples

    def estimate(self) -> Estimate:
        return Estimate()

    def run(self, inputs: Mapping[str, Path], out: Path, context: Context) -> Facts:
        from sparsify_deploy.graph import file
        from sparsify_deploy.graph.dequantized import integer_operators, is_quantised
        from sparsify_deploy.graph.layers import all_layers

        source, path = self.subject.path, out / self.outputs["onnx"]
        model = file.load(source)
        external = _take(model, source, path)
        file.check(model, source)
        layers = file_part(all_layers(model))
        by_operators = integer_operators(model)
        precision = _precision(layers, quantised=is_quantised(model) or bool(by_operators))
        outputs, batch = outputs_of_file(self.subject, path)
        metrics = self._metrics(outputs, batch)
        report = ModelReport(
            metrics=metrics,
            examples=len(next(iter(batch.values()))) if self.subject.measured else 0,
            sparsity_asked=None,
            precision=precision,
            layers=layers,
            onnx_bytes=path.stat().st_size,
            latency=(),
            runtime="onnxruntime",
        )
        (out / self.outputs["report"]).write_text(dump(report), encoding="utf-8")
        held = [layer.name for layer in layers if layer.usable]
        context.progress.say(_line(report, len(held)))
        return {
            "opset": file.opset(model),
            "precision": precision,
            "flavour": AS_GIVEN if is_quantised(model) else "none",
            "inputs": [dataclasses.asdict(tensor) for tensor in file.inputs(model)],
            "outputs": [dataclasses.asdict(tensor) for tensor in file.outputs(model)],
            "operators": file.operators(model),
            "integer_operators": list(by_operators),
            "external_data": external,
            "layers_with_2:4": held,
            "metrics": metrics,
            "bytes": report.onnx_bytes,
            "casts": self._casts(),
            "data_notes": list(self.subject.data_notes),
            **predictable(path, quantized="INT8" in precision),
        }

    def _casts(self) -> dict[str, str]:
        return dict(getattr(self.subject.examples, "casts", {}))

    def _metrics(self, outputs: Arrays, batch: Arrays) -> dict[str, float]:
        """The task's metrics, where there are data; `ModelError` where the file has another number of classes."""
        if not self.subject.measured:
            return {}
        classes = self.subject.examples.classes
        wanted = getattr(self.subject.task.params, "output", None)
        logits = outputs.get(wanted or usual_name(outputs))
        if classes is not None and logits is not None and logits.ndim == 2 and logits.shape[1] != len(classes):
            raise ModelError(
                f"{self.subject.path.name}: its output gives {logits.shape[1]} classes and data.source "
                f"{self.subject.data.source} has {len(classes)}: they must be the same, in the same order"
            )
        return self.subject.opened_task.evaluate(outputs, batch)


@dataclass(frozen=True)
class GivenFlavour:
    """Rewrite the file for ONNX Runtime, with ranges it computes over calibration batches; both must answer alike."""

    subject: Given
    export: Export
    batches: int
    batch_size: int

    name: ClassVar[str] = "export_onnx.onnxruntime"
    version: ClassVar[int] = 1
    inputs: ClassVar[tuple[str, ...]] = ("onnx",)
    outputs: ClassVar[Mapping[str, str]] = {"onnx": "model.onnx"}
    environment: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime")

    def methods(self) -> Mapping[str, int]:
        version: int = menu.entry("runtimes", "onnxruntime").VERSION
        return {**self.subject.methods(), "runtimes/onnxruntime": version}

    def files(self) -> Mapping[str, Path]:
        return self.subject.files()

    def unmet(self) -> Sequence[str]:
        return unmet_packages("export_onnx.onnxruntime", *self.subject.packages, "onnxruntime")

    def preflight(self) -> None:
        """Nothing shows that the import does not show."""

    def estimate(self) -> Estimate:
        return Estimate()

    def run(self, inputs: Mapping[str, Path], out: Path, context: Context) -> Facts:
        from sparsify_deploy.export.parity import compare
        from sparsify_deploy.graph import dequantized, file

        path = out / self.outputs["onnx"]
        if not dequantized.is_quantised(file.load(inputs["onnx"])):
            raise ModelError(
                f"{self.subject.path.name}: has no Q/DQ to place for ONNX Runtime: remove the target's flavour"
            )
        names = self.subject.examples.inputs
        calibration = self.subject.calibration(self.batches, self.batch_size)
        rewritten = write_onnxruntime(inputs["onnx"], path, [{k: b[k].numpy() for k in names} for b in calibration])
        given, _ = outputs_of_file(self.subject, inputs["onnx"], self.export.parity_examples)
        answered, _ = outputs_of_file(self.subject, path, self.export.parity_examples)
        between = compare(given, answered, self.subject.answers(given))
        agreement = between.top1_agreement
        if agreement is not None and agreement < self.export.min_top1_agreement:
            raise CheckFailed(
                f"{path}: agrees with the file as given on {agreement:.2%} of {between.examples} top-1 answers, less "
                f"than export.min_top1_agreement {self.export.min_top1_agreement:g}; the file is kept"
            )
        return {
            "precision": "INT8",
            "flavour": "onnxruntime",
            "between_flavours": dataclasses.asdict(between),
            "outputs_with_trained_scale": list(rewritten.trained),
            "outputs_with_measured_range": list(rewritten.measured),
            "calibration_batches": len(calibration),
            "float_layers": dict(rewritten.float_layers),
            "bytes": path.stat().st_size,
        }


@dataclass(frozen=True)
class RaceGiven(BenchmarkEngines):
    """The race of the file against those of its variants that its content gives a meaning."""

    def preflight(self) -> None:
        """The batch sizes are ones that the file takes."""
        assert isinstance(self.subject, Given)
        fixed = self.subject.fixed_batch
        if fixed is not None and set(self.benchmark.batch_sizes) != {fixed}:
            raise DataError(
                f"benchmark.batch_sizes: {self.subject.path.name} is written for batches of {fixed}: give [{fixed}]"
            )

    def _report(self, inputs: Mapping[str, Path], out: Path, context: Context) -> BenchmarkReport:
        kinds = meaningful(inputs["given_onnx"])
        chosen = tuple(variant for variant in self.variants if variant.kind in kinds)
        return BenchmarkEngines._report(dataclasses.replace(self, variants=chosen), inputs, out, context)

    def _made(self, variant: Variant, source: Path, out: Path, context: Context) -> Any:
        """As any race does; a variant that the file cannot be turned into is left out with the reason."""
        try:
            return super()._made(variant, source, out, context)
        except ModelError as error:
            if variant.kind == "engine":
                raise
            return str(error)


def meaningful(path: Path) -> set[str]:
    """The kinds of variants that tell something of a file: its float form where it is quantised, its lower precision
    where it is not, its dense twin where a layer holds 2:4."""
    from sparsify_deploy.graph import dequantized, file
    from sparsify_deploy.graph.layers import weight_layers

    model = file.load(path)
    found = {"engine"}
    if dequantized.is_quantised(model):
        found.add("float")
    elif not dequantized.integer_operators(model):
        found.add("lower_precision")
    if any(layer.usable for layer in file_part(weight_layers(model))):
        found.add("dense_weights")
    return found


def outputs_of_file(subject: Given, path: Path, count: int | None = None) -> tuple[dict[str, NDArray[Any]], Arrays]:
    """What ONNX Runtime makes of the test examples, or of the first `count`, and these."""
    runtime = menu.entry("runtimes", "onnxruntime")
    if count is not None:
        count = min(count, len(subject.examples.split("test")))
    with runtime.open(path, runtime.Params()) as session:
        return run_test(session, subject, _BATCH, count)


def _take(model: Any, source: Path, target: Path) -> bool:
    """Write the file with all its weights in it; whether some lay in other files."""
    from sparsify_deploy.graph import file

    if model.ByteSize() > _LARGEST_FILE:
        raise ModelError(
            f"{source}: {model.ByteSize() / 2**30:.1f} GiB with its weights, and one ONNX file holds 2 GiB"
        )
    external = bool(model.ByteSize() > source.stat().st_size)  # reading its external data made it grow
    if external:
        file.save(model, target)
    else:
        shutil.copyfile(source, target)
    return external


def _precision(layers: Sequence[LayerReport], *, quantised: bool) -> str:
    """That of the weights; of a quantised file the layers left in float are not told."""
    kinds = {layer.precision for layer in layers}
    if quantised:
        return " + ".join(sorted(kinds - {"FP64", "FP32", "FP16", "BF16"})) or "INT8"
    return " + ".join(sorted(kinds)) or "FP32"


def _line(report: ModelReport, held: int) -> str:
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in sorted(report.metrics.items())) or "accuracy unknown"
    return f"  {report.precision}; {metrics}; 2:4 in {held} of {len(report.layers)} layers; zeros {report.sparsity:.1%}"


def notes(name: str, facts: Mapping[str, Json]) -> list[str]:
    """What a reader must know of an import besides its numbers."""
    found = [f"{name}: input {key} is turned into {kind}, which the file takes" for key, kind in facts["casts"].items()]
    if facts["integer_operators"]:
        found.append(
            f"{name}: quantised by {', '.join(facts['integer_operators'])}, not by Q/DQ: their layers cannot be judged"
        )
    if facts["external_data"]:
        found.append(f"{name}: its external data were taken into one file")
    return found
