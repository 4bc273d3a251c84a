"""Where SynFlow's theory fails it says so, and where the published code fails it works."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify_deploy.criteria import synflow
from sparsify_deploy.errors import ModelError
from sparsify_deploy.sparsity.mask import Mask

IMAGES = {"input": torch.randn(4, 3, 8, 8)}
ROWS = {"input": torch.randn(4, 6)}


def score(model: nn.Module, batch: dict[str, Tensor], inputs: tuple[str, ...] = ("input",)) -> dict[str, Tensor]:
    return dict(synflow.score(model, [batch], None, synflow.Params(), inputs=inputs))  # type: ignore[arg-type]


class Calls(nn.Module):
    """Two linear layers with a plain function between them."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(6, 6), nn.Linear(6, 2), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


class Block(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(6, 6), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(x))


@pytest.mark.parametrize(
    "act",
    [
        nn.GELU(),
        nn.SiLU(),
        nn.Hardswish(),
        nn.Sigmoid(),
        nn.Tanh(),
        nn.Softmax(dim=-1),
        nn.LogSoftmax(dim=-1),
        nn.LayerNorm(6),
        nn.RMSNorm(6),
        nn.GroupNorm(2, 6),
        nn.BatchNorm1d(6, track_running_stats=False),
    ],
    ids=lambda act: type(act).__name__,
)
def test_modules_outside_the_theory_are_refused_by_name(act: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), Block(act), nn.Linear(6, 2))
    with pytest.raises(ModelError, match=r"does not hold for layer 2\.act .*magnitude or random"):
        score(model, ROWS)


@pytest.mark.parametrize(
    "function",
    [
        F.gelu,
        torch.sigmoid,
        lambda x: x.tanh(),
        lambda x: x.softmax(-1),
        F.normalize,
        lambda x: x / x.sum(),
        lambda x: x * (x.var(-1, keepdim=True) + 1e-5).rsqrt(),
        lambda x: F.layer_norm(x, (6,)),
    ],
)
def test_plain_functions_outside_the_theory_are_refused_too(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ModelError, match="does not hold for the model's own forward"):
        score(Calls(function), ROWS)


def test_attention_is_refused() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.last = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = x.unsqueeze(1)
            return self.last(self.attention(x, x, x, need_weights=False)[0])

    with pytest.raises(ModelError, match="layer attention"):
        score(Attends(), ROWS)


def test_constants_may_be_made_in_any_way() -> None:
    scale = torch.full((6,), 4.0)
    whole = score(Calls(lambda x: x * torch.rsqrt(scale)), ROWS)
    halved = Calls(lambda x: x * 0.5)
    torch.manual_seed(0)
    plain = Calls(lambda x: x / torch.tensor(2.0))
    halved.load_state_dict(plain.state_dict())
    assert set(whole) == {"first.weight", "last.weight"}
    assert all(torch.equal(a, score(halved, ROWS)[name]) for name, a in score(plain, ROWS).items())


