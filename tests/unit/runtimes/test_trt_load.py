"""Engines that cannot be opened here: by their record, and by loading them in a child first."""

from __future__ import annotations

import os

import pytest

from sparsify_deploy.errors import CorruptArtifact, DataError, NativeCrash
from sparsify_deploy.runtimes import _gpu, _metadata, _packages, _trt, _trt_load, tensorrt
from sparsify_deploy.types import BuildNotes

TRT = _trt.Flavour("tensorrt", "TensorRT")
RTX = _trt.Flavour("tensorrt_rtx", "TensorRT-RTX")

LOADS = """
import os, signal, time
class ILogger:
    def __init__(self): pass
class Runtime:
    engine_host_code_allowed = False
    def __init__(self, logger): self.logger = logger
    def deserialize_cuda_engine(self, content):
        with open(os.environ["SEEN"], "a") as seen: seen.write(f"{self.engine_host_code_allowed} ")
        {how}
"""


def here(monkeypatch, version, architecture):
    monkeypatch.setattr(_packages, "version_of", lambda module: version)
    found = (_gpu.Gpu("NVIDIA Test", architecture),) if architecture else ()
    monkeypatch.setattr(_gpu, "gpus", lambda: found)


def record(version="10.3.0", architecture="sm80", **params):
    return {"version": version, "params": params, "facts": {"architecture": architecture}}


@pytest.mark.parametrize(
    ("built", "version", "gpu", "line"),
    [
        (record(), "10.3.0 (tensorrt-cu12)", "sm80", None),
        (
            record(),
            "11.0.1",
            "sm90",
            "built by TensorRT 10.3.0 for sm80, here are 11.0.1 and sm90: build it again here, "
            "or once with version_compatible and ampere_plus where it was built",
        ),
        (record(version_compatible=True), "11.0.1", "sm80", None),
        (record(version_compatible=True), "11.0.1", "sm90", "or once with ampere_plus where"),
        (record(ampere_plus=True), "10.3.0", "sm90", None),
        (record(ampere_plus=True), "10.3.0", "sm75", "here are 10.3.0 and sm75"),
        (record(ampere_plus=True), "10.4.0", "sm90", "or once with version_compatible where"),
        ({"version": "10.3.0", "params": {}}, "10.3.0", "sm90", None),
    ],
)
def test_version_and_gpu_are_compared_with_the_record(monkeypatch, tmp_path, built, version, gpu, line):
    here(monkeypatch, version, gpu)
    found = _trt_load.mismatch(TRT, tmp_path / "net.engine", built)
    assert (found is None) if line is None else (line in found and "\n" not in found)


def test_an_rtx_engine_runs_on_any_of_its_targets(monkeypatch, tmp_path):
    built = {"version": "1.7", "params": {"targets": ["sm86", "sm89"]}, "facts": {}}
    here(monkeypatch, "1.7", "sm89")
    assert _trt_load.mismatch(RTX, tmp_path / "a", built) is None
    here(monkeypatch, "1.7", "sm120")
    assert _trt_load.mismatch(RTX, tmp_path / "a", built).endswith(
        "built by TensorRT-RTX 1.7 for sm86 and sm89, here are 1.7 and sm120: build it again here, "
        "or once with targets that hold sm120 where it was built"
    )


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """An engine of a stand-in package; `engine(how)` says what loading it does."""
    path = tmp_path / "net.engine"
    path.write_bytes(b"ptrt\0\1\2\3" * 100)
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    monkeypatch.syspath_prepend(tmp_path)
    _trt_load._loaded.cache_clear()

    def make(how, recorded=True, **params):
        (tmp_path / "loads_trt.py").write_text(LOADS.replace("{how}", how))
        if recorded:
            notes = BuildNotes("tensorrt", "10.3.0", ("net.engine",), 1.0, {}, True, facts={"architecture": "sm80"})
            _metadata.write_metadata(path, notes, "ab" * 32, tensorrt.Params(**params))
        here(monkeypatch, "10.3.0", "sm80")
        return path

    yield make
    _trt_load._loaded.cache_clear()


def ready(path, limit=60.0):
    return _trt_load.ready(_trt.Flavour("loads_trt", "TensorRT"), path, limit)


def test_an_engine_is_tried_once_in_a_child(engine, tmp_path):
    path = engine("return object()")
    assert ready(path) is False
    assert ready(path) is False
    assert (tmp_path / "seen").read_text() == "False "
    path.write_bytes(b"other\0" * 100)
    _metadata.metadata_path(path).unlink()
    assert ready(path) is False
    assert (tmp_path / "seen").read_text() == "False False "


def test_host_code_is_for_recorded_version_compatible_engines_alone(engine, tmp_path):
    path = engine("return object()", version_compatible=True)
    assert ready(path) is True
    assert (tmp_path / "seen").read_text() == "True "
    _metadata.metadata_path(path).unlink()
    assert ready(path) is False


def test_a_crash_while_loading_is_a_message_and_this_process_lives(engine):
    path = engine("os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(
        NativeCrash, match=r"^loading net.engine into TensorRT crashed \(SIGSEGV\): .* build it again"
    ) as e:
        ready(path)
    assert e.value.exit_code == 3
    assert os.getpid()


def test_a_hang_while_loading_ends_at_the_time_limit(engine):
    with pytest.raises(NativeCrash, match=r"loading net.engine into TensorRT was stopped after its time limit of 3 s"):
        ready(engine("time.sleep(600)"), limit=3.0)


def test_an_engine_that_does_not_load_brings_the_runtimes_reason(engine):
    path = engine("self.logger.log('Severity.ERROR', 'version tag\\n does not match')")
    with pytest.raises(DataError, match=r"cannot load it here: version tag does not match; it was built by") as caught:
        ready(path)
    assert caught.value.exit_code == 5
    assert "\n" not in str(caught.value)


def test_another_gpu_or_hash_is_refused_before_anything_is_loaded(engine, monkeypatch, tmp_path):
    path = engine("return object()")
    monkeypatch.setattr(_gpu, "gpus", lambda: (_gpu.Gpu("NVIDIA Test", "sm90"),))
    with pytest.raises(DataError, match=r"for sm80, here are 10\.3\.0 and sm90"):
        ready(path)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(CorruptArtifact, match="not the ones") as caught:
        ready(path)
    assert caught.value.exit_code == 9
    assert not (tmp_path / "seen").exists()
