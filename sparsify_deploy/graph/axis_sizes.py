"""The sizes which the free axes of an ONNX file take, kept in the file: builders, timing and predictions go by them."""

from __future__ import annotations

import re
from collections.abc import Mapping

import onnx

from sparsify_deploy.types import AxisSizes

_KEY = "sparsify_deploy.axis."
_SIZES = re.compile(r"([1-9][0-9]{0,9}) ([1-9][0-9]{0,9}) ([1-9][0-9]{0,9})")


def set_axis_sizes_(model: onnx.ModelProto, sizes: Mapping[str, AxisSizes]) -> None:
    """Write the sizes of the axes with these names into the file's metadata, in place of what was there."""
    kept = [entry for entry in model.metadata_props if not entry.key.startswith(_KEY)]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    for name, size in sorted(sizes.items()):
        model.metadata_props.add(key=_KEY + name, value=f"{size.least} {size.typical} {size.largest}")


def axis_sizes(model: onnx.ModelProto) -> dict[str, AxisSizes]:
    """Axis name to its sizes; what is not three growing numbers is as if it were not there."""
    found = {}
    for entry in model.metadata_props:
        match = _SIZES.fullmatch(entry.value) if entry.key.startswith(_KEY) else None
        if match is not None:
            least, typical, largest = map(int, match.groups())
            if least <= typical <= largest:
                found[entry.key.removeprefix(_KEY)] = AxisSizes(least, typical, largest)
    return found


def input_axes(model: onnx.ModelProto) -> dict[str, dict[int, AxisSizes]]:
    """Input to axis to sizes, of the axes besides the first that are free and have sizes in the file."""
    known = axis_sizes(model)
    found: dict[str, dict[int, AxisSizes]] = {}
    for value in model.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if axis and dim.dim_param in known:
                found.setdefault(value.name, {})[axis] = known[dim.dim_param]
    return found


def plain(model: onnx.ModelProto) -> dict[str, dict[str, list[int]]]:
    """`input_axes` as JSON: input to axis to least, typical and largest size."""
    return {
        name: {str(axis): [size.least, size.typical, size.largest] for axis, size in axes.items()}
        for name, axes in input_axes(model).items()
    }
