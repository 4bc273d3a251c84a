"""Reading an ONNX file, judged before anything else looks at it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto
from onnx.external_data_helper import load_external_data_for_model, uses_external_data

from sparsify_deploy.errors import ModelError
from sparsify_deploy.types import IOTensor

_BITS = {
    number: bits
    for kind, bits in (
        *((f"{sign}INT{size}", size) for sign in ("", "U") for size in (2, 4, 8, 16, 32, 64)),
        *(("BOOL", 8), ("FLOAT16", 16), ("BFLOAT16", 16), ("FLOAT", 32), ("DOUBLE", 64)),
        *(("COMPLEX64", 64), ("COMPLEX128", 128), ("FLOAT4E2M1", 4), ("FLOAT8E8M0", 8)),
        *((f"FLOAT8{form}", 8) for form in ("E4M3FN", "E4M3FNUZ", "E5M2", "E5M2FNUZ")),
    )
    if (number := dict(TensorProto.DataType.items()).get(kind)) is not None
}
"""Element types that this onnx package knows to their bits, for a check that no data were cut off."""


_KNOWN = frozenset(TensorProto.DataType.values()) - {TensorProto.UNDEFINED}
_TIMES = 4
"""How often tensors may share the bytes of an external file: without a bound, a small file fills the memory."""

_LARGEST = 2**31 - 1
"""Bytes of one protobuf message."""


def load(path: Path, *, checked: bool = False) -> onnx.ModelProto:
    """The model in `path`, with its external data, which must lie in the file's own folder.

    `checked` says that these very bytes have passed onnx's checker before.

    Raises:
        ModelError: the file is missing, empty, cut off, no ONNX, without nodes, for an opset newer than this onnx
            package knows, points outside its folder, holds an initializer
            without the bytes its shape needs, or does not pass onnx's checker.
    """
    content = _content(path)
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
    if (
        not _load_external(model, path) and not checked
    ):  # onnx's checker looks for external data in the working directory
        _check(model, path, inference=False)
    _check_sizes(model, path)
    return model


def _content(path: Path) -> bytes:
    if not path.exists():
        raise ModelError(f"{path}: no such file")
    if not path.is_file():
        raise ModelError(f"{path}: not a file; give the .onnx file itself")
    if (size := path.stat().st_size) > _LARGEST:
        raise ModelError(f"{path}: {size:,} bytes, more than ONNX files can have; keep weights as external data")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    if not content:
        raise ModelError(f"{path}: is empty; export the model again")
    return content


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
    if min((axis for axis in shape if axis is not None), default=0) < 0:
        raise ModelError(f"{value.name!r} has an axis of {min(axis for axis in shape if axis is not None)} values")
    try:
        dtype = str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    except KeyError:
        raise ModelError(
            f"{value.name!r} holds values of type {kind.elem_type}, which this onnx package does not know"
        ) from None
    return IOTensor(value.name, shape, dtype)


def _load_external(model: onnx.ModelProto, path: Path) -> bool:
    """Whether there was any."""
    folder = path.resolve().parent
    external = False
    files: dict[Path, int] = {}
    wanted = 0
    for tensor in (*_tensors(model.graph), *(t for made in model.functions for t in _of_nodes(made.node))):
        if not uses_external_data(tensor):
            continue
        external = True
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        target = folder if "\0" in location else Path(os.path.realpath(folder / location))
        if not location or target == folder or Path(location).is_absolute() or not target.is_relative_to(folder):
            raise ModelError(f"{path}: the data of {tensor.name!r} lie outside the file's folder, at {location!r}")
        if not target.is_file():
            raise ModelError(f"{path}: its external data file {location!r} is missing; keep it beside the .onnx file")
        files[target] = target.stat().st_size
        length = next((entry.value for entry in tensor.external_data if entry.key == "length"), "")
        wanted += min(int(length), files[target]) if length.isdecimal() and len(length) < 20 else files[target]
    if wanted > _TIMES * sum(files.values()):
        raise ModelError(
            f"{path}: its tensors claim {wanted:,} bytes of {sum(files.values()):,} bytes of external data"
        )
    if external:
        try:
            load_external_data_for_model(model, str(folder))
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"{path}: its external data cannot be read: {reason}") from error
    return external


def _check_sizes(model: onnx.ModelProto, path: Path) -> None:
    for tensor in _tensors(model.graph):
        if min(tensor.dims, default=0) < 0:
            raise ModelError(f"{path}: {tensor.name!r} has an axis of {min(tensor.dims)} values")
        if tensor.data_type not in _KNOWN:
            raise ModelError(f"{path}: {tensor.name!r} is of type {tensor.data_type}, not known to this onnx package")
        if not tensor.HasField("raw_data"):
            _check_listed(tensor, path)
        elif tensor.data_type in _BITS:
            expected = math.ceil(math.prod(tensor.dims) * _BITS[tensor.data_type] / 8)
            if len(tensor.raw_data) != expected:
                raise ModelError(
                    f"{path}: {tensor.name!r} holds {len(tensor.raw_data)} bytes, its shape needs {expected}"
                )


def _check_listed(tensor: onnx.TensorProto, path: Path) -> None:
    """Values that are listed one by one, which the checker does not count."""
    try:
        onnx.numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{path}: the values of {tensor.name!r} do not fit its shape or type ({reason})") from error


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Initializers and constant attributes, subgraphs included."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _tensors(inner)
