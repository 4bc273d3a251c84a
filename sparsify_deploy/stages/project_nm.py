"""N:M projection along input channels, refill, and fine-tuning with the mask held; on the way looser patterns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from sparsify_deploy import menu
from sparsify_deploy.errors import UsageError
from sparsify_deploy.params import n_and_m
from sparsify_deploy.recipe import NM
from sparsify_deploy.reports import SensitivityReport, load
from sparsify_deploy.stages.base import Estimate
from sparsify_deploy.stages.choice import already, keep_worst, loosened
from sparsify_deploy.stages.fitting import Fit, estimate, fit_, hold
from sparsify_deploy.stages.subject import Subject, reproducible, save_weights, unmet_packages
from sparsify_deploy.stages.teacher import check_teacher, taught, teacher_files, teacher_inputs
from sparsify_deploy.stages.training_checks import check_training, unmet_by_training
from sparsify_deploy.training.settings import Distillation, Training
from sparsify_deploy.types import Context, Facts, Json

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from sparsify_deploy.graph.eligibility import Answer
    from sparsify_deploy.sparsity.layers import Layer
    from sparsify_deploy.sparsity.mask import Mask

_CHECKED = 16
"""Test examples whose outputs a permutation must leave as they are."""


@dataclass(frozen=True)
class ProjectNM:
    """Project every layer the recipe chooses; layers left out are named with the reason.

    Each pattern of `nm.via`, then `nm.pattern`, is projected, refilled and trained with its mask held for an equal
    share of the steps; the last takes what is left over.
    """

    subject: Subject
    nm: NM
    training: Training | None
    batch_size: int
    distillation: Distillation | None = None

    name: ClassVar[str] = "project_nm"
    version: ClassVar[int] = 1
    outputs: ClassVar[Mapping[str, str]] = {"weights": "weights.safetensors", "mask": "mask.safetensors"}
    environment: ClassVar[tuple[str, ...]] = ()

    @property
    def inputs(self) -> tuple[str, ...]:
        ranked = ("sensitivity",) if self.nm.keep_worst_dense else ()
        return ("weights", "mask", *teacher_inputs(self.distillation), *ranked)

    def methods(self) -> Mapping[str, int]:
        version: int = menu.entry("methods", "static").VERSION
        return {**self.subject.methods(), "methods/static": version}

    def files(self) -> Mapping[str, Path]:
        return {**self.subject.files(), **teacher_files(self.distillation)}

    def unmet(self) -> Sequence[str]:
        return [*unmet_packages("project_nm", "torch"), *unmet_by_training(self.subject, self.training)]

    def preflight(self) -> None:
        from sparsify_deploy.sparsity.layers import prunable

        choose(prunable(self.subject.check_network()), self.nm)
        self._fits()
        check_training(self.subject, self.training, self.subject.check_network())
        check_teacher(self.distillation, self.subject)

    def estimate(self) -> Estimate:
        return estimate(self.subject, self.training)

    def run(self, inputs: Mapping[str, Path], out: Path, context: Context) -> Facts:
        from sparsify_deploy.sparsity.layers import prunable
        from sparsify_deploy.sparsity.mask import Mask

        device = reproducible(context)
        model = self.subject.network(inputs.get("weights"))
        self.subject.check_fits(model)
        mask = Mask.load(inputs["mask"]) if "mask" in inputs else Mask({})
        layers = prunable(model.to(device))
        choices = self._choices(layers, mask, inputs.get("sensitivity"), context)
        facts: dict[str, Json] = {}
        if self.nm.permute != "none":
            mask, facts["permutation"] = self._permute_(model, mask, choices, context)
        layers = prunable(model)
        held = already(layers, self.nm, mask)
        tables, trained = [], []
        with taught(self.distillation if self.training else None, self.subject, inputs, model) as teacher:
            for part, (pattern, fit) in enumerate(self._fits()):
                last = pattern == self.nm.pattern
                answers = choices if last else loosened(layers, choices, pattern, held)
                mask, table = self._project(model, layers, mask, answers, pattern)
                mask.apply_(model)
                tables.append(_tabled(pattern, table))
                if fit is not None:
                    kept, fitted = fit_(
                        model,
                        fit,
                        mask,
                        subject=self.subject,
                        out=out,
                        context=context,
                        distillation=teacher,
                        part=part,
                    )
                    mask = mask if kept is None else kept
                    trained.append(fitted)
            facts |= tables[-1]
            if self.nm.via:
                facts["via"] = tables[:-1]
            if trained:
                facts |= trained[0] if len(trained) == 1 else _joined(model, trained, self.subject)
            if teacher is not None:
                facts["distillation"] = teacher.facts
        save_weights(model, out / self.outputs["weights"])
        mask.save(out / self.outputs["mask"])
        return facts

    def _choices(
        self, layers: Sequence[Layer], mask: Mask, sensitivity: Path | None, context: Context
    ) -> dict[str, Answer]:
        """Which layers are projected, and why or why not, with what was measured of them."""
        choices = choose(layers, self.nm, mask)
        if sensitivity is not None:
            held = already(layers, self.nm, mask)
            losing = [layer for layer in layers if layer.name not in held]
            worst = keep_worst(losing, choices, self.nm, load(SensitivityReport, sensitivity))
            if len(worst) < self.nm.keep_worst_dense:
                context.progress.say(
                    f"nm.keep_worst_dense {self.nm.keep_worst_dense}: only {len(worst)} layers would be projected and "
                    "lose by it"
                )
            choices |= worst
        return choices

    def _fits(self) -> list[tuple[str, Fit | None]]:
        """The patterns in the order they are projected, each with its share of the fine-tuning."""
        patterns = (*self.nm.via, self.nm.pattern)
        if self.training is None:
            return [(pattern, None) for pattern in patterns]
        total = self.training.total_steps(len(self.subject.examples.split("train")))
        share = total // len(patterns)
        if share == 0:
            raise UsageError(
                f"nm.fine_tune: {total} steps cannot be shared by {len(patterns)} patterns ({', '.join(patterns)}): "
                "give more, or leave some of nm.via out"
            )
        steps = [*[share] * len(self.nm.via), total - share * len(self.nm.via)]
        shares = [self.training.model_copy(update={"epochs": None, "steps": own}) for own in steps]
        if not self.nm.via:
            shares = [self.training]
        return [(pattern, hold(True, own, "fine_tune")) for pattern, own in zip(patterns, shares, strict=True)]

    def _permute_(
        self, model: nn.Module, mask: Mask, choices: Mapping[str, Answer], context: Context
    ) -> tuple[Mask, dict[str, Json]]:
        """Reorder channels in place, before any projection; the mask that goes with the new order, and the facts."""
        from sparsify_deploy.sparsity.permutation import permute_

        method = self.nm.permute
        assert method != "none"
        chosen = [name for name, answer in choices.items() if answer.ok]
        example, inputs = self.subject.example(_CHECKED), self.subject.examples.inputs
        report = permute_(model, example, inputs, chosen, *self.nm.nm, method, mask, progress=context.progress)
        facts = {"method": method, **report.facts()}
        context.progress.say(
            f"{method}: {report.permuted} of {len(chosen)} layers permuted, {self.nm.pattern} keeps "
            f"{facts['kept_after']:.6g} in place of {facts['kept_before']:.6g} of {facts['whole']:.6g} L1 magnitude; "
            f"outputs differ by {report.max_difference:.1e} in float64"
        )
        return type(mask)(report.masks), facts

    def _project(
        self, model: nn.Module, layers: Sequence[Layer], sparse: Mask, choices: Mapping[str, Answer], pattern: str
    ) -> tuple[Mask, list[dict[str, Json]]]:
        """The new mask, and one row a layer on what was done and what it cost in weights and in L1."""
        from sparsify_deploy.sparsity.nm import nm_mask, refill
        from sparsify_deploy.training.gradients import dense_gradients

        n, m = n_and_m(pattern)
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
                kept = nm_mask(weight, n, m, _on(sparse.get(layer.parameter), weight.device))
                norm = weight.abs().sum().item()
                row["kept_l1"] = (weight.abs() * kept).sum().item() / norm if norm else 1.0
                row["kept_weights"] = int(kept.sum())
                if self.nm.fill:
                    kept = refill(kept, gradients[layer.parameter], n, m)
                    row["refilled"] = int(kept.sum()) - row["kept_weights"]
                masks[layer.parameter] = kept.cpu()
            table.append(row)
        return type(sparse)(masks), table


def _on(mask: Tensor | None, device: torch.device) -> Tensor | None:
    return mask.to(device) if mask is not None else None


def _tabled(pattern: str, table: Sequence[Mapping[str, Json]]) -> dict[str, Json]:
    return {"pattern": pattern, "layers": list(table), "projected": sum(row["projected"] for row in table)}


def _joined(model: nn.Module, trained: Sequence[Mapping[str, Json]], subject: Subject) -> dict[str, Json]:
    """The facts of several fits as those of one, against as many steps of dense training."""
    from sparsify_deploy.training.cost import training_cost
    from sparsify_deploy.training.history import joined, restored

    whole = joined([restored(facts["history"]) for facts in trained])
    whole = dataclasses.replace(whole, dense_steps=whole.steps)
    cost = training_cost(model, subject.example(), subject.examples.inputs, whole)
    return {"method": trained[0]["method"], "history": dataclasses.asdict(whole), "cost": cost}


def choose(layers: Sequence[Layer], nm: NM, mask: Mapping[str, Tensor] | None = None) -> dict[str, Answer]:
    """For each layer, whether the recipe projects it, and why or why not.

    A layer that is `already` on the pattern counts as projected whatever its size: it loses nothing.
    """
    from sparsify_deploy.graph import eligibility
    from sparsify_deploy.sparsity.layers import select

    m = nm.nm[1]
    dense = select(layers, nm.keep_dense, "nm.keep_dense")
    held = already(layers, nm, mask or {})
    answers = {}
    for layer in layers:
        shape = tuple(layer.weight.shape)
        answer = eligibility.pattern_possible(shape, layer.groups, m)
        if answer.ok and nm.layers == "rule_of_thumb":
            answer = eligibility.rule_of_thumb(shape, layer.groups, m)
        if layer.name in held:
            answer = eligibility.Answer(True, f"its mask is {nm.pattern} already")
        if layer.name in dense:
            answer = eligibility.Answer(False, "kept dense by the recipe (nm.keep_dense)")
        answers[layer.name] = answer
    return answers


@dataclass(frozen=True)
class Reach:
    """How many weights, parameters of two axes or more, a network has, and in how many of them 2:4 could ever be.

    `outside` names those that are of no Linear or Conv layer, with their counts, the largest first.
    """

    inside: int
    outside: Mapping[str, int]

    @property
    def line(self) -> str:
        """For a reader; "" where every weight is in such a layer."""
        if not self.outside:
            return ""
        whole = self.inside + sum(self.outside.values())
        named = ", ".join(f"{name} ({count:,})" for name, count in list(self.outside.items())[:3])
        more = f" and {len(self.outside) - 3} more" if len(self.outside) > 3 else ""
        return (
            f"{self.inside:,} of {whole:,} weights are in Conv and Linear layers, which can be projected; outside of "
            f"them, and never projected: {named}{more}"
        )


def reach(subject: Subject) -> Reach:
    """Where the network's weights are; one shared by several modules counts once."""
    from sparsify_deploy.sparsity.layers import prunable

    model = subject.network()
    layers = prunable(model)
    held = {id(layer.weight) for layer in layers}
    others = [(name, p.numel()) for name, p in model.named_parameters() if p.ndim > 1 and id(p) not in held]
    return Reach(sum(layer.weight.numel() for layer in layers), dict(sorted(others, key=lambda each: -each[1])))


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
