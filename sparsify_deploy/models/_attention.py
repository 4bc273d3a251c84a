"""torch's packed attention as separate Linear layers that compute the same.

nn.MultiheadAttention holds the projections of query, key and value in one parameter and reads it past any hook, and
torch.fx cannot look into nn.TransformerEncoder: so those weights could be neither pruned, counted nor quantised.
`unpack_attention_` puts modules of the same submodule names in their place, with `q_proj`, `k_proj` and `v_proj` for
the packed parameter. Reference: Vaswani et al. 2017, arXiv 1706.03762; the layer's two orders, arXiv 2002.04745.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from sparsify_deploy.errors import ModelError

TOLERANCE = 1e-6
"""Largest difference in float64 between a module and what replaces it, relative to the largest output."""


class Attention(nn.Module):
    """What nn.MultiheadAttention computes, with four Linear layers; call it as that one.

    Query `(N, L, E)`, key `(N, S, kdim)` and value `(N, S, vdim)` with `batch_first`, else the first two axes
    exchanged; without the axis N for one example, except inside torch.fx, where examples come in batches. Masks are
    boolean, True where nothing may be seen, or float, added.
    """

    in_proj_weight = None  # torch's encoder layers ask for these three before they take their fused path
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = packed.embed_dim, packed.num_heads, packed.head_dim
        self.kdim, self.vdim = packed.kdim, packed.vdim
        self.dropout, self.batch_first = packed.dropout, packed.batch_first
        bias = packed.in_proj_bias
        biases = [None] * 3 if bias is None else [nn.Parameter(b.clone(), bias.requires_grad) for b in _thirds(bias)]
        if packed._qkv_same_embed_dim:
            whole = packed.in_proj_weight
            weights = [nn.Parameter(part.clone(), whole.requires_grad) for part in _thirds(whole)]
        else:
            weights = [packed.q_proj_weight, packed.k_proj_weight, packed.v_proj_weight]
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj = _linear(packed.out_proj.weight, packed.out_proj.bias)
        self.train(packed.training)

    def forward(  # noqa: PLR0917 - that of nn.MultiheadAttention
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The attended values, shaped as `query`, and the weights `(N, L, S)`, or `(N, H, L, S)` if not averaged."""
        if is_causal and attn_mask is None:
            raise ModelError("attention is told is_causal, which is a hint only: give it attn_mask too")
        batched = isinstance(query, fx.Proxy) or query.dim() == 3
        first = self.batch_first or not batched
        q, k, v = (self._heads(x, first) for x in (self.q_proj(query), self.k_proj(key), self.v_proj(value)))
        mask = None
        if attn_mask is not None or key_padding_mask is not None:
            mask = additive_mask(attn_mask, key_padding_mask, q)
        dropped = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = torch.matmul(q, k.transpose(-2, -1)) * self.head_dim**-0.5
            weights = functional.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = functional.dropout(weights, dropped) if dropped else weights
            context = torch.matmul(weights, v)
            weights = weights.mean(dim=-3) if average_attn_weights else weights
        else:
            context = functional.scaled_dot_product_attention(q, k, v, mask, dropped)
        joined = context.transpose(-3, -2) if first else context.permute(2, 0, 1, 3)
        return self.out_proj(joined.flatten(-2)), weights

    def _heads(self, x: Tensor, first: bool) -> Tensor:
        """`(N, L, E)`, or `(L, N, E)` where not `first`, as `(N, H, L, E / H)`."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))  # type: ignore[no-untyped-call]
        return x.transpose(-3, -2) if first else x.permute(1, 2, 0, 3)


class EncoderLayer(nn.Module):
    """What nn.TransformerEncoderLayer computes, written so that torch.fx sees inside."""

    def __init__(self, layer: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        self.self_attn = layer.self_attn
        self.linear1, self.dropout, self.linear2 = layer.linear1, layer.dropout, layer.linear2
        self.norm_first, self.norm1, self.norm2 = layer.norm_first, layer.norm1, layer.norm2
        self.dropout1, self.dropout2 = layer.dropout1, layer.dropout2
        self.activation: Callable[[Tensor], Tensor] = layer.activation
        self.training = layer.training

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """`src` and the result are `(N, L, E)`, or `(L, N, E)` without `batch_first`."""
        if self.norm_first:
            src = src + self._attend(self.norm1(src), src_mask, src_key_padding_mask, is_causal)
            return src + self._feed(self.norm2(src))
        src = self.norm1(src + self._attend(src, src_mask, src_key_padding_mask, is_causal))
        return self.norm2(src + self._feed(src))  # type: ignore[no-any-return]

    def _attend(self, x: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool) -> Tensor:
        attended = self.self_attn(
            x, x, x, attn_mask=mask, key_padding_mask=padding, need_weights=False, is_causal=is_causal
        )
        return self.dropout1(attended[0])  # type: ignore[no-any-return]

    def _feed(self, x: Tensor) -> Tensor:
        return self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """What nn.TransformerEncoder computes, without nested tensors: what it gives for padded positions may differ."""

    def __init__(self, encoder: nn.TransformerEncoder) -> None:
        super().__init__()
        self.layers, self.num_layers, self.norm = encoder.layers, encoder.num_layers, encoder.norm
        self.training = encoder.training

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """`src` through every layer and the norm; `is_causal` says nothing that `mask` does not."""
        if is_causal and mask is None:
            raise ModelError("the encoder is told is_causal, which is a hint only: give it mask too")
        for layer in self.layers:
            src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask)
        return src if self.norm is None else self.norm(src)


def additive_mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, heads: Tensor) -> Tensor:
    """Both masks as one in float that broadcasts over the scores of `heads` `(N, H, L, D)`; -inf hides.

    `attn_mask` is `(L, S)` or `(N * H, L, S)`, `key_padding_mask` `(N, S)`.
    """
    parts = []
    if attn_mask is not None:
        split = attn_mask.dim() == 3 and heads.dim() == 4
        parts.append(_in_float(attn_mask.unflatten(0, (-1, heads.shape[1])) if split else attn_mask, heads))  # type: ignore[no-untyped-call]
    if key_padding_mask is not None:
        parts.append(_in_float(key_padding_mask, heads).unsqueeze(-2).unsqueeze(-2))
    assert parts
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


fx.wrap("additive_mask")  # it asks for types and ranks, which torch.fx does not know


def unpack_attention_(model: nn.Module) -> nn.Module:
    """Replace the packed attention modules and torch encoders inside `model`; a network without any is not touched.

    Returns `model`, or its replacement where it is such a module itself. Each replacement is compared with the
    original in float64. A module that has to stay gets the reason as its attribute `packed_because`.

    Raises:
        ModelError: a replacement differs by more than `TOLERANCE`; names the module.
    """
    shared = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    kinds: tuple[tuple[type[nn.Module], Callable[..., nn.Module]], ...] = (
        (nn.MultiheadAttention, Attention),
        (nn.TransformerEncoderLayer, EncoderLayer),
        (nn.TransformerEncoder, Encoder),
    )
    for kind, make in kinds:
        for name, module in list(model.named_modules()):
            if not isinstance(module, kind):
                continue
            reason = _obstacle(module, kind, shared)
            if reason is not None:
                module.packed_because = reason  # type: ignore[assignment]
                continue
            made = make(module)
            if kind is not nn.TransformerEncoder:  # a loop over layers that were compared
                _check_same(name, module, made)
            model = _replaced(model, module, made)
    return model


def packed(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights `given` under the names of `own`, that of a network as it was before `unpack_attention_`."""
    found = dict(given)
    for name in own:
        prefix, _, last = name.rpartition(".")
        dot = f"{prefix}." if prefix else ""
        if name in given:
            continue
        if last in ("in_proj_weight", "in_proj_bias"):
            parts = [f"{dot}{part}_proj.{last.removeprefix('in_proj_')}" for part in "qkv"]
            if all(part in given for part in parts):
                found[name] = torch.cat([found.pop(part) for part in parts])
        elif last in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            part = f"{dot}{last.removesuffix('_weight')}.weight"
            if part in given:
                found[name] = found.pop(part)
    return found


