"""The CUDA session against a stand-in driver and engine: order of calls, memory, capture, errors.

The stand-in refuses what the real driver refuses: unknown handles, launching before a capture, freeing twice.
"""

from __future__ import annotations

import ctypes
import sys
from enum import Enum, IntEnum
from types import SimpleNamespace

import numpy as np
import pytest

from sparsify_deploy.errors import DataError, OutOfResources, RuntimeUnavailable
from sparsify_deploy.runtimes import _cuda, _trt, _trt_load


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2


GOOD = CUresult.CUDA_SUCCESS


class Driver:
    """Device memory is a dict of buffers; a stream is 7; a captured graph is a list of functions."""

    CUresult = CUresult
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)

    def __init__(self, limit=1 << 20):
        self.buffers, self.limit, self.next = {}, limit, 1000
        self.capturing, self.graphs, self.calls = None, {}, []

    def cuStreamCreate(self, flags):
        return GOOD, 7

    def cuStreamDestroy(self, stream):
        return (GOOD,)

    def cuStreamSynchronize(self, stream):
        return (GOOD if self.capturing is None else CUresult.CUDA_ERROR_INVALID_VALUE,)

    def cuEventCreate(self, flags):
        return GOOD, object()

    def cuEventDestroy(self, event):
        return (GOOD,)

    def cuEventRecord(self, event, stream):
        return (GOOD,)

    def cuEventElapsedTime(self, begin, end):
        return GOOD, 0.25

    def cuMemAlloc(self, size):
        if size > self.limit:
            return CUresult.CUDA_ERROR_OUT_OF_MEMORY, None
        self.next += 1
        self.buffers[self.next] = bytearray(size)
        return GOOD, self.next

    def cuMemFree(self, pointer):
        del self.buffers[pointer]
        return (GOOD,)

    def cuMemcpyHtoDAsync(self, device, host, size, stream):
        self.buffers[device][:] = ctypes.string_at(host, size)
        return (GOOD,)

    def cuMemcpyDtoHAsync(self, host, device, size, stream):
        ctypes.memmove(host, bytes(self.buffers[device]), size)
        return (GOOD,)

    def cuStreamBeginCapture(self, stream, mode):
        self.capturing = []
        return (GOOD,)

    def cuStreamEndCapture(self, stream):
        graph, self.capturing = self.capturing, None
        return GOOD, graph

    def cuGraphInstantiate(self, graph, flags):
        self.next += 1
        self.graphs[self.next] = list(graph)
        self.calls.append("instantiate")
        return GOOD, self.next

    def cuGraphDestroy(self, graph):
        return (GOOD,)

    def cuGraphExecDestroy(self, graph):
        del self.graphs[graph]
        return (GOOD,)

    def cuGraphLaunch(self, graph, stream):
        if graph not in self.graphs:
            return (CUresult.CUDA_ERROR_INVALID_VALUE,)
        for work in self.graphs[graph]:
            work()
        self.calls.append("launch")
        return (GOOD,)


class Mode(Enum):
    INPUT, OUTPUT = 1, 2


class Kind(Enum):
    FLOAT, BF16, INT32 = 1, 2, 3


class Context:
    """Computes y = 2 x for x of shape (batch <= 4, 3)."""

    def __init__(self, driver):
        self.driver, self.shape, self.addresses = driver, None, {}

    def set_input_shape(self, name, shape):
        self.shape = tuple(shape)
        return shape[0] <= 4

    def get_tensor_shape(self, name):
        return self.shape

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def execute_async_v3(self, stream):
        def work():
            x = np.frombuffer(bytes(self.driver.buffers[self.addresses["x"]]), np.float32)
            self.driver.buffers[self.addresses["y"]][:] = (2 * x).tobytes()

        if self.driver.capturing is not None:
            self.driver.capturing.append(work)
        else:
            work()
        return True


class Engine:
    num_io_tensors = 2

    def __init__(self, driver, kind=Kind.FLOAT):
        self.driver, self.kind = driver, kind

    def create_execution_context(self):
        return Context(self.driver)

    def get_tensor_name(self, i):
        return "yx"[i]

    def get_tensor_mode(self, name):
        return Mode.INPUT if name == "x" else Mode.OUTPUT

    def get_tensor_dtype(self, name):
        return self.kind

    def get_tensor_shape(self, name):
        return (-1, 3)


def session(driver, shapes=None, kind=Kind.FLOAT):
    return _cuda.CudaSession(SimpleNamespace(TensorIOMode=Mode), driver, Engine(driver, kind), shapes)


