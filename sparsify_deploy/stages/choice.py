"""Which layers a projection leaves out or leaves as they are, by what their masks hold and by what they would lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sparsify_deploy.errors import DataError
from sparsify_deploy.graph import eligibility
from sparsify_deploy.graph.eligibility import Answer
from sparsify_deploy.params import n_and_m
from sparsify_deploy.recipe import NM
from sparsify_deploy.reports import SensitivityReport

if TYPE_CHECKING:
    from torch import Tensor

    from sparsify_deploy.sparsity.layers import Layer


def already(layers: Sequence[Layer], nm: NM, mask: Mapping[str, Tensor]) -> set[str]:
    """The layers whose mask keeps N of every M, as training that stays N:M leaves it.

    N and not fewer: a sparse mask that fits the pattern by chance is still refilled.
    """
    from sparsify_deploy.sparsity.nm import is_nm

    n, m = nm.nm
    found = set()
    for layer in layers:
        kept = mask.get(layer.parameter)
        if kept is None or not eligibility.pattern_possible(layer.shape, layer.groups, m).ok:
            continue
        if int(kept.sum()) * m == kept.numel() * n and is_nm(kept, n, m):
            found.add(layer.name)
    return found


def loosened(layers: Sequence[Layer], choices: Mapping[str, Answer], pattern: str, held: set[str]) -> dict[str, Answer]:
    """The choices for a looser pattern on the way. A layer it does not divide goes to the last pattern directly, and
    the layers `held` there already stay."""
    found = dict(choices)
    for layer in layers:
        if layer.name in held and found[layer.name].ok:
            found[layer.name] = Answer(False, f"{found[layer.name].reason}: stays")
        elif found[layer.name].ok:
            possible = eligibility.pattern_possible(layer.shape, layer.groups, n_and_m(pattern)[1])
            found[layer.name] = possible if not possible.ok else found[layer.name]
    return found


def keep_worst(
    layers: Sequence[Layer], choices: Mapping[str, Answer], nm: NM, measured: SensitivityReport
) -> dict[str, Answer]:
    """A no for the `nm.keep_worst_dense` of `layers` that lose most when projected alone, by the report's rank.

    `DataError` where a layer that would be projected was not measured.
    """
    rows = {row.layer: row for row in measured.layers}
    ranked = []
    for layer in layers:
        if not choices[layer.name].ok:
            continue
        row = rows.get(layer.name)
        if row is None or row.rank is None or row.projected is None:
            raise DataError(f"nm.keep_worst_dense: the sensitivity of {layer.name} was not measured: measure it again")
        ranked.append((row.rank, row.projected.drop, layer.name))
    sign = -1.0 if measured.direction == "higher" else 1.0
    return {
        name: Answer(
            False,
            f"kept dense: number {place} of the worst {nm.keep_worst_dense} (nm.keep_worst_dense): "
            f"{measured.metric} {sign * drop:+.4f} when projected alone",
        )
        for place, (_, drop, name) in enumerate(sorted(ranked)[: nm.keep_worst_dense], start=1)
    }
