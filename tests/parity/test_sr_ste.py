"""SR-STE's gradient by hand and against the published formula, and whole steps against autograd."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsify_deploy.training.methods import sr_ste


def best_by_search(weight: Tensor, n: int, m: int) -> Tensor:
    """The n largest magnitudes of every m consecutive input channels, one group after the other."""
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    k, c, r, s = weight.shape
    for i, j, y, x in product(range(k), range(0, c, m), range(r), range(s)):
        group = [abs(weight[i, j + q, y, x].item()) for q in range(m)]
        for q in sorted(range(m), key=lambda q: (-group[q], q))[:n]:
            mask[i, j + q, y, x] = True
    return mask


def test_the_gradient_by_hand() -> None:
    """w = (4, -3, 2, 1), 2:4 keeps the first two; the loss w . x has g = x; decay 0.5 adds 0.5 w to the others."""
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[4.0, -3.0, 2.0, 1.0]]))
    updater = sr_ste.SrSte(model, sr_ste.Params(decay=0.5), 1)
    updater.before_forward(0)
    assert model.weight.detach().tolist() == [[4.0, -3.0, 0.0, 0.0]]
    given = torch.tensor([[1.0, 2.0, 3.0, -5.0]])
    loss = model(given).sum()
    assert loss.item() == 4.0 - 6.0
    loss.backward()
    assert updater.after_backward(0)
    assert model.weight.detach().tolist() == [[4.0, -3.0, 2.0, 1.0]]  # dense again before the optimizer
    assert model.weight.grad.tolist() == [[1.0, 2.0, 3.0 + 0.5 * 2.0, -5.0 + 0.5 * 1.0]]
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    assert model.weight.detach().tolist() == [[4 - 0.5, -3 - 1.0, 2 - 2.0, 1 + 2.25]]
    updater.after_step(0)
    updater.finish()  # of (3.5, -4, 0, 3.25) the first two stay
    assert model.weight.detach().tolist() == [[3.5, -4.0, 0.0, 0.0]]


def test_the_default_is_the_papers() -> None:
    assert (sr_ste.Params().decay, sr_ste.Params().pattern) == (2e-4, "2:4")


class Published(torch.autograd.Function):
    """w * mask forward; g + decay * (1 - mask) * w backward, to the dense weight."""

    @staticmethod
    def forward(ctx, weight: Tensor, n: int, m: int, decay: float) -> Tensor:
        mask = best_by_search(weight, n, m).to(weight.dtype)
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return weight * mask

    @staticmethod
    def backward(ctx, gradient: Tensor):
        weight, mask = ctx.saved_tensors
        return gradient + ctx.decay * (1 - mask) * weight, None, None, None


@pytest.mark.parametrize(("pattern", "n", "m"), [("2:4", 2, 4), ("1:4", 1, 4), ("4:8", 4, 8)])
@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_steps_are_those_of_the_published_function(pattern: str, n: int, m: int, kind: str) -> None:
    torch.manual_seed(0)
    mine = nn.Conv2d(8, 3, (2, 3), dtype=torch.float64)
    reference = nn.Conv2d(8, 3, (2, 3), dtype=torch.float64)
    reference.load_state_dict(mine.state_dict())
    makers = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
        "adam": lambda p: torch.optim.Adam(p, lr=0.05),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    }
    first, second = makers[kind](mine.parameters()), makers[kind](reference.parameters())
    updater = sr_ste.SrSte(mine, sr_ste.Params(pattern=pattern, decay=0.3), 8)
    start = updater.mask
    for step in range(8):
        images, target = torch.randn(2, 8, 4, 5, dtype=torch.float64), torch.randn(2, 3, 3, 3, dtype=torch.float64)
        first.zero_grad()
        second.zero_grad()
        updater.before_forward(step)
        for part, wanted in zip(images.split(1), target.split(1), strict=True):  # accumulated over two batches
            (functional.mse_loss(mine(part), wanted) / 2).backward()
        updater.after_backward(step)
        weight = Published.apply(reference.weight, n, m, 0.3)
        functional.mse_loss(functional.conv2d(images, weight, reference.bias), target).backward()
        assert torch.allclose(mine.weight.grad, reference.weight.grad, rtol=1e-9, atol=1e-12)
        first.step()
        second.step()
        updater.after_step(step)
        assert torch.allclose(mine.weight, reference.weight, rtol=1e-9, atol=1e-12)
    updater.finish()
    kept = best_by_search(reference.weight.detach(), n, m)
    assert torch.equal(updater.mask["weight"], kept)
    assert torch.equal(mine.weight.detach() != 0, kept)
    assert updater.mask != start
