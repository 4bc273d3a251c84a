"""What the two TensorRT runtimes share, against stand-ins for what no machine without a GPU has."""

from __future__ import annotations

from enum import IntEnum
from types import SimpleNamespace

import pytest
from onnx import TensorProto, helper

from sparsify_deploy.errors import ModelError, NativeCrash, RuntimeUnavailable
from sparsify_deploy.runtimes import _gpu, _trt, _trt_build, _trt_refusals, tensorrt


def test_the_builders_log_says_what_was_eligible_and_picked():
    said = _trt_build.sparsity_said(
        [
            "(Sparsity) Layers eligible for sparse math: conv1 + relu1, fc",
            "something else",
            "(Sparsity) TRT inference plan picked sparse implementation for layers: conv1 + relu1",
        ]
    )
    assert said == {"sparse_eligible": ["conv1 + relu1", "fc"], "sparse_picked": ["conv1 + relu1"]}


def test_none_picked_is_not_the_same_as_nothing_said():
    said = _trt_build.sparsity_said(["(Sparsity) TRT inference plan picked sparse implementation for layers:"])
    assert said == {"sparse_eligible": None, "sparse_picked": []}


class Unreadable:
    """A ParserError of TensorRT 8.6: no node_name, no node_operator, and a desc() that is no UTF-8."""

    def desc(self):
        b"\xff".decode()

    def code(self):
        return "ErrorCode.UNSUPPORTED_NODE"

    def node(self):
        return 1


def test_an_unreadable_parser_error_still_names_the_node(tmp_path):
    error = _trt_build.parser_error(Unreadable())
    assert error == {"index": 1, "reason": "unsupported node", "name": "", "operator": ""}
    message = _trt_refusals.refusal(
        "TensorRT",
        tmp_path / "net.onnx",
        {"failed": "parse", "errors": [error, error], "nodes": [("first", "Conv"), ("second", "Det")]},
    )
    assert "TensorRT cannot parse node 'second' (operator Det): unsupported node. Export" in message


def fake_tensorrt(*, strongly_typed, libraries):
    names = {"EXPLICIT_BATCH": 0} | ({"STRONGLY_TYPED": 1} if strongly_typed else {})
    flags = {"SPARSE_WEIGHTS": 3} | ({} if strongly_typed else {"FP16": 0, "INT8": 1})
    sources = ({"CUBLAS": 0, "CUBLAS_LT": 1, "CUDNN": 2} if libraries else {}) | {"JIT_CONVOLUTIONS": 4}
    return SimpleNamespace(
        NetworkDefinitionCreationFlag=IntEnum("Creation", names),
        BuilderFlag=IntEnum("BuilderFlag", flags),
        TacticSource=IntEnum("TacticSource", sources),
        ProfilingVerbosity=SimpleNamespace(DETAILED="detailed"),
        HardwareCompatibilityLevel=SimpleNamespace(AMPERE_PLUS="ampere+"),
        MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"),
    )


class FakeConfig:
    def __init__(self):
        self.flags, self.sources, self.pool = [], 0b11111, {}

    def set_flag(self, flag):
        self.flags.append(flag.name)

    def get_tactic_sources(self):
        return self.sources

    def set_tactic_sources(self, mask):
        self.sources = mask

    def set_memory_pool_limit(self, pool, size):
        self.pool[pool] = size


def configured(trt, typed, quantised=True, **params):
    config = FakeConfig()
    request = {**tensorrt.Params(**params).model_dump(mode="json"), "quantised": quantised}
    return config, _trt_build.configure(trt, config, request, typed)


def test_8_6_gets_the_int8_flag_and_no_library_tactics():
    config, without_effect = configured(fake_tensorrt(strongly_typed=False, libraries=True), typed=False)
    assert config.flags == ["SPARSE_WEIGHTS", "INT8", "FP16"]
    assert config.sources == 0b11000
    assert config.profiling_verbosity == "detailed"
    assert without_effect == []


def test_a_strongly_typed_network_gets_no_precision_flag():
    trt = fake_tensorrt(strongly_typed=True, libraries=False)
    config, without_effect = configured(trt, typed=True, sparse=False, library_tactics=True, workspace_mib=2)
    assert config.flags == []
    assert config.sources == 0b11111
    assert config.pool == {"workspace": 2 << 20}
    assert without_effect == ["library_tactics has no effect: this version has no cuBLAS or cuDNN tactics"]


