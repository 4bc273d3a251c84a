"""Bytes of a layer's weights, computed from its shape."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sparsify_deploy.errors import ModelError

_BITS = {"FP64": 64, "FP32": 32, "FP16": 16, "BF16": 16, "INT8": 8, "UINT8": 8, "FP8": 8, "INT4": 4, "UINT4": 4}


def bytes_as_stored(shape: Sequence[int], precision: str) -> int:
    """Bytes of the weights stored densely in `precision`, such as "FP32" or "INT8"; scales not counted."""
    return math.ceil(math.prod(shape) * _bits(precision) / 8)


def bytes_compressed(shape: Sequence[int], precision: str, usable: bool) -> int:
    """Bytes in an engine: 2:4 compressed where `usable`, else stored densely.

    2:4 keeps half of the values and two bits of position for each: for INT8 0.625 bytes a weight, 6.4 times less
    than FP32.
    """
    if not usable:
        return bytes_as_stored(shape, precision)
    return math.ceil(math.prod(shape) / 2 * (_bits(precision) + 2) / 8)


def _bits(precision: str) -> int:
    if precision not in _BITS:
        raise ModelError(f"weights of {precision[:40]} are not known here: known are {', '.join(_BITS)}")
    return _BITS[precision]
