"""CPU time of a training step in channels-last memory format over one in the contiguous format, one thread.

A ResNet-20 of the package on random 32 x 32 images, dense and with a random mask of density 0.2 held. Contiguous,
contiguous again (the A/A control, whose ratio shows the noise) and channels-last trainers take turns. Time is this
process's CPU time, so other processes matter less; the ratio is the median over rounds, with a bootstrap interval.
Beforehand both formats take a step in float64, after which their weights must agree but for rounding.

    python benchmarks/memory_format.py [--width 16] [--batch 32] [--rounds 10] [--steps 2] [--json]
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness.ratio import machine, median_ratio, race, ratio_text
from torch import Tensor

from sparsify_deploy import menu
from sparsify_deploy.sparsity.layers import prunable
from sparsify_deploy.sparsity.mask import Mask
from sparsify_deploy.training.loop import Trainer
from sparsify_deploy.training.settings import Training
from sparsify_deploy.training.updater import Dense, HoldMask, Updater
from sparsify_deploy.types import Context

DENSITY = 0.2


@dataclass(frozen=True)
class RandomImages:
    """A `Split` of Gaussian images in ten classes."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        return {"input": self.images[indices], "target": self.labels[indices]}


@dataclass
class Contestant:
    """A trainer and the updater it runs with."""

    trainer: Trainer
    updater: Updater

    def step_ms(self, steps: int) -> float:
        """CPU time of one step, mean over `steps`."""
        start = time.process_time()
        for _ in range(steps):
            self.trainer.advance(self.updater)
        return (time.process_time() - start) * 1e3 / steps


def contestant(
    folder: Path, width: int, batch: int, *, channels_last: bool, masked: bool, dtype: torch.dtype = torch.float32
) -> Contestant:
    """The network from a fixed seed, in training mode."""
    torch.manual_seed(0)
    models, tasks = menu.entry("models", "builtin"), menu.entry("tasks", "classification")
    model = models.build(models.Params(name="resnet20", width=width)).train().to(dtype)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2 * batch, 3, 32, 32, generator=generator).to(dtype)
    split = RandomImages(images, torch.randint(10, (2 * batch,), generator=generator))
    settings = Training(steps=1_000_000, batch_size=batch, channels_last=channels_last)
    trainer = Trainer(
        model, tasks.create(tasks.Params()), split, ("input",), settings, seed=0, folder=folder, context=Context()
    )
    if not masked:
        return Contestant(trainer, Dense())
    mask = Mask({x.parameter: torch.rand(x.weight.shape, generator=generator) < DENSITY for x in prunable(model)})
    return Contestant(trainer, HoldMask(model, trainer.optimizer, mask))


def check_same(folder: Path, width: int, batch: int) -> float:
    """The largest difference of any weight after a float64 step in both formats."""
    states = []
    for channels_last in (False, True):
        one = contestant(folder, width, batch, channels_last=channels_last, masked=True, dtype=torch.float64)
        one.step_ms(1)
        states.append(one.trainer.model.state_dict())
    difference = max(float((value - states[1][name]).abs().max()) for name, value in states[0].items())
    if difference > 1e-9:
        raise SystemExit(f"the two formats train different networks: weights differ by {difference:.1e}")
    return difference


def measured(folder: Path, asked: argparse.Namespace, formats: Sequence[bool], *, masked: bool) -> dict[str, Any]:
    """The ratios of one kind of training."""
    made = [contestant(folder, asked.width, asked.batch, channels_last=last, masked=masked) for last in formats]
    for each in made:
        each.step_ms(1)
    rows = race([functools.partial(each.step_ms, asked.steps) for each in made], asked.rounds)
    return {
        "contiguous_step_ms": statistics.median(row[0] for row in rows),
        "control": median_ratio(rows, 1, 0),
        "channels_last": median_ratio(rows, 2, 0),
    }


def main() -> int:
    """Run the benchmark and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=2, help="steps of each trainer in a round")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        difference = check_same(Path(name), asked.width, asked.batch)
        found = {
            kind: measured(Path(name), asked, (False, False, True), masked=kind == "masked")
            for kind in ("dense", "masked")
        }
    report = {"network": "resnet20", "density": DENSITY, **vars(asked), **found, "largest_difference": difference}
    report.pop("json")
    if asked.json:
        print(json.dumps({**report, **machine()}, indent=2))
        return 0
    for kind, ratios in found.items():
        print(f"{kind}: contiguous step {ratios['contiguous_step_ms']:.0f} ms CPU")
        for label, key in (("contiguous (A/A)", "control"), ("channels-last", "channels_last")):
            print(f"  {label:<17} / contiguous {ratio_text(ratios[key], 4)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