def test_a_float_network_on_8_6_gets_no_int8_flag():
    config, _ = configured(
        fake_tensorrt(strongly_typed=False, libraries=True), typed=False, quantised=False, precision="fp32"
    )
    assert config.flags == ["SPARSE_WEIGHTS"]


def test_an_option_that_the_version_lacks_is_said():
    trt = fake_tensorrt(strongly_typed=True, libraries=True)
    del trt.HardwareCompatibilityLevel
    config, without_effect = configured(
        trt, typed=True, version_compatible=True, ampere_plus=True, optimization_level=3, sparse=False
    )
    assert config.flags == []
    assert without_effect == [
        "version_compatible has no effect: this version has no such option",
        "optimization_level has no effect: this version has no such option",
        "ampere_plus has no effect: this version has no such option",
    ]


def test_options_reach_a_version_that_has_them():
    trt = fake_tensorrt(strongly_typed=True, libraries=True)
    trt.BuilderFlag = IntEnum("BuilderFlag", {"SPARSE_WEIGHTS": 3, "VERSION_COMPATIBLE": 4})
    config = FakeConfig()
    config.builder_optimization_level = config.hardware_compatibility_level = None
    params = tensorrt.Params(version_compatible=True, ampere_plus=True, optimization_level=3, library_tactics=True)
    assert _trt_build.configure(trt, config, {**params.model_dump(mode="json"), "quantised": True}, True) == []
    assert config.flags == ["SPARSE_WEIGHTS", "VERSION_COMPATIBLE"]
    assert (config.builder_optimization_level, config.hardware_compatibility_level) == (3, "ampere+")
    assert config.sources == 0b11111


class FakeNetwork:
    def __init__(self, *shapes):
        self.inputs = [SimpleNamespace(name=f"x{i}", shape=shape) for i, shape in enumerate(shapes)]
        self.num_inputs = len(shapes)

    def get_input(self, i):
        return self.inputs[i]


@pytest.mark.parametrize(
    ("shapes", "ranges"),
    [
        ([(1, 3)], None),
        ([(-1, 3), (7,)], {"x0": ((2, 3), (4, 3), (8, 3))}),
        ([(-1, 3), (-1,)], {"x0": ((2, 3), (4, 3), (8, 3)), "x1": ((2,), (4,), (8,))}),
    ],
)
def test_the_profile_covers_every_dynamic_batch(shapes, ranges):
    set_shapes, added = {}, []
    profile = SimpleNamespace(set_shape=lambda name, *sizes: set_shapes.update({name: sizes}))
    builder = SimpleNamespace(create_optimization_profile=lambda: profile)
    config = SimpleNamespace(add_optimization_profile=added.append)
    request = {"min_batch": 2, "opt_batch": 4, "max_batch": 8, "shapes": {}}
    assert _trt_build.add_profile(builder, config, FakeNetwork(*shapes), request) is None
    assert set_shapes == (ranges or {})
    assert added == ([profile] if ranges else [])


RANGE = {"min": [1, 3, 8], "opt": [2, 3, 16], "max": [4, 3, 32]}


def test_a_range_of_shapes_goes_into_the_profile_as_it_is():
    assert profiled({"x0": RANGE}, (-1, 3, -1)) == (None, {"x0": ((1, 3, 8), (2, 3, 16), (4, 3, 32))})


@pytest.mark.parametrize(
    ("shapes", "line"),
    [
        (
            {},
            "input 'x0' has the dynamic axis 2 and no range for it: write params.shapes: {x0: {min: [1, 3, 1], "
            "opt: [16, 3, 16], max: [64, 3, 64]}} with the sizes that you need, or fix the axis at export",
        ),
        ({"x0": {**RANGE, "max": [4, 5, 32]}}, "params.shapes.x0: does not fit the file's (?, 3, ?)"),
        (
            {"x0": {key: value[:2] for key, value in RANGE.items()}},
            "params.shapes.x0: does not fit the file's (?, 3, ?)",
        ),
        ({"x0": RANGE, "y": RANGE}, "params.shapes.y: there is no such input; the file has x0"),
    ],
)
def test_a_missing_or_wrong_range_is_one_line(shapes, line):
    assert profiled(shapes, (-1, 3, -1))[0] == {"reason": line}