def _obstacle(module: nn.Module, kind: type[nn.Module], shared: Counter[int]) -> str | None:  # noqa: PLR0911
    """Why `module` cannot be replaced, or None."""
    if type(module) is not kind:
        return f"{type(module).__name__} is a class of its own"
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(hooks):
        return "it has hooks"
    if isinstance(module, nn.TransformerEncoderLayer):
        attends = type(module.self_attn)
        return None if attends in (Attention, nn.MultiheadAttention) else f"its self_attn is a {attends.__name__}"
    if isinstance(module, nn.TransformerEncoder):
        others = [type(layer).__name__ for layer in module.layers if not isinstance(layer, EncoderLayer)]
        return f"one of its layers is a {others[0]}" if others else None
    assert isinstance(module, nn.MultiheadAttention)
    if module.bias_k is not None or module.add_zero_attn:
        return "it attends to a learnt or zero key (add_bias_kv, add_zero_attn)"
    names = ("in_proj_weight",) if module._qkv_same_embed_dim else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    if any(name not in module._parameters for name in names) or "weight" not in module.out_proj._parameters:
        return "its weight is computed, not stored"
    if type(module.out_proj).__module__.partition(".")[0] != "torch":
        return f"its out_proj is a {type(module.out_proj).__name__}"
    if any(shared[id(parameter)] > 1 for parameter in module.parameters()):
        return "its weight is shared with another layer"
    return None


