"""Run a TensorRT engine: device memory, a stream, events and a captured CUDA graph through cuda-bindings.

The driver API is used, on the device's primary context that TensorRT uses too, because it needs nothing but the
driver. Nothing here was chosen by a version check: the name-based API and `execute_async_v3` are in all versions.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify_deploy.errors import DataError, ModelError, OutOfResources, RuntimeUnavailable
from sparsify_deploy.process import native
from sparsify_deploy.runtimes import _gpu, _packages, _tensors, _trt_load
from sparsify_deploy.runtimes._trt import DTYPES, Flavour, probe_reason
from sparsify_deploy.types import IOTensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparsify_deploy.types import Arrays

_WARM_UP_RUNS = 3


def cannot_run_reason(flavour: Flavour) -> str | None:
    """None where engines of `flavour` can run here, else one line: a package or a device that is missing."""
    if reason := _gpu.no_gpu_reason():
        return f"{flavour.name} engines need a GPU to run: {reason}"
    if not _packages.installed("cuda.bindings.driver"):
        return "cuda-bindings is not installed: pip install 'cuda-bindings>=12.8'"
    return probe_reason(flavour)


@contextmanager
def open_engine(
    flavour: Flavour, engine: Path, shapes: Mapping[str, tuple[int, ...]] | None, *, time_limit_s: float
) -> Iterator[CudaSession]:
    """Load an engine on the first GPU, after a child process has loaded it within `time_limit_s`.

    Raises RuntimeUnavailable without a GPU, DataError where it cannot be loaded here, CorruptArtifact where it is not
    the engine of its record, NativeCrash where loading it kills the child.
    """
    if reason := cannot_run_reason(flavour):
        raise RuntimeUnavailable(reason)
    host_code = _trt_load.ready(flavour, engine, time_limit_s)
    trt = importlib.import_module(flavour.package)
    driver = importlib.import_module("cuda.bindings.driver")
    with ExitStack() as stack:
        ok(driver, driver.cuInit(0))
        device = ok(driver, driver.cuDeviceGet(0))
        # kept until the process ends: TensorRT frees memory in this context after the session is closed
        context = ok(driver, driver.cuDevicePrimaryCtxRetain(device))
        ok(driver, driver.cuCtxSetCurrent(context))
        logger = trt.Logger(trt.Logger.WARNING)
        runtime = trt.Runtime(logger)
        if host_code:  # else it stays False
            runtime.engine_host_code_allowed = True
        with native.call(f"{flavour.name} loading {engine.name}"):
            loaded = runtime.deserialize_cuda_engine(engine.read_bytes())
        if loaded is None:
            raise DataError(
                f"{engine}: {flavour.name} cannot load it here: it was built by another version or for another GPU"
            )
        session = CudaSession(trt, driver, loaded, shapes)
        stack.callback(session.close)
        yield session


class CudaSession:
    """An engine with its execution context, stream, device buffers and CUDA graph."""

    device = "GPU"

    def __init__(self, trt: Any, driver: Any, engine: Any, shapes: Mapping[str, tuple[int, ...]] | None) -> None:
        self._trt, self._driver, self._engine = trt, driver, engine
        self._context = engine.create_execution_context()
        if self._context is None:
            raise OutOfResources("the GPU has not enough free memory for this engine: close other programs on it")
        every = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        described = {name: self._describe(name) for name in every}
        is_input = {name: engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in every}
        self.inputs: Sequence[IOTensor] = _tensors.fixed([described[n] for n in every if is_input[n]], shapes)[0]
        self.outputs: Sequence[IOTensor] = tuple(described[n] for n in every if not is_input[n])
        self._stream = self._ok(driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        self._begin, self._end = (self._ok(driver.cuEventCreate(0)) for _ in range(2))
        self._memory: dict[str, Any] = {}
        self._bound: dict[str, tuple[int, ...]] = {}
        self._graph: Any = None

    def bind(self, inputs: Arrays) -> None:
        """Copy `inputs` to the device; on a new shape also allocate, run once and capture the CUDA graph."""
        arrays = _tensors.checked(_tensors.narrowed(inputs, self.inputs), self.inputs)
        new = {name: array.shape for name, array in arrays.items()}
        if new != self._bound:
            self._allocate(arrays)
        for name, array in arrays.items():
            self._ok(self._driver.cuMemcpyHtoDAsync(self._memory[name], array.ctypes.data, array.nbytes, self._stream))
        self._ok(self._driver.cuStreamSynchronize(self._stream))
        if new != self._bound:
            self._capture()
            self._bound = new

    def execute(self) -> None:
        """One inference, from launching the graph until the device is done."""
        self._ok(self._driver.cuEventRecord(self._begin, self._stream))
        self._ok(self._driver.cuGraphLaunch(self._graph, self._stream))
        self._ok(self._driver.cuEventRecord(self._end, self._stream))
        self._ok(self._driver.cuStreamSynchronize(self._stream))

    @property
    def device_ms(self) -> float:
        """The last `execute` by the device's own events, ms."""
        return float(self._ok(self._driver.cuEventElapsedTime(self._begin, self._end)))

    def fetch(self) -> dict[str, NDArray[Any]]:
        """A copy of every output."""
        import numpy as np

        result = {}
        for tensor in self.outputs:
            array = np.empty(tuple(self._context.get_tensor_shape(tensor.name)), dtype=tensor.dtype)
            self._ok(
                self._driver.cuMemcpyDtoHAsync(array.ctypes.data, self._memory[tensor.name], array.nbytes, self._stream)
            )
            result[tensor.name] = array
        self._ok(self._driver.cuStreamSynchronize(self._stream))
        return result

    def layer_times(self, runs: int) -> dict[str, float]:
        """Milliseconds of each layer, summed over `runs` of what was bound, by TensorRT's profiler.

        Each run is enqueued by itself: inside of a CUDA graph the profiler hears nothing. The session keeps the
        profiler, so it is of no use for timing afterwards.
        """
        taken: dict[str, float] = {}
        base: Any = self._trt.IProfiler

        class Times(base):  # type: ignore[misc]
            def __init__(self) -> None:
                base.__init__(self)

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                taken[layer_name] = taken.get(layer_name, 0.0) + ms

        self._profiler = Times()  # the context keeps no reference
        self._context.profiler = self._profiler
        for run in range(_WARM_UP_RUNS + runs):
            if run == _WARM_UP_RUNS:
                taken.clear()
            self._enqueue()
            self._ok(self._driver.cuStreamSynchronize(self._stream))
        return taken

    def information(self) -> str:
        """The engine inspector's word on every layer, as JSON."""
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context
        return str(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))

    def close(self) -> None:
        """Free what was allocated on the device."""
        self._release()
        for event in (self._begin, self._end):
            self._driver.cuEventDestroy(event)
        self._driver.cuStreamDestroy(self._stream)
        del self._context, self._engine

    def _allocate(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        import numpy as np

        self._release()
        for name, array in arrays.items():
            if not self._context.set_input_shape(name, array.shape):
                shape = _tensors.shape_text(array.shape)
                raise DataError(
                    f"input {name!r} cannot be {shape}: the engine was built for other batch sizes or lengths"
                )
        sizes = {name: array.nbytes for name, array in arrays.items()}
        for tensor in self.outputs:
            axes = tuple(self._context.get_tensor_shape(tensor.name))
            if -1 in axes:
                raise ModelError(f"output {tensor.name!r} has a shape that depends on the data, which is not supported")
            sizes[tensor.name] = math.prod(axes) * np.dtype(tensor.dtype).itemsize
        for name, size in sizes.items():
            self._memory[name] = self._ok(self._driver.cuMemAlloc(max(size, 1)))
            self._context.set_tensor_address(name, int(self._memory[name]))

    def _capture(self) -> None:
        self._enqueue()  # TensorRT wants one run outside of a capture after a change of shape
        self._ok(self._driver.cuStreamSynchronize(self._stream))
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._ok(self._driver.cuStreamBeginCapture(self._stream, mode))
        self._enqueue()
        graph = self._ok(self._driver.cuStreamEndCapture(self._stream))
        self._graph = self._ok(self._driver.cuGraphInstantiate(graph, 0))
        self._ok(self._driver.cuGraphDestroy(graph))

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(int(self._stream)):
            raise ModelError("TensorRT could not run the engine: see its messages above")

    def _release(self) -> None:
        if self._graph is not None:
            self._driver.cuGraphExecDestroy(self._graph)
            self._graph = None
        for pointer in self._memory.values():
            self._driver.cuMemFree(pointer)
        self._memory, self._bound = {}, {}

    def _describe(self, name: str) -> IOTensor:
        kind = str(self._engine.get_tensor_dtype(name)).rpartition(".")[2]
        if kind not in DTYPES:
            raise ModelError(f"{name!r} is of type {kind}, which numpy does not have: export it as float32")
        shape = tuple(None if axis == -1 else int(axis) for axis in self._engine.get_tensor_shape(name))
        return IOTensor(name, shape, DTYPES[kind])

    def _ok(self, answer: Sequence[Any]) -> Any:
        return ok(self._driver, answer)


def ok(driver: Any, answer: Sequence[Any]) -> Any:
    """What a driver call returned besides its code. Raises OutOfResources, or RuntimeUnavailable with CUDA's name."""
    code, *values = answer
    if code == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        raise OutOfResources("the GPU's memory is full: use a smaller batch, or close other programs on it")
    if code != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeUnavailable(f"the GPU failed: {code.name}; `nvidia-smi` shows its state")
    return values[0] if values else None
