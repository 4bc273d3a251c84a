"""The search for an order of columns: bounds, determinism, refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sparsify_deploy.sparsity.permute import efficacy, ideal, kept, search


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def by_hand(matrix: Tensor, n: int, m: int) -> float:
    total = 0.0
    for row in matrix.double().abs().tolist():
        for start in range(0, len(row), m):
            total += sum(sorted(row[start : start + m], reverse=True)[:n])
    return total


def best_of_all(matrix: Tensor, n: int, m: int) -> float:
    columns = matrix.shape[1]
    best = 0.0
    for others in itertools.combinations(range(1, columns), m - 1):
        first = [0, *others]
        order = first + [i for i in range(columns) if i not in first]
        best = max(best, by_hand(matrix[:, order], n, m))
    return best


@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 4), (2, 4), (3, 4), (4, 8), (5, 16), (4, 4)])
def test_kept_is_the_sum_of_the_largest_of_each_group(n: int, m: int) -> None:
    matrix = normal(5, 2 * m)
    assert kept(matrix, n, m) == pytest.approx(by_hand(matrix, n, m), rel=1e-6)
    assert ideal(matrix, n, m) == pytest.approx(by_hand(matrix, 2 * n, 2 * m), rel=1e-6)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("n", [1, 2, 3])
def test_stripe_groups_finds_the_best_of_all_35_orders_of_8_columns(seed: int, n: int) -> None:
    matrix = normal(6, 8, seed)
    order = search(matrix, n, 4, "stripe_groups", escapes=0)
    assert kept(matrix[:, order], n, 4) == pytest.approx(best_of_all(matrix, n, 4), rel=1e-6)


@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 4), (2, 4), (3, 4), (4, 8), (2, 16), (8, 16)])
@pytest.mark.parametrize("window", [2, 512])
def test_channel_swap_gives_a_permutation_that_keeps_more(n: int, m: int, window: int) -> None:
    matrix = normal(9, 6 * m)
    order = search(matrix, n, m, window=window)
    assert sorted(order.tolist()) == list(range(6 * m))
    assert by_hand(matrix[:, order], n, m) > by_hand(matrix, n, m)
    assert 0 < efficacy(matrix, order, n, m) <= 1


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 8)])
def test_no_single_exchange_improves_what_channel_swap_found(n: int, m: int) -> None:
    matrix = normal(7, 3 * m, seed=3)
    found = matrix[:, search(matrix, n, m)]
    here = by_hand(found, n, m)
    for i, j in itertools.combinations(range(3 * m), 2):
        order = list(range(3 * m))
        order[i], order[j] = order[j], order[i]
        assert by_hand(found[:, order], n, m) <= here + 1e-3


@pytest.mark.parametrize("method", ["channel_swap", "stripe_groups"])
def test_the_same_matrix_gives_the_same_order_and_no_global_random_state_is_touched(method: str) -> None:
    matrix = normal(16, 32)
    state = torch.get_rng_state()
    first = search(matrix, method=method)  # type: ignore[arg-type]
    torch.rand(3)
    assert torch.equal(first, search(matrix, method=method))  # type: ignore[arg-type]
    torch.set_rng_state(state)
    search(matrix, method=method)  # type: ignore[arg-type]
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("matrix", [torch.ones(4, 16), torch.zeros(4, 16), torch.ones(3, 4), torch.ones(0, 8)], ids=str)
def test_where_nothing_helps_the_order_is_the_identity(matrix: Tensor) -> None:
    assert search(matrix).tolist() == list(range(matrix.shape[1]))


def test_dense_n_equals_m_has_nothing_to_search() -> None:
    assert search(normal(4, 16), 4, 4).tolist() == list(range(16))


def test_zero_columns_are_spread_so_that_nothing_is_lost() -> None:
    matrix = torch.zeros(4, 16)
    matrix[:, :8] = normal(4, 8).abs() + 1
    order = search(matrix)
    assert kept(matrix[:, order]) == pytest.approx(float(matrix.sum()))
    assert efficacy(matrix, order) == pytest.approx(1.0)


def test_stripe_groups_keeps_at_least_what_channel_swap_does_and_escapes_help() -> None:
    matrix = normal(64, 48)
    swapped, parted, escaped = (
        kept(matrix[:, search(matrix)]),
        kept(matrix[:, search(matrix, method="stripe_groups", escapes=0)]),
        kept(matrix[:, search(matrix, method="stripe_groups", escapes=60)]),
    )
    assert swapped <= parted < escaped


def test_what_is_no_pattern_is_refused() -> None:
    with pytest.raises(ValueError, match="0 < N <= M"):
        search(normal(4, 8), 5, 4)
    with pytest.raises(ValueError, match="no stripes of 4"):
        search(normal(4, 10))
    with pytest.raises(ValueError, match="use channel_swap"):
        search(normal(4, 16), 4, 8, "stripe_groups")
    with pytest.raises(ValueError, match="not finite"):
        search(torch.full((4, 8), torch.nan))
    with pytest.raises(ValueError, match="no permutation search"):
        search(normal(4, 8), method="best")  # type: ignore[arg-type]
