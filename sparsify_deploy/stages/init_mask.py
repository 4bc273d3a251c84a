"""A mask before training, from a criterion that scores the untrained weights."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from sparsify_deploy import menu
from sparsify_deploy.errors import ModelError, RecipeError
from sparsify_deploy.params import n_and_m
from sparsify_deploy.recipe import Init
from sparsify_deploy.stages.base import Estimate
from sparsify_deploy.stages.subject import Subject, reproducible, unmet_packages
from sparsify_deploy.types import Context, Facts, Progress

if TYPE_CHECKING:
    from sparsify_deploy.sparsity.layers import Layer
    from sparsify_deploy.sparsity.mask import Mask
    from sparsify_deploy.sparsity.prune import Scorer
    from sparsify_deploy.types import Batch


@dataclass(frozen=True)
class InitMask:
    """Score, allocate, prune: a mask at `sparsity`, or of the pattern, over the prunable layers not kept dense."""

    subject: Subject
    init: Init
    sparsity: float | None
    batch_size: int

    name: ClassVar[str] = "init_mask"
    version: ClassVar[int] = 1
    inputs: ClassVar[tuple[str, ...]] = ()
    outputs: ClassVar[Mapping[str, str]] = {"mask": "mask.safetensors"}
    environment: ClassVar[tuple[str, ...]] = ()

    def methods(self) -> Mapping[str, int]:
        version: int = menu.entry("criteria", self.init.criterion).VERSION
        return {**self.subject.methods(), f"criteria/{self.init.criterion}": version}

    def files(self) -> Mapping[str, Path]:
        return self.subject.files()

    def unmet(self) -> Sequence[str]:
        return unmet_packages("init_mask", "torch")

    def preflight(self) -> None:
        from sparsify_deploy.sparsity.layers import prunable, select

        layers = prunable(self.subject.check_network())
        chosen(layers, select(layers, self.init.keep_dense, "init.keep_dense"), self.init.pattern)

    def estimate(self) -> Estimate:
        return Estimate()

    def run(self, inputs: Mapping[str, Path], out: Path, context: Context) -> Facts:
        from sparsify_deploy.sparsity.layers import prunable, select
        from sparsify_deploy.sparsity.prune import collapsed
        from sparsify_deploy.training.evaluation import loss_of

        device = reproducible(context)
        criterion = menu.entry("criteria", self.init.criterion)
        model = self.subject.network()
        self.subject.check_fits(model)
        if criterion.NEEDS_DATA:
            model.to(device)
        layers = prunable(model)
        dense = select(layers, self.init.keep_dense, "init.keep_dense")
        pruned, left_out = chosen(layers, dense, self.init.pattern)
        batches = self._batches(criterion.NEEDS_DATA)
        scorer = criterion.prepare(
            model,
            batches,
            loss_of(self.subject.opened_task, self.subject.examples.inputs),
            self.init.params,
            inputs=self.subject.examples.inputs,
            seed=self.subject.seed,
        )
        mask, rounds = self._mask(scorer, pruned, criterion.rounds(self.init.params), context.progress)
        mask.save(out / self.outputs["mask"])
        empty = collapsed(mask)
        if empty:
            context.progress.say(f"layer collapse: no weight is left in {', '.join(empty)}")
        for name, reason in left_out.items():
            context.progress.say(f"{name} stays dense, no {self.init.pattern}: {reason}")
        examples = sum(len(batch[self.subject.examples.inputs[0]]) for batch in batches)
        return {
            "criterion": self.init.criterion,
            "allocation": None if self.init.pattern else self.init.allocation,
            "init_pattern": self.init.pattern,
            "no_pattern": left_out,
            "rounds": rounds,
            "examples": examples if criterion.NEEDS_DATA else 0,
            "sparsity_asked": self.sparsity,
            "sparsity_of_masked_layers": 1.0 - mask.density,
            "densities": mask.densities(),
            "kept_dense": sorted(dense),
            "collapsed": list(empty),
        }

    def _batches(self, needs_data: bool) -> list[Batch]:
        """The examples a criterion scores by; one that needs none still gets a batch, for its shapes."""
        from sparsify_deploy.training.batches import class_batches

        if self.init.samples_per_class is None or not needs_data:
            return self.subject.calibration(self.init.batches, self.batch_size)
        return class_batches(
            self.subject.examples.split("train"),
            seed=self.subject.seed,
            per_class=self.init.samples_per_class,
            batch_size=self.batch_size,
            classes=self.subject.examples.classes,
        )

    def _mask(self, scorer: Scorer, layers: Sequence[Layer], rounds: int, progress: Progress) -> tuple[Mask, int]:
        """The mask over `layers`, and in how many rounds it was made.

        A pattern takes one round: rounds are there against layers that run empty, and under N:M none can.
        """
        from sparsify_deploy.sparsity.prune import pattern_mask, prune_at_init

        if self.init.pattern is not None:
            scores = scorer(None)
            return pattern_mask({x.parameter: scores[x.parameter] for x in layers}, *n_and_m(self.init.pattern)), 1
        if self.sparsity is None:
            raise RecipeError(
                ["sparsity: init without a pattern needs the share of weights to drop: give one of the two"]
            )
        density = 1.0 - self.sparsity
        mask = prune_at_init(scorer, layers, density, allocation=self.init.allocation, rounds=rounds, progress=progress)
        return mask, rounds


def chosen(
    layers: Sequence[Layer], dense: Container[str], pattern: str | None
) -> tuple[tuple[Layer, ...], dict[str, str]]:
    """The layers the mask covers, and why others cannot take the pattern; ModelError where none can."""
    from sparsify_deploy.graph.eligibility import pattern_possible

    wanted = tuple(layer for layer in layers if layer.name not in dense)
    if pattern is None:
        if layers and not wanted:
            raise ModelError("init.keep_dense leaves no layer to prune: all are kept dense; name fewer layers")
        return wanted, {}
    answers = {layer.name: pattern_possible(layer.shape, layer.groups, n_and_m(pattern)[1]) for layer in wanted}
    left_out = {name: answer.reason for name, answer in answers.items() if not answer.ok}
    if len(left_out) == len(wanted):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items()) or "all are kept dense"
        raise ModelError(f"no layer can take init.pattern {pattern} ({reasons}): use another pattern, or sparsity")
    return tuple(layer for layer in wanted if answers[layer.name].ok), left_out
