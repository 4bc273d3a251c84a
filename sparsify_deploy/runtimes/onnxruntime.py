"""ONNX Runtime on the CPU or through CUDA: the reference that the others are compared with.

The engine is the ONNX file itself, copied after a session could be created from it. Zeros make nothing faster here.
Reference: https://onnxruntime.ai/docs/api/python
"""

from __future__ import annotations

import importlib
import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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

VERSION = 1
SUFFIX = ".onnx"
FLAVOUR = "onnxruntime"
_ERRORS_ONLY = 3
_COPY = re.compile(r"(_token_\d+|_nchwc)+$")
"""What ONNX Runtime appends to the name of a node that it rewrites."""


class Params(Base):
    """`provider` is where it runs; CUDA needs onnxruntime-gpu in place of onnxruntime."""

    provider: Literal["CPU", "CUDA"] = Field("CPU", description="execution provider")


def version() -> str | None:
    """ONNX Runtime's version, None where it is not installed."""
    return _packages.version_of("onnxruntime")


def unavailable_reason() -> str | None:
    """None where it can build here, else what to install."""
    return _packages.missing("ONNX Runtime", "onnxruntime", "cpu")


def cannot_run_reason() -> str | None:
    """The same as `unavailable_reason`; a missing CUDA provider is found when a session asks for it."""
    return unavailable_reason()


def build(onnx: Path, engine: Path, params: Params, /, *, progress: Progress | None = None) -> BuildNotes:
    """Copy an ONNX file that a session can be created from. Raises ModelError with ONNX Runtime's reason.

    Weights that lie in other files are taken into the copy: the engine is one file.
    """
    from sparsify_deploy.graph import axis_sizes
    from sparsify_deploy.graph.file import load

    model = load(onnx)
    started = time.perf_counter()
    _session(onnx, params, threads=1, free_axes={})
    if not (engine.exists() and engine.samefile(onnx)):
        with tempfile.TemporaryDirectory(dir=engine.parent, prefix=".onnxruntime-") as folder:
            partial = Path(folder, engine.name)
            if model.ByteSize() > onnx.stat().st_size:  # reading its external data made it grow
                partial.write_bytes(model.SerializeToString())
            else:
                shutil.copyfile(onnx, partial)
            durable.move(partial, engine)
    notes = BuildNotes(
        runtime="onnxruntime",
        version=version() or "unknown",
        files=(engine.name,),
        seconds=time.perf_counter() - started,
        options={"provider": params.provider, "graph_optimization_level": "all"},
        runs_here=True,
        facts={"axis_sizes": sizes} if (sizes := axis_sizes.plain(model)) else {},
    )
    _metadata.write_metadata(engine, notes, file_digest(onnx), params)
    return notes


