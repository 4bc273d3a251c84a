"""Which order of input channels keeps most magnitude under an N:M pattern (Pool & Yu 2021).

"Channel Permutations for N:M Sparsity", NeurIPS 2021. A *stripe* is m consecutive columns; what counts is which columns
share a stripe, neither their order in it nor the order of the stripes. Both searches climb: every step keeps more.

`channel_swap` exchanges two columns of two stripes as long as any exchange helps. Let t be the n-th largest magnitude
in a row of a stripe without column i. Then putting column j in the place of i adds `max(0, |w_j| - t)` in that row;
summed over rows, this is half of an L1 distance and two sums, so all C^2 exchanges are priced by one distance matrix,
and after an exchange only the lines of its two stripes are priced again.

`stripe_groups` goes on from there with all partitions of two stripes into two (35 for m = 4) and, when no pair can be
improved any more, tries to leave the local optimum: a few seeded exchanges, another climb, back if that keeps less.

Wide matrices are searched in windows of columns, first neighbouring ones, then strided ones across all of these: the
price of an exchange is a pass over all rows, and beyond some hundred columns more partners add little.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Method: TypeAlias = Literal["channel_swap", "stripe_groups"]

_TOLERANCE = 1e-5
"""A gain counts above this part of the mean magnitude of a stripe: float32 sums are good to about a tenth of it."""
_CHUNK = 1 << 20
"""Elements of one intermediate of the partition search: 4 MiB of float32."""
_ROUNDS = 10_000
"""Rounds of a climb, which takes some dozens: an end even if rounding should make gains of nothing."""
_EXCHANGES = 3
"""Random exchanges of an attempt to leave a local optimum: one is mostly undone by the next climb."""


def search(
    matrix: Tensor,
    n: int = 2,
    m: int = 4,
    method: Method = "channel_swap",
    *,
    window: int = 512,
    escapes: int = 60,
    reach: int = 32,
    seed: int = 0,
) -> Tensor:
    """The order of the columns of `matrix` `(rows, columns)` that was found: int64 `(columns,)` on its device.

    `matrix[:, order]` keeps at least as much as `matrix`; where nothing better is found, the order is the identity.
    Column i of the result is column `order[i]` of `matrix`. The same arguments give the same order on one device; no
    global random state is read. Exchanges happen inside windows of about `window` columns. `stripe_groups` makes
    `escapes` attempts to leave a local optimum, seeded by `seed`, and partitions each stripe with the `reach` ones on
    either side of it.

    Raises:
        ValueError: no N:M pattern, a number of columns m does not divide, values that are not finite, or
            `stripe_groups` with m > 4, whose partitions are too many (1:8 has 6,435).
    """
    _check(matrix, n, m)
    if method not in ("channel_swap", "stripe_groups"):
        raise ValueError(f"{method!r} is no permutation search: channel_swap or stripe_groups")
    if method == "stripe_groups" and m > 4:
        raise ValueError(f"stripe_groups tries every partition of two stripes, too many for M = {m}: use channel_swap")
    columns = matrix.shape[1]
    identity = torch.arange(columns, device=matrix.device)
    if m in (n, columns) or matrix.numel() == 0:
        return identity
    magnitude = matrix.detach().abs().to(torch.float32).t().contiguous()
    if not magnitude.isfinite().all():
        raise ValueError("the matrix holds values that are not finite: no permutation can be chosen")
    with torch.no_grad():
        stripes = identity.reshape(-1, m).clone()
        for part in _windows(len(stripes), max(2, window // m)):
            stripes[part] = _swap(magnitude, stripes[part], n, escapes if method == "stripe_groups" else 0, seed)
        if method == "stripe_groups":
            stripes = _partition(magnitude, stripes, n, reach)
    stripes = stripes.sort(1).values
    order = stripes[stripes[:, 0].argsort()].reshape(-1)
    return order if kept(matrix[:, order], n, m) > kept(matrix, n, m) else identity


def kept(matrix: Tensor, n: int = 2, m: int = 4) -> float:
    """The sum of the n largest magnitudes of every m consecutive columns, over all rows; summed in float64."""
    _check(matrix, n, m)
    groups = matrix.detach().abs().reshape(matrix.shape[0], -1, m)
    return float(torch.stack(_largest(groups.unbind(-1), n)).sum(dtype=torch.float64))


def ideal(matrix: Tensor, n: int = 2, m: int = 4) -> float:
    """The largest magnitudes of each row, n / m of it, wherever they lie: what no permutation can exceed."""
    _check(matrix, n, m)
    count = matrix.shape[1] * n // m
    return float(matrix.detach().abs().topk(count, dim=1).values.sum(dtype=torch.float64))


def efficacy(matrix: Tensor, permutation: Tensor, n: int = 2, m: int = 4) -> float:
    """The part of what N:M loses against `ideal` that `permutation` wins back; 0.0 where there is nothing to win."""
    before = kept(matrix, n, m)
    possible = ideal(matrix, n, m) - before
    return (kept(matrix[:, permutation], n, m) - before) / possible if possible > 0 else 0.0


def _check(matrix: Tensor, n: int, m: int) -> None:
    if not 0 < n <= m <= 16:
        raise ValueError(f"{n}:{m} is no N:M pattern: 0 < N <= M <= 16")
    if matrix.ndim != 2 or matrix.shape[1] % m:
        raise ValueError(f"a matrix of shape {tuple(matrix.shape)} has no stripes of {m} columns")


def _largest(planes: Sequence[Tensor], count: int) -> list[Tensor]:
    """The `count` largest of `planes` at each position, in falling order, by exchanging neighbours."""
    rest, found = list(planes), []
    for _ in range(count):
        top = rest[0]
        left = []
        for plane in rest[1:]:
            left.append(torch.minimum(top, plane))
            top = torch.maximum(top, plane)
        found.append(top)
        rest = left
    return found


def _windows(stripes: int, size: int) -> list[Tensor]:
    """Windows of at most `size` stripes: neighbouring ones, then, if that is more than one, strided ones."""
    every = torch.arange(stripes)
    count = -(-stripes // size)
    return [every] if count == 1 else [*every.tensor_split(count), *(every[first::count] for first in range(count))]


def _swap(magnitude: Tensor, stripes: Tensor, n: int, escapes: int = 0, seed: int = 0) -> Tensor:
    """Exchange columns between `stripes` `(S, m)` until no exchange helps; rows of `magnitude` are all columns.

    Then make `escapes` attempts to leave the optimum, each by a few exchanges drawn from `seed`.
    """
    count, m = stripes.shape
    chosen = magnitude[stripes.reshape(-1)]
    every = torch.arange(count, device=stripes.device)
    price = chosen.new_empty(count * m, count * m)
    local = torch.arange(count * m, device=stripes.device).reshape(count, m)
    local, price = _climb_by_swaps(chosen, local, price, every, n)
    random = torch.Generator().manual_seed(seed)
    best = _stripe_sums(chosen, local, n) if escapes else 0.0
    for _ in range(escapes):
        trial = local.clone()
        a, b, i, j = torch.randint(count * m, (4, _EXCHANGES), generator=random).to(stripes.device)
        a, b, i, j = a % count, b % count, i % m, j % m
        for k in range(_EXCHANGES):
            trial[a[k], i[k]], trial[b[k], j[k]] = trial[b[k], j[k]].clone(), trial[a[k], i[k]].clone()
        trial, trial_price = _climb_by_swaps(chosen, trial, price.clone(), torch.unique(torch.cat((a, b))), n)
        total = _stripe_sums(chosen, trial, n)
        if total > best:
            local, price, best = trial, trial_price, total
    return stripes.reshape(-1)[local]


def _climb_by_swaps(
    magnitude: Tensor, stripes: Tensor, price: Tensor, touched: Tensor, n: int
) -> tuple[Tensor, Tensor]:
    """Apply exchanges until none helps; `stripes` and `price`, by place and column, are overwritten and returned.

    `price[i, j]` is what the stripe of place i keeps more with column j there; it is unknown for `touched` stripes.
    """
    count, m = stripes.shape
    sums = magnitude.sum(1)
    tolerance = float(sums.sum()) / count * _TOLERANCE
    for _ in range(_ROUNDS):
        price.view(count, m, -1)[touched] = _prices(magnitude, sums, stripes[touched], n)
        by_place = price[:, stripes.reshape(-1)]
        gain = (by_place + by_place.t()).reshape(count, m, count, m)
        a, b = _mutual(gain.amax((1, 3)), tolerance)
        if not len(a):
            break
        which = gain[a, :, b].reshape(-1, m * m).argmax(1)
        i, j = which // m, which % m
        stripes[a, i], stripes[b, j] = stripes[b, j], stripes[a, i]
        touched = torch.cat((a, b))
    return stripes, price


def _prices(magnitude: Tensor, sums: Tensor, stripes: Tensor, n: int) -> Tensor:
    """For each place of `stripes` `(s, m)` and each column, what the stripe keeps more with it there: `(s, m, C)`."""
    members = magnitude[stripes]
    falling = _largest(members.unbind(1), n + 1)
    last, first_out = falling[n - 1].unsqueeze(1), falling[n].unsqueeze(1)
    bar = torch.where(members > first_out, first_out, last)
    lost = (members - first_out).clamp_min_(0).sum(2, keepdim=True)
    # max(0, w - bar) = (w - bar + |w - bar|) / 2
    distance = torch.cdist(bar.flatten(0, 1), magnitude, p=1).reshape(*stripes.shape, -1)
    return distance.add_(sums).sub_(bar.sum(2, keepdim=True)).mul_(0.5).sub_(lost)


def _mutual(gain: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Pairs a < b of stripes that are each other's best partner, by the symmetric `gain`; ties go to lower indices.

    They are disjoint, so that all can be changed at once, and the best pair of all is among them. The diagonal of
    `gain` is overwritten.
    """
    gain.fill_diagonal_(-torch.inf)
    partner = gain.argmax(1)
    value = gain.take_along_dim(partner.unsqueeze(1), 1).squeeze(1)
    own = torch.arange(len(gain), device=gain.device)
    chosen = (partner[partner] == own) & (own < partner) & (value > tolerance)
    a = chosen.nonzero().squeeze(1)
    return a, partner[a]


