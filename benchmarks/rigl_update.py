"""CPU time of one RigL update of a ResNet-50, 25.5 million weights, beside a version that sorts; one thread.

An update is everything that takes the place of the optimizer step: choose in all 54 layers which weights go and which
come, hold the new mask, reset the weights and the momentum of those that change. The peer is the straightforward
version: two full argsorts a layer, then the whole mask held anew. Both start from the same weights, gradients and mask
at every round, and both must end with the same mask, weights and momentum, bit for bit. The peer's second turn is the
A/A control. Time is this process's CPU time, so other processes matter less.

    python benchmarks/rigl_update.py [--rounds 5] [--density 0.2] [--json]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from harness.ratio import machine
from torch import Tensor, nn

from sparsify_deploy.sparsity.allocation import erk
from sparsify_deploy.sparsity.mask import Mask
from sparsify_deploy.training.methods import rigl
from sparsify_deploy.training.optimizer import build_optimizer, slots
from sparsify_deploy.training.settings import Optimizer
from sparsify_deploy.training.updater import HoldMask

STEP, TOTAL, PARAMS = 100, 10_000, rigl.Params()


def shapes() -> dict[str, tuple[int, ...]]:
    """The weights of ResNet-50's convolutions and of its classifier, by layer name."""
    found: dict[str, tuple[int, ...]] = {"conv1": (64, 3, 7, 7)}
    channels = 64
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), 1):
        for block in range(blocks):
            name = f"layer{stage}_{block}"
            found |= {
                f"{name}_conv1": (width, channels, 1, 1),
                f"{name}_conv2": (width, width, 3, 3),
                f"{name}_conv3": (4 * width, width, 1, 1),
            }
            if block == 0:
                found[f"{name}_downsample"] = (4 * width, channels, 1, 1)
            channels = 4 * width
    return found | {"fc": (1000, 2048)}


@dataclass
class Contestant:
    """A network in mid-training, and what updates it."""

    model: nn.ParameterDict
    optimizer: torch.optim.Optimizer
    held: HoldMask
    update: Callable[[], Mask]

    def round_s(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], mask: Mask) -> float:
        """CPU seconds of one update from the given state."""
        with torch.no_grad():
            for name, weight in weights.items():
                parameter = self.model[name]
                parameter.copy_(weight)
                parameter.grad = gradients[name]
                self.optimizer.state[parameter] = {"momentum_buffer": weight.clone()}
        self.held.hold(mask)
        start = time.process_time()
        self.update()
        return time.process_time() - start

    def state(self) -> list[Tensor]:
        """Mask, weights and momentum."""
        momentum = [self.optimizer.state[p]["momentum_buffer"] for p in self.model.values()]
        return [*self.held.mask.values(), *(p.detach() for p in self.model.values()), *momentum]


def contestant(mask: Mask, *, sorting: bool) -> Contestant:
    """The package's own updater, or the sorting one."""
    model = nn.ParameterDict({name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes().items()})
    optimizer = build_optimizer(model, Optimizer())
    held = HoldMask(model, optimizer, mask)
    if sorting:
        return Contestant(model, optimizer, held, lambda: sorted_update(held, optimizer))

    def update() -> Mask:
        updater = rigl.RigL(held, PARAMS, TOTAL)
        assert not updater.after_backward(STEP)
        return updater.mask

    return Contestant(model, optimizer, held, update)


def sorted_update(held: HoldMask, optimizer: torch.optim.Optimizer) -> Mask:
    """RigL's rules written down plainly, with two stable sorts of the whole layer."""
    end = round(PARAMS.end_fraction * TOTAL)
    fraction = PARAMS.drop_fraction / 2 * (1 + math.cos(math.pi * STEP / end))
    layers = {}
    for name, mask in held.mask.items():
        weight = held.parameters[name].detach()
        gradient = held.parameters[name].grad
        assert gradient is not None
        flat = mask.flatten()
        active = int(flat.sum())
        if active == flat.numel():
            continue
        count = math.floor(fraction * active)
        new = torch.zeros_like(flat)
        order = weight.abs().flatten().masked_fill(~flat, -1.0).argsort(descending=True, stable=True)
        new[order[: active - count]] = True
        order = gradient.abs().flatten().masked_fill(new, -1.0).argsort(descending=True, stable=True)
        new[order[:count]] = True
        layers[name] = new.view_as(mask)
    moved = held.mask.with_(layers)
    for name, parameter in held.parameters.items():
        new = moved[name] & ~held.mask[name]
        for tensor in (parameter.detach(), *slots(optimizer, parameter)):
            tensor.masked_fill_(new, 0.0)
    held.hold(moved)
    return held.mask


def main() -> int:
    """Run the benchmark and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    densities = erk(shapes(), asked.density)
    mask = Mask({n: torch.rand(s, generator=generator) < densities[n] for n, s in shapes().items()})
    ours, peer = contestant(mask, sorting=False), contestant(mask, sorting=True)
    rows = []
    for _ in range(asked.rounds):
        weights, gradients = ({n: torch.randn(s, generator=generator) for n, s in shapes().items()} for _ in range(2))
        rows.append([one.round_s(weights, gradients, mask) for one in (ours, peer, peer)])
        peer_state = peer.state()
        if not all(map(torch.equal, ours.state(), peer_state)):
            raise SystemExit("the two updates differ")
    changed = sum(int((new & ~old).sum()) for new, old in zip(ours.held.mask.values(), mask.values(), strict=True))
    report = {
        "weights": sum(math.prod(shape) for shape in shapes().values()),
        "layers": len(mask),
        "density": mask.density,
        "allocation": "erk",
        "weights_changed": changed,
        "rounds": asked.rounds,
        "update_s": statistics.median(row[0] for row in rows),
        "update_s_min": min(row[0] for row in rows),
        "update_s_max": max(row[0] for row in rows),
        "sorting_s": statistics.median(row[1] for row in rows),
        "faster": statistics.median(row[1] / row[0] for row in rows),
        "control": statistics.median(row[2] / row[1] for row in rows),
        "identical": True,
        **machine(),
    }
    if asked.json:
        print(json.dumps(report, indent=2))
        return 0
    print(f"{report['weights'] / 1e6:.1f} M weights in {report['layers']} layers, density {mask.density:.2f} (ERK)")
    low, high = report["update_s_min"], report["update_s_max"]
    print(f"update              {report['update_s']:.3f} s CPU  [{low:.3f}, {high:.3f}]")
    print(f"sorting / update    {report['faster']:.1f}")
    print(f"sorting, A/A        {report['control']:.3f}")
    print("both                the same mask, weights and momentum, bit for bit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