def x(batch, start=0.0):
    return {"x": (np.arange(batch * 3, dtype=np.float32) + np.float32(start)).reshape(batch, 3)}


def test_a_captured_graph_computes_on_what_was_bound_last():
    driver = Driver()
    opened = session(driver)
    for start in (0.0, 5.0):
        opened.bind(x(2, start))
        opened.execute()
        np.testing.assert_array_equal(opened.fetch()["y"], 2 * x(2, start)["x"])
    assert driver.calls == ["instantiate", "launch", "launch"]
    assert opened.device_ms == 0.25
    opened.bind(x(4))
    opened.execute()
    np.testing.assert_array_equal(opened.fetch()["y"], 2 * x(4)["x"])
    assert driver.calls[3:] == ["instantiate", "launch"]
    assert len(driver.buffers) == 2
    opened.close()
    assert driver.buffers == {}
    assert driver.graphs == {}


def test_the_shapes_are_described_and_fixed():
    opened = session(Driver(), {"x": (2, 3)})
    assert [(tensor.name, tensor.shape, tensor.dtype) for tensor in opened.inputs] == [("x", (2, 3), "float32")]
    assert opened.outputs[0].shape == (None, 3)
    with pytest.raises(DataError, match=r"shape \(3, 3\), the engine takes \(2, 3\)"):
        opened.bind(x(3))


def test_a_batch_outside_the_profile_is_refused_and_the_next_bind_works():
    opened = session(Driver())
    with pytest.raises(DataError, match="built for other batch sizes"):
        opened.bind(x(5))
    opened.bind(x(4))
    opened.execute()
    np.testing.assert_array_equal(opened.fetch()["y"], 2 * x(4)["x"])


def test_cuda_errors_have_their_name():
    driver = Driver(limit=20)
    with pytest.raises(OutOfResources, match="smaller batch"):
        session(driver).bind(x(4))
    with pytest.raises(RuntimeUnavailable, match="CUDA_ERROR_INVALID_VALUE"):
        session(driver).execute()


def test_a_type_numpy_lacks_is_refused():
    with pytest.raises(DataError, match="BF16"):
        session(Driver(), kind=Kind.BF16)


@pytest.mark.parametrize("host_code", [False, True])
def test_an_engine_is_opened_as_its_check_in_a_child_allows(host_code, monkeypatch, tmp_path):
    driver, made = Driver(), []
    driver.cuInit = lambda flags: (GOOD,)
    driver.cuDeviceGet = driver.cuDevicePrimaryCtxRetain = lambda handle: (GOOD, 0)
    driver.cuCtxSetCurrent = lambda context: (GOOD,)

    class Runtime:
        engine_host_code_allowed = False

        def __init__(self, logger):
            made.append(self)

        def deserialize_cuda_engine(self, content):
            return Engine(driver)

    logger = type("Logger", (), {"WARNING": 2, "__init__": lambda self, level: None})
    monkeypatch.setitem(sys.modules, "some_trt", SimpleNamespace(Logger=logger, Runtime=Runtime, TensorIOMode=Mode))
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    monkeypatch.setattr(_cuda, "cannot_run_reason", lambda flavour: None)
    monkeypatch.setattr(_trt_load, "ready", lambda flavour, engine, limit: host_code)
    path = tmp_path / "net.engine"
    path.write_bytes(b"engine")
    with _cuda.open_engine(_trt.Flavour("some_trt", "TensorRT"), path, None, time_limit_s=9.0) as opened:
        opened.bind(x(2))
        opened.execute()
        np.testing.assert_array_equal(opened.fetch()["y"], 2 * x(2)["x"])
    assert made[0].engine_host_code_allowed is host_code
    assert driver.buffers == {}


def test_what_the_child_refuses_is_not_loaded_here(monkeypatch, tmp_path):
    def refuse(flavour, engine, limit):
        raise DataError(f"built elsewhere, limit {limit:g}")

    monkeypatch.setattr(_cuda, "cannot_run_reason", lambda flavour: None)
    monkeypatch.setattr(_trt_load, "ready", refuse)
    flavour = _trt.Flavour("never_imported", "TensorRT")
    opening = _cuda.open_engine(flavour, tmp_path / "net.engine", None, time_limit_s=9.0)
    with pytest.raises(DataError, match="built elsewhere, limit 9"), opening:
        pass


def test_an_engine_that_takes_int32_for_the_files_int64_gets_it():
    driver = Driver()
    opened = session(driver, kind=Kind.INT32)
    opened.bind({"x": np.zeros((1, 3), np.int64)})
    assert {len(bytes(buffer)) for buffer in driver.buffers.values()} == {12}
