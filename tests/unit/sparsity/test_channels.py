"""Which channels share a permutation, and which layers are left out with what reason."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsify_deploy.errors import CheckFailed, ModelError
from sparsify_deploy.sparsity import permutation
from sparsify_deploy.sparsity.channels import channel_groups
from sparsify_deploy.sparsity.permutation import PermutationReport, permute_


class Net(nn.Module):
    """Named layers and a forward given as a function."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.function = forward

    def __getattr__(self, name: str) -> Any:  # layers by name, for mypy
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def conv(inputs: int, outputs: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, groups=groups)


def permuted(model: nn.Module, *layers: str, x: Tensor | None = None, m: int = 4) -> PermutationReport:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 8, 4, 4) if x is None else x
    original = copy.deepcopy(model).eval().double()
    report = permute_(model, {"x": x}, ["x"], layers, m // 2, m)
    with torch.no_grad():
        before, after = original(x.double()), copy.deepcopy(model).eval().double()(x.double())
    assert torch.allclose(before, after, rtol=1e-10, atol=1e-10 * float(before.abs().max()))
    return report


def reason(report: PermutationReport, layer: str) -> str:
    row = next(row for row in report.layers if row.layer == layer)
    assert row.permuted == (not row.reason)
    return row.reason


def test_consumers_of_one_value_share_a_permutation_and_residuals_join_producers() -> None:
    net = Net(
        lambda s, x: s.d(torch.relu(s.a(x)).add_(s.b(x)) + s.c(s.a2(x))).mean((2, 3)),
        a=conv(8, 16),
        b=conv(8, 16),
        a2=conv(8, 16),
        c=conv(16, 16),
        d=conv(16, 4),
    )
    report = permuted(net, "c", "d")
    assert {row.layers for row in report.groups} == {("c",), ("d",)}
    assert report.permuted == 2


@pytest.mark.parametrize(
    ("middle", "words"),
    [
        (conv(16, 16, groups=4), "b is a grouped convolution"),
        (nn.GroupNorm(4, 16), "b (GroupNorm) may depend on the order"),
        (nn.LocalResponseNorm(3), "b (LocalResponseNorm) may depend on the order"),
        (nn.ChannelShuffle(4), "b (ChannelShuffle) may depend on the order"),
        (nn.utils.parametrizations.weight_norm(conv(16, 16)), "b is no plain torch.nn layer"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_modules_that_look_at_the_order_are_barriers(middle: nn.Module, words: str) -> None:
    net = Net(lambda s, x: s.c(s.b(s.a(x))), a=conv(8, 16), b=middle, c=conv(16, 4))
    report = permuted(net, "c")
    assert not report.permuted
    assert words in reason(report, "c")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x[:, 1:].sum(1, keepdim=True) + x, "getitem"),
        (lambda x: x.reshape(2, 4, 4, 4, 4).transpose(1, 2).reshape(2, 16, 4, 4), "reshape"),
        (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), "chunk"),
        (lambda x: functional.pad(x, (0, 0, 0, 0, 1, 0))[:, 1:], "pad"),
        (lambda x: x + torch.arange(16.0, dtype=x.dtype).reshape(1, 16, 1, 1), "add"),
        (lambda x: x.cumsum(1), "cumsum"),
        (lambda x: x.flip(1), "flip"),
        (lambda x: torch.roll(x, 1, 1), "roll"),
        (lambda x: x - x.mean(1, keepdim=True), "mean"),
    ],
    ids=["item", "shuffle", "chunk", "pad", "constant", "cumsum", "flip", "roll", "mean"],
)
def test_functions_that_look_at_the_order_are_barriers(function: Callable[[Tensor], Tensor], words: str) -> None:
    report = permuted(Net(lambda s, x: s.b(function(s.a(x))), a=conv(8, 16), b=conv(16, 4)), "b")
    assert not report.permuted
    assert words in reason(report, "b")


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2),
        lambda x: x.transpose(1, 3).transpose(3, 1),
        lambda x: functional.interpolate(functional.avg_pool2d(x, 2), scale_factor=2.0),
        lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
        lambda x: x.flatten(2).softmax(1).view(2, 16, 4, 4),
        lambda x: x[:, :, 1:, None].squeeze(3),
        lambda x: x[..., 0:2, :] * 2.0 + 1,
        lambda x: torch.cat([x, x], 2),
        lambda x: x / x.abs().clamp(min=1e-3).amax(dim=3, keepdim=True),
        lambda x: x.view(x.size(0), x.shape[1], -1, 2),
    ],
)
def test_operators_that_treat_channels_alike_are_followed(function: Callable[[Tensor], Tensor]) -> None:
    report = permuted(Net(lambda s, x: s.b(function(s.a(x))), a=conv(8, 16), b=conv(16, 4)), "b")
    assert reason(report, "b") == ""


