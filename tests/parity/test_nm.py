"""N:M against a search through every pattern, and the losses of projecting a global magnitude mask."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsify_deploy.sparsity.nm import is_nm, nm_mask, refill, violations
from sparsify_deploy.sparsity.prune import global_mask

PATTERNS = [(2, 4), (4, 8), (1, 4)]


def best_by_search(group: list[float], n: int) -> tuple[int, ...]:
    """Of all patterns the one with most magnitude, the lexicographically first among equals."""
    return max(combinations(range(len(group)), n), key=lambda p: (sum(abs(group[i]) for i in p), [-i for i in p]))


def every_group(tensor: Tensor, m: int) -> list[tuple[list[float], tuple[int, int, int, int]]]:
    """Each group's values with the index (k, first channel, r, s) of where it lies, read out one by one."""
    k, c, r, s = tensor.shape
    return [
        ([tensor[i, j + q, y, x].item() for q in range(m)], (i, j, y, x))
        for i, j, y, x in product(range(k), range(0, c, m), range(r), range(s))
    ]


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_nm_mask_is_the_best_of_all_patterns(n: int, m: int) -> None:
    torch.manual_seed(0)
    for weight in (torch.randn(3, 16, 2, 3), torch.randint(-2, 3, (3, 16, 2, 3)).float()):
        kept = nm_mask(weight, n, m)
        for group, (i, j, y, x) in every_group(weight, m):
            assert tuple(kept[i, j : j + m, y, x].nonzero().flatten().tolist()) == best_by_search(group, n)


@pytest.mark.parametrize("m", range(1, 17))
def test_every_n_of_every_m_up_to_sixteen(m: int) -> None:
    torch.manual_seed(m)
    # three groups: of their own numbers, of ties, and mostly of zeros
    weight = torch.cat([torch.randn(m), torch.randint(-2, 3, (m,)).float(), torch.randn(m) * (torch.rand(m) < 0.2)])
    for n in range(1, m + 1):
        kept = nm_mask(weight[None], n, m)[0].view(3, m)
        for group, found in zip(weight.view(3, m).tolist(), kept, strict=True):
            order = sorted(range(m), key=lambda i: (-abs(group[i]), i))
            assert found.nonzero().flatten().tolist() == sorted(order[:n])
            if m <= 10:
                assert tuple(sorted(order[:n])) == best_by_search(group, n)


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_under_a_mask_it_is_the_best_of_all_patterns_left(n: int, m: int) -> None:
    torch.manual_seed(3)
    for weight in (torch.randn(3, 16, 2, 3), torch.randint(-1, 2, (3, 16, 2, 3)).float()):
        allowed = torch.rand(weight.shape) < 0.5
        kept = nm_mask(weight, n, m, allowed)
        for group, (i, j, y, x) in every_group(weight, m):
            free = [q for q in range(m) if allowed[i, j + q, y, x]]
            best = max(
                combinations(free, min(n, len(free))), key=lambda p: (sum(abs(group[q]) for q in p), [-q for q in p])
            )
            assert tuple(kept[i, j : j + m, y, x].nonzero().flatten().tolist()) == best


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64])
def test_other_dtypes_and_memory_formats(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    weight = (torch.randn(3, 16, 2, 3) * 8).to(dtype)
    expected = nm_mask(weight.double(), 2, 4)
    assert torch.equal(nm_mask(weight, 2, 4), expected)
    assert torch.equal(nm_mask(weight.to(memory_format=torch.channels_last), 2, 4), expected)
    assert torch.equal(nm_mask(weight.flip(0), 2, 4), expected.flip(0))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([*PATTERNS, (3, 5), (8, 16), (4, 4)]), st.data())
def test_nm_mask_on_any_numbers(pattern: tuple[int, int], data: st.DataObject) -> None:
    n, m = pattern
    values = st.one_of(st.integers(-2, 2).map(float), st.floats(-(2.0**100), 2.0**100, width=32))
    row = data.draw(st.lists(values, min_size=m, max_size=m))
    kept = nm_mask(torch.tensor([row]), n, m)[0]
    order = sorted(range(m), key=lambda i: (-abs(row[i]), i))
    assert kept.nonzero().flatten().tolist() == sorted(order[:n])


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([*PATTERNS, (3, 5), (8, 16)]), st.data())
def test_refill_on_any_mask(pattern: tuple[int, int], data: st.DataObject) -> None:
    n, m = pattern
    kept = data.draw(st.lists(st.booleans(), min_size=m, max_size=m))
    gradient = data.draw(st.lists(st.integers(-3, 3).map(float), min_size=m, max_size=m))
    grown = sorted((i for i in range(m) if not kept[i]), key=lambda i: (-abs(gradient[i]), i))
    expected = {i for i in range(m) if kept[i]} | set(grown[: max(0, n - sum(kept))])
    # the group sits in the second place of channels, at one kernel position of two
    mask = torch.zeros(1, 2 * m, 1, 2, dtype=torch.bool)
    mask[0, m:, 0, 1] = torch.tensor(kept)
    dense = torch.zeros(mask.shape)
    dense[0, m:, 0, 1] = torch.tensor(gradient)
    found = refill(mask, dense, n, m)
    assert set(found[0, m:, 0, 1].nonzero().flatten().tolist()) == expected
    assert bool((found | ~mask).all())
    assert int(found[0, :m].sum()) == 2 * n


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_violations_are_counted_one_by_one(n: int, m: int) -> None:
    torch.manual_seed(1)
    tensor = torch.randn(3, 16, 2, 3) * (torch.rand(3, 16, 2, 3) < 0.5)
    expected = sum(sum(value != 0 for value in group) > n for group, _ in every_group(tensor, m))
    assert 0 < expected < tensor.numel() // m
    assert violations(tensor, n, m) == violations(tensor != 0, n, m) == expected
    assert not is_nm(tensor, n, m)
    assert is_nm(tensor * nm_mask(tensor, n, m), n, m)


def test_two_of_four_is_four_of_eight_and_not_the_other_way() -> None:
    torch.manual_seed(2)
    weight = torch.randn(8, 32, 3, 3)
    assert is_nm(nm_mask(weight, 2, 4), 4, 8)
    assert not is_nm(nm_mask(weight, 4, 8), 2, 4)


@pytest.mark.parametrize(
    ("density", "weights_lost", "l1_kept"),
    [(1.0, 0.50, 0.745), (0.5, 0.188, 0.863), (0.3, 0.077, 0.939), (0.2, 0.036, 0.970), (0.1, 0.0096, 0.992)],
)
def test_what_projecting_a_global_magnitude_mask_loses(density: float, weights_lost: float, l1_kept: float) -> None:
    weight = torch.randn(256, 256, 3, 3, generator=torch.Generator().manual_seed(0))
    mask = global_mask({"w": weight.abs()}, density)["w"]
    projected = nm_mask(weight, 2, 4, mask)
    assert 1 - projected.sum() / mask.sum() == pytest.approx(weights_lost, abs=0.0015)
    assert (weight.abs() * projected).sum() / (weight.abs() * mask).sum() == pytest.approx(l1_kept, abs=0.0015)