def _replaced(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """`model` with `new` everywhere `old` stood."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
    return new if model is old else model


@torch.no_grad()
def _check_same(name: str, old: nn.Module, new: nn.Module) -> None:
    """Raises ModelError where the two differ on random inputs in float64."""
    generator = torch.Generator().manual_seed(0)
    pair = [copy.deepcopy(module).to("cpu", torch.float64).eval() for module in (old, new)]
    attention: Any = old if isinstance(old, nn.MultiheadAttention) else old.self_attn
    width = attention.embed_dim
    sizes = [(3, width), (5, attention.kdim), (5, attention.vdim)] if old is attention else [(3, width)]
    inputs = [torch.randn(2, *size, generator=generator, dtype=torch.float64) for size in sizes]
    inputs = inputs if attention.batch_first else [x.transpose(0, 1) for x in inputs]
    mask = torch.zeros(3, sizes[-1][0], dtype=torch.bool)
    mask[0, -1] = mask[2, 1] = True
    key = "attn_mask" if old is attention else "src_mask"
    expected, found = (list(_tensors(module(*inputs, **{key: mask}))) for module in pair)
    for a, b in zip(expected, found, strict=True):
        difference, largest = float((a - b).abs().max()), float(a.abs().max())
        if not difference <= TOLERANCE * largest:
            raise ModelError(
                f"{name or 'the model'}: taken apart, {type(old).__name__} differs by {difference:.2g} of "
                f"{largest:.2g}: are all its weights finite?"
            )


def _tensors(outputs: Tensor | tuple[Tensor, ...]) -> Iterator[Tensor]:
    return iter((outputs,) if isinstance(outputs, Tensor) else outputs)


def _thirds(packed: Tensor) -> tuple[Tensor, ...]:
    return packed.detach().chunk(3)


def _linear(weight: Any, bias: nn.Parameter | None) -> nn.Linear:
    """A Linear layer that holds these very parameters; nothing is drawn at random."""
    layer = nn.Linear(1, 1, bias=False, device="meta")
    layer.out_features, layer.in_features = weight.shape
    layer.weight = weight
    layer.bias = bias  # type: ignore[assignment]
    return layer


def _in_float(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)