def profiled(shapes, *network):
    set_shapes = {}
    profile = SimpleNamespace(set_shape=lambda name, *sizes: set_shapes.update({name: sizes}))
    builder = SimpleNamespace(create_optimization_profile=lambda: profile)
    config = SimpleNamespace(add_optimization_profile=lambda profile: None)
    request = {"min_batch": 2, "opt_batch": 4, "max_batch": 8, "shapes": shapes}
    return _trt_build.add_profile(builder, config, FakeNetwork(*network), request), set_shapes


def test_tensorrt_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr("sparsify_deploy.runtimes._packages.installed", lambda module: False)
    reason = "TensorRT is not installed: pip install 'sparsify-deploy[gpu]'"
    assert tensorrt.unavailable_reason() == reason
    assert tensorrt.cannot_run_reason() == reason
    monkeypatch.setattr("sparsify_deploy.runtimes._packages.installed", lambda module: True)
    monkeypatch.setattr(_gpu, "no_gpu_reason", lambda: "no NVIDIA GPU here")
    assert tensorrt.unavailable_reason() == "TensorRT builds only on the GPU it builds for: no NVIDIA GPU here"
    monkeypatch.setattr(_gpu, "no_gpu_reason", lambda: None)
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.8: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    _trt.probe_reason.cache_clear()
    assert "does not import: libnvinfer.so.8" in tensorrt.unavailable_reason()
    with pytest.raises(RuntimeUnavailable, match=r"^TensorRT is installed but does not work here: [^\n]*$"):
        tensorrt.build(tmp_path / "net.onnx", tmp_path / "net.engine", tensorrt.Params())
    (tmp_path / "tensorrt.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    _trt.probe_reason.cache_clear()
    assert "crashed (SIGSEGV)" in tensorrt.unavailable_reason()
    _trt.probe_reason.cache_clear()


def test_a_builder_that_segfaults_is_a_message_with_its_log(tmp_path, monkeypatch):
    """A stand-in package with the names that are used before the parser, which dies where the native one has."""
    (tmp_path / "fake_trt.py").write_text(
        "import os, signal\n"
        "class ILogger:\n    def __init__(self): pass\n"
        "class NetworkDefinitionCreationFlag:\n    EXPLICIT_BATCH = 0\n"
        "class Network:\n    num_layers = 0\n"
        "class Builder:\n"
        "    def __init__(self, logger): logger.log('Severity.INFO', 'about to parse')\n"
        "    def create_network(self, flags):\n        assert flags == 1\n        return Network()\n"
        "class OnnxParser:\n"
        "    def __init__(self, network, logger): pass\n"
        "    def parse_from_file(self, path): os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", value[:1], value[1:])
    path, engine = tmp_path / "net.onnx", tmp_path / "net.engine"
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString())
    with pytest.raises(
        NativeCrash, match=r"the TensorRT builder crashed \(SIGSEGV\): try .* its log is .*net.engine.log"
    ):
        _trt.build(_trt.Flavour("fake_trt", "TensorRT"), path, engine, tensorrt.Params())
    assert (tmp_path / "net.engine.log").read_text() == "INFO: about to parse\n"
    path.write_bytes(b"")
    with pytest.raises(ModelError, match="empty"):
        _trt.build(_trt.Flavour("fake_trt", "TensorRT"), path, engine, tensorrt.Params())


@pytest.mark.parametrize(
    ("messages", "eligible", "picked"),
    [
        (
            [
                "(Sparsity) Found 3 layer(s) eligible to use sparse tactics: conv1 + PWN(a, b), fc1, fc2",
                "(Sparsity) Chose 1 layer(s) using sparse tactics: fc1",
            ],
            ["conv1 + PWN(a, b)", "fc1", "fc2"],
            ["fc1"],
        ),
        (
            [
                "(Sparsity) Found 39 layer(s) eligible to use sparse tactics",
                "(Sparsity) Chose 0 layer(s) using sparse tactics",
            ],
            None,
            [],
        ),
        (["(Sparsity) Found 0 layer(s) eligible to use sparse tactics:"], [], None),
    ],
)
def test_what_version_10_says_of_sparse_layers(messages, eligible, picked):
    assert _trt_build.sparsity_said(messages) == {"sparse_eligible": eligible, "sparse_picked": picked}
