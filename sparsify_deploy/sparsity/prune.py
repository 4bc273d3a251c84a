"""From scores to a mask: the highest scores stay, counts are exact, ties go to the lower index.

Density is always that of the layers handed in: a layer kept dense is not scored, not in the mask, not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from sparsify_deploy.errors import ModelError
from sparsify_deploy.sparsity.allocation import erk, uniform
from sparsify_deploy.sparsity.mask import Mask
from sparsify_deploy.sparsity.schedules import exponential_density
from sparsify_deploy.types import Progress, Silent

if TYPE_CHECKING:
    from torch import Tensor

    from sparsify_deploy.sparsity.layers import Layer
    from sparsify_deploy.types import Scores

    Scorer: TypeAlias = Callable[[Mask | None], Scores]
    """Scores of the weights `W * mask`, keyed by parameter name; None is the unmasked network."""

Allocation: TypeAlias = Literal["global", "uniform", "erk"]


def global_mask(scores: Scores, density: float) -> Mask:
    """Keep the round(density · total) highest scores over all layers together.

    Ties go to the lower index, layers in the order of `scores`. ModelError on a score that is not finite.
    """
    _check_finite(scores)
    if not scores:
        return Mask({})
    kept = _top(torch.cat([score.detach().flatten() for score in scores.values()]), density)
    parts = torch.split(kept, [score.numel() for score in scores.values()])
    return Mask({name: part.view(score.shape) for part, (name, score) in zip(parts, scores.items(), strict=True)})


def layerwise_mask(scores: Scores, densities: Mapping[str, float]) -> Mask:
    """Keep the round(density · size) highest scores of each layer of `densities`; ties go to the lower index."""
    _check_finite({name: scores[name] for name in densities})
    return Mask(
        {
            name: _top(scores[name].detach().flatten(), density).view(scores[name].shape)
            for name, density in densities.items()
        }
    )


def allocate(scores: Scores, density: float, allocation: Allocation) -> Mask:
    """One shot: the mask of `density` over all scored layers, shared out by `allocation`."""
    final = _final_densities({name: tuple(score.shape) for name, score in scores.items()}, density, allocation)
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
    final = _final_densities({layer.parameter: layer.shape for layer in layers}, density, allocation)
    mask = Mask.ones(layers)
    for done in range(rounds):
        found = scorer(mask)
        scores = {layer.parameter: found[layer.parameter] for layer in layers}
        if final is None:
            mask = global_mask(scores, exponential_density(density, done, rounds))
        else:
            mask = layerwise_mask(scores, {n: exponential_density(d, done, rounds) for n, d in final.items()})
        progress.update("prune", done + 1, rounds, f"density {mask.density:.4f}")
    return mask


def collapsed(mask: Mask) -> tuple[str, ...]:
    """Names of the parameters of which no weight is left: nothing can pass that layer but its bias."""
    return tuple(name for name, (kept, _) in mask.counts().items() if kept == 0)


def _final_densities(
    shapes: Mapping[str, tuple[int, ...]], density: float, allocation: Allocation
) -> dict[str, float] | None:
    if allocation == "global":
        return None
    return uniform(shapes, density) if allocation == "uniform" else erk(shapes, density)


def _top(scores: Tensor, density: float) -> Tensor:
    keep = round(density * scores.numel())
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
        bad = int(score.numel() - torch.isfinite(score).sum())
        if bad:
            raise ModelError(
                f"{bad} of {score.numel()} scores of {name} are NaN or infinite: check its weights and the loss"
            )
