"""Permuting channels leaves a network's outputs as they are, and keeps as much as the published search.

Golden magnitudes: NVIDIA apex, ASP's permutation search on `np.random.seed(1); np.random.rand(128, 64)`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsify_deploy.models import builtin
from sparsify_deploy.sparsity.layers import prunable
from sparsify_deploy.sparsity.mask import Mask
from sparsify_deploy.sparsity.nm import nm_mask
from sparsify_deploy.sparsity.permutation import PermutationReport, permute_
from sparsify_deploy.sparsity.permute import efficacy, ideal, kept, search


def asp_matrix() -> Tensor:
    return torch.from_numpy(np.random.RandomState(1).rand(128, 64))


def test_magnitudes_of_asps_matrix() -> None:
    matrix = asp_matrix()
    assert float(matrix.sum()) == pytest.approx(4083.169, abs=1e-3)
    assert kept(matrix) == pytest.approx(2852.376, abs=2e-3)
    assert ideal(matrix) == pytest.approx(3042.332, abs=1e-3)


@pytest.mark.parametrize(
    ("method", "asp", "share"), [("channel_swap", 2913.352, 0.321), ("stripe_groups", 2919.757, 0.355)]
)
def test_searches_keep_at_least_what_asps_do(method: str, asp: float, share: float) -> None:
    matrix = asp_matrix()
    order = search(matrix, method=method)  # type: ignore[arg-type]
    assert kept(matrix[:, order]) >= asp
    assert efficacy(matrix, order) >= share
    assert sorted(order.tolist()) == list(range(64))


class Concatenated(nn.Module):
    """Two branches side by side, read by one convolution and, one of them, by another beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.a = nn.Conv2d(16, 8, 1)
        self.b = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.bn = nn.BatchNorm2d(24)
        self.both = nn.Conv2d(24, 16, 1)
        self.only_b = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        a, b = self.a(x), self.b(x)
        y = self.both(functional.relu(self.bn(torch.cat([a, b], 1)))) + self.only_b(b)
        return self.head(functional.adaptive_avg_pool2d(y, 1).flatten(1))  # type: ignore[no-any-return]


class Separable(nn.Module):
    """An inverted residual with a depthwise convolution and squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.expand = nn.Conv2d(16, 32, 1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.bn = nn.BatchNorm2d(32)
        self.act = nn.PReLU(32)
        self.squeeze = nn.Conv2d(32, 8, 1)
        self.excite = nn.Conv2d(8, 32, 1)
        self.project = nn.Conv2d(32, 16, 1)
        self.norm = nn.GroupNorm(1, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.act(self.bn(self.depthwise(self.expand(x))))
        y = y * torch.sigmoid(self.excite(functional.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.head(self.norm(x + self.project(y)).mean([2, 3]))  # type: ignore[no-any-return]


class EncoderBlock(nn.Module):
    """A pre-norm transformer block with torch's attention, on a residual stream read through LayerNorms."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm1(x)
        x = x + self.attention(y, y, y)[0]
        x = x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))
        return self.head(x[:, 0])  # type: ignore[no-any-return]


def images() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))}


def chain() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.BatchNorm2d(24)),
        *(nn.MaxPool2d(2), nn.Dropout(0.5), nn.Flatten(), nn.Linear(24 * 4, 16), nn.ReLU(), nn.Linear(16, 5)),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor], set[str]]] = {
    "chain": (chain, images(), {"3", "10"}),
    "resnet8": (lambda: builtin.build(builtin.Params(name="resnet8", width=8)), images(), set()),
    "resnet20": (lambda: builtin.build(builtin.Params(name="resnet20", width=8)), images(), set()),
    "concatenated": (Concatenated, images(), {"a", "b.0", "both", "only_b", "head"}),
    "separable": (Separable, images(), {"expand", "squeeze", "excite", "project", "head"}),
    "mlp": (
        lambda: nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)),
        {"x": torch.randn(2, 12, generator=torch.Generator().manual_seed(1))},
        {"2", "4"},
    ),
    "encoder": (EncoderBlock, {"x": torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))}, {"fc2"}),
    "torch encoder": (
        lambda: nn.Sequential(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)),
        {"x": torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(1))},
        {"0.layers.0.linear2", "0.layers.1.linear2"},
    ),
}
NETWORKS["resnet8"][2].update(
    f"layer{i}.0.{name}"
    for i in (1, 2, 3)
    for name in ("conv1", "conv2", "downsample.0")
    if (i, name) != (1, "downsample.0")
)
NETWORKS["resnet8"][2].add("fc")


