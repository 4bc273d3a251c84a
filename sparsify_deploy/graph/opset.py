"""Bringing a file to the opset whose quantizers take FP16 scales."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sparsify_deploy.errors import ModelError
from sparsify_deploy.graph.constants import attribute, label
from sparsify_deploy.graph.file import opset

TARGET = 19
_OLDEST = 13
_AXES_BECAME_AN_INPUT = frozenset(
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSumSquare".split()  # noqa: SIM905
)


def to_opset_19_(model: onnx.ModelProto) -> None:
    """Rewrite a file of opset 13 to 18 in place so that it says the same in opset 19; newer ones are left alone.

    Of what changed between them only the reductions' `axes` (18), Split's `num_outputs` (18) and RoiAlign's default
    (16) matter to a file that was valid before. Source: the ONNX operator changelog.

    Raises:
        ModelError: the file is older than opset 13.
    """
    old = opset(model)
    if old >= TARGET:
        return
    if old < _OLDEST:
        raise ModelError(f"opset {old} is too old for FP16 beside Q/DQ: export with opset {_OLDEST} or newer")
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type in _AXES_BECAME_AN_INPUT and old < 18:
            _axes_as_input_(model.graph, node)
        elif node.op_type == "Split" and old < 18 and len(node.input) == 1:
            node.attribute.append(helper.make_attribute("num_outputs", len(node.output)))
        elif node.op_type == "RoiAlign" and old < 16:
            node.attribute.append(helper.make_attribute("coordinate_transformation_mode", "output_half_pixel"))
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = TARGET
    model.ir_version = max(model.ir_version, 9)


def _axes_as_input_(graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
    axes = attribute(node, "axes", None)
    if axes is None:
        return
    name = f"{label(node)}/axes"
    graph.initializer.append(numpy_helper.from_array(np.array(axes, np.int64), name))
    node.input.append(name)
    node.attribute.remove(next(item for item in node.attribute if item.name == "axes"))
