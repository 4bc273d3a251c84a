"""Packed attention taken apart: the same numbers, masks and gradients; what stays says why."""

from __future__ import annotations

import copy
import re

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from sparsify_deploy.errors import ModelError  # noqa: E402
from sparsify_deploy.models import _attention, _checkpoint  # noqa: E402
from sparsify_deploy.models._attention import Attention, Encoder, EncoderLayer, unpack_attention_  # noqa: E402
from sparsify_deploy.sparsity.layers import prunable  # noqa: E402
from sparsify_deploy.sparsity.tracing import trace  # noqa: E402

KINDS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "other widths": {"kdim": 8, "vdim": 12, "batch_first": True},
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def pair(**arguments):
    """A packed attention of 16 channels and 4 heads, with biases that are not 0, and the same taken apart."""
    old = nn.MultiheadAttention(16, 4, **arguments).eval()
    if old.in_proj_bias is not None:
        nn.init.normal_(old.in_proj_bias)
        nn.init.normal_(old.out_proj.bias)
    new = unpack_attention_(copy.deepcopy(old))
    assert type(new) is Attention
    return old, new


def inputs(attention, batch=3):
    """Query of 5, key and value of 7 positions."""
    sizes = (5, 16), (7, attention.kdim), (7, attention.vdim)
    made = [torch.randn(batch, *size) for size in sizes]
    return made if attention.batch_first else [x.transpose(0, 1) for x in made]


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_outputs_and_weights_with_every_mask(kind, weights, average):
    old, new = pair(**KINDS[kind])
    x = inputs(old)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[0, 5:] = padding[2, 0] = True
    masks = [
        {},
        {"key_padding_mask": padding},
        {"attn_mask": torch.randn(5, 7)},
        {"attn_mask": torch.ones(5, 7, dtype=torch.bool).triu(2)},
        {"attn_mask": torch.randn(3 * 4, 5, 7), "key_padding_mask": torch.zeros(3, 7).masked_fill(padding, -torch.inf)},
    ]
    for mask in masks:
        keys = {"need_weights": weights, "average_attn_weights": average, **mask}
        expected, found = old(*x, **keys), new(*x, **keys)
        assert torch.allclose(expected[0], found[0], atol=1e-6)
        assert (expected[1] is None) == (found[1] is None) == (not weights)
        if weights:
            assert torch.allclose(expected[1], found[1], atol=1e-6)


def test_one_example_without_a_batch():
    for kind in ("plain", "batch first"):
        old, new = pair(**KINDS[kind])
        x = torch.randn(5, 16)
        assert torch.allclose(old(x, x, x)[0], new(x, x, x)[0], atol=1e-6)


def test_gradients_are_the_same():
    old, new = pair(batch_first=True)
    x = torch.randn(2, 5, 16)
    for module in (old, new):
        module(x, x, x, need_weights=False)[0].square().sum().backward()
    parts = [new.q_proj, new.k_proj, new.v_proj]
    assert torch.allclose(old.in_proj_weight.grad, torch.cat([part.weight.grad for part in parts]), atol=1e-4)
    assert torch.allclose(old.in_proj_bias.grad, torch.cat([part.bias.grad for part in parts]), atol=1e-4)
    assert torch.allclose(old.out_proj.weight.grad, new.out_proj.weight.grad, atol=1e-4)


@pytest.mark.parametrize("weights", [True, False])
def test_dropout_acts_in_training_alone(weights):
    _, new = pair(batch_first=True, dropout=0.5)
    x = torch.randn(2, 5, 16)
    assert torch.equal(new(x, x, x, need_weights=weights)[0], new(x, x, x, need_weights=weights)[0])
    new.train()
    assert not torch.equal(new(x, x, x, need_weights=weights)[0], new(x, x, x, need_weights=weights)[0])


def test_is_causal_alone_is_refused_as_torch_refuses_it():
    old, new = pair()
    x = inputs(old)
    with pytest.raises(RuntimeError):
        old(*x, is_causal=True)
    with pytest.raises(ModelError, match="attn_mask"):
        new(*x, is_causal=True)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_an_encoder_computes_the_same_and_can_be_traced(activation, norm_first, batch_first):
    layer = nn.TransformerEncoderLayer(16, 4, 32, activation=activation, norm_first=norm_first, batch_first=batch_first)
    old = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16)).eval()
    new = unpack_attention_(copy.deepcopy(old))
    assert type(new) is Encoder
    assert {type(layer) for layer in new.layers} == {EncoderLayer}
    x = torch.randn(3, 5, 16)
    length = 5 if batch_first else 3
    causal = nn.Transformer.generate_square_subsequent_mask(length)
    assert torch.allclose(old(x), new(x), atol=1e-6)
    assert torch.allclose(old(x, mask=causal), new(x, mask=causal), atol=1e-6)
    assert torch.allclose(trace(new)(x), new(x), atol=1e-6)
    kept = {name for name in old.state_dict() if "in_proj" not in name}
    assert kept == {name for name in new.state_dict() if "_proj." not in name or "out_proj" in name}
    names = [layer.name for layer in prunable(new)]
    assert len(names) == 12
    assert "layers.1.self_attn.k_proj" in names


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 16)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 1, enable_nested_tensor=False
        )

    def forward(self, x):
        return self.encoder(self.embed(x), src_key_padding_mask=x == 0)


