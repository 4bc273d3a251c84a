"""Reading an ONNX file, judged before anything else looks at it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto
from onnx.external_data_helper import load_external_data_for_model, uses_external_data

from sparsify_deploy.errors import ModelError
from sparsify_deploy.types import IOTensor

_WHOLE_BYTES = {
    **dict.fromkeys((TensorProto.INT8, TensorProto.UINT8, TensorProto.BOOL), 1),
    **dict.fromkeys((TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT16, TensorProto.UINT16), 2),
    **dict.fromkeys((TensorProto.FLOAT, TensorProto.INT32, TensorProto.UINT32), 4),
    **dict.fromkeys((TensorProto.DOUBLE, TensorProto.INT64, TensorProto.UINT64), 8),
}
"""Element types to their bytes, for a check that no data were cut off."""


def load(path: Path) -> onnx.ModelProto:
    """The model in `path`, with its external data, which must lie in the file's own folder.

    Raises:
        ModelError: the file is missing, empty, cut off, no ONNX, without nodes, for an opset newer than this onnx
            package knows, points outside its folder, holds an initializer
            without the bytes its shape needs, or does not pass onnx's checker.
    """
    if not path.exists():
        raise ModelError(f"{path}: no such file")
    if not path.is_file():
        raise ModelError(f"{path}: not a file; give the .onnx file itself")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    if not content:
        raise ModelError(f"{path}: is empty; export the model again")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError as error:
        raise ModelError(f"{path}: is no ONNX file, or was cut off; export or copy it again") from error
    if not model.ir_version or not model.HasField("graph"):
        raise ModelError(f"{path}: is no ONNX file: it holds no graph")
    if not all(isinstance(node.op_type, str) and isinstance(node.domain, str) for node in model.graph.node):
        raise ModelError(f"{path}: is damaged: an operator's name is not UTF-8; export or copy it again")
    if not model.graph.node:
        raise ModelError(f"{path}: its graph has no nodes; export the model again")
    known = onnx.defs.onnx_opset_version()
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset > known:
        raise ModelError(f"{path}: opset {opset} is newer than {known}, the newest this onnx package knows: upgrade it")
    if opset < 1:
        raise ModelError(f"{path}: names no ONNX opset; export the model again")
    if not model.graph.output:
        raise ModelError(f"{path}: its graph has no outputs; export the model again")
    if not _load_external(model, path):  # onnx's checker looks for external data in the working directory
        _check(model, path, inference=False)
    _check_sizes(model, path)
    return model


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write `model` to `path` as one file; equal models give equal bytes."""
    path.write_bytes(model.SerializeToString(deterministic=True))


def check(model: onnx.ModelProto, path: Path) -> None:
    """Run onnx's checker and strict shape inference.

    Raises:
        ModelError: the first thing they object to.
    """
    _check(model, path, inference=True)


def _check(model: onnx.ModelProto, path: Path, *, inference: bool) -> None:
    try:
        onnx.checker.check_model(model)
        if inference:
            onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except UnicodeDecodeError as error:  # the checker's own message quotes a damaged name
        raise ModelError(f"{path}: is damaged: a name in it is not UTF-8; export or copy it again") from error
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{path}: is not valid ONNX: {reason}") from error


def opset(model: onnx.ModelProto) -> int:
    """The version of the standard operator set the model is written for."""
    return next(int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def inputs(model: onnx.ModelProto) -> tuple[IOTensor, ...]:
    """What the graph is fed: inputs that no initializer stands in for."""
    constant = {tensor.name for tensor in model.graph.initializer}
    return tuple(_tensor(value) for value in model.graph.input if value.name not in constant)


def outputs(model: onnx.ModelProto) -> tuple[IOTensor, ...]:
    """What the graph returns."""
    return tuple(_tensor(value) for value in model.graph.output)


def operators(model: onnx.ModelProto) -> dict[str, int]:
    """Operator type to how often the top graph holds it, sorted by name; other domains as `domain::type`."""
    counts: dict[str, int] = {}
    for node in model.graph.node:
        name = f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))


def _tensor(value: onnx.ValueInfoProto) -> IOTensor:
    kind = value.type.tensor_type
    if not kind.elem_type:
        raise ModelError(f"{value.name!r} is no tensor: only tensor inputs and outputs are supported")
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim)
    return IOTensor(value.name, shape, str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)))


def _load_external(model: onnx.ModelProto, path: Path) -> bool:
    """Whether there was any."""
    folder = path.resolve().parent
    external = False
    for tensor in _tensors(model.graph):
        if not uses_external_data(tensor):
            continue
        external = True
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        target = Path(os.path.realpath(folder / location))
        if not location or Path(location).is_absolute() or not target.is_relative_to(folder):
            raise ModelError(f"{path}: the data of {tensor.name!r} lie outside the file's folder, at {location!r}")
        if not target.is_file():
            raise ModelError(f"{path}: its external data file {location!r} is missing; keep it beside the .onnx file")
    if external:
        try:
            load_external_data_for_model(model, str(folder))
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"{path}: its external data cannot be read: {reason}") from error
    return external


def _check_sizes(model: onnx.ModelProto, path: Path) -> None:
    for tensor in model.graph.initializer:
        if not tensor.HasField("raw_data") or tensor.data_type not in _WHOLE_BYTES:
            continue
        expected = math.prod(tensor.dims) * _WHOLE_BYTES[tensor.data_type]
        if len(tensor.raw_data) != expected:
            raise ModelError(f"{path}: {tensor.name!r} holds {len(tensor.raw_data)} bytes, its shape needs {expected}")


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Initializers and constant attributes, subgraphs included."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _tensors(inner)
