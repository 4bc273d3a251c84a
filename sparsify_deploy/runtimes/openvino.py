"""OpenVINO on the CPU: the fastest way to run a Q/DQ file without a GPU.

The engine is an OpenVINO IR (`.xml` with its `.bin` beside it), saved without compressing floats to FP16. Zeros make
nothing faster here, 2:4 ones included. Activations that cannot be negative are quantised in UINT8 before it reads the
file, at the same scale. Reference: https://docs.openvino.ai
"""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from sparsify_deploy.artifacts import durable
from sparsify_deploy.artifacts.fingerprint import file_digest
from sparsify_deploy.errors import DataError, ModelError, RuntimeUnavailable
from sparsify_deploy.params import Params as Base
from sparsify_deploy.process import native
from sparsify_deploy.runtimes import _metadata, _packages, _profiles, _tensors
from sparsify_deploy.types import BuildNotes, EngineProfile, IOTensor, LayerTime, Progress

if TYPE_CHECKING:
    from types import ModuleType

    from numpy.typing import NDArray

    from sparsify_deploy.types import Arrays

VERSION = 3
SUFFIX = ".xml"
FLAVOUR = "tensorrt"
_PARTS = ("/DequantizationMultiply", "/DequantizationSubtract", "/WithoutBiases")
"""What OpenVINO appends to the name of an ONNX node where it splits that."""


class Params(Base):
    """`precision` is that of the layers without Q/DQ; bf16 needs a CPU that computes in it."""

    precision: Literal["f32", "bf16"] = Field("f32", description="of what is not INT8")


def lower_precision(params: Params, /) -> tuple[str, Params] | None:
    """The float precision below the one of `params`, and the parameters for it; None: there is none.

    Whether this CPU computes in it is `build`'s to say.
    """
    return ("BF16", Params(precision="bf16")) if params.precision == "f32" else None


def version() -> str | None:
    """OpenVINO's version, None where it is not installed."""
    return _packages.version_of("openvino")


def unavailable_reason() -> str | None:
    """None where it can build here, else what to install."""
    return _packages.missing("OpenVINO", "openvino", "cpu")


def cannot_run_reason() -> str | None:
    """The same as `unavailable_reason`: where OpenVINO is installed, so is its CPU plugin."""
    return unavailable_reason()


def build(onnx: Path, engine: Path, params: Params, /, *, progress: Progress | None = None) -> BuildNotes:
    """Convert an ONNX file to an IR. Raises ModelError naming what OpenVINO cannot convert."""
    from sparsify_deploy.graph import axis_sizes
    from sparsify_deploy.graph.file import load
    from sparsify_deploy.graph.flavour import unsigned_

    loaded = load(onnx)
    source = loaded.SerializeToString() if unsigned_(loaded) else onnx
    openvino = _package()
    started = time.perf_counter()
    weights = engine.with_suffix(".bin")
    with tempfile.TemporaryDirectory(dir=engine.parent, prefix=".openvino-") as folder:
        partial = Path(folder, engine.name)
        try:
            with native.call(f"OpenVINO converting {onnx.name}"):
                model = _core().read_model(source)
                openvino.save_model(model, partial, compress_to_fp16=False)
        except RuntimeError as error:
            with durable.explained(engine.parent):
                durable.check_room(Path(folder, "room"), onnx.stat().st_size)  # it says the same of a full disk
            raise ModelError(f"{onnx}: OpenVINO cannot convert it: {_one_line(error)}") from None
        durable.move(partial.with_suffix(".bin"), weights)
        durable.move(partial, engine)
    lacking = _precision_reason(openvino, params)
    notes = BuildNotes(
        runtime="openvino",
        version=version() or "unknown",
        files=(engine.name, weights.name),
        seconds=time.perf_counter() - started,
        options={"compress_to_fp16": False, "precision": params.precision},
        runs_here=lacking is None,
        label="" if lacking is None else "built, not run here",
        warnings=() if lacking is None else (lacking,),
        facts={"axis_sizes": sizes} if (sizes := axis_sizes.plain(loaded)) else {},
    )
    _metadata.write_metadata(engine, notes, file_digest(onnx), params)
    return notes


