"""What a recipe should know before it trains, each in one line with the numbers and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import comb

from sparsify_deploy.graph import eligibility
from sparsify_deploy.prediction.roofline import GpuForecast, Layer

_NAMED = 3
"""Layers a line names before it counts the others."""

_MATTERS = 0.02
"""The least difference of two gains that advice rests on: no race claims less."""


def kept_by_two_of_four(density: float) -> float:
    """The share of the kept weights that 2:4 leaves, where a mask of that density lies at random.

    Computed: the expected min(k, 2) over the expected k, for k of 4 kept independently.
    """
    if density == 0:
        return 1.0
    expected = sum(min(k, 2) * comb(4, k) * density**k * (1 - density) ** (4 - k) for k in range(5))
    return expected / (4 * density)


def sparsity_lines(
    sparsity: float | None, allocation: str | None, densities: Mapping[str, float], *, projected: bool
) -> Iterator[str]:
    """On the recipe's own sparsity, before 2:4; `densities` are by layer, where the allocation says them beforehand."""
    if sparsity is None:
        return
    if sparsity > 0.5:
        yield (
            f"sparsity {sparsity:g}: 2:4 hardware skips half of the weights and no more, so what is beyond 0.5 buys no "
            "latency, only fewer bytes on disk and accuracy lost; ask for 0.5, or start from the dense network"
        )
    if not projected or allocation not in ("erk", "global"):
        return
    uniform = kept_by_two_of_four(1 - sparsity)
    text = f"init.allocation {allocation} before 2:4: "
    if densities:
        worst = max(densities, key=lambda name: densities[name])
        above = sum(density > 0.5 for density in densities.values())
        text += (
            f"{above} of the {len(densities)} layers for 2:4 start denser than it allows, {worst} at "
            f"{densities[worst]:.2f}, of which 2:4 keeps {kept_by_two_of_four(densities[worst]):.0%} (computed for a "
            "random mask)"
        )
    else:
        text += "layers left denser than 0.5 lose what they had more"
    yield (
        f"{text}; a uniform density {1 - sparsity:.2f} would keep {uniform:.0%}: use init.allocation uniform, or "
        "init.pattern 2:4 in place of sparsity"
    )


def shape_lines(layers: Sequence[Layer]) -> Iterator[str]:
    """On grouped convolutions, and on channel counts that keep a layer dense or from INT8 kernels."""
    weighted = [layer for layer in layers if layer.work.shape]
    total = sum(layer.work.macs for layer in weighted) or 1

    def line(chosen: Callable[[Layer], bool], what: str, then: str) -> Iterator[str]:
        found = [layer for layer in weighted if chosen(layer)]
        if found:
            share = sum(layer.work.macs for layer in found) / total
            counted = f"{len(found)} of {len(weighted)} layers {what} ({share:.0%} of the products)"
            yield f"{counted}: {_names(found)}; {then}"

    yield from line(
        lambda layer: layer.work.groups > 1,
        "are grouped or depthwise convolutions",
        "no sparse kernel takes them, ungrouped ones can be 2:4",
    )
    plain = [layer for layer in weighted if layer.work.groups == 1]
    possible = {id(layer): eligibility.pattern_possible(layer.work.shape, 1, 4).ok for layer in plain}
    rule = {id(layer): eligibility.rule_of_thumb(layer.work.shape, 1, 4).ok for layer in plain}
    advised = {id(layer): eligibility.int8_advice(layer.work.shape).ok for layer in plain}
    yield from line(
        lambda layer: possible.get(id(layer)) is False,
        "have a C_in that is not a multiple of 4",
        "they stay dense: widen the layer before each",
    )
    yield from line(
        lambda layer: possible.get(id(layer), False) and not rule[id(layer)],
        "have C_in not a multiple of 16 or C_out not of 8",
        "2:4 is possible, kernels may not be picked: widen to the next multiple",
    )
    yield from line(
        lambda layer: rule.get(id(layer), False) and not advised[id(layer)],
        "have a C_in that is not a multiple of 32",
        "the sparse INT8 kernel may not be picked: a multiple of 32 lets it",
    )


def _names(layers: Sequence[Layer]) -> str:
    named = [f"{layer.work.name} ({'x'.join(map(str, layer.work.shape))})" for layer in layers[:_NAMED]]
    more = len(layers) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")


def batch_lines(forecasts: Sequence[GpuForecast]) -> Iterator[str]:
    """On each GPU, where the smallest batch is bound by bytes and launches rather than by what 2:4 halves."""
    for gpu in dict.fromkeys(found.gpu for found in forecasts):
        own = sorted((f for f in forecasts if f.gpu == gpu), key=lambda f: f.batch_size)
        small, large = own[0], own[-1]
        if not small.share or small.bytes_bound < 0.5 * small.share:
            continue
        then = "predict a larger batch (prediction.batch_sizes)"
        if large.batch_size > small.batch_size:
            then = f"at batch {large.batch_size} ideally {large.gain('ideal'):.2f}x: "
            grows = large.gain("ideal") - small.gain("ideal") >= _MATTERS
            then += "serve larger batches" if grows else "this network is too small for 2:4 to matter there"
        yield (
            f"batch {small.batch_size} on {gpu}: {small.bytes_bound / small.share:.0%} of the eligible layers' "
            f"predicted time is bound by bytes or launches, so 2:4 ideally gains {small.gain('ideal'):.2f}x; {then}"
        )


def section_lines(*, projected: bool, quantized: bool) -> Iterator[str]:
    """On sections without which nothing below 2:4 INT8 comes out."""
    if not projected:
        yield (
            "no nm section: the final model is not 2:4, and no runtime here skips other zeros; the prediction is what "
            "an nm section would gain"
        )
    if not quantized:
        yield (
            "no quantize section: the final model is not INT8; the prediction takes every Conv and Linear as INT8, as "
            "such a section would have it"
        )


def limits(found: GpuForecast) -> str:
    """The layers that hold the ideal gain down: the largest of what is left of the time that 2:4 does not help."""
    left = sorted(found.layers, key=lambda row: -row.share * (2.0 - min(row.ideal, 2.0)))[:_NAMED]
    return ", ".join(
        f"{row.name} ({row.share:.0%} of the time, "
        + (f"bound by {row.bound}, ideally {row.ideal:.2f}x)" if row.eligible else f"{row.reason})")
        for row in left
    )
