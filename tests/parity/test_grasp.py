"""GraSP against an explicit Hessian, its sign against the gradient flow it is meant to keep."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from sparsify_deploy.criteria import grasp
from sparsify_deploy.errors import ModelError
from sparsify_deploy.sparsity.layers import prunable
from sparsify_deploy.sparsity.mask import Mask
from sparsify_deploy.sparsity.prune import global_mask

Batch = dict[str, Tensor]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch["input"]), batch["target"])


def net(norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    middle: nn.Module = nn.BatchNorm2d(2) if norm else nn.Identity()
    model = nn.Sequential(nn.Conv2d(1, 2, 3), middle, nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double()
    return model.train()


def examples(count: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 1, 4, 4, generator=generator, dtype=torch.float64)
    return {"input": images, "target": torch.randint(3, (count,), generator=generator)}


def explicit(model: nn.Module, batches: list[Batch], temperature: float) -> dict[str, Tensor]:
    """θ ⊙ (H g) with the whole Hessian of the mean loss by all prunable weights."""
    names = [layer.parameter for layer in prunable(model)]
    weights = [model.get_parameter(name).detach() for name in names]
    others = {name: value for name, value in copy.deepcopy(model).state_dict().items() if name not in names}
    total = sum(len(batch["target"]) for batch in batches)

    def mean_loss(flat: Tensor) -> Tensor:
        parts = torch.split(flat, [weight.numel() for weight in weights])
        state = others | {n: p.view_as(w) for n, p, w in zip(names, parts, weights, strict=True)}
        sums = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            logits = functional_call(model, state, (batch["input"],)) / temperature
            sums = sums + nn.functional.cross_entropy(logits, batch["target"], reduction="sum")
        return sums / total

    theta = torch.cat([weight.flatten() for weight in weights])
    hessian = torch.autograd.functional.hessian(mean_loss, theta)
    (gradient,) = torch.autograd.grad(mean_loss(theta.requires_grad_()), theta)
    flat = theta.detach() * (hessian @ gradient)
    parts = torch.split(flat, [weight.numel() for weight in weights])
    return {n: p.view_as(w) for n, p, w in zip(names, parts, weights, strict=True)}


def score(model: nn.Module, batches: list[Batch], temperature: float = 200.0) -> dict[str, Tensor]:
    params = grasp.Params(temperature=temperature)
    return dict(grasp.score(model, batches, loss, params, inputs=("input",)))


def halves(batch: Batch) -> list[Batch]:
    return [{name: value[:5] for name, value in batch.items()}, {name: value[5:] for name, value in batch.items()}]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_scores_are_theta_times_an_explicit_hessian_times_the_gradient(norm: bool, temperature: float) -> None:
    model, batches = net(norm), halves(examples(12))
    expected = explicit(model, batches, temperature)
    found = score(model, batches, temperature)
    for name, value in found.items():
        size = float(expected[name].abs().max())
        torch.testing.assert_close(value, expected[name], rtol=1e-7, atol=1e-9 * size)
    both = torch.cat([value.flatten() for value in expected.values()])
    assert 0.1 < float((both > 0).double().mean()) < 0.9, "a flipped sign would not show"


def test_the_default_temperature_is_200() -> None:
    model, batches = net(), halves(examples(12))
    found = grasp.score(model, batches, loss, grasp.Params(), inputs=("input",))
    assert all(torch.equal(value, score(model, batches, 200.0)[name]) for name, value in found.items())
    assert any(not torch.allclose(value * 200**2, score(model, batches, 1.0)[name]) for name, value in found.items())


def test_dropping_low_scores_keeps_the_gradients_norm_and_dropping_high_ones_loses_it() -> None:
    model, batch = net(), examples(24)
    scores = score(model, [batch], 1.0)

    def flow(mask: Mask) -> float:
        twin = copy.deepcopy(model)
        for layer in prunable(twin):
            # a short way towards removal, where the first order rules
            layer.weight.data.mul_(1 - 1e-3 * (~mask[layer.parameter]).double())
        gradients = torch.autograd.grad(loss(twin, batch), [layer.weight for layer in prunable(twin)])
        return float(sum((gradient**2).sum() for gradient in gradients))

    whole = flow(Mask({name: torch.ones_like(value, dtype=torch.bool) for name, value in scores.items()}))
    keep_high = flow(global_mask(scores, 0.5))
    keep_low = flow(global_mask({name: -value for name, value in scores.items()}, 0.5))
    assert keep_high > whole > keep_low


def test_examples_may_be_cut_into_batches_in_any_way() -> None:
    model, batch = net(), examples(12)
    whole = score(model, [batch])
    for name, value in score(model, halves(batch)).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-9, atol=1e-20)


def test_only_float_outputs_are_cooled_whatever_their_container() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            logits = self.inner(x)
            return {"logits": logits, "top": logits.argmax(1)}

    model, batch = Named(), examples(12)

    def named_loss(model: nn.Module, batch: Batch) -> Tensor:
        outputs = model(batch["input"])
        assert outputs["top"].dtype == torch.int64
        return nn.functional.cross_entropy(outputs["logits"], batch["target"])

    found = grasp.score(model, [batch], named_loss, grasp.Params(), inputs=("input",))
    plain = score(model.inner, [batch])
    assert all(torch.equal(found[f"inner.{name}"], value) for name, value in plain.items())


def test_attention_is_differentiated_twice() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.last = nn.Linear(4, 12), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x.flatten(2).transpose(1, 2).reshape(-1, 4, 4)).unsqueeze(1).chunk(3, -1)
            return self.last(nn.functional.scaled_dot_product_attention(q, k, v).mean((1, 2)))

    torch.manual_seed(0)
    scores = grasp.score(Attends().double(), [examples(8)], loss, grasp.Params(), inputs=("input",))
    assert all(bool(value.any()) for value in scores.values())


def test_a_loss_without_curvature_is_refused() -> None:
    model = nn.Linear(16, 1).double()
    with pytest.raises(ModelError, match=r"GraSP: all scores of weight are 0.*snip, synflow, magnitude or random"):
        grasp.score(
            model, [examples(4)], lambda m, b: m(b["input"].flatten(1)).mean(), grasp.Params(), inputs=("input",)
        )
