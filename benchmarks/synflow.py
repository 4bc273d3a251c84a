"""CPU time of a SynFlow mask against the straightforward implementation, both in float64, on one thread.

The peer does what the published code does in each round: absolute values over the whole state dict with the signs
kept aside, ones forward and a full backward, a copy of the scores, signs back, one threshold over the concatenated
scores, and W * mask in every forward. Ours is timed twice (the A/A control, whose ratio shows the noise). Time is this
process's CPU time, so other processes matter less; the contestants take turns, round of the benchmark by round, and
the ratio is the median, with a bootstrap interval. All masks must be identical.

    python benchmarks/synflow.py [--model vgg16 | resnet50] [--rounds 100] [--repeats 5] [--density 0.01] [--json]
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from harness.ratio import machine, median_ratio, race, ratio_text
from torch import Tensor, nn

from sparsify_deploy.criteria import synflow
from sparsify_deploy.sparsity.layers import Layer, prunable
from sparsify_deploy.sparsity.mask import Mask
from sparsify_deploy.sparsity.prune import prune_at_init

Contestant = Callable[[], Mask]


def vgg16() -> tuple[nn.Module, tuple[int, ...]]:
    """VGG-16 with BatchNorm for 32x32 images in ten classes: 14,715,584 prunable weights."""
    layers: list[nn.Module] = []
    channels = 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10)), (3, 32, 32)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions beside a shortcut; the stride is in the 3x3."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)),
        )
        self.shortcut: nn.Module = nn.Identity()
        if inputs != 4 * width:
            shortcut = nn.Conv2d(inputs, 4 * width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(shortcut, nn.BatchNorm2d(4 * width))

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)`."""
        return torch.relu(self.body(images) + self.shortcut(images))


def resnet50() -> tuple[nn.Module, tuple[int, ...]]:
    """ResNet-50 for 224x224 images in 1000 classes: 25,502,912 prunable weights."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    channels = 64
    for stage, depth in enumerate((3, 4, 6, 3)):
        for block in range(depth):
            layers.append(Bottleneck(channels, 64 << stage, 2 if stage and not block else 1))
            channels = 256 << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000)), (3, 224, 224)


MODELS = {"vgg16": vgg16, "resnet50": resnet50}


class Straightforward:
    """SynFlow step by step, on masked layers of its own."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer], shape: Sequence[int]) -> None:
        self.model, self.shape = model, shape
        self.weights = {layer.parameter: layer.weight for layer in layers}
        self.masks = {name: torch.ones_like(weight, requires_grad=False) for name, weight in self.weights.items()}
        for layer in layers:
            module = model.get_submodule(layer.name)
            module.forward = self._masked_forward(module, layer.parameter)

    def _masked_forward(self, module: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
        def conv(images: Tensor) -> Tensor:
            assert isinstance(module, nn.Conv2d)
            convolved: Tensor = module._conv_forward(images, module.weight * self.masks[name], module.bias)
            return convolved

        def linear(rows: Tensor) -> Tensor:
            assert isinstance(module, nn.Linear)
            return nn.functional.linear(rows, module.weight * self.masks[name], module.bias)

        return conv if isinstance(module, nn.Conv2d) else linear

    def scores(self) -> dict[str, Tensor]:
        """|weight · gradient| at the masked absolute weights; parameters and buffers get their signs back."""
        signs = {}
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                signs[name] = torch.sign(value)
                value.abs_()
        self.model.zero_grad()
        flow = torch.sum(self.model(torch.ones(1, *self.shape, dtype=torch.float64)))
        torch.autograd.backward(flow)
        found = {}
        for name, weight in self.weights.items():
            assert weight.grad is not None
            found[name] = torch.clone(weight.grad * weight).detach().abs_()
            weight.grad = None
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                value.mul_(signs[name])
        return found

    def prune(self, density: float, rounds: int) -> Mask:
        """The mask after `rounds`, its layers as bool."""
        for mask in self.masks.values():
            mask.fill_(1)
        self.model.eval()
        for done in range(rounds):
            scores = self.scores()
            flat = torch.cat([score.flatten() for score in scores.values()])
            dropped = flat.numel() - round(density ** ((done + 1) / rounds) * flat.numel())
            if dropped:
                threshold = torch.kthvalue(flat, dropped).values
                zero, one = torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
                for name, score in scores.items():
                    self.masks[name].copy_(torch.where(score <= threshold, zero, one))
        return Mask({name: mask.bool() for name, mask in self.masks.items()})


def contestants(name: str, rounds: int, density: float) -> list[Contestant]:
    """Ours, ours again, the peer; each makes the whole mask of the same float64 network, preparation included."""
    torch.manual_seed(0)
    model, shape = MODELS[name]()
    model = model.double().eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)

    def ours() -> Mask:
        batch = {"input": torch.ones(1, *shape)}
        params = synflow.Params(rounds=rounds)
        scorer = synflow.prepare(model, [batch], _no_loss, params, inputs=("input",), seed=0)
        return prune_at_init(scorer, prunable(model), density, allocation="global", rounds=rounds)

    copied, _ = MODELS[name]()
    copied.double().load_state_dict(model.state_dict())
    peer = Straightforward(copied, prunable(copied), shape)
    return [ours, ours, lambda: peer.prune(density, rounds)]


def _no_loss(model: nn.Module, batch: object) -> Tensor:
    raise AssertionError("SynFlow takes no loss")


def raced(turns: Sequence[Contestant], repeats: int) -> tuple[list[list[float]], list[Mask]]:
    """CPU seconds: one row a repeat, one column a contestant. And the masks of the last repeat."""
    masks = [Mask({})] * len(turns)

    def seconds(turn: int) -> float:
        start = time.process_time()
        masks[turn] = turns[turn]()
        return time.process_time() - start

    return race([functools.partial(seconds, turn) for turn in range(len(turns))], repeats), masks


def main() -> int:
    """Run the benchmark and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="vgg16")
    parser.add_argument("--rounds", type=int, default=100, help="SynFlow's score-and-prune rounds")
    parser.add_argument("--repeats", type=int, default=5, help="masks each contestant makes")
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    turns = contestants(asked.model, asked.rounds, asked.density)
    rows, masks = raced(turns, asked.repeats)
    if masks[0] != masks[2] or masks[0] != masks[1]:
        raise SystemExit("the masks differ")
    report = {
        "model": asked.model,
        "weights": sum(total for _, total in masks[0].counts().values()),
        "rounds": asked.rounds,
        "repeats": asked.repeats,
        "density": masks[0].density,
        "dtype": "float64",
        "ours_s": statistics.median(row[0] for row in rows),
        "straightforward_s": statistics.median(row[2] for row in rows),
        "control": median_ratio(rows, 1, 0),
        "speedup": median_ratio(rows, 2, 0),
        "masks_identical": True,
        **machine(),
    }
    if asked.json:
        print(json.dumps(report, indent=2))
        return 0
    print(f"{asked.model}, {report['weights']:,} weights to {report['density']:.2%} in {asked.rounds} rounds, float64")
    print(f"ours                     {report['ours_s']:.2f} s CPU, one thread")
    print(f"straightforward          {report['straightforward_s']:.2f} s")
    for label, key in (("ours / ours (A/A)", "control"), ("straightforward / ours", "speedup")):
        print(f"{label:<24} {ratio_text(report[key])}")
    print("masks                    identical")
    return 0


if __name__ == "__main__":
    sys.exit(main())
