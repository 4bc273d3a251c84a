"""Each criterion loads without torch and numpy and defines what `criteria.Criterion` asks for."""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from sparsify_deploy import menu
from sparsify_deploy.errors import ModelError
from sparsify_deploy.sparsity.layers import prunable
from sparsify_deploy.sparsity.mask import Mask

IMAGES = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BATCHES = [
    {"input": IMAGES, "target": torch.tensor([0, 3, 1, 9, 3])},
    {"input": IMAGES[:2], "target": torch.ones(2).long()},
]
NAMES = menu.names("criteria")


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch["input"]), batch["target"])


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(288, 10)
    )


@pytest.mark.parametrize("name", NAMES)
def test_loads_on_a_bare_python(name: str) -> None:
    code = f"""
import sys
sys.modules["torch"] = sys.modules["numpy"] = None
from sparsify_deploy import menu
from sparsify_deploy.errors import ModelError
found = menu.entry("criteria", {name!r})
assert isinstance(found.VERSION, int) and isinstance(found.NEEDS_DATA, bool)
assert found.rounds(found.Params()) >= 1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert menu.summary("criteria", name).endswith((".", ").", ","))


@pytest.mark.parametrize("name", NAMES)
def test_scores_every_prunable_weight_and_leaves_everything_as_found(name: str) -> None:
    criterion = menu.entry("criteria", name)
    model = net()
    with torch.no_grad():
        model.get_parameter("0.weight")[0, 0] = -0.0
    model.get_parameter("5.bias").requires_grad_(False)
    model[1].eval()
    loss(model, BATCHES[0]).backward()
    state = copy.deepcopy(model.state_dict())
    gradients = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    flags = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    asks = [p.requires_grad for p in model.parameters()]
    pointers = [p.data_ptr() for p in model.parameters()]
    random_state = torch.get_rng_state()

    scores = criterion.score(model, BATCHES, loss, criterion.Params(), inputs=("input",), seed=1)
    for layer in prunable(model):
        assert scores[layer.parameter].shape == layer.weight.shape
        assert torch.isfinite(scores[layer.parameter]).all()
    assert set(scores) == {"0.weight", "5.weight"}

    assert torch.equal(torch.get_rng_state(), random_state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
        assert torch.equal(torch.signbit(value), torch.signbit(state[key])), f"{key} lost the sign of a zero"
    for key, parameter in model.named_parameters():
        before = gradients[key]
        assert (parameter.grad is None) == (before is None)
        assert before is None or torch.equal(parameter.grad, before)
    assert flags == [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert asks == [p.requires_grad for p in model.parameters()]
    assert pointers == [p.data_ptr() for p in model.parameters()]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fails", ["forward", "loss"])
def test_leaves_everything_as_found_when_something_fails(name: str, fails: str) -> None:
    criterion = menu.entry("criteria", name)
    calls = 0

    def breaks(module: nn.Module, arguments: object, output: object) -> None:
        nonlocal calls
        calls += 1
        torch.rand(3)
        if calls > 1:
            raise RuntimeError("planted")

    def failing_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if fails == "loss":
            breaks(model, None, None)
        return loss(model, batch)

    model = net()
    if fails == "forward":
        model[2].register_forward_hook(breaks)
    model[5].weight.requires_grad_(False)
    model[3].eval()
    state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    flags = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    scorer = criterion.prepare(model, BATCHES, failing_loss, criterion.Params(), inputs=("input",), seed=1)
    for _ in range(2):
        with contextlib.suppress(ModelError):
            scorer(Mask({"0.weight": torch.rand(8, 3, 3, 3, generator=torch.Generator().manual_seed(1)) < 0.5}))
    assert calls > 1 or not criterion.NEEDS_DATA
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert flags == [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert [p.requires_grad for p in model.parameters()] == [True] * 4 + [False, True]
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("name", NAMES)
def test_pruned_weights_never_score_above_kept_ones(name: str) -> None:
    criterion = menu.entry("criteria", name)
    model = net()
    scorer = criterion.prepare(model, BATCHES, loss, criterion.Params(), inputs=("input",), seed=1)
    whole = {key: value.clone() for key, value in scorer(None).items()}
    kept = torch.rand(8, 3, 3, 3) < 0.5
    found = scorer(Mask({"0.weight": kept}))
    lowest = min(float(found["0.weight"][kept].min()), float(found["5.weight"].min()))
    assert (found["0.weight"][~kept] <= lowest).all()
    assert found["0.weight"][kept].unique().numel() > 100
    if name != "grasp":  # whose scores have signs
        assert (found["0.weight"][~kept] == 0).all()
        assert (found["0.weight"][kept] > 0).all()
    again = scorer(None)
    assert all(torch.equal(again[key], whole[key]) for key in whole), "a scorer remembers the last mask"
