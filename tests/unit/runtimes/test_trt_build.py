"""A whole build in its child process against stand-ins with the API shapes of TensorRT 8.6, 10 and 11."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsify_deploy.errors import ModelError, NativeCrash, RuntimeUnavailable
from sparsify_deploy.runtimes import _gpu, _metadata, _packages, _trt, _trt_refusals, tensorrt

STAND_IN = """
import json, os, signal, time
from enum import IntEnum
__version__ = "{version}"
SEEN = {}
class ILogger:
    def __init__(self): pass
class IHostMemory(bytes): pass
NetworkDefinitionCreationFlag = IntEnum("NetworkDefinitionCreationFlag", {creation})
BuilderFlag = IntEnum("BuilderFlag", {flags})
TacticSource = IntEnum("TacticSource", {sources})
class ProfilingVerbosity: DETAILED = 2
class MemoryPoolType: WORKSPACE = 0
class HardwareCompatibilityLevel: AMPERE_PLUS = 1
{monitor}
class Shape(tuple): pass
class Tensor: name, shape = "image", (-1, 16, 8, 8)
class Network:
    num_layers, num_inputs = 3, 1
    def get_input(self, i): return Tensor
class OnnxParser:
    num_errors = 0
    def __init__(self, network, logger): pass
    def parse_from_file(self, path):
        SEEN["parsed"], SEEN["content"] = path, open(path, "rb").read().hex()
        return True
class Cache:
    def __init__(self, content): self.content = content
    def serialize(self): return IHostMemory(self.content + b"+timed")
class Config:
    builder_optimization_level = hardware_compatibility_level = profiling_verbosity = None
    {config}
    def __init__(self): self.flags, self.cache = [], None
    def set_flag(self, flag): self.flags.append(flag.name)
    def get_tactic_sources(self): return 31
    def set_tactic_sources(self, mask): SEEN["sources"] = mask
    def set_memory_pool_limit(self, pool, size): SEEN["workspace"] = size
    def add_optimization_profile(self, profile): SEEN["profile"] = profile.shapes
    def create_timing_cache(self, content):
        SEEN.setdefault("caches", []).append(content.hex())
        return None if content.startswith(b"odd") else Cache(content)
    def set_timing_cache(self, cache, ignore_mismatch):
        assert ignore_mismatch is False
        if cache.content.startswith(b"elsewhere"): return False
        self.cache = cache
        return True
    def get_timing_cache(self): return self.cache
class Profile:
    def __init__(self): self.shapes = {}
    def set_shape(self, name, *sizes): self.shapes[name] = sizes
class Builder:
    def __init__(self, logger): self.logger = logger
    def create_network(self, flags):
        SEEN["network"] = flags
        return Network()
    def create_builder_config(self): return Config()
    def create_optimization_profile(self): return Profile()
    def build_serialized_network(self, network, config):
        SEEN["flags"] = config.flags
        {build}
        monitor = getattr(config, "progress_monitor", None)
        if monitor is not None:
            assert monitor.ready
            monitor.phase_start("Building", None, 2)
            monitor.phase_start("Timing", "Building", 3)
            monitor.phase_start("A tactic", "Timing", 1)
            assert monitor.step_complete("A tactic", 0)
            monitor.phase_finish("A tactic")
            assert monitor.step_complete("Timing", 1)
            monitor.phase_finish("Timing")
            monitor.phase_finish("Building")
        self.logger.log("Severity.VERBOSE", "(Sparsity) Layers eligible for sparse math: /conv")
        self.logger.log("Severity.WARNING", "a native warning")
        json.dump(SEEN, open(os.environ["SEEN"], "w"))
        return IHostMemory(b"ptrt" + bytes(100))