@contextmanager
def open(
    engine: Path, params: Params, /, *, threads: int = 1, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> Iterator[OpenVinoSession]:
    """Compile an IR for the CPU with one stream of `threads` threads.

    `shapes` fixes dynamic axes, which makes it faster; None keeps them. Raises DataError where it cannot be read or
    a shape does not fit, RuntimeUnavailable where this CPU lacks the precision.
    """
    yield OpenVinoSession(*_compiled(engine, params, threads, shapes, profiled=False))


def profile(engine: Path, params: Params, inputs: Arrays, /, *, threads: int = 1) -> EngineProfile:
    """Wall time of every primitive that ran, ms, of 60 runs; nodes by their ONNX names, fused ones included."""
    shapes = {name: tuple(array.shape) for name, array in inputs.items()}
    compiled, given, outputs = _compiled(engine, params, threads, shapes, profiled=True)
    session = OpenVinoSession(compiled, given, outputs)
    session.bind(inputs)
    taken: dict[str, list[float]] = {}
    with native.call(f"OpenVINO profiling {engine.name}") as renew:
        for run in range(_profiles.WARM_UP + _profiles.RUNS):
            renew()
            session.execute()
            if run >= _profiles.WARM_UP:
                for name, ms in session.times_ms().items():
                    taken.setdefault(name, []).append(ms)
    layers = []
    for op in compiled.get_runtime_model().get_ordered_ops():
        name, said = op.get_friendly_name(), op.get_rt_info()
        if name in taken:
            nodes = (node for node in str(_said(said, "originalLayersNames")).split(",") if node)
            layers.append(
                LayerTime(
                    name=name,
                    nodes=tuple(dict.fromkeys(_onnx_name(node) for node in nodes)),
                    kernel=str(_said(said, "primitiveType")),
                    ms=_profiles.middle_half(taken[name]),
                    precision=str(_said(said, "runtimePrecision")),
                )
            )
    return EngineProfile(tuple(layers), _profiles.RUNS, _profiles.NOTE)


def _said(info: Any, key: str) -> Any:
    """An entry of a node's rt_info, whose values are wrapped in some versions; "" where it has none."""
    if key not in info:
        return ""
    value = info[key]
    return getattr(value, "value", value)


def _onnx_name(node: str) -> str:
    for part in _PARTS:
        node = node.removesuffix(part)
    return node


def _compiled(
    engine: Path, params: Params, threads: int, shapes: Mapping[str, tuple[int, ...]] | None, *, profiled: bool
) -> tuple[Any, tuple[IOTensor, ...], tuple[IOTensor, ...]]:
    """The IR compiled for the CPU, its inputs with `shapes` put in, and its outputs."""
    _metadata.judge(engine)
    openvino = _package()
    if reason := _precision_reason(openvino, params):
        raise RuntimeUnavailable(reason)
    try:
        core = _core()
        with native.call(f"OpenVINO reading {engine.name}"):
            model = core.read_model(engine)
    except RuntimeError as error:
        raise DataError(f"{engine}: OpenVINO cannot read it: {_one_line(error)}") from None
    inputs, changed = _tensors.fixed(_describe(model.inputs), shapes)
    try:
        if changed:
            model.reshape({tensor.name: tensor.shape for tensor in inputs if tensor.name in changed})
        with native.call(f"OpenVINO compiling {engine.name}"):
            compiled = core.compile_model(model, "CPU", {**_settings(params, threads), "PERF_COUNT": profiled})
    except RuntimeError as error:
        raise ModelError(f"{engine}: OpenVINO cannot compile it: {_one_line(error)}") from None
    # an output that a layer reads as well has the names of both once it is compiled, in no order
    outputs = zip(_describe(compiled.outputs), _describe(model.outputs), strict=True)
    return compiled, inputs, tuple(replace(now, name=given.name) for now, given in outputs)


class OpenVinoSession:
    """A compiled IR with one inference request."""

    device = "CPU"

    def __init__(self, compiled: Any, inputs: tuple[IOTensor, ...], outputs: tuple[IOTensor, ...]) -> None:
        self.inputs: Sequence[IOTensor] = inputs
        self.outputs: Sequence[IOTensor] = outputs
        self._request = compiled.create_infer_request()

    def bind(self, inputs: Arrays) -> None:
        """Copy `inputs` into the request's own tensors."""
        for i, array in enumerate(_tensors.checked(inputs, self.inputs).values()):
            tensor = self._request.get_input_tensor(i)
            tensor.shape = array.shape
            tensor.data[...] = array

    def execute(self) -> None:
        """One synchronous inference on what was bound last."""
        try:
            self._request.infer(share_outputs=True)
        except RuntimeError as error:
            raise ModelError(f"OpenVINO failed while running: {_one_line(error)}") from None

    def times_ms(self) -> dict[str, float]:
        """Wall time of every node that the last inference executed, for a model compiled with PERF_COUNT."""
        ran = [each for each in self._request.profiling_info if each.status.name == "EXECUTED"]
        return {each.node_name: each.real_time.total_seconds() * 1e3 for each in ran}

    def fetch(self) -> dict[str, NDArray[Any]]:
        """A copy of every output."""
        return {tensor.name: self._request.get_output_tensor(i).data.copy() for i, tensor in enumerate(self.outputs)}


@cache
def _core() -> Any:
    """One core for the process: where several overlap, OpenVINO leaves a freed signal stack behind, and the next
    signal kills the process."""
    package = _package()
    with native.call("starting OpenVINO"):
        return package.Core()


def _package() -> ModuleType:
    if reason := unavailable_reason():
        raise RuntimeUnavailable(reason)
    try:
        with native.call("importing OpenVINO"):
            package = importlib.import_module("openvino")
    except ImportError as error:
        raise RuntimeUnavailable(f"OpenVINO is installed but does not import: {error}") from None
    return package


def _settings(params: Params, threads: int) -> dict[str, object]:
    return {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": params.precision,
        "ENABLE_CPU_PINNING": False,  # two processes would both be pinned to the first cores
    }


def _precision_reason(openvino: ModuleType, params: Params) -> str | None:
    # asked for bf16, OpenVINO says bf16 on every CPU and computes in float32 where there is none
    if params.precision == "bf16" and "BF16" not in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return "this CPU does not compute in BF16 (it needs avx512_bf16 or AMX): use precision: f32"
    return None


def _describe(ports: Sequence[Any]) -> tuple[IOTensor, ...]:
    import numpy as np

    return tuple(
        IOTensor(
            port.get_any_name(),
            tuple(None if axis.is_dynamic else axis.get_length() for axis in port.get_partial_shape()),
            np.dtype(port.get_element_type().to_dtype()).name,
        )
        for port in ports
    )


def _one_line(error: Exception) -> str:
    """OpenVINO's messages run over many lines, the first ones naming its own source files."""
    noise = ("Exception from src", "Check '", "FrontEnd API failed")
    lines = [line.strip() for line in str(error).splitlines()]
    useful = [line for line in lines if line and not line.startswith(noise)]
    return " ".join(useful or lines)[:500]
