"""The ONNX file, its parity with torch on real inputs, and 2:4 checked on the final values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from sparsify_deploy import menu
from sparsify_deploy.errors import CheckFailed, ModelError
from sparsify_deploy.recipe import NM, Export
from sparsify_deploy.recipe import Quantize as QuantizeSection
from sparsify_deploy.stages.base import Estimate
from sparsify_deploy.stages.inference import batches_of_test, run_all
from sparsify_deploy.stages.predictions import predictable
from sparsify_deploy.stages.quantize import rebuild
from sparsify_deploy.stages.subject import Subject, reproducible, unmet_packages
from sparsify_deploy.types import Context, Facts, Json

if TYPE_CHECKING:
    from torch import nn

    from sparsify_deploy.export.parity import Parity
    from sparsify_deploy.sparsity.mask import Mask
    from sparsify_deploy.types import Arrays

_PIECE = 32
"""Examples a batch of the parity check where batches differ in size."""

_FAR = 100
"""How much farther from torch a file is at other sizes if one of them became a constant."""

_CONSTANT = (
    "a size became a constant when the network was traced; compute it from a tensor's shape in forward, or give all "
    "examples one size"
)


@dataclass(frozen=True)
class ExportOnnx:
    """Export `quantized` where the branch has it, else `weights` with BatchNorm folded."""

    subject: Subject
    export: Export
    quantize: QuantizeSection | None
    nm: NM | None

    name: ClassVar[str] = "export_onnx"
    version: ClassVar[int] = 4
    inputs: ClassVar[tuple[str, ...]] = ("weights", "quantized", "mask")
    outputs: ClassVar[Mapping[str, str]] = {"onnx": "model.onnx"}
    environment: ClassVar[tuple[str, ...]] = ("torch", "onnx")

    def methods(self) -> Mapping[str, int]:
        return self.subject.methods()

    def files(self) -> Mapping[str, Path]:
        return self.subject.files()

    def unmet(self) -> Sequence[str]:
        quantised = ("modelopt",) if self.quantize is not None else ()
        return unmet_packages("export_onnx", "torch", *quantised, "onnxruntime")

    def preflight(self) -> None:
        self.subject.check_traceable()

    def estimate(self) -> Estimate:
        return Estimate()

    def run(self, inputs: Mapping[str, Path], out: Path, context: Context) -> Facts:
        from sparsify_deploy.sparsity.mask import Mask

        reproducible(context)
        model = network_of(self.subject, self.quantize, inputs)
        path = out / self.outputs["onnx"]
        write_onnx(self.subject, self.export, model, path)
        parity = check_parity(self.subject, self.export, model, path, quantised=self.quantize is not None)
        mask = Mask.load(inputs["mask"]) if "mask" in inputs else None
        checked = check_pattern(path, self.nm, mask)
        return {
            "opset": self.export.opset,
            "precision": "INT8" if self.quantize is not None else "FP32",
            "weights": "INT8 + DQ" if self.quantize and self.export.int8_weights else "FP32",
            "flavour": "tensorrt" if self.quantize is not None else "none",
            "parity": dataclasses.asdict(parity),
            "nm_checked": checked,
            "bytes": path.stat().st_size,
            **predictable(path, quantized=self.quantize is not None),
        }


def check_parity(subject: Subject, export: Export, model: nn.Module, path: Path, *, quantised: bool) -> Parity:
    """Torch against ONNX Runtime on test examples; `CheckFailed` beyond the recipe's limits.

    Where the size of an axis differs between batches, batch by batch, and once more at its least and largest size.
    """
    parity = _parity(subject, export, model, path)
    if not quantised:
        if parity.max_relative > export.max_relative_difference:
            raise CheckFailed(
                f"{path}: differs from torch by {parity.max_relative:.2e} of the largest output, "
                f"more than export.max_relative_difference {export.max_relative_difference:g}; it is kept"
                + _traced_alone(subject, model, path, parity)
            )
    elif parity.top1_agreement is not None and parity.top1_agreement < export.min_top1_agreement:
        raise CheckFailed(
            f"{path}: agrees with torch on {parity.top1_agreement:.2%} of {parity.examples} top-1 answers, "
            f"less than export.min_top1_agreement {export.min_top1_agreement:g}; the file is kept"
            + _traced_alone(subject, model, path, parity)
        )
    return parity


def _parity(subject: Subject, export: Export, model: nn.Module, path: Path) -> Parity:
    import torch

    from sparsify_deploy.export.parity import compare, together
    from sparsify_deploy.training.loop import predict

    split, names = subject.examples.split("test"), subject.examples.inputs
    count = min(export.parity_examples, len(split))
    if not subject.free_axes:
        reference, batch = predict(model, split, names, torch.arange(count))
        found = onnx_outputs(path, {name: batch[name] for name in names})
        return compare(reference, found, subject.answers(reference))
    parts = [_compared(subject, model, path, batch) for batch in batches_of_test(subject, _PIECE, count)]
    sizes = ({name: values.numpy() for name, values in each.items()} for each in subject.extremes())
    extremes = [_compared(subject, model, path, each) for each in sizes]
    whole = together(parts)
    # the examples there are filled up with their own tokens: no share of right answers can be drawn from them
    return dataclasses.replace(whole, max_relative=max(part.max_relative for part in (whole, *extremes)))


def _traced_alone(subject: Subject, model: nn.Module, path: Path, found: Parity) -> str:
    """The end of an error where the file answers as torch does at the sizes it was traced with, and only there."""
    from sparsify_deploy.export.parity import compare

    if not subject.free_axes:
        return ""
    batch, names = subject.timed_arrays(1), subject.examples.inputs
    traced = compare(torch_outputs(model, batch, names), onnx_outputs(path, {name: batch[name] for name in names}))
    if traced.max_relative > found.max_relative / _FAR:
        return ""
    shapes = ", ".join(f"{name} {batch[name].shape}" for name in names)
    return f"; it agrees with torch at {shapes}, as it was traced: {_CONSTANT}"


def _compared(subject: Subject, model: nn.Module, path: Path, batch: Arrays) -> Parity:
    from sparsify_deploy.export.parity import compare

    names = subject.examples.inputs
    reference = torch_outputs(model, batch, names)
    try:
        found = onnx_outputs(path, {name: batch[name] for name in names})
        return compare(reference, found, subject.answers(reference))
    except ModelError as error:
        shapes = ", ".join(f"{name} {batch[name].shape}" for name in names)
        raise ModelError(f"{path}: does not take {shapes}, though torch does: {_CONSTANT} ({error})") from error


def torch_outputs(model: nn.Module, batch: Arrays, names: Sequence[str]) -> Arrays:
    """What a network in evaluation mode answers to one batch."""
    import torch

    from sparsify_deploy.types import outputs_of

    given = {name: torch.from_numpy(batch[name]) for name in names}
    with torch.no_grad():
        outputs = outputs_of(model, given, names)
    return {
        name: value.float().numpy() if value.is_floating_point() else value.numpy() for name, value in outputs.items()
    }


def onnx_outputs(path: Path, batch: Arrays) -> Arrays:
    """What a file answers to a batch in ONNX Runtime, all at once or example by example as its batch axis has it."""
    runtime = menu.entry("runtimes", "onnxruntime")
    with runtime.open(path, runtime.Params()) as session:
        fixed = session.inputs[0].shape[0]
        return run_all(session, batch, fixed or len(next(iter(batch.values()))), fixed=fixed is not None)


def network_of(subject: Subject, quantize: QuantizeSection | None, inputs: Mapping[str, Path]) -> nn.Module:
    """The network as the branch has it: quantised, or in float with BatchNorm folded; in eval mode."""
    from sparsify_deploy.quantization.folding import fold_batchnorm

    if quantize is not None and "quantized" in inputs:
        module: nn.Module = rebuild(subject, quantize, inputs["quantized"]).module
    else:
        module = fold_batchnorm(subject.network(inputs.get("weights")))
    return module.eval()


def write_onnx(subject: Subject, settings: Export, model: nn.Module, path: Path) -> None:
    """Export with the data's own input names and a test example; INT8 weights as integers if the recipe says so."""
    from sparsify_deploy.export.onnx import export
    from sparsify_deploy.graph import file
    from sparsify_deploy.graph.int8_weights import store_int8_weights_

    export(
        model,
        subject.example(),
        subject.examples.inputs,
        path,
        opset=settings.opset,
        dynamic_batch=settings.dynamic_batch,
        free=subject.free_axes,
    )
    if settings.int8_weights:
        written = file.load(path)
        store_int8_weights_(written)
        file.save(written, path)


def check_pattern(path: Path, nm: NM | None, mask: Mask | None) -> list[dict[str, Json]]:
    """Count groups with more than N non-zeros in each layer the mask holds to N:M, on the file's final values."""
    from sparsify_deploy.graph import file, layers
    from sparsify_deploy.graph.nm import violations
    from sparsify_deploy.sparsity.nm import is_nm

    if nm is None or mask is None:
        return []
    n, m = nm.nm
    found = {layer.weight: layer for layer in layers.weight_layers(file.load(path))}
    rows: list[dict[str, Json]] = []
    for parameter, kept in mask.items():
        if kept.shape[1] % m or not is_nm(kept, n, m):
            continue
        if parameter not in found:
            raise CheckFailed(f"{path}: holds no initializer {parameter!r}, so its {nm.pattern} cannot be checked")
        bad = violations(found[parameter].values, n, m)
        rows.append({"parameter": parameter, "violations": bad, "precision": found[parameter].precision})
    broken = [str(row["parameter"]) for row in rows if row["violations"]]
    if broken:
        raise CheckFailed(f"{path}: final values break {nm.pattern} along input channels in {', '.join(broken)}")
    return rows
