"""The placement table: what is INT8, what is not, and the rule that decided."""

from __future__ import annotations

import fnmatch
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from sparsify_deploy import menu
from sparsify_deploy.errors import ModelError
from sparsify_deploy.quantization.attention import why_fused
from sparsify_deploy.quantization.folding import unfolded
from sparsify_deploy.quantization.placement import Row
from sparsify_deploy.quantization.tracing import label_of
from sparsify_deploy.sparsity.tracing import WEIGHTED

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FUNCTIONS: tuple[Any, ...] = (
    *(nn.functional.linear, nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d),
    *(torch.matmul, operator.matmul, torch.bmm, nn.functional.scaled_dot_product_attention),
)
_METHODS = ("matmul", "bmm")


def layer_rows(module: nn.Module, keep_float: Sequence[str], default_patterns: Sequence[str]) -> Iterator[Row]:
    """Every Conv and Linear module, with the rule that quantises it or not.

    `keep_float` are the recipe's shell patterns over module names, `default_patterns` nvidia-modelopt's own over
    quantizer names.
    """
    inside: dict[str, str] = {}
    for name, child in module.named_modules():
        if isinstance(child, nn.MultiheadAttention):
            reason = getattr(child, "packed_because", None)
            inside[name] = "float: nn.MultiheadAttention reads its weights past any quantizer"
            inside[name] += f", and stays packed: {reason}" if reason else ""
        if not isinstance(child, (*WEIGHTED, *_TRANSPOSED)):
            continue
        kind = type(child).__name__
        kept = next((pattern for pattern in keep_float if fnmatch.fnmatchcase(name, pattern)), None)
        default = next((p for p in default_patterns if fnmatch.fnmatchcase(f"{name}.weight_quantizer", p)), None)
        attention = inside.get(name.rpartition(".")[0])
        if attention is not None:
            yield Row(name, kind, False, attention)
        elif kept is not None:
            yield Row(name, kind, False, f"float: keep_float {kept!r}")
        elif isinstance(child, _TRANSPOSED):
            yield Row(name, kind, False, "float: transposed convolutions are not quantised")
        elif default is not None:
            yield Row(name, kind, False, f"float: nvidia-modelopt's default rule {default!r}")
        else:
            yield Row(name, kind, True, "weights per output channel, input per tensor")


def unquantised_rows(module: fx.GraphModule) -> Iterator[Row]:
    """What else computes in float: BatchNorms that stayed, functional products, adds no tracing sees."""
    for name, reason in unfolded(module).items():
        yield Row(name, type(module.get_submodule(name)).__name__, False, f"not folded: {reason}")
    for name, child in module.named_modules():
        if isinstance(child, (nn.RNNBase, nn.RNNCellBase)):
            yield Row(name, type(child).__name__, False, "float: recurrent layers are not quantised")
    for node in module.graph.nodes:
        called = node.op == "call_function" and node.target in _FUNCTIONS
        if called or (node.op == "call_method" and node.target in _METHODS):
            kind = node.target if isinstance(node.target, str) else node.target.__name__
            fused = why_fused(node) if node.target is nn.functional.scaled_dot_product_attention else None
            rule = "float: a function call, not a layer"
            yield Row(label_of(node), kind, False, f"float: stays fused: {fused}" if fused else rule)
        if node.op == "call_module" and isinstance(
            block := module.get_submodule(node.target), (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
        ):
            yield Row(node.target, type(block).__name__, False, "float: its residual adds are inside torch.nn")


def check_patterns(patterns: Sequence[str], names: Sequence[str]) -> None:
    """Raises ModelError for a pattern of `quantize.keep_float` that matches none of `names`."""
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            hint = menu.did_you_mean(pattern, names)
            raise ModelError(f"quantize.keep_float: {pattern!r} matches no layer{hint}")
