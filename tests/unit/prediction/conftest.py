"""Networks as lists of workloads, written by hand from their papers' shapes; nothing here imports torch."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sparsify_deploy.graph.workload import Workload
from sparsify_deploy.prediction.roofline import Layer


def conv(channels: tuple[int, int], kernel: int, sizes: tuple[int, int], residual: bool = False) -> Layer:
    """A convolution with INT8 weights from `sizes[0]` squared to `sizes[1]` squared pixels."""
    c, k = channels
    written = k * sizes[1] ** 2
    extra = written if residual else 0
    shape = (k, c, kernel, kernel)
    work = Workload(
        f"conv{c}-{k}", "Conv", written * c * kernel**2, c * sizes[0] ** 2 + extra, written, shape, extra=extra
    )
    return Layer(work, True, c % 16 == 0, "")


def linear(tokens: int, c: int, k: int, residual: bool = False) -> Layer:
    extra = tokens * k if residual else 0
    work = Workload(f"linear{c}-{k}", "Linear", tokens * c * k, tokens * c + extra, tokens * k, (k, c), extra=extra)
    return Layer(work, True, True, "")


def other(op: str, macs: int, read: int, written: int) -> Layer:
    return Layer(Workload(op, op, macs, read, written), False, False, "no weight")


@pytest.fixture(scope="session")
def resnet50() -> tuple[Layer, ...]:
    """ResNet-50 at 224 x 224 (He 2016, table 1), stride in the 3 x 3 as torchvision has it."""
    layers = [conv((3, 64), 7, (224, 112)), other("Pool", 0, 64 * 112**2, 64 * 56**2)]
    size, channels = 56, 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            after = size // stride if block == 0 else size
            layers += [conv((channels, width), 1, (size, size)), conv((width, width), 3, (size, after))]
            if block == 0:
                layers.append(conv((channels, 4 * width), 1, (size, after)))
            layers.append(conv((width, 4 * width), 1, (after, after), residual=True))
            size, channels = after, 4 * width
    return (*layers, other("Reduce", 0, 2048 * 49, 2048), linear(1, 2048, 1000))


@pytest.fixture(scope="session")
def bert_base() -> tuple[Layer, ...]:
    """The encoder of BERT-base (Devlin 2019) on 128 tokens: 12 layers, 768 wide, queries, keys and values apart."""
    tokens, width = 128, 768
    layer = (
        *[linear(tokens, width, width)] * 3,
        other("Attention", 2 * tokens**2 * width, 3 * tokens * width, tokens * width),
        linear(tokens, width, width, residual=True),
        other("LayerNorm", 0, tokens * width, tokens * width),
        linear(tokens, width, 4 * width),
        linear(tokens, 4 * width, width, residual=True),
        other("LayerNorm", 0, tokens * width, tokens * width),
    )
    return layer * 12


def free_of_elementwise(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """The same with residuals read for nothing, and pooling and normalisation fused away."""
    return tuple(
        replace(one, work=replace(one.work, read=one.work.read - one.work.extra, extra=0))
        for one in layers
        if one.work.macs
    )


@pytest.fixture(scope="session")
def bare_resnet50(resnet50: tuple[Layer, ...]) -> tuple[Layer, ...]:
    return free_of_elementwise(resnet50)


@pytest.fixture(scope="session")
def bare_bert_base(bert_base: tuple[Layer, ...]) -> tuple[Layer, ...]:
    return free_of_elementwise(bert_base)