def test_a_padding_mask_that_follows_from_the_data_can_be_traced():
    old = Padded().eval()
    new = unpack_attention_(copy.deepcopy(old))
    x = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]])
    found = trace(new)(x)
    assert torch.allclose(old(x), found, atol=1e-6)
    assert not torch.allclose(found, trace(new)(x + (x == 0)), atol=1e-3)


def test_a_network_without_attention_is_the_same_object_with_the_same_modules():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Linear(4, 4))
    before = dict(model.named_modules())
    assert unpack_attention_(model) is model
    assert dict(model.named_modules()) == before


def test_what_is_called_twice_stays_one_module():
    shared = nn.MultiheadAttention(8, 2)
    model = nn.ModuleDict({"a": shared, "b": shared})
    unpack_attention_(model)
    assert type(model["a"]) is Attention
    assert model["a"] is model["b"]


class Own(nn.MultiheadAttention):
    pass


def hooked():
    attention = nn.MultiheadAttention(8, 2)
    attention.register_forward_hook(lambda *_: None)
    return attention


def tied():
    first, second = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)
    second.in_proj_weight = first.in_proj_weight
    return nn.ModuleList([first, second])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Own(8, 2), "Own is a class of its own"),
        (lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True), "learnt or zero key"),
        (lambda: nn.MultiheadAttention(8, 2, add_zero_attn=True), "learnt or zero key"),
        (hooked, "hooks"),
        (tied, "shared"),
        (lambda: nn.utils.parametrizations.orthogonal(nn.MultiheadAttention(8, 2), "in_proj_weight"), "computed|class"),
    ],
)
def test_what_cannot_be_taken_apart_stays_and_says_why(make, reason):
    model = make()
    names = set(model.state_dict())
    assert unpack_attention_(model) is model
    assert set(model.state_dict()) == names
    found = [m.packed_because for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    assert found
    assert all(re.search(reason, text) for text in found)


def test_a_replacement_that_computes_something_else_is_refused(monkeypatch):
    class Wrong(Attention):
        def __init__(self, packed):
            super().__init__(packed)
            self.q_proj, self.k_proj = self.k_proj, self.q_proj
            self.out_proj = self.v_proj

    monkeypatch.setattr(_attention, "Attention", Wrong)
    with pytest.raises(ModelError, match=r"attention: taken apart, MultiheadAttention differs by"):
        unpack_attention_(nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_fits_whether_packed_or_taken_apart(kind, tmp_path):
    old, new = pair(**KINDS[kind])
    x = inputs(old)
    for source in (old, new):
        path = tmp_path / "weights.pt"
        torch.save({f"a.{name}": value for name, value in source.state_dict().items()}, path)
        fresh = nn.ModuleDict({"a": nn.MultiheadAttention(16, 4, **KINDS[kind])}).eval()
        _checkpoint.load_checkpoint(fresh, path)
        assert torch.allclose(unpack_attention_(fresh)["a"](*x)[0], new(*x)[0], atol=1e-6)


class Named(nn.Module):
    """An attention of one's own."""

    batch_first, in_proj_bias, _qkv_same_embed_dim = True, None, False

    def forward(self, query, key, value, **_):
        return query + key + value, None


def test_a_layer_with_an_attention_of_its_own_stays():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    layer.self_attn = Named()
    assert unpack_attention_(layer) is layer
    assert layer.packed_because == "its self_attn is a Named"


class Hinted(nn.TransformerEncoderLayer):
    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        return 2 * src if is_causal else src


def test_an_encoder_of_layers_of_ones_own_still_tells_them_is_causal():
    old = nn.TransformerEncoder(Hinted(16, 4, 32, batch_first=True), 1).eval()
    new = unpack_attention_(copy.deepcopy(old))
    x = torch.randn(2, 5, 16)
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    assert torch.equal(old(x, mask=causal), new(x, mask=causal))
    assert new.packed_because == "one of its layers is a Hinted"
    assert type(new.layers[0].self_attn) is Attention


def test_an_encoder_told_is_causal_without_a_mask_is_refused_as_torch_refuses_it():
    old = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 1).eval()
    new = unpack_attention_(copy.deepcopy(old))
    x = torch.randn(2, 5, 16)
    with pytest.raises(RuntimeError):
        old(x, is_causal=True)
    with pytest.raises(ModelError, match="give it mask too"):
        new(x, is_causal=True)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_a_whole_transformer_with_masks_computes_the_same(batch_first):
    old = nn.Transformer(16, 4, 1, 1, 32, batch_first=batch_first).eval()
    new = unpack_attention_(copy.deepcopy(old))
    assert type(new.decoder.layers[0].multihead_attn) is Attention
    x, y = torch.randn(3, 3, 16), torch.randn(3, 3, 16)
    padding = torch.tensor([[False] * 3, [False, False, True], [False] * 3])
    masks = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(3),
        "tgt_is_causal": True,
        "tgt_key_padding_mask": padding.float().masked_fill(padding, -torch.inf),
        "memory_key_padding_mask": padding,
    }
    assert torch.allclose(old(x, y, **masks), new(x, y, **masks), atol=1e-5)
