"""The same graph with dense weights: a twin for latency where nobody trained one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import numpy_helper

from sparsify_deploy.graph.constants import Graph
from sparsify_deploy.graph.layers import weight_layers

if TYPE_CHECKING:
    from numpy.typing import NDArray


def fill_zeros_(model: onnx.ModelProto, seed: int) -> int:
    """Replace the zeros of every layer's weight by random values of that layer's range; returns how many.

    Names, shapes and types stay, and every other weight. A random magnitude lies between a quarter of the layer's
    largest and that itself, so that rounding to INT8 leaves it different from zero. What the network computes is
    nonsense: the copy is good for latency alone.
    """
    random = np.random.default_rng(seed)
    stored = Graph(model).initializers
    filled = 0
    for name in dict.fromkeys(layer.weight for layer in weight_layers(model)):
        values = numpy_helper.to_array(stored[name]) if name in stored else None
        if values is None or values.dtype.kind not in "if":
            continue
        holes = values == 0
        if holes.any():
            stored[name].CopyFrom(numpy_helper.from_array(_filled(values, holes, random), name))
            filled += int(holes.sum())
    return filled


def _filled(values: NDArray[Any], holes: NDArray[Any], random: np.random.Generator) -> NDArray[Any]:
    largest = float(np.abs(values.astype(np.float64)).max()) or 1.0
    drawn = random.uniform(0.25, 1.0, int(holes.sum())) * largest * random.choice((-1.0, 1.0), int(holes.sum()))
    if values.dtype.kind == "i":
        drawn = np.clip(np.rint(drawn), -127, 127)
        drawn[drawn == 0] = 1
    dense = values.copy()
    dense[holes] = drawn.astype(values.dtype)
    return dense
