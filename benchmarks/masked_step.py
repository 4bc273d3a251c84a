"""CPU time of a training step with the mask held, over a dense one: ResNet-20 on random images, one thread.

Three trainers take turns: dense, dense again (the A/A control, whose ratio shows the noise) and masked. Time is this
process's CPU time, so other processes matter less; the ratio is the median over rounds, with a bootstrap interval.
Beforehand a few steps with an all-ones mask must give bit for bit the weights of dense training.

    python benchmarks/masked_step.py [--rounds 30] [--steps 2] [--batch-size 32] [--density 0.2] [--json]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparsify_deploy import menu
from sparsify_deploy.sparsity.layers import prunable
from sparsify_deploy.sparsity.mask import Mask
from sparsify_deploy.training.loop import Trainer
from sparsify_deploy.training.settings import Training
from sparsify_deploy.training.updater import Dense, HoldMask, Updater
from sparsify_deploy.types import Context


@dataclass(frozen=True)
class RandomImages:
    """A `Split` of `count` images `(3, 32, 32)` in ten classes."""

    images: Tensor
    labels: Tensor

    @classmethod
    def make(cls, count: int) -> RandomImages:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(count, 3, 32, 32, generator=generator)
        return cls(images, torch.randint(10, (count,), generator=generator))

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


def contestant(batch_size: int, folder: Path, density: float | None) -> Contestant:
    """ResNet-20 from a fixed seed; dense for None, else with a random mask of `density`."""
    torch.manual_seed(0)
    models, tasks = menu.entry("models", "builtin"), menu.entry("tasks", "classification")
    model = models.build(models.Params(name="resnet20", width=16)).train()
    split = RandomImages.make(4 * batch_size)
    settings = Training(steps=1_000_000, batch_size=batch_size)
    trainer = Trainer(
        model, tasks.create(tasks.Params()), split, ("input",), settings, seed=0, folder=folder, context=Context()
    )
    if density is None:
        return Contestant(trainer, Dense())
    generator = torch.Generator().manual_seed(1)
    mask = Mask({x.parameter: torch.rand(x.weight.shape, generator=generator) < density for x in prunable(model)})
    return Contestant(trainer, HoldMask(model, trainer.optimizer, mask))


def check_all_ones(batch_size: int, folder: Path) -> None:
    """An all-ones mask must not change a single bit of dense training."""
    dense, masked = (contestant(batch_size, folder, density) for density in (None, 1.1))
    for one in (dense, masked):
        one.step_ms(3)
    states = dense.trainer.model.state_dict(), masked.trainer.model.state_dict()
    if different := [name for name, value in states[0].items() if not torch.equal(value, states[1][name])]:
        raise SystemExit(f"an all-ones mask changes training: {', '.join(different)}")


def race(contestants: Sequence[Contestant], rounds: int, steps: int) -> list[list[float]]:
    """Milliseconds of CPU time a step: one row a round, one column a contestant; the order rotates."""
    for each in contestants:
        each.step_ms(2)
    rows = []
    for number in range(rounds):
        row = [0.0] * len(contestants)
        for k in range(len(contestants)):
            turn = (number + k) % len(contestants)
            row[turn] = contestants[turn].step_ms(steps)
        rows.append(row)
    return rows


def median_ratio(rows: Sequence[Sequence[float]], over: int, under: int) -> dict[str, float]:
    """The median over rounds of column `over` / column `under`, with a 95 % bootstrap interval."""
    ratios = [row[over] / row[under] for row in rows]
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    return {"median": statistics.median(ratios), "low": medians[50], "high": medians[1949]}


def main() -> int:
    """Run the benchmark and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=2, help="steps of each trainer in a round")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        check_all_ones(asked.batch_size, folder)
        contestants = [contestant(asked.batch_size, folder, density) for density in (None, None, asked.density)]
        rows = race(contestants, asked.rounds, asked.steps)
    report = {
        "model": "resnet20",
        "batch_size": asked.batch_size,
        "density": asked.density,
        "rounds": asked.rounds,
        "steps_per_round": asked.steps,
        "dense_step_ms": statistics.median(row[0] for row in rows),
        "control": median_ratio(rows, 1, 0),
        "masked": median_ratio(rows, 2, 0),
        "all_ones_identical": True,
        "torch": str(torch.__version__),
        "cpu_instruction_set": torch.backends.cpu.get_cpu_capability(),
    }
    if asked.json:
        print(json.dumps(report, indent=2))
        return 0
    print(f"dense step          {report['dense_step_ms']:.1f} ms CPU, batch {asked.batch_size}, one thread")
    for label, key in (("dense / dense (A/A)", "control"), ("masked / dense", "masked")):
        ratio = report[key]
        print(f"{label:<19} {ratio['median']:.4f}  [{ratio['low']:.4f}, {ratio['high']:.4f}]")
    print("all-ones mask       bit for bit the dense weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
