"""ERK and uniform densities of torchvision's ResNet-50 against published numbers (Evci 2020 and its code)."""

from __future__ import annotations

import math

import pytest

from sparsify_deploy.sparsity.allocation import erk, uniform

Shapes = dict[str, tuple[int, ...]]


def resnet50() -> tuple[Shapes, dict[str, int]]:
    """Weight shapes of the 54 layers and the number of output positions of each at 224x224."""
    shapes: Shapes = {"conv1": (64, 3, 7, 7)}
    positions = {"conv1": 112 * 112}
    channels, side = 64, 56
    for stage, (blocks, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)], start=1):
        for block in range(blocks):
            stride = 2 if block == 0 and stage > 1 else 1
            name = f"layer{stage}.{block}"
            shapes[f"{name}.conv1"] = (width, channels, 1, 1)
            positions[f"{name}.conv1"] = side * side
            side //= stride
            shapes[f"{name}.conv2"] = (width, width, 3, 3)  # torchvision puts the stride here
            shapes[f"{name}.conv3"] = (4 * width, width, 1, 1)
            if block == 0:
                shapes[f"{name}.downsample.0"] = (4 * width, channels, 1, 1)
            for layer in ("conv2", "conv3", "downsample.0"):
                positions[f"{name}.{layer}"] = side * side
            channels = 4 * width
    shapes["fc"] = (1000, 2048)
    positions["fc"] = 1
    return shapes, positions


def relative_flops(densities: dict[str, float]) -> float:
    shapes, positions = resnet50()
    cost = {name: math.prod(shape) * positions[name] for name, shape in shapes.items()}
    return sum(densities[name] * cost[name] for name in shapes) / sum(cost.values())


def test_the_shapes_are_resnet50s() -> None:
    shapes, positions = resnet50()
    assert len(shapes) == 54
    assert sum(math.prod(shape) for shape in shapes.values()) == 25_502_912
    assert sum(math.prod(s) * positions[n] for n, s in shapes.items()) == 4_089_184_256


@pytest.mark.parametrize(
    ("density", "flops", "dense_layers", "conv2", "conv1", "fc"),
    [(0.2, 0.414, 8, 0.0435, 0.857, 0.148), (0.1, 0.242, 1, 0.0213, 0.420, 0.0726)],
)
def test_erk_golden(density: float, flops: float, dense_layers: int, conv2: float, conv1: float, fc: float) -> None:
    found = erk(resnet50()[0], density)
    assert sum(value == 1 for value in found.values()) == dense_layers
    assert found["layer4.2.conv2"] == pytest.approx(conv2, abs=5e-5)
    assert found["conv1"] == pytest.approx(conv1, abs=5e-4)
    assert found["fc"] == pytest.approx(fc, abs=5e-4)
    assert relative_flops(found) == pytest.approx(flops, abs=5e-4)


@pytest.mark.parametrize(("density", "flops"), [(0.2, 0.223), (0.1, 0.126)])
def test_uniform_with_the_first_convolution_dense_golden(density: float, flops: float) -> None:
    shapes = resnet50()[0]
    found = {**uniform(shapes, density), "conv1": 1.0}
    assert relative_flops(found) == pytest.approx(flops, abs=5e-4)


def test_half_density_leaves_most_layers_dense() -> None:
    assert sum(value == 1 for value in erk(resnet50()[0], 0.5).values()) == 32
