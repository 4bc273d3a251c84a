"""The `onnxruntime` flavour of an exported file: the same trained scales, UINT8 activations, Q on layer outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from sparsify_deploy import menu
from sparsify_deploy.recipe import NM, Export
from sparsify_deploy.recipe import Quantize as QuantizeSection
from sparsify_deploy.stages.base import Estimate
from sparsify_deploy.stages.calibration import calibration_files, calibration_methods
from sparsify_deploy.stages.export_onnx import check_parity, check_pattern, network_of, onnx_outputs
from sparsify_deploy.stages.inference import batches_of_test, run_all
from sparsify_deploy.stages.subject import Subject, reproducible, unmet_packages
from sparsify_deploy.types import Context, Facts

if TYPE_CHECKING:
    from sparsify_deploy.graph.flavour import Rewritten
    from sparsify_deploy.types import Arrays

_PIECE = 32
"""Examples a batch of the comparison where batches differ in size."""


@dataclass(frozen=True)
class ExportFlavour:
    """Rewrite the `tensorrt` file of the branch for ONNX Runtime; both must answer as torch does.

    Outputs that have no trained scale get the range which the `tensorrt` file computes over the calibration batches.
    """

    subject: Subject
    export: Export
    quantize: QuantizeSection
    nm: NM | None
    batch_size: int

    name: ClassVar[str] = "export_onnx.onnxruntime"
    version: ClassVar[int] = 2
    inputs: ClassVar[tuple[str, ...]] = ("onnx", "weights", "quantized", "mask")
    outputs: ClassVar[Mapping[str, str]] = {"onnx": "model.onnx"}
    environment: ClassVar[tuple[str, ...]] = ("torch", "onnx", "onnxruntime")

    def methods(self) -> Mapping[str, int]:
        version: int = menu.entry("runtimes", "onnxruntime").VERSION
        return {**self.subject.methods(), **calibration_methods(self.quantize), "runtimes/onnxruntime": version}

    def files(self) -> Mapping[str, Path]:
        return {**self.subject.files(), **calibration_files(self.quantize)}

    def unmet(self) -> Sequence[str]:
        return unmet_packages("export_onnx.onnxruntime", "torch", "modelopt", "onnxruntime")

    def preflight(self) -> None:
        """Nothing shows that the `tensorrt` export does not show."""

    def estimate(self) -> Estimate:
        return Estimate()

    def run(self, inputs: Mapping[str, Path], out: Path, context: Context) -> Facts:
        from sparsify_deploy.export.parity import compare, together
        from sparsify_deploy.sparsity.mask import Mask

        reproducible(context)
        path = out / self.outputs["onnx"]
        names = self.subject.examples.inputs
        settings = self.quantize
        calibration = self.subject.calibration(settings.calibration_batches, self.batch_size, settings.calibration_data)
        batches = [{name: batch[name].numpy() for name in names} for batch in calibration]
        rewritten = write_onnxruntime(inputs["onnx"], path, batches)
        for layer, reason in rewritten.float_layers.items():
            context.progress.say(f"onnxruntime flavour: {layer} runs in float: {reason}")
        model = network_of(self.subject, self.quantize, inputs)
        parity = check_parity(self.subject, self.export, model, path, quantised=True)
        between = together(
            [
                compare(reference, onnx_outputs(path, examples), self.subject.answers(reference))
                for examples in self._examples(parity.examples)
                for reference in [onnx_outputs(inputs["onnx"], examples)]
            ]
        )
        mask = Mask.load(inputs["mask"]) if "mask" in inputs else None
        return {
            "opset": self.export.opset,
            "precision": "INT8",
            "weights": "INT8 + DQ",
            "flavour": "onnxruntime",
            "parity": dataclasses.asdict(parity),
            "between_flavours": dataclasses.asdict(between),
            "outputs_with_trained_scale": list(rewritten.trained),
            "outputs_with_measured_range": list(rewritten.measured),
            "calibration_batches": len(batches),
            "float_layers": dict(rewritten.float_layers),
            "nm_checked": check_pattern(path, self.nm, mask),
            "bytes": path.stat().st_size,
        }

    def _examples(self, count: int) -> Iterator[Arrays]:
        """The inputs of the first `count` test examples, at once, or in batches where these differ in size."""
        batches = batches_of_test(self.subject, _PIECE, count)
        whole = batches if self.subject.free_axes else [self.subject.test_arrays(count)]
        yield from ({name: batch[name] for name in self.subject.examples.inputs} for batch in whole)


def write_onnxruntime(source: Path, target: Path, batches: Iterable[Arrays]) -> Rewritten:
    """Write the file `source`, of the `tensorrt` flavour, as `target` of the `onnxruntime` one.

    Outputs that have no trained scale get the smallest and largest value which `source` computes over `batches`.
    """
    from sparsify_deploy.graph import file, flavour

    model = file.load(source)
    ranges = measured_ranges(source, flavour.unranged(model), batches, target.with_suffix(".tapped.onnx"))
    rewritten = flavour.to_onnxruntime_(model, ranges)
    file.check(model, target)
    file.save(model, target)
    return rewritten


def measured_ranges(
    source: Path, names: tuple[str, ...], batches: Iterable[Arrays], scratch: Path
) -> Mapping[str, tuple[float, float]]:
    """The smallest and largest value of each tensor over all batches; `scratch` is a file it writes and removes.

    A file with a fixed batch gets the examples in batches of that size, the last one filled up with its first.
    """
    from sparsify_deploy.graph import file, taps

    if not names:
        return {}
    runtime = menu.entry("runtimes", "onnxruntime")
    file.save(taps.with_outputs(file.load(source), names), scratch)
    ranges: dict[str, tuple[float, float]] = {}
    try:
        with runtime.open(scratch, runtime.Params()) as session:
            fixed = session.inputs[0].shape[0]
            for batch in batches:
                size = fixed or len(next(iter(batch.values())))
                found = run_all(session, batch, size, fixed=fixed is not None)
                for name in names:
                    low, high = ranges.get(name, (float("inf"), float("-inf")))
                    ranges[name] = min(low, float(found[name].min())), max(high, float(found[name].max()))
    finally:
        scratch.unlink()
    return ranges
