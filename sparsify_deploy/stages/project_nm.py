"""N:M projection along input channels, refill, and fine-tuning with the mask held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from sparsify_deploy import menu
from sparsify_deploy.recipe import NM
from sparsify_deploy.stages.base import Estimate
from sparsify_deploy.stages.fitting import estimate, fit_, hold
from sparsify_deploy.stages.subject import Subject, reproducible, save_weights, unmet_packages
from sparsify_deploy.training.settings import Distillation, Training
from sparsify_deploy.types import Context, Facts, Json

if TYPE_CHECKING:
    from torch import nn

    from sparsify_deploy.graph.eligibility import Answer
    from sparsify_deploy.sparsity.layers import Layer
    from sparsify_deploy.sparsity.mask import Mask


@dataclass(frozen=True)
class ProjectNM:
    """Project every layer the recipe chooses; layers left out are named with the reason."""

    subject: Subject
    nm: NM
    training: Training | None
    batch_size: int
    distillation: Distillation | None = None

    name: ClassVar[str] = "project_nm"
    version: ClassVar[int] = 1
    inputs: ClassVar[tuple[str, ...]] = ("weights", "mask", "teacher", "sensitivity")
    outputs: ClassVar[Mapping[str, str]] = {"weights": "weights.safetensors", "mask": "mask.safetensors"}
    environment: ClassVar[tuple[str, ...]] = ()

    def methods(self) -> Mapping[str, int]:
        version: int = menu.entry("methods", "static").VERSION
        return {**self.subject.methods(), "methods/static": version}

    def files(self) -> Mapping[str, Path]:
        return self.subject.files()

    def unmet(self) -> Sequence[str]:
        return unmet_packages("project_nm", "torch")

    def preflight(self) -> None:
        from sparsify_deploy.sparsity.layers import prunable

        choose(prunable(self.subject.check_network()), self.nm)

    def estimate(self) -> Estimate:
        return estimate(self.subject, self.training)

    def run(self, inputs: Mapping[str, Path], out: Path, context: Context) -> Facts:
        from sparsify_deploy.sparsity.layers import prunable
        from sparsify_deploy.sparsity.mask import Mask

        device = reproducible(context)
        model = self.subject.network(inputs.get("weights"))
        self.subject.check_fits(model)
        layers = prunable(model)
        sparse = Mask.load(inputs["mask"]) if "mask" in inputs else Mask({})
        choices = choose(layers, self.nm)
        mask, table = self._project(model.to(device), layers, sparse, choices)
        mask.apply_(model)
        facts: dict[str, Json] = {
            "pattern": self.nm.pattern,
            "layers": table,
            "projected": sum(row["projected"] for row in table),
        }
        if self.training is not None:
            held = hold(True, self.training, phase="fine_tune")
            facts |= fit_(model, held, mask, subject=self.subject, out=out, context=context)[1]
        save_weights(model, out / self.outputs["weights"])
        mask.save(out / self.outputs["mask"])
        return facts

    def _project(
        self, model: nn.Module, layers: Sequence[Layer], sparse: Mask, choices: Mapping[str, Answer]
    ) -> tuple[Mask, list[dict[str, Json]]]:
        """The new mask, and one row a layer on what was done and what it cost in weights and in L1."""
        from sparsify_deploy.sparsity.nm import nm_mask, refill
        from sparsify_deploy.training.gradients import dense_gradients

        n, m = self.nm.nm
        chosen = [layer for layer in layers if choices[layer.name].ok]
        gradients = (
            dense_gradients(
                model,
                self.subject.opened_task,
                self.subject.calibration(self.nm.fill_batches, self.batch_size),
                self.subject.examples.inputs,
                [layer.parameter for layer in chosen],
            )
            if self.nm.fill and chosen
            else {}
        )
        masks, table = dict(sparse), []
        for layer in layers:
            row: dict[str, Json] = {
                "layer": layer.name,
                "shape": list(layer.weight.shape),
                "projected": choices[layer.name].ok,
                "reason": choices[layer.name].reason,
            }
            if choices[layer.name].ok:
                weight = layer.weight.detach()
                kept = nm_mask(weight, n, m, sparse.get(layer.parameter))
                norm = weight.abs().sum().item()
                row["kept_l1"] = (weight.abs() * kept).sum().item() / norm if norm else 1.0
                row["kept_weights"] = int(kept.sum())
                if self.nm.fill:
                    kept = refill(kept, gradients[layer.parameter], n, m)
                    row["refilled"] = int(kept.sum()) - row["kept_weights"]
                masks[layer.parameter] = kept.cpu()
            table.append(row)
        return type(sparse)(masks), table


def choose(layers: Sequence[Layer], nm: NM) -> dict[str, Answer]:
    """For each layer, whether the recipe projects it, and why or why not."""
    from sparsify_deploy.graph import eligibility
    from sparsify_deploy.sparsity.layers import select

    m = nm.nm[1]
    dense = select(layers, nm.keep_dense)
    answers = {}
    for layer in layers:
        shape = tuple(layer.weight.shape)
        answer = eligibility.pattern_possible(shape, layer.groups, m)
        if answer.ok and nm.layers == "rule_of_thumb":
            answer = eligibility.rule_of_thumb(shape, layer.groups, m)
        if layer.name in dense:
            answer = eligibility.Answer(False, "kept dense by the recipe (nm.keep_dense)")
        answers[layer.name] = answer
    return answers


@dataclass(frozen=True)
class LayerForecast:
    """Whether a layer would be projected, and why or why not, known from its shape before any training."""

    name: str
    shape: tuple[int, ...]
    projected: bool
    reason: str


def forecast_layers(subject: Subject, nm: NM | None) -> tuple[LayerForecast, ...]:
    """One row a prunable layer; with no `nm` section, for 2:4 by the rule of thumb."""
    from sparsify_deploy.sparsity.layers import prunable

    layers = prunable(subject.network())
    answers = choose(layers, nm or NM())
    return tuple(
        LayerForecast(layer.name, tuple(layer.weight.shape), answers[layer.name].ok, answers[layer.name].reason)
        for layer in layers
    )
