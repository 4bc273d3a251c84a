"""Graphs that torch.export made: layers are called by name again, sizes stay free, and what differs is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from sparsify_deploy.errors import ModelError
from sparsify_deploy.models._exported import Exported, Refused, export, followable
from sparsify_deploy.sparsity.tracing import trace


class Sliced(nn.Module):
    """It asks for the size of its input, which torch.fx's symbols cannot do."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(6, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.act, self.drop = nn.ReLU(), nn.Dropout(0.5)
        self.last = nn.Linear(8, 4)
        self.twin = nn.Linear(8, 4)
        self.twin.weight = self.last.weight
        self.scale = nn.Parameter(torch.rand(8))
        self.register_buffer("table", torch.randn(1, 8, 64), persistent=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if x.shape[1] != 6:
            raise ValueError("six channels are expected")
        x = self.drop(self.act(self.norm(self.conv(x))))
        places = torch.arange(x.shape[-1], device=x.device)
        x = (x + self.table[..., places]) * self.scale[:, None]
        x = functional.dropout(x, 0.25, self.training).mean(-1)
        return {"first": self.last(x), "second": self.twin(self.act(x))}


def batch(count: int, length: int = 9) -> dict[str, Tensor]:
    return {"x": torch.randn(count, 6, length, generator=torch.Generator().manual_seed(count))}


def exported(model: nn.Module) -> Exported:
    return export(model, batch(2), (batch(3, 12), batch(1, 9)), free={"x": (0, 2)})


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Sliced().train()


def test_torch_fx_alone_refuses_it(model: nn.Module) -> None:
    with pytest.raises(ModelError, match="Sliced cannot be traced"):
        trace(model)


def test_layers_are_called_by_their_names_and_shared(model: nn.Module) -> None:
    before = copy.deepcopy(model.state_dict())
    module = exported(model).over(model)
    called = [str(node.target) for node in module.graph.nodes if node.op == "call_module"]
    assert [name for name in called if not name.startswith(("constant", "dropout"))] == [
        *("conv", "norm", "act", "drop", "last", "act", "twin"),
    ]
    assert module.conv is model.conv
    assert module.last.weight is module.twin.weight
    assert set(module.state_dict()) == set(model.state_dict()) == set(copy.deepcopy(module).state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(part.training for part in model.modules())


def test_it_answers_at_other_sizes_and_trains_alike(model: nn.Module) -> None:
    module, other = exported(model).over(model), copy.deepcopy(model)
    for training in (True, False):
        for given in (batch(1, 64), batch(5, 2)) if not training else (batch(4, 7),):
            torch.manual_seed(1)
            expected = other.train(training)(**given)
            torch.manual_seed(1)
            found = module.train(training)(*given.values())
            assert list(found) == ["first", "second"]
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value)
    for name, value in other.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value)  # BatchNorm's statistics moved alike


def test_dropout_as_a_function_follows_the_mode(model: nn.Module) -> None:
    module = exported(model).over(model).eval()
    rates = sorted(part.p for part in module.modules() if isinstance(part, nn.Dropout))
    assert rates == [0.25, 0.5]
    values = batch(3)["x"]
    assert torch.equal(module(values)["first"], module(values)["first"])
    module.train()
    assert not torch.equal(module(values)["first"], module(values)["first"])


def test_the_same_graph_serves_another_network_of_the_class(model: nn.Module) -> None:
    graph = exported(model)
    torch.manual_seed(9)
    another = Sliced()
    another.table = model.table  # a constant belongs to the architecture
    module = graph.over(another).eval()
    torch.testing.assert_close(module(batch(3)["x"]), another.eval()(batch(3)["x"]))


def test_no_device_is_written_into_the_graph(model: nn.Module) -> None:
    module = exported(model).over(model)
    for node in module.graph.nodes:
        given = (*node.args, *node.kwargs.values())
        assert not any(isinstance(value, torch.device) for value in given), node
    meta = copy.deepcopy(module).to("meta")
    assert meta(torch.zeros(2, 6, 9, device="meta"))["first"].device.type == "meta"


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x.mean(-1))
        return result * 2 if self.training else result


def test_a_forward_that_depends_on_the_mode_is_refused() -> None:
    with pytest.raises(ModelError, match=r"Two, as torch.export has it, gives other values .* in train mode differs"):
        exported(Two())


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x.mean(-1))
        return x * 2 if x.sum() > 0 else x


def test_a_branch_on_values_is_one_line() -> None:
    with pytest.raises(ModelError, match=r"^Branches cannot be exported by torch.export: ") as caught:
        exported(Branches())
    assert "\n" not in str(caught.value)


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x.mean(-1).reshape(2, 6))
        return result


def test_a_batch_that_is_fixed_is_refused() -> None:
    with pytest.raises(ModelError, match="Fixed"):
        exported(Fixed())


def test_only_what_torch_fx_cannot_follow_takes_this_way(model: nn.Module) -> None:
    def given() -> Any:
        return [batch(2), batch(3, 12), batch(1)], {"x": (0, 2)}

    def never() -> Any:
        raise AssertionError("no example is needed")

    assert followable(nn.Sequential(nn.Linear(9, 3)), never) is None
    refused = followable(Branches(), given)
    assert isinstance(refused, Refused)
    assert refused.reason.startswith("Branches cannot be exported by torch.export: ")
    found = followable(model, given)
    assert isinstance(found, Exported)
    module = found.over(model)
    (note,) = module.meta["notes"]
    assert note.startswith("Sliced cannot be traced")
    assert "torch.export made of it" in note
    assert isinstance(trace(module), fx.GraphModule)


class Attending(nn.Module):
    """Fused attention that drops weights, with a branch that torch.fx cannot take."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.table, self.query, self.key = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.kind = kind

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        given: dict[str, Any] = {"scale": 0.7} if self.kind == "scaled" else {}
        if ids.size(1) > 0 and self.kind in ("bool", "float"):
            seen = (ids > 5)[:, None, :]
            hidden = torch.zeros_like(seen, dtype=x.dtype).masked_fill(~seen, -1e4)
            given["attn_mask"] = seen if self.kind == "bool" else hidden
        rate = 0.3 if self.training else 0.0
        return functional.scaled_dot_product_attention(self.query(x), self.key(x), x, dropout_p=rate, **given).mean(1)


@pytest.mark.parametrize("kind", ["plain", "scaled", "bool", "float"])
def test_fused_attention_drops_weights_in_training_alone(kind: str) -> None:
    def ids(count: int, length: int) -> Tensor:
        return torch.randint(1, 50, (count, length), generator=torch.Generator().manual_seed(length))

    torch.manual_seed(0)
    network = Attending(kind)
    found = export(network, {"ids": ids(2, 8)}, [{"ids": ids(3, 5)}, {"ids": ids(1, 8)}], free={"ids": (0, 1)})
    assert found.dropouts == {"dropout_0": 0.3}
    module, x = found.over(network), ids(16, 7)
    with torch.no_grad():
        drawn = [torch.stack([each(x) for _ in range(400)]) for each in (network.train(), module.train())]
        assert torch.allclose(module.eval()(x), network.eval()(x), atol=1e-6)
    assert torch.allclose(drawn[0].mean(0), drawn[1].mean(0), atol=0.05)
    assert torch.allclose(drawn[0].std(0).mean(), drawn[1].std(0).mean(), rtol=0.05)
    assert drawn[1].std(0).mean() > 0.01
