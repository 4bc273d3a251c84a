"""timm's convolutions that pad as TensorFlow does, as a padding and a convolution.

nvidia-modelopt quantises torch's own classes only, and what such a layer pads depends on the size of its input. With
the padding in front, Q/DQ stands straight before a plain convolution.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional


def same_padded(x: Tensor, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
    """`(B, C, H, W)` with zeros around it, so that a convolution gives `(H / stride, W / stride)`, rounded up.

    An odd number of zeros puts the extra one last. In an exported file the padding is that of the example's size.
    """
    pads: list[int] = []
    for axis in (1, 0):
        size = int(x.shape[-2 + axis])
        whole = max((-(-size // stride[axis]) - 1) * stride[axis] + (kernel[axis] - 1) * dilation[axis] + 1 - size, 0)
        pads += [whole // 2, whole - whole // 2]
    return _ZeroPad.apply(x, pads) if any(pads) else x  # type: ignore[no-untyped-call]


class _ZeroPad(torch.autograd.Function):
    """Zeros on the last two axes, in ONNX one Pad with a constant: torch's exporter writes a dozen operators."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pads: list[int]) -> Tensor:
        """`pads`: left, right, top, bottom."""
        ctx.pads = pads
        return functional.pad(x, pads)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The gradient without its margins."""
        return functional.pad(gradient, [-size for size in ctx.pads]), None

    @staticmethod
    def symbolic(g: Any, x: Any, pads: list[int]) -> Any:
        """What the exporter writes."""
        left, right, top, bottom = pads
        return g.op("Pad", x, g.op("Constant", value_t=torch.tensor([0, 0, top, left, 0, 0, bottom, right])))


def split_padding_(module: fx.GraphModule) -> None:
    """Put `same_padded` and an nn.Conv2d of the same parameters in place of every Conv2dSame of timm."""
    for node in list(module.graph.nodes):
        layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, nn.Conv2d) or not _pads_itself(type(layer)):
            continue
        sizes = (tuple(layer.kernel_size), tuple(layer.stride), tuple(layer.dilation))
        with module.graph.inserting_before(node):
            padded = module.graph.call_function(same_padded, (node.args[0], *sizes))
        padded.meta = dict(node.meta)
        node.args = (padded, *node.args[1:])
        module.set_submodule(str(node.target), _plain(layer))


def _pads_itself(kind: type[nn.Module]) -> bool:
    return kind.__name__ == "Conv2dSame" and kind.__module__.partition(".")[0] == "timm"


def _plain(layer: nn.Conv2d) -> nn.Conv2d:
    """An nn.Conv2d without padding that holds the parameters of `layer`."""
    plain = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        (layer.kernel_size[0], layer.kernel_size[1]),
        (layer.stride[0], layer.stride[1]),
        0,
        (layer.dilation[0], layer.dilation[1]),
        layer.groups,
        bias=False,
        device=torch.device("meta"),
    )
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain.train(layer.training)