def network(name: str) -> nn.Module:
    """The network with every parameter and running statistic drawn anew, so that an unmoved one shows."""
    torch.manual_seed(0)
    model = NETWORKS[name][0]()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn_like(tensor) * 0.3)
    for key, tensor in model.state_dict().items():
        if key.endswith("running_var"):
            tensor.abs_().add_(0.5)
    return model.eval()


def candidates(model: nn.Module) -> list[str]:
    return [
        layer.name
        for layer in prunable(model)
        if layer.groups == 1 and layer.weight.shape[1] % 4 == 0 and not layer.name.endswith("out_proj")
    ]


def run(model: nn.Module, name: str, method: str = "channel_swap", masks: Mask | None = None) -> PermutationReport:
    return permute_(model, NETWORKS[name][1], ["x"], candidates(model), 2, 4, method, masks)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_stay_in_float64_and_the_layers_that_can_be_are_permuted(name: str) -> None:
    model = network(name)
    original = copy.deepcopy(model)
    report = run(model, name)
    x = NETWORKS[name][1]["x"].double()
    with torch.no_grad():
        before, after = original.double()(x), copy.deepcopy(model).double()(x)
    assert float((before - after).abs().max()) <= 1e-12 * float(before.abs().max())
    assert any(not torch.equal(a, b.float()) for a, b in zip(model.parameters(), original.parameters(), strict=True))
    permuted = {row.layer for row in report.layers if row.permuted}
    assert permuted >= NETWORKS[name][2]
    assert all(row.reason for row in report.layers if not row.permuted)
    facts = report.facts()
    assert facts["kept_after"] > facts["kept_before"]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_report_is_what_the_weights_say(name: str) -> None:
    model = network(name)
    original = copy.deepcopy(model)
    report = run(model, name)
    assert {row.layer for row in report.layers} == set(candidates(model))
    for row in report.layers:
        for net, reported in ((original, row.kept_before), (model, row.kept_after)):
            weight = net.get_parameter(f"{row.layer}.weight").detach()
            assert float((weight.abs() * nm_mask(weight, 2, 4)).double().sum()) == pytest.approx(reported, rel=1e-5)
        assert row.whole == pytest.approx(float(weight.double().abs().sum()), rel=1e-6)


@pytest.mark.parametrize("name", ["chain", "resnet8", "concatenated", "separable"])
def test_masks_move_with_the_weights(name: str) -> None:
    model = network(name)
    generator = torch.Generator().manual_seed(2)
    mask = Mask({layer.parameter: torch.rand(layer.shape, generator=generator) < 0.5 for layer in prunable(model)})
    mask.apply_(model)
    report = run(model, name, masks=mask)
    moved = Mask(report.masks)
    assert report.permuted
    assert moved.check_holds(model) == ()
    assert mask.check_holds(model) != ()
    assert moved.densities() == mask.densities()


def test_masked_weights_do_not_count() -> None:
    model = network("mlp")
    mask = Mask({"2.weight": torch.zeros(16, 16, dtype=torch.bool)})
    report = permute_(model, NETWORKS["mlp"][1], ["x"], ["2"], 2, 4, "channel_swap", mask)
    assert not report.permuted
    assert report.layers[0].whole == 0


def test_permuting_twice_composes_and_gains_nothing_more() -> None:
    model = network("concatenated")
    original = copy.deepcopy(model)
    first, second = run(model, "concatenated"), run(model, "concatenated")
    assert second.facts()["kept_before"] == pytest.approx(first.facts()["kept_after"], rel=1e-6)
    assert second.facts()["kept_after"] >= second.facts()["kept_before"]
    x = images()["x"].double()
    with torch.no_grad():
        assert torch.allclose(original.double()(x), model.double()(x), rtol=1e-10, atol=1e-12)


def test_a_resnet_keeps_half_a_percent_more() -> None:
    torch.manual_seed(0)
    model = builtin.build(builtin.Params(name="resnet20"))
    names = candidates(model)
    facts = permute_(model, images(), ["x"], names, 2, 4).facts()
    assert facts["kept_after"] / facts["kept_before"] >= 1.005
    assert facts["permuted"] == len(names)
