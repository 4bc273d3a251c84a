from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsify_deploy.errors import DataError, Diverged, ModelError
from sparsify_deploy.tasks import classification, regression
from sparsify_deploy.training.gradients import dense_gradients
from sparsify_deploy.training.loop import training_batches

TASK = classification.create(classification.Params())


def test_they_are_the_mean_gradient_at_pruned_weights_too(tiny):
    model = nn.Linear(3, 2).double()
    with torch.no_grad():
        model.weight[0] = 0
    batches = [{"input": torch.randn(5, 3).double(), "target": torch.randn(5, 2).double()} for _ in range(3)]
    found = dense_gradients(model, regression.create(regression.Params()), batches, ("input",), ["weight"])
    errors = [model(b["input"]) - b["target"] for b in batches]
    expected = sum(2 * e.T @ b["input"] / 10 for e, b in zip(errors, batches, strict=True)) / 3
    assert list(found) == ["weight"]
    assert torch.allclose(found["weight"], expected)
    assert found["weight"][0].abs().min() > 0


def test_the_model_is_left_as_found(tiny):
    model = tiny.network().train()
    model[5].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random_state = torch.get_rng_state()
    batches = training_batches(tiny.images(), seed=0, batch_size=8, count=2)
    found = dense_gradients(model, TASK, batches, ("input",), ["0.weight", "5.weight"])
    assert found["5.weight"].abs().sum() > 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[5].weight.grad is None
    assert not model[5].weight.requires_grad
    assert all(module.training for module in model)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_mistakes_are_named(tiny):
    batches = training_batches(tiny.images(), seed=0, batch_size=8, count=1)
    with pytest.raises(ModelError, match=r"'9\.weight'"):
        dense_gradients(tiny.network(), TASK, batches, ("input",), ["9.weight"])
    with pytest.raises(DataError, match="at least one batch"):
        dense_gradients(tiny.network(), TASK, [], ("input",), ["0.weight"])
    broken = tiny.network()
    with torch.no_grad():
        broken[0].weight.fill_(torch.nan)
    with pytest.raises(Diverged, match=r"gradient of 0.weight is not finite"):
        dense_gradients(broken, TASK, batches, ("input",), ["0.weight"])
