"""From scores to a mask: the highest scores stay, counts are exact, ties go to the lower index.

Density is always that of the layers handed in: a layer kept dense is not scored, not in the mask, not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import torch

from sparsify_deploy.errors import ModelError
from sparsify_deploy.sparsity.allocation import erk, uniform
from sparsify_deploy.sparsity.mask import Mask
from sparsify_deploy.sparsity.nm import nm_mask
from sparsify_deploy.sparsity.schedules import exponential_density
from sparsify_deploy.types import Progress, Silent

if TYPE_CHECKING:
    from torch import Tensor

    from sparsify_deploy.sparsity.layers import Layer
    from sparsify_deploy.types import Scores

    Scorer: TypeAlias = Callable[[Mask | None], Scores]
    """Scores of the weights `W * mask`, keyed by parameter name; None is the unmasked network."""

_SAMPLE_STRIDE = 61
"""Every so many scores guess where the threshold lies; a prime, so that no axis of a weight is seen at one place."""
_SMALL = 1 << 16
"""Below so many scores the guess costs more than it saves."""
_CACHED = 1 << 16
"""Scores looked at together: half a MiB of float64 stays in the cache between one comparison and the next."""

Allocation: TypeAlias = Literal["global", "uniform", "erk"]


def global_mask(scores: Scores, density: float) -> Mask:
    """Keep the round(density · total) highest scores over all layers together.

    Ties go to the lower index, layers in the order of `scores`. ModelError on a score that is not finite.
    """
    _check_finite(scores)
    if not scores:
        return Mask({})
    parts = _comparable(list(scores.values()))
    kept = _top(parts, round(density * sum(part.numel() for part in parts)))
    return Mask({name: part.view(score.shape) for part, (name, score) in zip(kept, scores.items(), strict=True)})


def layerwise_mask(scores: Scores, densities: Mapping[str, float]) -> Mask:
    """Keep the round(density · size) highest scores of each layer of `densities`; ties go to the lower index."""
    _check_finite({name: scores[name] for name in densities})
    kept = {}
    for name, density in densities.items():
        (part,) = _top(_comparable([scores[name]]), round(density * scores[name].numel()))
        kept[name] = part.view(scores[name].shape)
    return Mask(kept)


def pattern_mask(scores: Scores, n: int, m: int) -> Mask:
    """The n highest scores of every m consecutive input channels, signs and all; ties go to the lower channel.

    ModelError on a score that is not finite, and where m does not divide a layer's channels.
    """
    _check_finite(scores)
    kept = {}
    for name, score in scores.items():
        # nm_mask ranks magnitudes; the scores' own order as whole numbers from 0 keeps negative ones apart
        _, order = torch.unique(score.detach(), return_inverse=True)
        kept[name] = nm_mask(order, n, m)
    return Mask(kept)


def allocate(scores: Scores, density: float, allocation: Allocation) -> Mask:
    """One shot: the mask of `density` over all scored layers, shared out by `allocation`."""
    final = final_densities({name: tuple(score.shape) for name, score in scores.items()}, density, allocation)
    return global_mask(scores, density) if final is None else layerwise_mask(scores, final)


def prune_at_init(
    scorer: Scorer,
    layers: Iterable[Layer],
    density: float,
    *,
    allocation: Allocation,
    rounds: int,
    progress: Progress | None = None,
) -> Mask:
    """Prune `layers` to `density` of their weights in `rounds`; no model is touched.

    After round e the density is density ** ((e + 1) / rounds), and the mask is made from scratch out of
    the scores of W · mask (Tanaka 2020). `global` holds one threshold over all layers; `uniform` and `erk` go
    towards each layer's own final density by the same rule. `scorer` may score more layers than asked for.
    """
    progress = progress or Silent()
    layers = tuple(layers)
    final = final_densities({layer.parameter: layer.shape for layer in layers}, density, allocation)
    mask = Mask.ones(layers)
    for done in range(rounds):
        found = scorer(mask)
        scores = {layer.parameter: found[layer.parameter] for layer in layers}
        if final is None:
            mask = global_mask(scores, exponential_density(density, done, rounds))
        else:
            mask = layerwise_mask(scores, {n: exponential_density(d, done, rounds) for n, d in final.items()})
        progress.update("prune", done + 1, rounds, f"density {exponential_density(density, done, rounds):.4f}")
    return mask


def collapsed(mask: Mask) -> tuple[str, ...]:
    """Names of the parameters of which no weight is left: nothing can pass that layer but its bias."""
    return tuple(name for name, (kept, _) in mask.counts().items() if kept == 0)


def final_densities(
    shapes: Mapping[str, tuple[int, ...]], density: float, allocation: Allocation
) -> dict[str, float] | None:
    """Each layer's own density, by parameter name; None for a global threshold, which leaves that to the scores."""
    if allocation == "global":
        return None
    return uniform(shapes, density) if allocation == "uniform" else erk(shapes, density)