def test_the_input_and_the_output_of_the_network_are_barriers() -> None:
    report = permuted(Net(lambda s, x: (s.b(y := s.a(x)), y)[0] + 0 * y, a=conv(8, 16), b=conv(16, 16)), "a", "b")
    assert "network input" in reason(report, "a")
    assert "output" in reason(report, "b")


@pytest.mark.parametrize(
    ("before", "words"),
    [
        (lambda s, x: torch.relu(x).flatten(1), "it reads the network input"),
        (lambda s, x: s.norm(x.flatten(1)), "it reads the network input"),
        (lambda s, x: torch.relu(functional.linear(x.flatten(1), s.w)), "what linear (linear) makes"),
        (lambda s, x: (x.flatten(1) @ s.w.t()) * 2, "what matmul (matmul) makes"),
        (lambda s, x: s.table(x.flatten(1).long().clamp(0, 3)).mean(1), "what table (Embedding) makes"),
        (lambda s, x: s.cell(x.flatten(1))[0], "what cell (LSTM) makes"),
    ],
    ids=["keeping functions", "a keeping module", "functional", "matmul", "embedding", "recurrent"],
)
def test_only_a_layer_that_reads_the_network_input_is_said_to(before: Callable[..., Tensor], words: str) -> None:
    net = Net(
        lambda s, x: s.b(before(s, x)),
        b=nn.Linear(16, 16),
        norm=nn.BatchNorm1d(16),
        table=nn.Embedding(4, 16),
        cell=nn.LSTM(16, 16),
    )
    net.register_parameter("w", nn.Parameter(torch.randn(16, 16)))
    assert words in reason(permuted(net, "b", x=torch.randn(2, 1, 4, 4)), "b")


def test_a_module_called_twice_is_a_barrier_but_a_shared_activation_is_not() -> None:
    twice = Net(lambda s, x: s.c(s.b(s.b(s.a(x)))), a=conv(8, 16), b=conv(16, 16), c=conv(16, 4))
    report = permuted(twice, "b", "c")
    assert "b is called more than once" in reason(report, "b")
    assert "b is called more than once" in reason(report, "c")
    act = nn.ReLU()
    shared = Net(lambda s, x: s.c(s.act(s.b(s.act(s.a(x))))), a=conv(8, 16), b=conv(16, 16), c=conv(16, 4), act=act)
    assert permuted(shared, "b", "c").permuted == 2


def test_tied_weights_and_weights_read_directly_are_barriers() -> None:
    net = Net(lambda s, x: s.c(s.b(s.a(x))), a=conv(16, 16), b=conv(16, 16), c=conv(16, 4))
    net.get_submodule("b").weight = net.get_submodule("a").weight
    assert "are one tensor" in reason(permuted(net, "c", x=torch.randn(2, 16, 4, 4)), "c")
    read = Net(lambda s, x: s.b(s.a(x)) + s.a.weight.sum(), a=conv(8, 16), b=conv(16, 4))
    assert "a.weight is also read outside its layer" in reason(permuted(read, "b"), "b")


def test_a_flattened_map_moves_in_blocks_and_says_that_it_gains_nothing() -> None:
    net = Net(
        lambda s, x: s.fc(torch.flatten(y := s.a(x), 1)) + s.b(y).mean((2, 3)),
        a=conv(8, 16),
        b=conv(16, 4),
        fc=nn.Linear(16 * 16, 4),
    )
    report = permuted(net, "b", "fc")
    assert reason(report, "b") == ""
    assert "16 consecutive features of a flattened map" in reason(report, "fc")
    assert [row.layers for row in report.groups] == [("b",)]


def test_concatenated_segments_keep_permutations_of_their_own() -> None:
    net = Net(lambda s, x: s.c(torch.cat([s.a(x), x, s.b(x)], 1)), a=conv(8, 16), b=conv(8, 16), c=conv(40, 4))
    report = permuted(net, "c")
    assert [(row.layers, row.channels) for row in report.groups] == [(("c",), 16), (("c",), 16)]
    assert reason(report, "c") == ""