@pytest.mark.parametrize(
    "act",
    [
        nn.ReLU6(),
        nn.ReLU6(inplace=True),
        nn.Hardtanh(0, 0.01),
        Block(nn.Hardtanh(-1, 1)).act,
    ],
)
def test_clipped_activations_score_as_relu(act: nn.Module) -> None:
    torch.manual_seed(0)
    # 50 times the usual weights: everything is far above 6
    model = nn.Sequential(nn.Linear(6, 6), act, nn.Linear(6, 6), act, nn.Linear(6, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(50)
    twin = nn.Sequential(model[0], nn.ReLU(), model[2], nn.ReLU(), model[4])
    found, expected = score(model, ROWS), score(twin, ROWS)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all((value > 0).all() for value in found.values())


@pytest.mark.parametrize(
    "function",
    [
        F.relu6,
        lambda x: F.hardtanh(x, 0, 6),
        lambda x: x.clamp(0, 6),
        lambda x: torch.clamp(x, max=6),
        lambda x: x.clip(min=0, max=6),
        lambda x: x.clamp_max(6),
        lambda x: F.relu(x).clamp_(0, 6),
    ],
)
def test_clipping_functions_score_as_relu(function: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, twin = Calls(function), Calls(F.relu)
    with torch.no_grad():
        model.first.weight.mul_(100)
    twin.load_state_dict(model.state_dict())
    found, expected = score(model, ROWS), score(twin, ROWS)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def deep(layers: int, gain: float) -> nn.Module:
    model = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(layers)))
    for parameter in model.parameters():
        nn.init.constant_(parameter, gain)
    return model


def test_float32_would_overflow_and_float64_does_not() -> None:
    model = deep(40, 10.0)  # R = 6 · 60^40 = 8e71
    assert not torch.isfinite(model(torch.ones(1, 6))).any()
    scores = score(model, ROWS)
    for value in scores.values():
        assert value.dtype == torch.float64
        assert value.sum() == pytest.approx(6 * 60.0**40)


def test_overflow_in_float64_is_refused_with_advice() -> None:
    with pytest.raises(ModelError, match=r"overflows float64 .* magnitude or random"):
        score(deep(200, 10.0), ROWS)
    # R itself is finite, a gradient at tiny weights is not
    tiny = deep(2, 1e-30)
    with torch.no_grad():
        tiny[1].weight.fill_(1e38)
    assert all(torch.isfinite(value).all() for value in score(tiny, ROWS).values())


def test_a_network_through_which_nothing_flows_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2, bias=False))
    nn.init.zeros_(model.get_parameter("2.weight"))
    with pytest.raises(ModelError, match=r"flow is 0.*all weights of 2\.weight are 0"):
        score(model, ROWS)
    nn.init.ones_(model.get_parameter("2.weight"))
    scorer = synflow.prepare(model, [ROWS], None, synflow.Params(), inputs=("input",), seed=0)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"2\.weight"):
        scorer(Mask({"2.weight": torch.zeros(2, 6, dtype=torch.bool)}))


def test_weights_that_are_not_finite_are_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        model.get_parameter("0.weight")[0, 0] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        score(model, ROWS)


def test_token_inputs_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 6), nn.Flatten(), nn.Linear(24, 2))
    with pytest.raises(ModelError, match="int64 input 'ids'"):
        score(model, {"ids": torch.zeros(4, 4, dtype=torch.long)}, inputs=("ids",))


def test_a_forward_that_fails_in_float64_names_the_layer() -> None:
    class Float32Only(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.ones(6, 6)

    with pytest.raises(ModelError, match="layer 1 failed"):
        score(nn.Sequential(nn.Linear(6, 6), Float32Only()), ROWS)


def test_several_inputs_and_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.unused = nn.Linear(6, 2), nn.Linear(3, 2), nn.Linear(2, 2)

        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, dict[str, int] | Tensor]:
            return self.left(a), self.right(b) * 3

    model = Two()
    scores = score(model, {"b": torch.randn(4, 3), "a": torch.randn(4, 6)}, inputs=("a", "b"))
    assert torch.allclose(scores["left.weight"], model.left.weight.detach().double().abs())
    assert torch.allclose(scores["right.weight"], 3 * model.right.weight.detach().double().abs())
    assert (scores["unused.weight"] == 0).all()


def test_random_numbers_drawn_in_forward_do_not_move_the_global_state() -> None:
    model = Calls(lambda x: F.dropout(x, 0.5, training=True))
    state = torch.get_rng_state()
    score(model, ROWS)
    assert torch.equal(torch.get_rng_state(), state)


def test_scores_are_made_with_gradients_switched_off_outside() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    with torch.no_grad():
        quiet = score(model, IMAGES)
    assert all(torch.equal(quiet[name], value) for name, value in score(model, IMAGES).items())