def _comparable(scores: Sequence[Tensor]) -> list[Tensor]:
    """Flat, on the CPU, in one dtype NumPy has that holds every score exactly."""
    dtype = torch.float32
    for score in scores:
        dtype = torch.promote_types(dtype, score.dtype)
    return [score.detach().flatten().to("cpu", dtype) for score in scores]


def _top(parts: Sequence[Tensor], keep: int) -> list[Tensor]:
    """True at the `keep` highest entries of all `parts` together; ties go to the lower index, the earlier part.

    The threshold is looked for between two guesses that a sample gives, so that only the few entries between them
    are ranked. Where the guesses are wrong every entry is.
    """
    if keep == 0:
        return [torch.zeros_like(part, dtype=torch.bool) for part in parts]
    sizes = [part.numel() for part in parts]
    if sum(sizes) < _SMALL:
        return list(torch.split(_highest(torch.cat(list(parts)), keep), sizes))
    above, between = _around(parts, *_bracket(parts, keep))
    wanted = keep - sum(int(over.count_nonzero()) for over in above)
    if not 0 <= wanted <= sum(len(places) for places in between):
        above, between = _around(parts, -math.inf, math.inf)
        wanted = keep
    values = torch.cat([part[places] for part, places in zip(parts, between, strict=True)])
    chosen = torch.split(_highest(values, wanted), [len(places) for places in between])
    for kept, places, taken in zip(above, between, chosen, strict=True):
        kept[places[taken]] = True
    return above


def _bracket(parts: Sequence[Tensor], keep: int) -> tuple[float, float]:
    """Two scores between which, in all likelihood, the `keep`-th highest lies."""
    sample = torch.cat([part[::_SAMPLE_STRIDE] for part in parts]).numpy()
    share = keep / sum(part.numel() for part in parts)
    margin = 8 * math.sqrt(len(sample) * share * (1 - share)) + 8
    ends = [len(sample) * (1 - share) + side * margin for side in (-1, 1)]
    first, last = (min(max(int(end), 0), len(sample) - 1) for end in ends)
    sample.partition((first, last))
    low = float(sample[first]) if ends[0] > 0 else -math.inf
    high = float(sample[last]) if ends[1] < len(sample) - 1 else math.inf
    if low == 0:  # weights pruned before: ranking all their zeros would be the longest part
        low = min(high, float(torch.finfo(parts[0].dtype).smallest_normal))
    return low, high


def _around(parts: Sequence[Tensor], low: float, high: float) -> tuple[list[Tensor], list[Tensor]]:
    """For each part, where it is above `high` as bool, and the places where it is from `low` to `high`."""
    above, between = [], []
    for part in parts:
        over, places = torch.empty_like(part, dtype=torch.bool), []
        for start in range(0, part.numel(), _CACHED):
            piece = part[start : start + _CACHED]
            higher = torch.gt(piece, high, out=over[start : start + _CACHED])
            # several times faster than torch's nonzero on one thread
            places.append(torch.from_numpy(np.flatnonzero(((piece >= low) ^ higher).numpy())) + start)
        above.append(over)
        between.append(torch.cat(places) if places else torch.empty(0, dtype=torch.int64))
    return above, between


def _highest(scores: Tensor, keep: int) -> Tensor:
    if keep == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(scores.numel() - keep + 1).values
    kept = scores > threshold
    # topk and sort promise no order among equal scores, and SynFlow has many that are exactly 0
    ties = (scores == threshold).nonzero().flatten()
    kept[ties[: keep - int(kept.sum())]] = True
    return kept


def _check_finite(scores: Scores) -> None:
    for name, score in scores.items():
        if bool(torch.isfinite(score.sum())):  # one pass; a sum that overflows proves nothing, so count then
            continue
        bad = int(score.numel() - torch.isfinite(score).sum())
        if bad:
            raise ModelError(
                f"{bad} of {score.numel()} scores of {name} are NaN or infinite: check its weights and the loss"
            )
