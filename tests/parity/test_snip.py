"""SNIP against finite differences of the loss by a factor on a single weight, and its iterative form by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sparsify_deploy.criteria import snip
from sparsify_deploy.sparsity.layers import prunable
from sparsify_deploy.sparsity.mask import Mask
from sparsify_deploy.sparsity.prune import global_mask, prune_at_init

Batch = dict[str, Tensor]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch["input"]), batch["target"])


def net(norm: bool) -> nn.Module:
    torch.manual_seed(0)
    middle: nn.Module = nn.BatchNorm2d(3) if norm else nn.Identity()
    model = nn.Sequential(nn.Conv2d(2, 3, 3), middle, nn.Tanh(), nn.Flatten(), nn.Linear(12, 4)).double()
    return model.train()


def examples(count: int, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 2, 4, 4, generator=generator, dtype=torch.float64)
    return {"input": images, "target": torch.randint(4, (count,), generator=generator)}


def cut(batch: Batch, *sizes: int) -> list[Batch]:
    pieces = {name: torch.split(value, list(sizes)) for name, value in batch.items()}
    return [{name: pieces[name][i] for name in batch} for i in range(len(sizes))]


def score(model: nn.Module, batches: list[Batch], mask: Mask | None = None) -> dict[str, Tensor]:
    scorer = snip.prepare(model, batches, loss, snip.Params(), inputs=("input",), seed=0)
    return dict(scorer(mask))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("pruned", [False, True])
def test_scores_are_central_differences_by_a_mask_entry(norm: bool, pruned: bool) -> None:
    model, batches = net(norm), cut(examples(12), 5, 7)
    names = [layer.parameter for layer in prunable(model)]
    generator = torch.Generator().manual_seed(2)
    shapes = {name: model.get_parameter(name).shape for name in names}
    mask = Mask({name: torch.rand(shape, generator=generator) < 0.6 for name, shape in shapes.items()})
    found = score(model, batches, mask if pruned else None)

    twin = copy.deepcopy(model)
    if pruned:
        mask.apply_(twin)

    def mean_loss() -> float:
        with torch.no_grad():
            return sum(float(loss(twin, batch)) * len(batch["target"]) / 12 for batch in batches)

    for name in names:
        flat = twin.get_parameter(name).data.view(-1)
        for i in range(flat.numel()):
            value, step = float(flat[i]), 1e-5
            sides = []
            for factor in (1 + step, 1 - step):
                flat[i] = value * factor
                sides.append(mean_loss())
            flat[i] = value
            expected = abs(sides[0] - sides[1]) / (2 * step)
            assert float(found[name].view(-1)[i]) == pytest.approx(expected, rel=1e-5, abs=1e-9), (name, i)


def test_examples_may_be_cut_into_batches_in_any_way() -> None:
    model, batch = net(norm=False), examples(12)
    whole = score(model, [batch])
    for sizes in ((6, 6), (1, 11), (3, 2, 7)):
        for name, value in score(model, cut(batch, *sizes)).items():
            torch.testing.assert_close(value, whole[name], rtol=1e-10, atol=1e-14)


def test_gradients_are_summed_before_the_absolute_value() -> None:
    # two examples whose gradients cancel in the weight of the first input
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.ones_(model.weight)
    batches = [{"input": torch.tensor([[sign, 1.0]], dtype=torch.float64)} for sign in (1.0, -1.0)]
    scorer = snip.prepare(model, batches, lambda m, b: m(b["input"]).sum(), snip.Params(), inputs=("input",), seed=0)
    assert scorer(None)["weight"].tolist() == [[0.0, 1.0]]


def test_rounds_are_iter_snip() -> None:
    model, batches = net(norm=False), [examples(20)]
    layers = prunable(model)
    scorer = snip.prepare(model, batches, loss, snip.Params(rounds=3), inputs=("input",), seed=0)
    found = prune_at_init(scorer, layers, 0.1, allocation="global", rounds=snip.rounds(snip.Params(rounds=3)))

    total = sum(layer.weight.numel() for layer in layers)
    twin = copy.deepcopy(model)
    for e in (1, 2, 3):
        gradients = torch.autograd.grad(loss(twin, batches[0]), [x.weight for x in prunable(twin)])
        scores = {x.parameter: (x.weight.detach() * g).abs() for x, g in zip(prunable(twin), gradients, strict=True)}
        expected = global_mask(scores, round(0.1 ** (e / 3) * total) / total)
        before = {x.parameter: x.weight.detach() != 0 for x in prunable(twin)}
        assert all(not (expected[name] & ~before[name]).any() for name in expected), "a pruned weight came back"
        expected.apply_(twin)
    assert found == expected
    assert found != prune_at_init(scorer, layers, 0.1, allocation="global", rounds=1)


def test_a_model_in_half_precision_is_scored_in_float32() -> None:
    model, batch = net(norm=False), examples(12)
    exact = score(model, [batch])
    model = model.to(torch.bfloat16)
    found = score(model, cut({"input": batch["input"].bfloat16(), "target": batch["target"]}, 6, 6))
    for name, value in found.items():
        assert value.dtype == torch.float32
        together = torch.stack([value.double().flatten(), exact[name].flatten()])
        assert float(torch.corrcoef(together)[0, 1]) > 0.99