def test_segments_that_do_not_begin_with_a_group_are_named() -> None:
    net = Net(lambda s, x: s.c(torch.cat([s.a(x), s.b(x)], 1)), a=conv(8, 6), b=conv(8, 10), c=conv(16, 4))
    report = permuted(net, "c")
    assert "6 channels from 0 on are not whole groups of 4" in reason(report, "c")


def test_only_channels_of_layers_asked_for_move() -> None:
    net = Net(lambda s, x: s.c(s.b(s.a(x))), a=conv(8, 16), b=conv(16, 16), c=conv(16, 4))
    before = copy.deepcopy(net.state_dict())
    torch.manual_seed(0)
    for tensor in before.values():
        nn.init.normal_(tensor)
    report = permuted(net, "c")
    after = net.state_dict()
    assert [row.layer for row in report.layers] == ["c"]
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"b.weight", "b.bias", "c.weight"}


def test_other_patterns_than_2_4_use_their_own_groups() -> None:
    net = Net(lambda s, x: s.b(s.a(x)), a=conv(8, 24), b=conv(24, 4))
    report = permuted(net, "b", m=8)
    assert report.permuted == 1
    assert 0 < report.layers[0].efficacy <= 1


def test_the_report_is_json() -> None:
    net = Net(lambda s, x: s.b(s.a(x)), a=conv(8, 16), b=conv(16, 4))
    facts = json.loads(json.dumps(permuted(net, "b").facts()))
    assert facts["permuted"] == 1
    assert facts["layers"][0]["layer"] == "b"
    assert facts["groups"][0]["layers"] == ["b"]


def test_a_network_torch_fx_cannot_follow_is_one_clear_line() -> None:
    net = Net(lambda s, x: s.a(x) if x.sum() > 0 else s.b(x), a=conv(8, 16), b=conv(8, 16))
    with pytest.raises(ModelError, match="cannot be traced") as caught:
        permute_(net, {"x": torch.ones(2, 8, 2, 2)}, ["x"], ["a"], 2, 4)
    assert len(caught.value.lines) == 1


def test_mistakes_of_the_caller_are_named() -> None:
    net = Net(lambda s, x: s.b(s.a(x)), a=conv(8, 16), b=conv(16, 4))
    with pytest.raises(ModelError, match="'z' is no conv or linear layer"):
        permute_(net, {"x": torch.ones(2, 8, 2, 2)}, ["x"], ["z"], 2, 4)
    odd = Net(lambda s, x: s.b(s.a(x)), a=conv(8, 6), b=conv(6, 4))
    with pytest.raises(ModelError, match="b has 6 input channels, not a multiple of 4"):
        permute_(odd, {"x": torch.ones(2, 8, 2, 2)}, ["x"], ["b"], 2, 4)
    with pytest.raises(ModelError, match="float64"):
        permute_(
            Net(lambda s, x: s.b(s.a(x.float())), a=conv(8, 16), b=conv(16, 4)),
            {"x": torch.ones(2, 8, 2, 2)},
            *(["x"], ["b"], 2, 4),
        )


def test_a_network_whose_outputs_would_change_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(lambda s, x: s.b(s.a(x)), a=conv(8, 16), b=conv(16, 4))
    before = copy.deepcopy(net.state_dict())

    def forgetful(model: nn.Module, arguments: object) -> object:
        found = channel_groups(model, arguments)  # type: ignore[arg-type]
        found.axes = [axis for axis in found.axes if axis.name != "a.bias"]
        return found

    monkeypatch.setattr(permutation, "channel_groups", forgetful)
    with pytest.raises(CheckFailed, match="would change output output"):
        permute_(net, {"x": torch.randn(2, 8, 2, 2)}, ["x"], ["b"], 2, 4)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_the_network_keeps_its_mode_dtype_and_parameters() -> None:
    net = Net(lambda s, x: s.b(s.bn(s.a(x))), a=conv(8, 16), bn=nn.BatchNorm2d(16), b=conv(16, 4)).train()
    parameters = dict(net.named_parameters())
    permute_(net, {"x": torch.randn(2, 8, 2, 2)}, ["x"], ["b"], 2, 4)
    assert net.training
    assert all(parameters[name] is p and p.dtype == torch.float32 for name, p in net.named_parameters())
    assert int(net.get_submodule("bn").num_batches_tracked) == 0  # type: ignore[arg-type]
