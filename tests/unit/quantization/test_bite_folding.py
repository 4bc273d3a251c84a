"""Folding takes the epsilon of the very BatchNorm that it folds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsify_deploy.quantization.folding import fold_batchnorm


@pytest.mark.parametrize("eps", [1e-3, 0.1, 2.0])
def test_each_batchnorm_is_folded_with_its_own_epsilon(lively, eps):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8, eps=eps),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3),
        nn.BatchNorm2d(4, eps=3 * eps),
        nn.Flatten(),
        nn.Linear(64, 5),
        nn.BatchNorm1d(5, eps=5 * eps),
    )
    lively(model).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    folded = fold_batchnorm(model)
    assert not [module for module in folded.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    torch.testing.assert_close(folded(x), model(x), rtol=1e-9, atol=1e-9)


def test_a_variance_near_zero_is_where_the_epsilon_decides(lively):
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8, eps=1e-4)).double().eval()
    with torch.no_grad():
        model[1].running_var.fill_(1e-6)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(fold_batchnorm(model)(x), model(x), rtol=1e-9, atol=1e-9)
