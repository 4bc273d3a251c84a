"""CPU time of the 2:4 projection of a ResNet-50-shaped model, against modelopt's in plain torch, one thread.

The layers are the 53 convolutions and the classifier of torchvision's ResNet-50 (25.5 M weights), Gaussian. Three
contestants take turns: `nm_mask` over every layer that modelopt's rule chooses, the same again (the A/A control,
whose ratio shows the noise), and `modelopt.torch.sparsity.sparsify(model, mode="sparse_magnitude")` whole, on a copy
made before its time is taken. The ratio is the median over rounds, with a bootstrap interval.

Masks must be identical. modelopt compares the float32 sums of whole patterns, so two weights closer than the rounding
of such a sum are a tie to it; a group may differ only there, only between weights that close, and is counted.

    python benchmarks/projection.py [--rounds 5] [--json]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib
import io
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import torch
from harness.ratio import machine, median_ratio, race, ratio_text
from torch import Tensor, nn

from sparsify_deploy.graph.eligibility import rule_of_thumb
from sparsify_deploy.sparsity.layers import prunable
from sparsify_deploy.sparsity.nm import nm_mask


def resnet50_layers() -> nn.ModuleList:
    """The convolutions and the classifier, in torchvision's shapes and order; they are not connected."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, bias=False)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            layers += [
                nn.Conv2d(channels, width, 1, bias=False),
                nn.Conv2d(width, width, 3, bias=False),
                nn.Conv2d(width, 4 * width, 1, bias=False),
            ]
            if block == 0:
                layers.append(nn.Conv2d(channels, 4 * width, 1, bias=False))
            channels = 4 * width
    layers.append(nn.Linear(channels, 1000))
    for layer in layers:
        nn.init.normal_(layer.weight)  # type: ignore[arg-type]  # these layers all have a tensor there
    return nn.ModuleList(layers)


def ours(model: nn.Module) -> dict[str, Tensor]:
    """The 2:4 masks of the layers the rule of thumb chooses, by layer name."""
    return {
        layer.name: nm_mask(layer.weight, 2, 4)
        for layer in prunable(model)
        if rule_of_thumb(layer.shape, layer.groups, 4).ok
    }


def theirs(model: nn.Module) -> None:
    """modelopt's own projection; `model` is converted."""
    sparsity = importlib.import_module("modelopt.torch.sparsity")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # it names every layer, and warns of those it leaves out
        sparsity.sparsify(model, mode="sparse_magnitude")


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """The masks modelopt left in a converted model, by layer name."""
    masks = {name: getattr(module, "_weight_mask", None) for name, module in model.named_modules()}
    return {name: mask for name, mask in masks.items() if mask is not None and not bool(mask.all())}


def in_groups(tensor: Tensor) -> Tensor:
    """`(K, C, ...)` as rows of four consecutive input channels."""
    return tensor.reshape(len(tensor), -1, 4, tensor[0, 0].numel()).movedim(2, -1).reshape(-1, 4)


def compare(model: nn.Module) -> dict[str, int]:
    """How many layers, groups and differing groups; stops where a difference is not a tie of float32 sums."""
    weights = {layer.name: layer.weight.detach() for layer in prunable(model)}
    converted = copy.deepcopy(model)
    theirs(converted)
    mine, other = ours(model), masks_of(converted)
    if mine.keys() != other.keys():
        raise SystemExit(f"other layers are chosen: {sorted(mine.keys() ^ other.keys())}")
    groups = different = 0
    for name, mask in mine.items():
        first, second, magnitude = (in_groups(t) for t in (mask, other[name], weights[name].abs()))
        groups += len(first)
        odd = (first != second).any(1)
        different += int(odd.sum())
        kept = [magnitude[odd].masked_select(chosen[odd]).view(-1, 2) for chosen in (first, second)]
        if not torch.equal(kept[0].sum(1), kept[1].sum(1)) or bool(
            (kept[0].double().sum(1) < kept[1].double().sum(1)).any()
        ):
            raise SystemExit(f"the masks of {name} differ where it is no tie")
    return {"layers": len(mine), "groups": groups, "groups_that_tie_in_float32": different}


def cpu_ms(run: Callable[[nn.Module], object], model: nn.Module) -> float:
    """CPU time of one call on a copy of `model`, which is made before."""
    copied = copy.deepcopy(model)
    start = time.process_time()
    run(copied)
    return (time.process_time() - start) * 1e3


def raced(model: nn.Module, rounds: int) -> list[list[float]]:
    """Milliseconds of CPU time: one row a round, columns ours, ours again, modelopt; each on a copy of its own."""
    contestants = (ours, ours, theirs)
    for run in contestants:
        run(copy.deepcopy(model))
    return race([functools.partial(cpu_ms, run, model) for run in contestants], rounds)


def main() -> int:
    """Run the benchmark and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model = resnet50_layers()
    same = compare(model)
    rows = raced(model, asked.rounds)
    report = {
        "model": "layers of ResNet-50",
        "weights": sum(layer.weight.numel() for layer in prunable(model)),
        "rounds": asked.rounds,
        **same,
        "ours_ms": statistics.median(row[0] for row in rows),
        "modelopt_ms": statistics.median(row[2] for row in rows),
        "control": median_ratio(rows, 1, 0),
        "modelopt_over_ours": median_ratio(rows, 2, 0),
        **machine(),
    }
    if asked.json:
        print(json.dumps(report, indent=2))
        return 0
    print(f"nm_mask             {report['ours_ms']:.0f} ms CPU, {report['weights'] / 1e6:.1f} M weights, one thread")
    print(f"modelopt sparsify   {report['modelopt_ms']:.0f} ms CPU")
    for label, key in (("ours / ours (A/A)", "control"), ("modelopt / ours", "modelopt_over_ours")):
        print(f"{label:<19} {ratio_text(report[key])}")
    ties = same["groups_that_tie_in_float32"]
    print(
        f"masks               identical in {same['layers']} layers, but for {ties} of {same['groups']} groups that tie"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
