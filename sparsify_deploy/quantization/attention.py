"""Where the two products of attention get their quantizers.

TensorRT runs the products of query with key and of the softmax with value in INT8 if both inputs of each come out of
Q/DQ; scale, mask and softmax between them stay float. torch's fused function hides both products, so it is written
out first. A product that is neither of the two (no softmax behind or before it) is not quantised.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from sparsify_deploy.quantization.placement import Place, activations
from sparsify_deploy.quantization.tracing import MOVES, NO_OPS, label_of, reaches, runs

_FUSED = functional.scaled_dot_product_attention
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_PRODUCTS: tuple[Any, ...] = (torch.matmul, operator.matmul, torch.bmm)
_METHODS = ("matmul", "bmm")
_BETWEEN: frozenset[object] = MOVES | {
    *(operator.add, operator.iadd, operator.sub, operator.mul, operator.imul, operator.truediv, torch.add, torch.mul),
    *(torch.div, torch.where, torch.clamp),
    *("add", "add_", "mul", "mul_", "div", "div_", "masked_fill", "masked_fill_", "float", "to", "type_as", "half"),
}


def attention_weights(
    scores: Tensor, query: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    """What torch's fused attention computes between its products: `(..., L, S)` to the same, rows adding up to 1."""
    scores = scores * (1 / math.sqrt(int(query.shape[-1])) if scale is None else scale)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(mask.logical_not(), -torch.inf)
    elif mask is not None:
        scores = scores + mask
    return torch.softmax(scores, dim=-1)


_SOFTMAX: set[object] = {attention_weights, torch.softmax, functional.softmax, "softmax"}


def write_out_(module: fx.GraphModule) -> None:
    """Put two products and `attention_weights` in place of every fused attention that computes just that."""
    for node in list(module.graph.nodes):
        if node.target is not _FUSED or why_fused(node) is not None:
            continue
        given = {**dict(zip(_ARGUMENTS, node.args, strict=False)), **node.kwargs}
        query, key, value = (given[name] for name in _ARGUMENTS[:3])
        graph = module.graph
        with graph.inserting_before(node):
            turned = graph.call_method("transpose", (key, -2, -1))
            scores = graph.call_function(torch.matmul, (query, turned))
            rest = (given.get("attn_mask"), given.get("is_causal", False), given.get("scale"))
            weights = graph.call_function(attention_weights, (scores, query, *rest))
            context = graph.call_function(torch.matmul, (weights, value))
        for made in (turned, scores, weights, context):
            made.meta = dict(node.meta)
        node.replace_all_uses_with(context)
        graph.erase_node(node)


def why_fused(node: fx.Node) -> str | None:
    """Why a call of torch's fused attention is not written out, or None."""
    given = {**dict(zip(_ARGUMENTS, node.args, strict=False)), **node.kwargs}
    if given.get("enable_gqa", False) is not False:
        return "its heads share keys (enable_gqa)"
    if given.get("dropout_p", 0.0) != 0.0:
        return "it drops weights in eval mode too"
    if isinstance(given.get("is_causal", False), fx.Node):
        return "its is_causal is computed"
    return None


def products(module: fx.GraphModule) -> list[Place]:
    """Every product of two activations, in graph order."""
    known = activations(module.graph.nodes)
    found = []
    for node in module.graph.nodes:
        if not runs(module, node, (), (*_PRODUCTS, *_METHODS)):
            continue
        if len(node.all_input_nodes) != 2 or not all(source in known for source in node.all_input_nodes):
            continue
        sides: tuple[int, ...] = (0, 1)
        if reaches(node, lambda user: _softmax(module, user), lambda user: _between(module, user)):
            rule = "both inputs: query and key; the softmax stays float"
        elif any(_from_softmax(module, source) for source in node.all_input_nodes):
            rule = "both inputs: what the softmax gives, and value"
        else:
            sides, rule = (), "float: a product of two activations without a softmax"
        found.append(Place(label_of(node), "attention product", node, sides, rule))
    return found


def _softmax(module: fx.GraphModule, node: fx.Node) -> bool:
    return runs(module, node, (nn.Softmax,), _SOFTMAX)


def _between(module: fx.GraphModule, node: fx.Node) -> bool:
    return runs(module, node, NO_OPS, _BETWEEN)


def _from_softmax(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` is a softmax's output, looking through what keeps its values."""
    while not _softmax(module, node):
        if not runs(module, node, NO_OPS, MOVES | {"to", "type_as", "float", "half"}) or not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
    return True
