"""SynFlow against an independent implementation, its closed form, and the conservation law it is built on."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparsify_deploy.criteria import _flow, synflow
from sparsify_deploy.sparsity.layers import prunable
from sparsify_deploy.sparsity.mask import Mask
from sparsify_deploy.sparsity.prune import prune_at_init


class Residual(nn.Module):
    """Convolutions, BatchNorm with statistics of its own, a shortcut, pooling, a classifier with bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.bn2 = nn.BatchNorm2d(8)
        self.drop = nn.Dropout()
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(x + self.bn2(self.conv2(x)))
        return self.fc(self.drop(x.mean((2, 3))))


def residual() -> nn.Module:
    torch.manual_seed(0)
    model = Residual()
    with torch.no_grad():
        for module in (model.bn1, model.bn2):
            for tensor in (module.weight, module.bias, module.running_mean):
                tensor.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model


def reference_products(model: nn.Module, masks: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As the paper's code does it: signs off, ones in, sum, backward; on a fresh copy each time."""
    model = copy.deepcopy(model).double().eval()
    state = {n: v.abs() if v.is_floating_point() else v for n, v in model.state_dict().items()}
    for name, mask in masks.items():
        state[name] = state[name] * torch.from_numpy(mask)
    model.load_state_dict(state)
    model.zero_grad()
    torch.sum(model(torch.ones(1, 3, 8, 8, dtype=torch.float64))).backward()
    named = dict(model.named_parameters())
    return {name: (named[name].detach() * named[name].grad).numpy() for name in masks}  # type: ignore[operator]


def reference_mask(model: nn.Module, names: list[str], density: float, rounds: int) -> dict[str, np.ndarray]:
    masks = {name: np.ones(tuple(model.get_parameter(name).shape), dtype=bool) for name in names}
    total = sum(mask.size for mask in masks.values())
    for e in range(1, rounds + 1):
        scores = {n: np.abs(p) for n, p in reference_products(model, masks).items()}
        flat = np.concatenate([scores[name].ravel() for name in names])
        kept = np.zeros(total, dtype=bool)
        kept[np.argsort(-flat, kind="stable")[: round(density ** (e / rounds) * total)]] = True
        start = 0
        for name in names:
            masks[name] = kept[start : start + masks[name].size].reshape(masks[name].shape)
            start += masks[name].size
    return masks


@pytest.mark.parametrize("density", [0.3, 0.05])
def test_masks_of_a_hundred_rounds_are_the_references(density: float) -> None:
    model = residual()
    layers = prunable(model)
    expected = reference_mask(model, [layer.parameter for layer in layers], density, 100)
    batch = {"input": torch.randn(16, 3, 8, 8)}
    scorer = synflow.prepare(model, [batch], None, synflow.Params(), inputs=("input",), seed=0)  # type: ignore[arg-type]
    mask = prune_at_init(scorer, layers, density, allocation="global", rounds=synflow.rounds(synflow.Params()))
    assert set(mask) == set(expected)
    for name, kept in expected.items():
        assert np.array_equal(mask[name].numpy(), kept), name
    assert 0 < mask.density < 0.31


def test_one_rounds_scores_are_the_references() -> None:
    model = residual()
    scores = synflow.score(model, [{"input": torch.randn(2, 3, 8, 8)}], None, synflow.Params(), inputs=("input",))  # type: ignore[arg-type]
    shapes = {name: np.ones(tuple(value.shape), dtype=bool) for name, value in scores.items()}
    for name, product in reference_products(model, shapes).items():
        np.testing.assert_allclose(scores[name].numpy(), np.abs(product), rtol=1e-12)


def test_closed_form_of_two_layers() -> None:
    # R = 1ᵀ |W2| |W1| 1, so the score of W1[h, i] is |W1[h, i]| · Σ_o |W2[o, h]|
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 7, bias=False), nn.ReLU(), nn.Linear(7, 3, bias=False))
    first, last = (model.get_parameter(n).detach().double().abs() for n in ("0.weight", "2.weight"))
    scores = synflow.score(model, [{"input": -torch.ones(2, 5)}], None, synflow.Params(), inputs=("input",))  # type: ignore[arg-type]
    torch.testing.assert_close(scores["0.weight"], first * last.sum(0)[:, None], rtol=1e-12, atol=0)
    torch.testing.assert_close(scores["2.weight"], last * first.sum(1)[None, :], rtol=1e-12, atol=0)


def sequential() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, bias=False),
        nn.LeakyReLU(0.1),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 2 * 2, 20, bias=False),
        nn.ELU(),
        nn.Linear(20, 10, bias=False),
    )


@pytest.mark.parametrize("pruned", [False, True])
def test_flow_is_conserved_from_layer_to_layer(pruned: bool) -> None:
    model = sequential()
    names = [layer.parameter for layer in prunable(model)]
    ones = _flow.all_ones({"input": torch.randn(2, 3, 14, 14)}, ("input",), model)
    flow = _flow.Flow(_flow.positive_copy(model), names, ones, ("input",))
    mask = Mask({name: torch.rand(model.get_parameter(name).shape) < 0.4 for name in names}) if pruned else {}
    total, products = flow.products(mask)
    assert total > 0
    for name in names:
        assert float(products[name].sum()) == pytest.approx(total, rel=1e-12), name
        assert float(products[name].min()) >= 0


def test_a_hundred_rounds_collapse_no_layer_where_one_round_does() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(20, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 4)
    )
    scorer = synflow.prepare(  # type: ignore[arg-type]
        model, [{"input": torch.randn(2, 20)}], None, synflow.Params(), inputs=("input",), seed=0
    )
    layers = prunable(model)
    total = sum(layer.weight.numel() for layer in layers)
    many = prune_at_init(scorer, layers, 60 / total, allocation="global", rounds=100)
    once = prune_at_init(scorer, layers, 60 / total, allocation="global", rounds=1)
    assert sum(kept for kept, _ in many.counts().values()) == 60
    assert min(kept for kept, _ in many.counts().values()) > 0
    assert min(kept for kept, _ in once.counts().values()) == 0


def test_the_same_model_gives_the_same_mask() -> None:
    model = residual()
    masks = []
    for values in (torch.zeros(4, 3, 8, 8), torch.randn(9, 3, 8, 8)):
        torch.manual_seed(int(values.sum()) & 0xFF)
        scorer = synflow.prepare(  # type: ignore[arg-type]
            model.train(), [{"input": values}], None, synflow.Params(), inputs=("input",), seed=len(values)
        )
        masks.append(prune_at_init(scorer, prunable(model), 0.1, allocation="global", rounds=20))
    assert masks[0] == masks[1]


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Basic(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(convolution(inputs, width, 3, stride), nn.ReLU(), convolution(width, width, 3))
        self.shortcut = nn.Identity() if inputs == width else convolution(inputs, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def test_flow_of_resnet18_at_224_is_the_measured_one() -> None:
    torch.manual_seed(0)
    ends = [(64, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512)]
    blocks = [Basic(inputs, width, stride=width // inputs) for inputs, width in ends]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000)]
    model = nn.Sequential(convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1), *blocks, *head)
    names = [layer.parameter for layer in prunable(model)]
    ones = _flow.all_ones({"input": torch.zeros(1, 3, 224, 224)}, ("input",), model)
    total, _ = _flow.Flow(_flow.positive_copy(model), names, ones, ("input",)).products({})
    assert len(names) == 21
    assert total == pytest.approx(7.0e29, rel=0.02)
