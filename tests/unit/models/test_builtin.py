"""The built-in networks: sizes, names, start, tracing, export."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from sparsify_deploy.models import builtin

NAMES = ["lenet-300-100", "lenet-5", "resnet8", "resnet20", "resnet32", "resnet56"]


def build(**params: object) -> nn.Module:
    return builtin.build(builtin.Params.model_validate(params))


def example(name: str, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 1, 28, 28) if name.startswith("lenet") else torch.randn(batch, 3, 32, 32)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("lenet-300-100", 266_610),  # Han et al. 2015: 267K
        ("lenet-5", 431_080),  # Caffe's model: 431K
        ("resnet8", 78_042),
        ("resnet20", 272_474),  # He et al. 2015, table 6: 0.27M (269,722 with option A, plus 2,752 of two shortcuts)
        ("resnet32", 466_906),  # 0.46M
        ("resnet56", 855_770),  # 0.85M
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, parameters: int) -> None:
    assert sum(p.numel() for p in build(name=name).parameters()) == parameters


def test_option_b_costs_what_its_two_shortcuts_weigh() -> None:
    shortcuts = {n: p.numel() for n, p in build(name="resnet20").named_parameters() if "downsample" in n}
    assert sum(shortcuts.values()) == 272_474 - 269_722
    assert shortcuts["layer2.0.downsample.0.weight"] == 16 * 32


@pytest.mark.parametrize("name", NAMES)
def test_gives_logits(name: str) -> None:
    assert build(name=name, classes=7).eval()(example(name)).shape == (2, 7)


@pytest.mark.parametrize("depth", [8, 20, 32, 56])
def test_resnets_have_as_many_layers_as_their_name_says(depth: int) -> None:
    net = build(name=f"resnet{depth}")
    on_the_way = [n for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and "downsample" not in n]
    assert len(on_the_way) == depth


def test_sizes_can_be_chosen() -> None:
    net = build(name="resnet8", width=32, in_channels=1, classes=3)
    shapes = {n: tuple(m.weight.shape) for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert shapes["conv1"] == (32, 1, 3, 3)
    assert shapes["layer1.0.conv1"] == (32, 32, 3, 3)
    assert shapes["layer2.0.downsample.0"] == (64, 32, 1, 1)
    assert shapes["layer3.0.conv2"] == (128, 128, 3, 3)
    assert shapes["fc"] == (3, 128)
    assert net.eval()(torch.randn(1, 1, 16, 24)).shape == (1, 3)
    assert build(name="lenet-300-100", image_size=8)(torch.randn(5, 1, 8, 8)).shape == (5, 10)
    assert build(name="lenet-300-100", image_size=8)(torch.randn(5, 64)).shape == (5, 10)
    assert build(name="lenet-5", image_size=16, in_channels=3)(torch.randn(5, 3, 16, 16)).shape == (5, 10)


def test_a_block_adds_its_shortcut_before_the_last_relu() -> None:
    net = build(name="resnet20").eval()
    block, x = net.layer2[0], torch.randn(2, 16, 8, 8)
    inner = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
    torch.testing.assert_close(block(x), torch.relu(inner + block.downsample(x)))
    block, x = net.layer1[1], torch.randn(2, 16, 8, 8)
    assert block.downsample is None
    inner = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
    torch.testing.assert_close(block(x), torch.relu(inner + x))


def test_lenets_match_their_formula() -> None:
    net, x = build(name="lenet-300-100"), torch.randn(3, 1, 28, 28)
    by_hand = net.fc3(torch.relu(net.fc2(torch.relu(net.fc1(x.reshape(3, 784))))))
    torch.testing.assert_close(net(x), by_hand)
    net = build(name="lenet-5")
    pooled = nn.functional.max_pool2d(net.conv1(x), 2)
    pooled = nn.functional.max_pool2d(net.conv2(pooled), 2).reshape(3, 800)
    torch.testing.assert_close(net(x), net.fc2(torch.relu(net.fc1(pooled))))


def test_starts_glorot_and_kaiming_normal() -> None:
    torch.manual_seed(0)
    net = build(name="lenet-300-100")
    assert net.fc1.weight.std().item() == pytest.approx(math.sqrt(2 / (784 + 300)), rel=0.02)
    assert net.fc2.weight.std().item() == pytest.approx(math.sqrt(2 / (300 + 100)), rel=0.02)
    assert net.fc1.weight.abs().max() > 3 * net.fc1.weight.std()  # normal, not uniform
    net = build(name="resnet20", width=64)
    assert net.layer3[0].conv1.weight.std().item() == pytest.approx(math.sqrt(2 / (256 * 9)), rel=0.02)
    for name, value in net.named_parameters():
        if name.endswith("bias"):
            assert not value.any(), name


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_network_and_another_seed_another(name: str) -> None:
    torch.manual_seed(3)
    first, second = build(name=name).state_dict(), build(name=name).state_dict()
    torch.manual_seed(3)
    again = build(name=name).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", NAMES)
def test_is_traceable_and_keeps_its_names(name: str) -> None:
    net = build(name=name).eval()
    traced = torch.fx.symbolic_trace(net)
    x = example(name, 5)
    torch.testing.assert_close(traced(x), net(x))
    assert {n for n, _ in traced.named_parameters()} == {n for n, _ in net.named_parameters()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch says so of the exporter that it still ships
@pytest.mark.parametrize("name", ["lenet-300-100", "lenet-5", "resnet8"])
def test_exports_to_onnx_with_a_free_batch(name: str, tmp_path: object) -> None:
    onnx = pytest.importorskip("onnx")
    path = f"{tmp_path}/net.onnx"
    axes = {"x": {0: "batch"}, "y": {0: "batch"}}
    net = build(name=name).eval()
    torch.onnx.export(
        net, (example(name),), path, input_names=["x"], output_names=["y"], dynamic_axes=axes, dynamo=False
    )
    runtime = pytest.importorskip("onnx.reference").ReferenceEvaluator(onnx.load(path))
    x = example(name, 3)
    (y,) = runtime.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), net(x).detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"name": "lenet-5", "image_size": 12}, "lenet-5 needs 16 or more"),
        ({"name": "lenet-5", "image_size": 15}, "lenet-5 needs 16 or more"),
        ({"name": "lenet-300-100", "image_size": 0}, "greater than or equal to 1"),
        ({"name": "resnet8", "image_size": 32}, "image_size has no effect on resnet8"),
        ({"name": "lenet-5", "width": 8}, "width has no effect on lenet-5"),
        ({"name": "resnet8", "width": 0}, "greater than or equal to 1"),
        ({"name": "resnet18"}, "Input should be 'lenet-300-100'"),
        ({"name": "resnet8", "classes": 0}, "greater than or equal to 1"),
        ({"name": "resnet8", "width": 16.0}, "valid integer"),
    ],
)
def test_params_that_make_no_sense_are_refused(params: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        builtin.Params.model_validate(params)


def test_params_survive_a_round_trip() -> None:
    params = builtin.Params(name="resnet8")
    assert builtin.Params.model_validate(params.model_dump()) == params
