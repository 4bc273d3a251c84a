"""BatchNorm folding: same function, same names, nothing folded that must not be."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparsify_deploy.errors import ModelError
from sparsify_deploy.quantization.folding import fold_batchnorm, unfolded


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.bn2 = nn.BatchNorm2d(8, affine=False)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Sequential(Block(), nn.ReLU())
        self.fc = nn.Linear(8, 5, bias=False)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x):
        return self.norm(self.fc(self.layer1(x).mean((2, 3))))


def test_function_is_unchanged_and_every_batchnorm_gone(lively):
    model = lively(Net()).double()
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    folded = fold_batchnorm(model)
    expected = copy.deepcopy(model).eval()(x)
    assert (folded(x) - expected).abs().max() < 1e-10
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    assert unfolded(folded) == {}
    assert not folded.training


def test_float32_function_is_close(lively):
    model = lively(Net())
    x = torch.randn(6, 3, 8, 8)
    expected = copy.deepcopy(model).eval()(x)
    assert (fold_batchnorm(model)(x) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_names_are_kept_and_biases_appear():
    model = Net()
    names = {name for name, _ in fold_batchnorm(model).named_parameters()}
    weights = {name for name, p in model.named_parameters() if p.dim() > 1}
    assert weights <= names
    assert "layer1.0.conv1.weight" in names
    assert {"layer1.0.conv1.bias", "fc.bias"} <= names


def test_the_original_is_left_alone(lively):
    model = lively(Net()).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fold_batchnorm(model)
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_zeros_survive(lively):
    model = lively(Net())
    with torch.no_grad():
        model.layer1[0].conv1.weight[:, ::2] = 0
    weight = fold_batchnorm(model).get_parameter("layer1.0.conv1.weight")
    assert (weight[:, ::2] == 0).all()
    assert (weight[:, 1::2] != 0).all()


class Stays(nn.Module):
    """Every reason not to fold, one each."""

    def __init__(self):
        super().__init__()
        self.read_twice = nn.Conv2d(3, 4, 1)
        self.bn_read_twice = nn.BatchNorm2d(4)
        self.called_twice = nn.Conv2d(4, 4, 1)
        self.bn_layer_twice = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 1)
        self.bn_twice = nn.BatchNorm2d(4)
        self.bn_after_relu = nn.BatchNorm2d(4)
        self.batch_conv = nn.Conv2d(4, 4, 1)
        self.bn_batch_statistics = nn.BatchNorm2d(4, track_running_stats=False)
        self.tied_a, self.tied_b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.tied_b.weight = self.tied_a.weight
        self.bn_tied = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.read_twice(x)
        x = self.bn_read_twice(x) + x
        x = self.called_twice(self.bn_layer_twice(self.called_twice(x)))
        x = self.bn_twice(self.bn_twice(self.conv(x)))
        x = self.bn_after_relu(F.relu(x))
        x = self.bn_batch_statistics(self.batch_conv(x))
        return self.bn_tied(self.tied_b(self.tied_a(x)))


def test_what_cannot_be_folded_stays_and_is_listed(lively):
    model = lively(Stays()).double()
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    folded = fold_batchnorm(model)
    assert (folded(x) - copy.deepcopy(model).eval()(x)).abs().max() < 1e-10
    reasons = unfolded(folded)
    assert set(reasons) == {name for name, _ in model.named_modules() if name.startswith("bn_")}
    assert "used elsewhere" in reasons["bn_read_twice"]
    assert "more than once" in reasons["bn_layer_twice"]
    assert "2 times" in reasons["bn_twice"]
    assert "shared" in reasons["bn_tied"]
    assert "running statistics" in reasons["bn_batch_statistics"]


class NormAct(nn.BatchNorm2d):
    """The shape of timm's BatchNormAct2d."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x):
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return self.act(self.drop(x))


class Doubling(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(("norm", "stays"), [(NormAct, False), (Doubling, True)])
def test_subclasses(norm, stays, lively):
    model = lively(nn.Sequential(nn.Conv2d(3, 4, 1), norm(4))).double()
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    folded = fold_batchnorm(model)
    assert (folded(x) - copy.deepcopy(model).eval()(x)).abs().max() < 1e-10
    assert ("1" in unfolded(folded)) is stays


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(Chooser())

    def forward(self, x):
        return self.inner(x)


class Chooser(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_an_untraceable_model_is_one_clear_line():
    with pytest.raises(ModelError, match=r"Branches cannot be traced in 'inner\.0': symbolically traced") as caught:
        fold_batchnorm(Branches())
    assert "\n" not in str(caught.value)


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x, mask=None, scale: float = 2.0):
        x = self.fc(x) * scale
        return x if mask is None else x * mask


def test_arguments_with_a_default_are_fixed_to_it():
    model = Optional().eval()
    folded = fold_batchnorm(model)
    x = torch.randn(2, 3)
    assert torch.equal(folded(x), model(x))
    assert [n.name for n in folded.graph.nodes if n.op == "placeholder"] == ["x"]
