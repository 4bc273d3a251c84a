"""Straight-through scores against autograd: the same step written with a custom `Function` and plain optimizers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsify_deploy.tasks import classification
from sparsify_deploy.training.loop import Trainer
from sparsify_deploy.training.methods import ste
from sparsify_deploy.training.settings import Optimizer, Schedule, Training
from sparsify_deploy.types import Context

DENSITY, SCORE_LR = 0.3, 0.7
OPTIMIZERS = {
    "sgd": Optimizer(lr=0.05, weight_decay=0.1),
    "adam": Optimizer(name="adam", lr=0.02, weight_decay=0.1),
    "adamw": Optimizer(name="adamw", lr=0.02, weight_decay=0.1),
}


class Images:
    """A `Split` whose batches are all the same: as many examples as a batch holds."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.input = torch.randn(6, 5, generator=generator)
        self.target = torch.randint(3, (6,), generator=generator)

    def __len__(self) -> int:
        return 6

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        order = indices.sort().values
        return {"input": self.input[order], "target": self.target[order]}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


class TopK(torch.autograd.Function):
    """The highest scores as a mask of ones; the gradient passes as if it were the identity."""

    @staticmethod
    def forward(ctx, score: Tensor) -> Tensor:
        keep = round(DENSITY * score.numel())
        order = sorted(range(score.numel()), key=lambda i: (-score.flatten()[i].item(), i))
        mask = torch.zeros(score.numel(), dtype=score.dtype)
        mask[order[:keep]] = 1
        return mask.view(score.shape)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


def made(settings: Optimizer, decayed: list[nn.Parameter], others: list[nn.Parameter], lr: float):
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9)
    kind = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
    return kind(groups, lr=lr, eps=1e-8)


def by_autograd(settings: Optimizer, steps: int, freeze: bool) -> tuple[nn.Module, list[nn.Parameter]]:
    """Dense weights and scores after `steps`."""
    model, images = network(), Images()
    layers = [model[0], model[2]]
    scores = [nn.Parameter(layer.weight.detach().abs()) for layer in layers]
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    trained = made(settings, [] if freeze else weights, biases, settings.lr)
    scored = made(settings, [], scores, SCORE_LR)
    for step in range(steps):
        for group in trained.param_groups:
            group["lr"] = settings.lr * (0.1 if step >= steps // 2 else 1.0)
        for group in scored.param_groups:
            group["lr"] = SCORE_LR * (0.1 if step >= steps // 2 else 1.0)
        hidden = functional.linear(images.input.double(), weights[0] * TopK.apply(scores[0]), biases[0]).tanh()
        output = functional.linear(hidden, weights[1] * TopK.apply(scores[1]), biases[1])
        trained.zero_grad()
        scored.zero_grad()
        functional.cross_entropy(output, images.target).backward()
        trained.step()
        scored.step()
    return model, scores


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_autograd(tmp_path, name: str, freeze: bool) -> None:
    settings, steps = OPTIMIZERS[name], 8
    expected, scores = by_autograd(settings, steps, freeze)

    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, batch: Tensor) -> Tensor:
            return self.body(batch.double())

    model = Doubled()
    training = Training(
        steps=steps, batch_size=6, optimizer=settings, schedule=Schedule(name="step", milestones=(0.5,))
    )
    task = classification.create(classification.Params())
    trainer = Trainer(model, task, Images(), ("input",), training, seed=0, folder=tmp_path, context=Context())
    updater = ste.Ste(trainer, ste.Params(allocation="uniform", score_lr=SCORE_LR, freeze_weights=freeze), DENSITY)
    start = updater.mask
    model.train()
    for _ in range(steps):
        trainer.advance(updater)
    for mine, theirs in zip(model.body.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)
    for mine, theirs in zip(updater.scores.values(), scores, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)
    updater.finish()
    kept = {"body.0.weight": TopK.apply(scores[0]).bool(), "body.2.weight": TopK.apply(scores[1]).bool()}
    assert all(torch.equal(updater.mask[parameter], mask) for parameter, mask in kept.items())
    assert updater.mask != start


def test_gradients_of_scores_and_weights_by_hand(tmp_path) -> None:
    """One linear layer, w = (3, -2, 1, 0.5), half kept: g = dL/d(w * mask) = x for the loss w . x."""
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, -2.0, 1.0, 0.5]]))
    given = torch.tensor([1.0, 2.0, -4.0, 8.0])

    class Same:
        def __len__(self) -> int:
            return 1

        def take(self, indices: Tensor) -> dict[str, Tensor]:
            return {"input": given[None]}

    class Sum:
        def loss(self, outputs, batch) -> Tensor:
            return outputs["output"].sum()

    settings = Training(
        steps=2,
        batch_size=1,
        optimizer=Optimizer(lr=0.125, momentum=0.0, weight_decay=0.0),
        schedule=Schedule(name="constant"),
    )
    trainer = Trainer(model, Sum(), Same(), ("input",), settings, seed=0, folder=tmp_path, context=Context())
    updater = ste.Ste(trainer, ste.Params(score_lr=0.5), 0.5)
    assert trainer.advance(updater) == 3.0 - 4.0  # only the first two weights act
    # weights: w - 0.125 * g * mask; scores: |w| - 0.5 * g * w, of the pruned weights too
    assert model.weight.detach().tolist() == [[3 - 0.125, -2 - 0.25, 1, 0.5]]
    assert updater.scores["weight"].tolist() == [[3 - 1.5, 2 + 2.0, 1 + 2.0, 0.5 - 2.0]]
    # the third weight has overtaken the first
    assert trainer.advance(updater) == pytest.approx(2 * -2.25 - 4 * 1.0)
    assert updater.mask["weight"].tolist() == [[False, True, True, False]]
