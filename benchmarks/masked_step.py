"""CPU time of a training step with the mask held, over a dense one: three networks on random data, one thread.

The networks are a ResNet-50 (25.6 M weights; 16 images of 96 x 96), a transformer encoder of 12 layers, width 256
(9.5 M weights, 7.1 M of them in layers that can be pruned; 8 sequences of 128) and an MLP of 3 x 1024 (3.2 M; 1024
rows). What masking costs depends on the weights alone, what a step costs on the batch too, so a larger batch only makes
the share smaller. A ResNet-20 on 32 x 32 images is there to be asked for.

Three trainers take turns: dense, dense again (the A/A control, whose ratio shows the noise) and masked. Time is this
process's CPU time, so other processes matter less; the ratio is the median over rounds, with a bootstrap interval.
Beforehand a few steps with an all-ones mask must give bit for bit the weights of dense training.

    python benchmarks/masked_step.py [--nets resnet50 encoder mlp] [--rounds 10] [--steps 1] [--density 0.2] [--json]
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness.ratio import machine, median_ratio, race, ratio_text
from torch import Tensor, nn

from sparsify_deploy import menu
from sparsify_deploy.sparsity.layers import prunable
from sparsify_deploy.sparsity.mask import Mask
from sparsify_deploy.training.loop import Trainer
from sparsify_deploy.training.settings import Training
from sparsify_deploy.training.updater import Dense, HoldMask, Updater
from sparsify_deploy.types import Context


@dataclass(frozen=True)
class RandomData:
    """A `Split` of `count` Gaussian examples of one shape in ten classes."""

    examples: Tensor
    labels: Tensor

    @classmethod
    def make(cls, count: int, shape: Sequence[int]) -> RandomData:
        generator = torch.Generator().manual_seed(0)
        examples = torch.randn(count, *shape, generator=generator)
        return cls(examples, torch.randint(10, (count,), generator=generator))

    def __len__(self) -> int:
        return len(self.examples)

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        return {"input": self.examples[indices], "target": self.labels[indices]}


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """A convolution and its BatchNorm."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class Bottleneck(nn.Module):
    """ResNet-50's block, stride in its 3 x 3 convolution."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            convolution(inputs, width, 1),
            nn.ReLU(inplace=True),
            convolution(width, width, 3, stride),
            nn.ReLU(inplace=True),
            convolution(width, 4 * width, 1),
        )
        same = inputs == 4 * width and stride == 1
        self.shortcut = nn.Identity() if same else convolution(inputs, 4 * width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet50() -> nn.Module:
    """In torchvision's shapes, 1000 classes."""
    parts: list[nn.Module] = [convolution(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            parts.append(Bottleneck(inputs, width, 2 if block == 0 and width > 64 else 1))
            inputs = 4 * width
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


def encoder() -> nn.Module:
    """Twelve layers of width 256 with four heads, then a classifier averaged over the sequence."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    body = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
    return nn.Sequential(body, nn.Flatten(2), nn.Linear(256, 10), Mean())


class Mean(nn.Module):
    """`(B, T, K)` to its mean over T."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def mlp() -> nn.Module:
    """Three hidden layers of 1024."""
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(1024, 1024), nn.ReLU()) for _ in range(3)),
        nn.Linear(1024, 10),
    )


def resnet20() -> nn.Module:
    """The package's own."""
    models = menu.entry("models", "builtin")
    built: nn.Module = models.build(models.Params(name="resnet20", width=16))
    return built


@dataclass(frozen=True)
class Net:
    """What to train on how much data at a time."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch_size: int


NETS = {
    "resnet50": Net(resnet50, (3, 96, 96), 16),
    "encoder": Net(encoder, (128, 256), 8),
    "mlp": Net(mlp, (1024,), 1024),
    "resnet20": Net(resnet20, (3, 32, 32), 32),
}


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


def contestant(net: Net, folder: Path, density: float | None) -> Contestant:
    """The network from a fixed seed; dense for None, else with a random mask of `density`."""
    torch.manual_seed(0)
    model, tasks = net.build().train(), menu.entry("tasks", "classification")
    split = RandomData.make(2 * net.batch_size, net.shape)
    settings = Training(steps=1_000_000, batch_size=net.batch_size)
    trainer = Trainer(
        model, tasks.create(tasks.Params()), split, ("input",), settings, seed=0, folder=folder, context=Context()
    )
    if density is None:
        return Contestant(trainer, Dense())
    generator = torch.Generator().manual_seed(1)
    mask = Mask({x.parameter: torch.rand(x.weight.shape, generator=generator) < density for x in prunable(model)})
    return Contestant(trainer, HoldMask(model, trainer.optimizer, mask))


def check_all_ones(net: Net, folder: Path) -> None:
    """An all-ones mask must not change a single bit of dense training."""
    dense, masked = (contestant(net, folder, density) for density in (None, 1.1))
    for one in (dense, masked):
        one.step_ms(2)
    states = dense.trainer.model.state_dict(), masked.trainer.model.state_dict()
    if different := [name for name, value in states[0].items() if not torch.equal(value, states[1][name])]:
        raise SystemExit(f"an all-ones mask changes training: {', '.join(different)}")


def measured(net: Net, rounds: int, steps: int, density: float) -> dict[str, Any]:
    """One network's rows as a report."""
    with tempfile.TemporaryDirectory() as name:
        check_all_ones(net, Path(name))
        contestants = [contestant(net, Path(name), share) for share in (None, None, density)]
        for each in contestants:
            each.step_ms(1)
        rows = race([functools.partial(each.step_ms, steps) for each in contestants], rounds)
    return {
        "weights": sum(layer.weight.numel() for layer in prunable(contestants[0].trainer.model)),
        "batch": [net.batch_size, *net.shape],
        "dense_step_ms": statistics.median(row[0] for row in rows),
        "control": median_ratio(rows, 1, 0),
        "masked": median_ratio(rows, 2, 0),
        "all_ones_identical": True,
    }


def main() -> int:
    """Run the benchmark and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["resnet50", "encoder", "mlp"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=1, help="steps of each trainer in a round")
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    nets = {name: measured(NETS[name], asked.rounds, asked.steps, asked.density) for name in asked.nets}
    report = {
        "nets": nets,
        "density": asked.density,
        "rounds": asked.rounds,
        "steps_per_round": asked.steps,
        **machine(),
    }
    if asked.json:
        print(json.dumps(report, indent=2))
        return 0
    for name, found in nets.items():
        batch, weights = " x ".join(map(str, found["batch"])), found["weights"] / 1e6
        print(f"{name}: {weights:.1f} M weights, batch {batch}, dense step {found['dense_step_ms']:.0f} ms CPU")
        for label, key in (("dense / dense (A/A)", "control"), ("masked / dense", "masked")):
            print(f"  {label:<19} {ratio_text(found[key], 4)}")
    print("an all-ones mask gives bit for bit the dense weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