"""

MONITOR = "class IProgressMonitor:\n    def __init__(self): self.ready = True"
LIBRARIES = {"CUBLAS": 0, "CUBLAS_LT": 1, "CUDNN": 2}
VERSIONS = {
    "8.6.0": {
        "creation": {"EXPLICIT_BATCH": 0},
        "flags": {"FP16": 0, "INT8": 1, "SPARSE_WEIGHTS": 7, "VERSION_COMPATIBLE": 12},
        "sources": LIBRARIES,
        "monitor": "",
        "config": "",
    },
    "10.3.0": {
        "creation": {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1},
        "flags": {"FP16": 0, "INT8": 1, "SPARSE_WEIGHTS": 7, "VERSION_COMPATIBLE": 12},
        "sources": LIBRARIES,
        "monitor": MONITOR,
        "config": "progress_monitor = None",
    },
    "11.0.0": {
        "creation": {"STRONGLY_TYPED": 1},
        "flags": {"SPARSE_WEIGHTS": 7, "VERSION_COMPATIBLE": 12},
        "sources": {"EDGE_MASK_CONVOLUTIONS": 3, "JIT_CONVOLUTIONS": 4},
        "monitor": MONITOR,
        "config": "progress_monitor = None",
    },
}
FLAVOUR, NEVER_IMPORTED = _trt.Flavour("standin_trt", "TensorRT"), _trt.Flavour("never_imported", "TensorRT")


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """`stand_in(version, build="")` installs the stand-in and returns a function that reads what it saw."""
    monkeypatch.setenv("SEEN", str(tmp_path / "seen.json"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(_gpu, "gpus", lambda: (_gpu.Gpu("NVIDIA A100-SXM4", "sm80"),))

    def install(version, build="pass"):
        text = STAND_IN.replace("{version}", version).replace("{build}", build)
        for key, value in VERSIONS[version].items():
            text = text.replace("{" + key + "}", str(value))
        (tmp_path / "standin_trt.py").write_text(text)
        return lambda: json.loads((tmp_path / "seen.json").read_text())

    return install


def build(net, tmp_path, progress=None, **params):
    return _trt.build(FLAVOUR, net.path, tmp_path / "net.engine", tensorrt.Params(**params), progress)


@pytest.mark.parametrize("version", VERSIONS)
def test_precision_goes_into_the_file_or_into_flags(version, stand_in, tiny_net, tmp_path):
    seen, net = stand_in(version), tiny_net("N")
    facts, warnings, _ = build(net, tmp_path)
    typed = version != "8.6.0"
    assert facts["strongly_typed"] is typed
    assert seen()["network"] == (2 if typed else 1)
    parsed = onnx.load_from_string(bytes.fromhex(seen()["content"]))
    opset = parsed.opset_import[0].version
    if typed:
        assert (opset, seen()["flags"]) == (19, ["SPARSE_WEIGHTS"])
        assert facts["float16"] == {"nodes": 4, "kept_fp32": {}}
        assert not Path(seen()["parsed"]).exists()
    else:
        assert (opset, seen()["flags"]) == (17, ["SPARSE_WEIGHTS", "INT8", "FP16"])
        assert facts["float16"] is None
        assert seen()["parsed"] == str(net.path)
    assert seen()["profile"] == {"image": [[1, 16, 8, 8], [1, 16, 8, 8], [32, 16, 8, 8]]}
    assert seen().get("sources") == (None if version == "11.0.0" else 31 & ~7)
    assert (facts["sparse_eligible"], facts["sparse_picked"]) == (["/conv"], None)
    assert warnings == ("a native warning",)


@pytest.mark.parametrize("version", VERSIONS)
def test_fp32_leaves_the_file_and_sets_no_fp16(version, stand_in, tiny_net, tmp_path):
    seen, net = stand_in(version), tiny_net("N")
    build(net, tmp_path, precision="fp32", sparse=False, version_compatible=True)
    assert seen()["parsed"] == str(net.path)
    assert seen()["flags"] == ["VERSION_COMPATIBLE", *(["INT8"] if version == "8.6.0" else [])]


class Heard:
    def __init__(self):
        self.updates = []

    def update(self, label, done, total, note=""):
        self.updates.append((label, done, total, note))


@pytest.mark.parametrize("version", ["8.6.0", "10.3.0"])
def test_the_builders_phases_reach_the_caller_where_the_version_tells_them(version, stand_in, tiny_net, tmp_path):
    stand_in(version)
    heard = Heard()
    build(tiny_net("N"), tmp_path, heard)
    told = [("Building", 0, 2), ("Timing", 0, 3), ("Timing", 2, 3), ("Timing", 3, 3), ("Building", 2, 2)]
    expected = [("TensorRT", done, total, phase) for phase, done, total in told]
    assert heard.updates == ([] if version == "8.6.0" else expected)


def test_a_line_that_is_not_yet_whole_waits(tmp_path):
    told, heard = tmp_path / "told", Heard()
    look = _trt.follow(told, "x", heard)
    look()
    told.write_text('["a", 0, 2]\n["a", 1')
    look()
    assert heard.updates == [("x", 0, 2, "a")]
    told.write_text('["a", 0, 2]\n["a", 1, 2]\n')
    look()
    look()
    assert heard.updates == [("x", 0, 2, "a"), ("x", 1, 2, "a")]


CACHE = "standin-trt-10.3.0-NVIDIA-A100-SXM4-sm80.timing"


def stored(body):
    return hashlib.sha256(body).digest() + body


def test_timings_are_kept_by_version_and_gpu(stand_in, tiny_net, tmp_path):
    seen, net = stand_in("10.3.0"), tiny_net("N")
    file = tmp_path / "cache" / "sparsify-deploy" / "tensorrt" / CACHE
    assert build(net, tmp_path)[0]["timing_cache"] == {"file": CACHE, "loaded_bytes": 0}
    assert file.read_bytes() == stored(b"+timed")
    assert build(net, tmp_path)[0]["timing_cache"] == {"file": CACHE, "loaded_bytes": 6}
    assert seen()["caches"] == [b"+timed".hex()]
    assert file.read_bytes() == stored(b"+timed+timed")
    assert [path.name for path in file.parent.iterdir()] == [CACHE]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "the timing cache is damaged"),
        (stored(b"+timed")[:-1], "the timing cache is damaged"),
        (stored(b"odd"), "the builder does not take this timing cache"),
        (stored(b"elsewhere"), "the builder does not take this timing cache"),
    ],
)
def test_a_timing_cache_that_is_of_no_use_is_a_warning(content, line, stand_in, tiny_net, tmp_path):
    stand_in("10.3.0")
    file = tmp_path / "mine" / CACHE
    file.parent.mkdir()
    file.write_bytes(content)
    facts, warnings, _ = build(tiny_net("N"), tmp_path, timing_cache=str(file.parent))
    assert facts["timing_cache"]["loaded_bytes"] == 0
    assert warnings[0].startswith(f"{file}: {line}")
    assert file.read_bytes() == stored(b"+timed")
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_written_is_a_warning(stand_in, tiny_net, tmp_path):
    stand_in("10.3.0")
    (tmp_path / "taken").write_text("a file")
    _, warnings, _ = build(tiny_net("N"), tmp_path, timing_cache=str(tmp_path / "taken" / "inner"))
    assert "the timing cache cannot be written: Not a directory" in warnings[0]
    facts, warnings, _ = build(tiny_net("N"), tmp_path, timing_cache=False)
    assert facts["timing_cache"] == {"file": None, "reason": "switched off"}
    assert warnings == ("a native warning",)


@pytest.mark.parametrize(("home", "expected"), [("", ".cache"), ("relative", ".cache"), ("/cache", None)])
def test_the_cache_folder_follows_xdg(home, expected, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    monkeypatch.setenv("HOME", str(tmp_path))
    base = tmp_path / expected if expected else Path(home)
    assert _trt.timing_cache_folder(True) == base / "sparsify-deploy" / "tensorrt"
    assert _trt.timing_cache_folder(False) is None
    assert _trt.timing_cache_folder("~/mine") == tmp_path / "mine"


def test_a_builder_that_hangs_or_crashes_is_a_message(stand_in, tiny_net, tmp_path):
    net = tiny_net("N")
    stand_in("10.3.0", "time.sleep(600)")
    with pytest.raises(NativeCrash, match=r"the TensorRT builder was stopped after its time limit of 4 s") as caught:
        build(net, tmp_path, Heard(), time_limit_s=4.0)
    assert caught.value.exit_code == 3
    stand_in("10.3.0", "os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(NativeCrash, match=r"the TensorRT builder crashed \(SIGSEGV\)"):
        build(net, tmp_path, Heard())
    assert not (tmp_path / "net.engine").exists()


GPU = "TensorRT builds only on the GPU it builds for and "


@pytest.mark.parametrize(
    ("here", "params", "line"),
    [
        ("sm80", {}, None),
        ("sm80", {"targets": ("sm80",)}, None),
        ("sm80", {"targets": ("sm86", "sm90"), "ampere_plus": True}, None),
        (
            "sm90",
            {"targets": ("sm80",)},
            GPU + "this one is sm90, not sm80: build on a machine with sm80; or set ampere_plus: true, for one slower "
            "engine that runs on sm80 and every later GPU; or use runtime tensorrt_rtx, which "
            "builds ahead of time for sm80 without a GPU",
        ),
        (
            "sm75",
            {"targets": ("sm90",), "ampere_plus": True},
            GPU + "this one is sm75, not sm90: build on a machine "
            "with sm90; or tensorrt_rtx builds ahead of time for sm80, sm86, sm89 and sm120, but has no sm90",
        ),
        (
            None,
            {"targets": ("sm86", "sm90")},
            GPU + "there is none here, not sm86 and sm90: build on machines with sm86 and sm90; or use runtime "
            "tensorrt_rtx, which builds ahead of time for sm86 without a GPU, though not for sm90",
        ),
    ],
)
def test_a_target_that_this_gpu_is_not_names_the_ways_out(here, params, line, monkeypatch, tmp_path):
    monkeypatch.setattr(_gpu, "gpus", lambda: (_gpu.Gpu("NVIDIA Test", here),) if here else ())
    monkeypatch.setattr(_packages, "missing", lambda *names: None)
    assert tensorrt.target_reason(tensorrt.Params(**params)) == line
    if line is not None:
        with pytest.raises(RuntimeUnavailable, match=line[:60]) as caught:
            tensorrt.build(tmp_path / "n.onnx", tmp_path / "n.engine", tensorrt.Params(**params))
        assert caught.value.exit_code == 3


def test_the_record_names_gpu_driver_version_hash_and_options(stand_in, tiny_net, tmp_path, monkeypatch):
    stand_in("10.3.0")
    monkeypatch.setattr(tensorrt, "_FLAVOUR", FLAVOUR)
    monkeypatch.setattr(tensorrt, "unavailable_reason", lambda: None)
    monkeypatch.setattr(tensorrt, "cannot_run_reason", lambda: None)
    monkeypatch.setattr(_packages, "missing", lambda *names: None)
    monkeypatch.setattr(tensorrt, "version", lambda: "10.3.0")
    net, engine = tiny_net("N"), tmp_path / "net.engine"
    notes = tensorrt.build(net.path, engine, tensorrt.Params(targets=("sm80",)))
    record = _metadata.check(engine, trust=False)
    assert notes.runs_here
    assert record["version"] == "10.3.0"
    assert record["onnx_sha256"] == hashlib.sha256(net.path.read_bytes()).hexdigest()
    assert record["options"]["targets"] == ["sm80"]
    facts = record["facts"]
    assert (facts["gpu"], facts["architecture"]) == ("NVIDIA A100-SXM4", "sm80")
    assert "driver" in facts


def test_the_next_lower_precision_keeps_every_other_setting():
    params = tensorrt.Params(precision="fp32", max_batch=8, optimization_level=5)
    assert tensorrt.lower_precision(params) == ("FP16", params.model_copy(update={"precision": "fp16"}))
    assert tensorrt.lower_precision(tensorrt.Params()) is None


def quantised(kind, zero, operator="DequantizeLinear", value=1):
    """x -> Q -> DQ -> Add a constant that `operator` makes of integers of type `kind` with zero point `zero`."""
    nodes = [helper.make_node(operator, ["c", "s", "z"], ["d"], name="/bias_dq")]
    nodes.append(helper.make_node("Add", ["x", "d"], ["y"]))
    constants = {"c": kind(value), "s": np.float32(0.1), "z": kind(zero)}
    return made(nodes, constants)


def made(nodes, constants, opset=17):
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "net", values[:1], values[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def scale_of_zero():
    model = quantised(np.int8, 0)
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.float32(0), "s"))
    return model


def dropout():
    nodes = [helper.make_node("Dropout", ["x", "ratio", "training"], ["y"], name="/drop")]
    return made(nodes, {"ratio": np.float32(0.5), "training": np.array(True)})


def integer_product():
    nodes = [
        helper.make_node("Cast", ["x"], ["q"], to=TensorProto.INT8),
        helper.make_node("MatMulInteger", ["q", "w"], ["i"], name="/product"),
        helper.make_node("Cast", ["i"], ["y"], to=TensorProto.FLOAT),
    ]
    return made(nodes, {"w": np.ones((2, 2), np.int8)})


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (
            quantised(np.int32, 0),
            r"node '/bias_dq' \(operator DequantizeLinear\): it holds an INT32 bias; .* flavour t",
        ),
        (quantised(np.uint8, 0), r"node '/bias_dq' .*: it quantises to UINT8; .* flavour tensorrt"),
        (quantised(np.int8, 3), r"node '/bias_dq' .*: its zero point is not 0; .* flavour tensorrt"),
        (scale_of_zero(), r"'/bias_dq': 1 of 1 scales are not above 0"),
        (dropout(), r"node '/drop' \(operator Dropout\): .* call \.eval\(\) on the very object"),
        (integer_product(), r"node '/product' \(operator MatMulInteger\): TensorRT reads Quant"),
    ],
    ids=["int32 bias", "uint8", "zero point", "zero scale", "dropout", "integer product"],
)
def test_what_no_version_takes_is_refused_before_the_builder_starts(model, line, tmp_path, monkeypatch):
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(ModelError, match=line) as caught:
        _trt.build(
            _trt.Flavour("never_imported", "TensorRT"), tmp_path / "net.onnx", tmp_path / "n.engine", tensorrt.Params()
        )
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "net.onnx"))
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("cut", [0, 300])
def test_a_broken_file_never_reaches_the_builder(cut, tiny_net, tmp_path):
    net = tiny_net()
    net.path.write_bytes(net.path.read_bytes()[:cut])
    with pytest.raises(ModelError, match="cut off" if cut else "empty"):
        _trt.build(NEVER_IMPORTED, net.path, tmp_path / "n.engine", tensorrt.Params())


def test_data_outside_the_folder_never_reach_the_builder(tiny_net, tmp_path):
    net = tiny_net(external=True)
    model = onnx.load(net.path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../tiny.data" if entry.key == "location" else entry.value
    net.path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="outside the file's folder"):
        _trt.build(NEVER_IMPORTED, net.path, tmp_path / "n.engine", tensorrt.Params())


@pytest.mark.parametrize(
    ("operator", "reason", "advice"),
    [
        ("Det", "unsupported node", "Export the model without that operator"),
        ("Dropout", "Assertion failed: training mode", "Call .eval() on the very object"),
        ("Conv", "invalid weights type of Int8", "This version wants FP32 weights behind Q and DQ"),
        ("QuantizeLinear", "Zero point must be 0", "That is how files for ONNX Runtime are quantised"),
        ("DequantizeLinear", "Scale must be positive", "Calibrate again"),
        ("Add", "unsupported type DOUBLE", "Export the model in float32"),
    ],
)
def test_what_a_parser_says_comes_with_what_to_do(operator, reason, advice, tmp_path):
    error = {"index": 0, "reason": reason, "name": "", "operator": ""}
    answer = {"failed": "parse", "errors": [error], "nodes": [("/n", operator)]}
    line = _trt_refusals.refusal("TensorRT", tmp_path / "net.onnx", answer)
    assert f"TensorRT cannot parse node '/n' (operator {operator}): {reason}. {advice}" in line
