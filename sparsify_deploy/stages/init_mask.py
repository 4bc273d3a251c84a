"""A mask before training, from a criterion that scores the untrained weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from sparsify_deploy import menu
from sparsify_deploy.recipe import Init
from sparsify_deploy.stages.base import Estimate
from sparsify_deploy.stages.subject import Subject, reproducible, unmet_packages
from sparsify_deploy.types import Context, Facts


@dataclass(frozen=True)
class InitMask:
    """Score, allocate, prune: a mask at `sparsity` over the prunable layers that are not kept dense."""

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

        select(prunable(self.subject.check_network()), self.init.keep_dense)

    def estimate(self) -> Estimate:
        return Estimate()

    def run(self, inputs: Mapping[str, Path], out: Path, context: Context) -> Facts:
        from sparsify_deploy.sparsity.layers import prunable, select
        from sparsify_deploy.sparsity.prune import collapsed, prune_at_init
        from sparsify_deploy.training.evaluation import loss_of

        reproducible(context)
        criterion = menu.entry("criteria", self.init.criterion)
        model = self.subject.network()
        self.subject.check_fits(model)
        layers = prunable(model)
        dense = select(layers, self.init.keep_dense)
        scorer = criterion.prepare(
            model,
            self.subject.calibration(self.init.batches, self.batch_size),
            loss_of(self.subject.opened_task, self.subject.examples.inputs),
            self.init.params,
            inputs=self.subject.examples.inputs,
            seed=self.subject.seed,
        )
        mask = prune_at_init(
            scorer,
            [layer for layer in layers if layer.name not in dense],
            1.0 - self.sparsity,
            allocation=self.init.allocation,
            rounds=criterion.rounds(self.init.params),
            progress=context.progress,
        )
        mask.save(out / self.outputs["mask"])
        empty = collapsed(mask)
        if empty:
            context.progress.say(f"layer collapse: no weight is left in {', '.join(empty)}")
        return {
            "criterion": self.init.criterion,
            "allocation": self.init.allocation,
            "sparsity_asked": self.sparsity,
            "sparsity_of_masked_layers": 1.0 - mask.density,
            "densities": mask.densities(),
            "kept_dense": sorted(dense),
            "collapsed": list(empty),
        }
