"""Which weights of a layer are dropped and which are grown: exact counts, ties by index, no sort of a whole layer.

All functions work on the CPU, where masks live, and take tensors of any device; numpy finds the k-th value and the
positions in a mask several times faster than torch does.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsify_deploy.sparsity.nm import refill

_SAMPLE = 8192
"""Layers of several times as many weights are first thinned out by a threshold guessed from so many of them."""


def drop(weight: Tensor, mask: Tensor, count: int) -> Tensor:
    """`mask` without the `count` weights it keeps of smallest |weight|; of equal ones the lower index stays.

    `mask` is a bool tensor on the CPU, as is the result; `weight` has its shape and holds no NaN.
    """
    left = mask.clone(memory_format=torch.contiguous_format)
    flat = left.view(-1).numpy()
    active = np.flatnonzero(flat)
    magnitude = np.abs(_flat(weight).take(active))
    flat[active] = _largest(magnitude, len(active) - count)
    return left


def grow_(mask: Tensor, score: Tensor, count: int) -> Tensor:
    """`mask` with the `count` positions of largest |score| among those it prunes; of equal ones the lower index.

    `mask` is a bool tensor on the CPU with at least `count` False, changed in place and returned; `score` has its
    shape and holds no NaN.
    """
    flat = mask.view(-1).numpy()
    values = _flat(score)
    guess = _guess(values, flat, count)
    reach = values >= guess
    np.logical_or(reach, values <= -guess, out=reach)  # np.abs of a whole layer would cost more than both
    where = np.flatnonzero(np.greater(reach, flat, out=reach))
    if len(where) < count:  # the sample misled
        where = np.flatnonzero(~flat)
    flat[where] = _largest(np.abs(values.take(where)), count)
    return mask


def grow_in_groups(mask: Tensor, score: Tensor, n: int, m: int) -> Tensor:
    """`mask`, of groups with at most n True, with every group grown to n where |score| is largest in that group."""
    return refill(mask, score.to("cpu"), n, m)


def kept(mask: Tensor) -> int:
    """How many weights a mask on the CPU keeps."""
    return int(np.count_nonzero(mask.numpy()))


def finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite: such an entry shows in the sum, which is far cheaper to look at."""
    tensor = tensor.detach()
    return math.isfinite(float(tensor.sum())) or bool(tensor.isfinite().all())


def _flat(tensor: Tensor) -> NDArray[np.floating]:
    tensor = tensor.detach().to("cpu")
    if tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.float()
    array: NDArray[np.floating] = tensor.reshape(-1).numpy()
    return array


def _largest(values: NDArray[np.floating], count: int) -> NDArray[np.bool_]:
    """Which of `values` are the `count` largest; of equal ones the first."""
    if count == 0:
        return np.zeros(len(values), dtype=np.bool_)
    threshold = np.partition(values, len(values) - count)[len(values) - count]
    chosen: NDArray[np.bool_] = values > threshold
    ties = np.flatnonzero(values == threshold)
    chosen[ties[: count - np.count_nonzero(chosen)]] = True
    return chosen


def _guess(values: NDArray[np.floating], taken: NDArray[np.bool_], count: int) -> float:
    """What about `count` of the free |values| reach: a quantile of a sample, five standard deviations to the safe side.

    0 for a small layer; every value reaches that.
    """
    stride = len(values) // _SAMPLE | 1
    if stride < 4:
        return 0.0
    sample = np.abs(values[::stride][~taken[::stride]])
    expected = count / stride
    rank = math.ceil(expected + 5 * math.sqrt(expected) + 5)
    return float(np.partition(sample, len(sample) - rank)[len(sample) - rank]) if rank < len(sample) else 0.0
