"""Each warning: what triggers it, what it says in numbers, and silence where there is nothing to say."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from sparsify_deploy.graph.workload import Workload
from sparsify_deploy.prediction import advice
from sparsify_deploy.prediction.gpus import known
from sparsify_deploy.prediction.roofline import Layer, forecast


def layer(name: str, shape: tuple[int, ...], groups: int = 1, macs: int = 100) -> Layer:
    return Layer(Workload(name, "Conv", macs, 10, 10, shape, groups, f"{name}.weight"), True, True, "")


@pytest.mark.parametrize("density", [0.1, 0.3, 0.5, 0.9])
def test_what_two_of_four_keeps_of_a_random_mask_against_all_sixteen_groups(density: float) -> None:
    kept = whole = 0.0
    for group in itertools.product((0, 1), repeat=4):
        chance = density ** sum(group) * (1 - density) ** (4 - sum(group))
        whole += chance * sum(group)
        kept += chance * min(sum(group), 2)
    assert advice.kept_by_two_of_four(density) == pytest.approx(kept / whole)


def test_a_dense_mask_keeps_half_and_an_empty_one_all() -> None:
    assert advice.kept_by_two_of_four(1.0) == pytest.approx(0.5)
    assert advice.kept_by_two_of_four(0.0) == 1.0


def test_sparsity_beyond_half_buys_no_latency() -> None:
    (line,) = advice.sparsity_lines(0.8, None, {}, projected=True)
    assert line.startswith("sparsity 0.8: 2:4 hardware skips half")
    assert "buys no latency" in line
    assert not [*advice.sparsity_lines(0.5, None, {}, projected=True)]
    assert not [*advice.sparsity_lines(None, "erk", {}, projected=True)]


def test_erk_before_two_of_four_names_the_densest_layer_and_what_is_left_of_it() -> None:
    (line,) = advice.sparsity_lines(0.5, "erk", {"a": 0.9, "b": 0.2}, projected=True)
    assert "1 of the 2 layers for 2:4" in line
    assert "a at 0.90, of which 2:4 keeps 55%" in line
    assert "uniform density 0.50 would keep 81%" in line
    (line,) = advice.sparsity_lines(0.5, "global", {}, projected=True)
    assert line.startswith("init.allocation global before 2:4")
    assert not [*advice.sparsity_lines(0.5, "erk", {"a": 0.9}, projected=False)]
    assert not [*advice.sparsity_lines(0.5, "uniform", {}, projected=True)]


@pytest.mark.parametrize(
    ("one", "says"),
    [
        (layer("dw", (64, 1, 3, 3), groups=64), "grouped or depthwise"),
        (layer("first", (64, 3, 7, 7)), "C_in that is not a multiple of 4"),
        (layer("thin", (64, 24, 1, 1)), "C_in not a multiple of 16 or C_out not of 8"),
        (layer("head", (10, 64)), "C_in not a multiple of 16 or C_out not of 8"),
        (layer("half", (64, 48, 1, 1)), "C_in that is not a multiple of 32"),
    ],
)
def test_each_shape_that_stays_dense_is_named_with_its_share(one: Layer, says: str) -> None:
    (line,) = advice.shape_lines([one, layer("good", (64, 64, 3, 3), macs=300)])
    assert line.startswith("1 of 2 layers")
    assert says in line
    assert "(25% of the products)" in line
    assert one.work.name in line
    assert "good" not in line


def test_many_layers_are_counted_and_none_are_silence() -> None:
    (line,) = advice.shape_lines([layer(f"dw{i}", (8, 1, 3, 3), groups=8) for i in range(5)])
    assert "dw0 (8x1x3x3), dw1 (8x1x3x3), dw2 (8x1x3x3) and 2 more" in line
    assert not [*advice.shape_lines([layer("good", (64, 64, 3, 3))])]
    no_weight = Layer(Workload("pool", "Pool", 0, 5, 5), False, False, "no weight")
    assert not [*advice.shape_lines([no_weight])]


def test_a_small_batch_is_bound_by_bytes_and_a_large_one_is_named_instead(resnet50: tuple[Layer, ...]) -> None:
    a100 = known()["a100"]
    (line,) = advice.batch_lines([forecast(resnet50, a100, size) for size in (1, 32)])
    ideal = forecast(resnet50, a100, 32).gain("ideal")
    assert line.startswith("batch 1 on a100: ")
    assert f"at batch 32 ideally {ideal:.2f}x: serve larger batches" in line
    assert not [*advice.batch_lines([forecast(resnet50, a100, 256)])]
    dense = [replace(one, sparse=False) for one in resnet50]
    assert not [*advice.batch_lines([forecast(dense, a100, 1)])]
    tiny = [layer("tiny", (16, 16, 1, 1))]
    (line,) = advice.batch_lines([forecast(tiny, a100, size) for size in (1, 32)])
    assert line.endswith("at batch 32 ideally 1.00x: this network is too small for 2:4 to matter there")


def test_missing_sections_are_named() -> None:
    assert [line.partition(":")[0] for line in advice.section_lines(projected=False, quantized=False)] == [
        "no nm section",
        "no quantize section",
    ]
    assert not [*advice.section_lines(projected=True, quantized=True)]


def test_limits_name_the_slowest_layers_that_two_of_four_does_not_help(resnet50: tuple[Layer, ...]) -> None:
    found = forecast(resnet50, known()["h100"], 32)
    assert advice.limits(found).startswith("Pool (5% of the time, no weight), conv64-256 (")
    assert len(advice.limits(found).split("), ")) == 3
