"""How much the network loses when one layer alone is projected on N:M, and when one alone is INT8."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from sparsify_deploy.artifacts import durable
from sparsify_deploy.errors import CorruptArtifact, DataError, Interrupted, ModelError
from sparsify_deploy.recipe import NM
from sparsify_deploy.recipe import Quantize as QuantizeSection
from sparsify_deploy.reports import LayerSensitivity, Score, SensitivityReport, dump
from sparsify_deploy.stages.base import Estimate
from sparsify_deploy.stages.calibration import calibration_files, calibration_methods
from sparsify_deploy.stages.project_nm import choose
from sparsify_deploy.stages.quantize import Quantize, settings_of
from sparsify_deploy.stages.subject import Subject, reproducible, unmet_packages
from sparsify_deploy.types import Context, Direction, Facts, Json

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor, nn

    from sparsify_deploy.graph.eligibility import Answer
    from sparsify_deploy.quantization.int8 import Quantized
    from sparsify_deploy.sparsity.layers import Layer
    from sparsify_deploy.sparsity.mask import Mask
    from sparsify_deploy.types import Split

PARTIAL = "measured.partial.json"
"""What was measured so far; it goes when the stage is committed."""

_UNREACHED = "float: the forward pass does not reach it"


@dataclass(frozen=True)
class Sensitivity:
    """Evaluate the network once for each layer with nothing but that layer changed.

    Layers are chosen by these numbers, so they come from `examples` training examples without augmentation: the test
    split stays unseen. A projected layer is neither refilled nor fine-tuned, channels are not permuted, and BatchNorm
    keeps its statistics. `metric` None is the task's first.
    """

    subject: Subject
    nm: NM
    quantize: QuantizeSection
    metric: str | None
    batch_size: int
    examples: int = 2048

    name: ClassVar[str] = "sensitivity"
    version: ClassVar[int] = 2
    inputs: ClassVar[tuple[str, ...]] = ("weights", "mask")
    outputs: ClassVar[Mapping[str, str]] = {"sensitivity": "sensitivity.json"}
    environment: ClassVar[tuple[str, ...]] = ("modelopt",)

    def methods(self) -> Mapping[str, int]:
        return {**self.subject.methods(), **calibration_methods(self.quantize)}

    def files(self) -> Mapping[str, Path]:
        return {**self.subject.files(), **calibration_files(self.quantize)}

    def unmet(self) -> Sequence[str]:
        return unmet_packages("sensitivity", "torch", "modelopt", "requests", "huggingface_hub")

    def preflight(self) -> None:
        from sparsify_deploy.sparsity.layers import prunable

        choose(prunable(self.subject.check_network()), self.nm)
        if self.quantize.keep_float:
            Quantize(self.subject, self.quantize, None, self.batch_size).preflight()

    def estimate(self) -> Estimate:
        return Estimate()

    def run(self, inputs: Mapping[str, Path], out: Path, context: Context) -> Facts:
        from sparsify_deploy.sparsity.layers import prunable
        from sparsify_deploy.sparsity.mask import Mask

        device = reproducible(context)
        model = self.subject.network(inputs.get("weights"))
        self.subject.check_fits(model)
        mask = Mask.load(inputs["mask"]) if "mask" in inputs else Mask({})
        quantized, obstacle = self._quantized(model, device)
        layers = prunable(model.to(device))
        choices = choose(layers, self.nm, mask)
        rules = {row.name: row.rule for row in quantized.placement} if quantized else {}
        chosen = [layer for layer in layers if choices[layer.name].ok]
        placed = {row.name for row in quantized.placement if row.quantised} if quantized else set()
        int8 = [layer.name for layer in layers if layer.name in placed]
        total = 1 + len(chosen) + (2 + len(int8) if quantized else 0)
        trials = _Trials(self, out / PARTIAL, device, context, total)
        before, projected = _projected(trials, model, chosen, self.nm, mask)
        folded, whole, alone = _quantised(trials, quantized, int8) if quantized else (None, None, {})
        if obstacle:
            context.progress.say(f"no layer quantised alone: {obstacle}")
        report = SensitivityReport(
            metric=trials.metric,
            direction=trials.direction,
            split="train",
            examples=len(trials.split),
            pattern=self.nm.pattern,
            baseline=before.metric,
            baseline_loss=before.loss,
            baseline_float=folded.metric if folded else None,
            int8_all=whole,
            not_quantized=obstacle,
            layers=tuple(
                _row(layer, choices[layer.name], projected, alone, obstacle or rules.get(layer.name, _UNREACHED))
                for layer in layers
            ),
        )
        (out / self.outputs["sensitivity"]).write_text(dump(report), encoding="utf-8")
        return {"metric": trials.metric, "examples": len(trials.split), "worst": _worst(report), "untried": obstacle}

    def _quantized(self, model: nn.Module, device: torch.device) -> tuple[Quantized | None, str]:
        """The calibrated INT8 network on `device`; or None and why there is none, such as a forward torch.fx cannot
        follow, which is no reason to leave the projections unmeasured."""
        from sparsify_deploy.quantization import int8

        try:
            quantized = int8.prepare(model, settings_of(self.quantize))
            quantized.module.to(device)
            batches = self.subject.calibration(
                self.quantize.calibration_batches, self.batch_size, self.quantize.calibration_data
            )
            int8.calibrate_(quantized, batches, self.subject.examples.inputs)
        except ModelError as error:
            return None, str(error)
        return quantized, ""


@dataclass(frozen=True)
class _Trial:
    """What a network scored: the metric, and the loss without training-only terms."""

    metric: float
    loss: float


class _Trials:
    """Trials of networks on the chosen examples; each is on disk before the next begins and is never made twice."""

    def __init__(self, stage: Sensitivity, path: Path, device: torch.device, context: Context, total: int) -> None:
        import torch

        from sparsify_deploy.training.batches import generator
        from sparsify_deploy.training.checkpoint import environment

        self.task = stage.subject.opened_task
        self.metric = stage.metric or next(iter(self.task.metrics))
        self.direction: Direction = self.task.metrics[self.metric]
        self.inputs = stage.subject.examples.inputs
        train = stage.subject.examples.split("train")
        order = torch.randperm(len(train), generator=generator("sensitivity", stage.subject.seed, 0))
        self.split = _Part(train, order[: stage.examples].sort().values)
        self._path, self._context, self._total = path, context, total
        self._environment: Json = environment(device)
        self._found: dict[str, list[float]] = self._kept()

    def _kept(self) -> dict[str, list[float]]:
        """What an earlier attempt on a machine like this one measured."""
        if not self._path.is_file():
            return {}
        try:
            kept = durable.read_json(self._path)
        except CorruptArtifact as error:
            advice = "delete that file and run the same command again: it measures anew"
            raise CorruptArtifact(f"{error}: {advice}") from None
        if kept["environment"] != self._environment:
            self._context.progress.say("sensitivity: measured anew, for the device or torch changed since it stopped")
            return {}
        self._context.progress.say(f"sensitivity: goes on after {len(kept['found'])} of {self._total} measurements")
        found: dict[str, list[float]] = kept["found"]
        return found

    def __call__(self, what: str, model: nn.Module, change: AbstractContextManager[None] | None = None) -> _Trial:
        """The trial of that name: `model` evaluated within `change`. Raises `Interrupted` before one if asked to."""
        from sparsify_deploy.training.evaluation import evaluate

        if what not in self._found:
            if self._context.stop_requested():
                done = f"{len(self._found)} of {self._total}"
                raise Interrupted(f"sensitivity: stopped after {done} measurements; the same command goes on from here")
            try:
                with change or nullcontext():
                    scores = evaluate(model, self.task, self.split, self.inputs)
            except DataError as error:
                raise DataError(f"{what}: {error}") from error
            self._found[what] = [float(scores[self.metric]), float(scores["loss"])]
            if not all(map(math.isfinite, self._found[what])):
                raise ModelError(f"{what}: {self.metric} or loss is not finite; train the network or check its weights")
            durable.write_json(self._path, {"environment": self._environment, "found": self._found})
        self._context.progress.update("sensitivity", len(self._found), self._total, what)
        return _Trial(*self._found[what])

    def against(self, before: _Trial, after: _Trial) -> Score:
        """What `after` lost, positive where it is worse."""
        sign = 1.0 if self.direction == "higher" else -1.0
        return Score(after.metric, sign * (before.metric - after.metric), after.loss - before.loss)


@dataclass(frozen=True)
class _Part:
    """The examples of a split at `indices`."""

    split: Split
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        return self.split.take(self.indices[indices])


def _projected(
    trials: _Trials, model: nn.Module, layers: Sequence[Layer], nm: NM, mask: Mask
) -> tuple[_Trial, dict[str, tuple[int, Score]]]:
    """The network as it stands; and by layer name what is lost when it alone is projected, with its rank from 1."""
    before = trials("as it stands", model)
    scores = {
        layer.name: trials.against(
            before,
            trials(f"{layer.name} on {nm.pattern}", model, projected(layer, *nm.nm, mask.get(layer.parameter))),
        )
        for layer in layers
    }
    worst = sorted(scores, key=lambda name: (-scores[name].drop, -scores[name].loss_increase))  # ties: module order
    return before, {name: (rank, scores[name]) for rank, name in enumerate(worst, start=1)}


def _quantised(trials: _Trials, quantized: Quantized, layers: Iterable[str]) -> tuple[_Trial, Score, dict[str, Score]]:
    """The folded network in float; what is lost with all of it INT8; by layer name, with that layer alone INT8."""
    from sparsify_deploy.quantization import int8

    folded = trials("folded, in float", quantized.module, int8.only(quantized, ()))
    whole = trials.against(folded, trials("all INT8", quantized.module))
    alone = {
        name: trials.against(folded, trials(f"{name} INT8", quantized.module, int8.only(quantized, (name,))))
        for name in layers
    }
    return folded, whole, alone


@contextlib.contextmanager
def projected(layer: Layer, n: int, m: int, mask: Tensor | None) -> Iterator[None]:
    """Within it, `layer` holds only what N:M keeps of the weights that `mask` keeps; after it, its own bits again."""
    import torch

    from sparsify_deploy.sparsity.nm import nm_mask

    weight = layer.weight.detach()
    own = weight.clone()
    kept = nm_mask(weight, n, m, mask.to(weight.device) if mask is not None else None)
    with torch.no_grad():
        weight.masked_fill_(~kept, 0.0)
        try:
            yield
        finally:
            weight.copy_(own)


def _row(
    layer: Layer, choice: Answer, projected: Mapping[str, tuple[int, Score]], alone: Mapping[str, Score], rule: str
) -> LayerSensitivity:
    rank, score = projected.get(layer.name, (None, None))
    return LayerSensitivity(
        layer=layer.name,
        parameter=layer.parameter,
        shape=tuple(layer.weight.shape),
        projected=score,
        rank=rank,
        reason=choice.reason,
        quantized=alone.get(layer.name),
        quantized_reason=rule,
    )


def _worst(report: SensitivityReport) -> str | None:
    return next((row.layer for row in report.layers if row.rank == 1), None)