def _partition(magnitude: Tensor, stripes: Tensor, n: int, reach: int) -> Tensor:
    """Give pairs of `stripes` `(S, m)` at most `reach` apart their best partition until none helps; overwrites them."""
    count, m = stripes.shape
    tolerance = float(magnitude.sum()) / count * _TOLERANCE
    halves = _halves(m).to(stripes.device)
    touched = torch.arange(count, device=stripes.device)
    gain = magnitude.new_full((count, count), -torch.inf)
    which = touched.new_zeros(count, count)
    for _ in range(_ROUNDS):
        a, b = _pairs(touched, count, reach)
        gain[a, b], which[a, b] = _best_partition(magnitude, torch.cat((stripes[a], stripes[b]), 1), halves, n)
        gain[b, a], which[b, a] = gain[a, b], which[a, b]
        a, b = _mutual(gain, tolerance)
        if not len(a):
            break
        both = torch.cat((stripes[a], stripes[b]), 1).take_along_dim(halves[which[a, b]], 1)
        stripes[a], stripes[b] = both[:, :m], both[:, m:]
        touched = torch.cat((a, b))
    return stripes


def _stripe_sums(magnitude: Tensor, stripes: Tensor, n: int) -> float:
    return float(torch.stack(_largest(magnitude[stripes].unbind(1), n)).sum(dtype=torch.float64))