@contextmanager
def open(
    engine: Path, params: Params, /, *, threads: int = 1, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> Iterator[OnnxRuntimeSession]:
    """Create a sequential session of `threads` threads.

    `shapes` fixes dynamic axes, None keeps them. Raises DataError where the file cannot be read or a shape does not
    fit, RuntimeUnavailable where the session came back on another provider than the one asked for.
    """
    from sparsify_deploy.graph import file

    model = file.load(engine)
    inputs, _ = _tensors.fixed(file.inputs(model), shapes)
    named = {value.name: [axis.dim_param for axis in value.type.tensor_type.shape.dim] for value in model.graph.input}
    session = _session(engine, params, threads, _free_axes(named, shapes or {}))
    yield OnnxRuntimeSession(session, inputs, file.outputs(model), params.provider)


def profile(engine: Path, params: Params, inputs: Arrays, /, *, threads: int = 1) -> EngineProfile:
    """Wall time of every node of the optimised graph, ms, of 60 runs by ONNX Runtime's own profiler."""
    from sparsify_deploy.graph import file

    model = file.load(engine)
    shapes = {name: tuple(array.shape) for name, array in inputs.items()}
    tensors, _ = _tensors.fixed(file.inputs(model), shapes)
    fed = _tensors.checked(inputs, tensors)
    with tempfile.TemporaryDirectory(prefix="sparsify-deploy-") as folder:
        session = _session(engine, params, threads, {}, profile=str(Path(folder, "profile")))
        try:
            with native.call(f"ONNX Runtime profiling {engine.name}") as renew:
                for _ in range(_profiles.WARM_UP + _profiles.RUNS):
                    renew()
                    session.run(None, fed)
        except _native_errors() as error:
            raise ModelError(f"ONNX Runtime failed while running: {_one_line(error)}") from None
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return _profile_of(events)


def _profile_of(events: Sequence[Mapping[str, Any]]) -> EngineProfile:
    """Kernel events by node; the runs before the last 60 warmed up."""
    taken: dict[str, list[float]] = {}
    kernels: dict[str, str] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            name = event["name"].removesuffix("_kernel_time")
            taken.setdefault(name, []).append(event["dur"] / 1e3)
            kernels[name] = event["args"].get("op_name", "")
    layers = [
        LayerTime(name, (_COPY.sub("", name),), kernels[name], _profiles.middle_half(ms[-_profiles.RUNS :]))
        for name, ms in taken.items()
    ]
    return EngineProfile(tuple(layers), _profiles.RUNS, _profiles.NOTE)


class OnnxRuntimeSession:
    """A session with its inputs bound to memory of its own, on the device where it computes."""

    def __init__(
        self, session: Any, inputs: tuple[IOTensor, ...], outputs: tuple[IOTensor, ...], provider: str
    ) -> None:
        self.inputs: Sequence[IOTensor] = inputs
        self.outputs: Sequence[IOTensor] = outputs
        self.device = "CPU" if provider == "CPU" else "GPU"
        self._memory = "cpu" if provider == "CPU" else "cuda"
        self._session = session
        self._binding = session.io_binding()

    def bind(self, inputs: Arrays) -> None:
        """Copy `inputs` to the device."""
        onnxruntime = _package()
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()
        for name, array in _tensors.checked(inputs, self.inputs).items():
            # on the CPU an OrtValue is a view of the array it is given
            value = onnxruntime.OrtValue.ortvalue_from_numpy(array.copy(), self._memory, 0)
            self._binding.bind_ortvalue_input(name, value)
        for tensor in self.outputs:
            self._binding.bind_output(tensor.name, self._memory)

    def execute(self) -> None:
        """One synchronous inference on what was bound last."""
        try:
            self._session.run_with_iobinding(self._binding)
        except _native_errors() as error:
            raise ModelError(f"ONNX Runtime failed while running: {_one_line(error)}") from None

    def fetch(self) -> dict[str, NDArray[Any]]:
        """A copy of every output."""
        arrays = self._binding.copy_outputs_to_cpu()
        return {tensor.name: array.copy() for tensor, array in zip(self.outputs, arrays, strict=True)}


def _package() -> ModuleType:
    if reason := unavailable_reason():
        raise RuntimeUnavailable(reason)
    try:
        with native.call("importing ONNX Runtime"):
            package = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise RuntimeUnavailable(f"ONNX Runtime is installed but does not import: {error}") from None
    return package


def _session(
    path: Path, params: Params, threads: int, free_axes: Mapping[str, int], *, profile: str | None = None
) -> Any:
    """A session; `profile` is the start of the file's name that its profiler writes."""
    onnxruntime = _package()
    wanted = f"{params.provider}ExecutionProvider"
    if wanted not in onnxruntime.get_available_providers():
        raise RuntimeUnavailable(_no_provider(params.provider, onnxruntime.get_available_providers()))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _ERRORS_ONLY
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, profile
    for name, size in free_axes.items():
        options.add_free_dimension_override_by_name(name, size)
    try:
        with native.call(f"ONNX Runtime loading {path.name}"):
            session = onnxruntime.InferenceSession(path, options, providers=[wanted])
    except _native_errors() as error:
        raise ModelError(f"{path}: ONNX Runtime cannot load it: {_one_line(error)}") from None
    # a session asked for CUDA alone comes back on the CPU where there is no GPU, without an error
    if session.get_providers()[0] != wanted:
        raise RuntimeUnavailable(_no_provider(params.provider, session.get_providers()))
    return session


def _no_provider(asked: str, found: Sequence[str]) -> str:
    have = ", ".join(name.removesuffix("ExecutionProvider") for name in found)
    return (
        f"ONNX Runtime was asked for {asked} and has {have}: it needs an NVIDIA GPU and onnxruntime-gpu without "
        "onnxruntime beside it; `sparsify-deploy doctor` shows which is missing"
    )


def _free_axes(named: Mapping[str, Sequence[str]], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The size of every named free axis. Raises DataError where one name gets two sizes."""
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        for axis, size in zip(named.get(name, ()), shape, strict=False):
            if axis and sizes.setdefault(axis, size) != size:
                raise DataError(f"input {name!r}: axis {axis!r} cannot be both {sizes[axis]} and {size}")
    return sizes


def _native_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises: classes without a common base of their own."""
    native = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    raised = [each for each in vars(native).values() if isinstance(each, type) and issubclass(each, Exception)]
    return (*raised, RuntimeError, ValueError)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
