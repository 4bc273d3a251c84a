"""Exact counts, ties by index, allocation and the iterative loop."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsify_deploy.errors import ModelError
from sparsify_deploy.sparsity.layers import prunable
from sparsify_deploy.sparsity.prune import allocate, collapsed, global_mask, layerwise_mask, pattern_mask, prune_at_init

if TYPE_CHECKING:
    from sparsify_deploy.sparsity.mask import Mask


def by_sorting(values: list[float], keep: int) -> list[bool]:
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    chosen = set(order[:keep])
    return [i in chosen for i in range(len(values))]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=40), st.integers(1, 39), st.floats(0, 1))
def test_global_is_a_stable_sort(values: list[int], cut: int, density: float) -> None:
    cut = min(cut, len(values) - 1)
    flat = torch.tensor(values, dtype=torch.float32)
    mask = global_mask({"z": flat[:cut], "a": flat[cut:]}, density)
    got = [*mask["z"].tolist(), *mask["a"].tolist()]
    assert got == by_sorting(flat.tolist(), round(density * len(values)))


def test_ties_go_to_the_lower_index_however_large_the_layer() -> None:
    # torch.topk and torch.sort without stable=True choose arbitrarily here
    mask = global_mask({"a": torch.zeros(100_003)}, 0.25)
    assert int(mask["a"].sum()) == 25_001
    assert bool(mask["a"][:25_001].all())


@pytest.mark.parametrize("density", [0.0, 1e-5, 0.001, 0.3, 0.6, 0.97, 1.0])
@pytest.mark.parametrize("kind", ["normal", "pruned before", "few values", "sorted", "spiked"])
def test_large_networks_are_ranked_like_a_stable_sort(kind: str, density: float) -> None:
    # the guess from a sample must not show, even where it is wrong
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(200_000, generator=generator, dtype=torch.float64)
    if kind == "pruned before":
        flat = flat.abs() * (torch.rand(200_000, generator=generator) < 0.5)
    if kind == "few values":
        flat = torch.randint(-2, 3, (200_000,), generator=generator).double()
    if kind == "sorted":
        flat = flat.sort().values
    if kind == "spiked":  # the sample sees large values alone
        flat[::61] += 100
    mask = global_mask({"b": flat[:150_000].view(300, 500), "a": flat[150_000:]}, density)
    order = torch.sort(flat, descending=True, stable=True).indices
    expected = torch.zeros(200_000, dtype=torch.bool)
    expected[order[: round(density * 200_000)]] = True
    assert torch.equal(torch.cat([mask["b"].flatten(), mask["a"]]), expected)


def test_pattern_mask_keeps_signs_apart_and_breaks_ties_by_channel() -> None:
    scores = {"w": torch.tensor([[-9.0, 1.0, -2.0, 0.5, 3.0, 3.0, 3.0, 3.0]])}
    assert pattern_mask(scores, 2, 4)["w"].tolist() == [[False, True, False, True, True, True, False, False]]
    with pytest.raises(ModelError, match="NaN"):
        pattern_mask({"w": torch.tensor([[1.0, float("nan")]])}, 1, 2)


def test_layerwise_holds_each_layers_own_count() -> None:
    scores = {"a": torch.arange(8.0).view(2, 4), "b": torch.arange(10.0) - 100, "left_out": torch.ones(3)}
    mask = layerwise_mask(scores, {"a": 0.25, "b": 0.5})
    assert mask["a"].tolist() == [[False] * 4, [False, False, True, True]]
    assert mask["b"].tolist() == [False] * 5 + [True] * 5
    assert "left_out" not in mask


def test_global_compares_across_layers_and_uniform_does_not() -> None:
    scores = {"small": torch.full((4, 10), 0.1), "large": torch.full((4, 10), 9.0)}
    assert allocate(scores, 0.5, "global").densities() == {"small": 0.0, "large": 1.0}
    assert allocate(scores, 0.5, "uniform").densities() == {"small": 0.5, "large": 0.5}
    assert collapsed(allocate(scores, 0.5, "global")) == ("small",)


def test_erk_allocation() -> None:
    scores = {"a": torch.rand(10, 10), "b": torch.rand(10, 20)}
    assert allocate(scores, 0.1, "erk").counts() == {"a": (12, 100), "b": (18, 200)}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    scores = {"fine": torch.ones(3), "layer1.weight": torch.tensor([1.0, bad, 2.0])}
    with pytest.raises(ModelError, match=r"1 of 3 scores of layer1\.weight"):
        global_mask(scores, 0.5)
    with pytest.raises(ModelError, match=r"layer1\.weight"):
        layerwise_mask(scores, {"layer1.weight": 0.5})


def test_mixed_dtypes_are_compared_by_value() -> None:
    mask = global_mask({"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([2.0, 4.0], dtype=torch.float64)}, 0.5)
    assert (mask["a"].tolist(), mask["b"].tolist()) == ([False, True], [False, True])


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10), nn.ReLU(), nn.Linear(10, 4))


def test_every_round_scores_the_masked_weights_at_the_exponential_density() -> None:
    model, seen = net(), []
    before = copy.deepcopy(model.state_dict())

    def scorer(mask: Mask | None) -> dict[str, Tensor]:
        assert mask is not None
        seen.append(mask.density)
        return {name: model.get_parameter(name).detach().abs() * mask[name] for name in mask}

    mask = prune_at_init(scorer, prunable(model), 0.01, allocation="global", rounds=4)
    total = 20 * 30 + 300 + 40
    assert seen == [1.0, *(round(0.01 ** (e / 4) * total) / total for e in (1, 2, 3))]
    assert len(mask) == 3
    assert sum(kept for kept, _ in mask.counts().values()) == round(0.01 * total)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_mask_is_made_from_scratch_in_each_round() -> None:
    # the second round likes what the first has dropped: a loop that only ever drops cannot follow it
    layers = prunable(nn.Linear(4, 1))
    rounds = iter([torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.tensor([[1.0, 2.0, 3.0, 4.0]])])
    mask = prune_at_init(lambda _: {"weight": next(rounds)}, layers, 0.25, allocation="global", rounds=2)
    assert mask["weight"].tolist() == [[False, False, False, True]]


@pytest.mark.parametrize("allocation", ["uniform", "erk"])
def test_layers_go_to_their_own_density_exponentially(allocation: str) -> None:
    model, seen = net(), []

    def scorer(mask: Mask | None) -> dict[str, Tensor]:
        assert mask is not None
        seen.append(mask.densities())
        return {name: torch.rand(mask[name].shape) for name in mask}

    mask = prune_at_init(scorer, prunable(model), 0.2, allocation=allocation, rounds=3)  # type: ignore[arg-type]
    single = allocate({n: torch.rand(t.shape) for n, t in mask.items()}, 0.2, allocation)  # type: ignore[arg-type]
    assert mask.counts() == single.counts()
    sizes = {name: total for name, (_, total) in mask.counts().items()}
    for name, density in mask.densities().items():
        assert seen[1][name] == pytest.approx(density ** (1 / 3), abs=2 / sizes[name])
        assert seen[2][name] == pytest.approx(density ** (2 / 3), abs=2 / sizes[name])


def test_layers_kept_dense_are_neither_in_the_mask_nor_in_the_count() -> None:
    model = net()
    layers = [layer for layer in prunable(model) if layer.name != "0"]
    mask = prune_at_init(
        lambda _: {layer.parameter: layer.weight.detach().abs() for layer in prunable(model)},
        layers,
        0.5,
        allocation="global",
        rounds=1,
    )
    assert set(mask) == {"2.weight", "4.weight"}
    assert mask.density == 0.5


def test_progress_is_told_of_each_round() -> None:
    told: list[tuple[int, int]] = []

    class Listener:
        def update(self, label: str, done: int, total: int, note: str = "") -> None:
            told.append((done, total))

        def say(self, message: str) -> None:
            raise AssertionError(message)

    layers = prunable(net())
    scores = {layer.parameter: layer.weight.detach().abs() for layer in layers}
    prune_at_init(lambda _: scores, layers, 0.5, allocation="global", rounds=3, progress=Listener())
    assert told == [(1, 3), (2, 3), (3, 3)]