def _pairs(touched: Tensor, count: int, reach: int) -> tuple[Tensor, Tensor]:
    """Every pair a < b of stripes at most `reach` apart, around the end, of which one is in `touched`."""
    step = torch.arange(1, min(reach, count // 2) + 1, device=touched.device)
    other = torch.cat((touched[:, None] + step, touched[:, None] - step), 1) % count
    one = touched[:, None].expand_as(other)
    pair = torch.unique(torch.minimum(one, other) * count + torch.maximum(one, other))
    return pair // count, pair % count


@lru_cache
def _halves(m: int) -> Tensor:
    """All ways to part 2 m columns into two stripes, `(ways, 2 m)`: the first column stays in the first stripe."""
    ways = []
    for others in combinations(range(1, 2 * m), m - 1):
        first = (0, *others)
        ways.append([*first, *(i for i in range(2 * m) if i not in first)])
    return torch.tensor(ways)


def _best_partition(magnitude: Tensor, columns: Tensor, halves: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """For each row of `columns` `(pairs, 2 m)`, the gain of the best of `halves` and which one it is."""
    m = columns.shape[1] // 2
    groups = halves.reshape(-1, m)
    size = max(1, _CHUNK // (len(groups) * magnitude.shape[1]))
    gains, indices = [], []
    for chunk in torch.split(columns, size):
        values = magnitude[chunk.t()]
        sums = torch.stack([p.sum(2) for p in _largest([values[groups[:, k]] for k in range(m)], n)]).sum(0)
        total = sums.reshape(len(halves), 2, -1).sum(1)
        index = total.argmax(0)
        gains.append(total.take_along_dim(index.unsqueeze(0), 0).squeeze(0) - total[0])
        indices.append(index)
    return torch.cat(gains), torch.cat(indices)
