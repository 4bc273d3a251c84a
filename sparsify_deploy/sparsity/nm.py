"""N:M patterns: at most N of every M consecutive input channels are kept.

The groups of a conv weight `(K, C, R, S)` run along C for every output channel and every kernel position, those of
a linear weight `(out, in)` along `in`; never along the flattened kernel, which no sparse kernel reads.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from sparsify_deploy.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor


def nm_mask(weight: Tensor, n: int, m: int, mask: Tensor | None = None) -> Tensor:
    """The N:M pattern that keeps most magnitude: bool of `weight`'s shape, exactly n True in every group.

    Ties go to the lower channel. With `mask`, a bool tensor of the same shape, only weights it keeps can be
    chosen, so a group has n True or all that it had. ModelError on NaN, or where m does not divide the channels.
    """
    magnitude = _grouped(weight.detach(), n, m).abs_()
    if mask is None:
        return _ungrouped(_first(magnitude, n), weight)
    allowed = _grouped(mask, n, m)
    return _ungrouped(_first(magnitude.masked_fill_(~allowed, -1), n) & allowed, weight)


def refill(mask: Tensor, gradient: Tensor, n: int, m: int) -> Tensor:
    """`mask` with every group of fewer than n True grown to n, where |gradient| is largest; ties: lower channel.

    `gradient` is the dense gradient, of the mask's shape. Groups of n or more True stay as they are.
    """
    kept = _grouped(mask, n, m)
    rank = _rank(_grouped(gradient.detach(), n, m).abs_().masked_fill_(kept, -1))
    return _ungrouped(kept | (rank < n - kept.sum(1, keepdim=True)), mask)


def violations(tensor: Tensor, n: int, m: int) -> int:
    """How many groups of `tensor` (weights, or a bool mask) have more than n entries that are not zero."""
    return int((_grouped(tensor.detach(), n, m).ne(0).sum(1) > n).sum())


def is_nm(tensor: Tensor, n: int, m: int) -> bool:
    """Whether every group of `tensor` (weights, or a bool mask) has at most n entries that are not zero."""
    return violations(tensor, n, m) == 0


def _grouped(tensor: Tensor, n: int, m: int) -> Tensor:
    """A copy of `(K, C, *kernel)` as `(K, m, kernel, C / m)`: the members of a group lie along axis 1.

    Channels last, so that each member is long runs of memory and a kernel of nine does not break them up.
    """
    if not 0 < n <= m <= 16:
        raise ValueError(f"{n}:{m} is no N:M pattern: 0 < N <= M <= 16")
    if tensor.ndim < 2 or tensor.shape[1] % m:
        raise ModelError(
            f"a weight of shape {tuple(tensor.shape)} has no {n}:{m} pattern: its input channels (axis 1) are "
            f"not a multiple of {m}; keep the layer dense"
        )
    outputs, channels, *kernel = tensor.shape
    members = tensor.reshape(outputs, channels // m, m, math.prod(kernel)).permute(0, 2, 3, 1)
    return members.clone(memory_format=torch.contiguous_format)


def _ungrouped(groups: Tensor, like: Tensor) -> Tensor:
    return groups.flatten(1, 2).transpose(1, 2).reshape(like.shape)


def _first(score: Tensor, n: int) -> Tensor:
    """Which entries of `(K, m, ...)` are among the first n of their group."""
    # In int8 throughout, and 0 or 1 read as bool: a comparison that writes bool costs as much as six of these
    return _rank(score).neg_().add_(n).clamp_(0, 1).view(torch.bool)


def _rank(score: Tensor) -> Tensor:
    """For each entry of `(K, m, ...)` the number of entries of its group that go before it, int8; 0 is the best.

    Counting pairs is exact about ties and, for m = 4, six passes over memory instead of a sort.
    """
    if score.sum().isnan():  # no entry is -inf, so only a NaN makes one
        raise ModelError("weights or gradients of a layer are NaN: no N:M pattern can be chosen")
    members = score.unbind(1)
    rank = torch.empty_like(score, dtype=torch.int8)
    ranks = rank.unbind(1)
    first = torch.empty(members[0].shape, dtype=torch.bool, device=score.device)  # one for all: fresh memory is slow
    won = first.view(torch.int8)
    for i, (member, own) in enumerate(zip(members, ranks, strict=True)):
        own.fill_(len(members) - 1 - i)  # all that come later go before it, until it beats them
        for j in range(i):
            torch.ge(members[j], member, out=first)
            ranks[j].sub_(won)
            own.add_(won)
    return rank
