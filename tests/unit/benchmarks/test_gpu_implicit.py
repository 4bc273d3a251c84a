"""INT8 without Q/DQ, with a stand-in for TensorRT 8.6 that writes down what it is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gpu import implicit

from sparsify_deploy.errors import ModelError, RuntimeUnavailable

TENSORRT = """
import json, enum
__version__ = "%(version)s"

class NetworkDefinitionCreationFlag(enum.IntEnum):
    EXPLICIT_BATCH = 0

class TacticSource(enum.IntEnum):
    CUBLAS = 0
    CUBLAS_LT = 1
    CUDNN = 2
    EDGE_MASK_CONVOLUTIONS = 3

class ProfilingVerbosity(enum.Enum):
    DETAILED = 2

class BuilderFlag(enum.Enum):
    FP16 = 0
    INT8 = 1
    SPARSE_WEIGHTS = 2

class ILogger:
    pass

class Tensor:
    dynamic_range = None

class Layer:
    num_outputs = 2
    def __init__(self):
        self.outputs = [Tensor(), Tensor()]
    def get_output(self, i):
        return self.outputs[i]

class Network:
    num_inputs, num_layers = 1, 3
    def __init__(self):
        self.input, self.layers = Tensor(), [Layer() for _ in range(3)]
    def get_input(self, i):
        return self.input
    def get_layer(self, i):
        return self.layers[i]

class OnnxParser:
    def __init__(self, network, logger):
        self.logger = logger
    def parse_from_file(self, path):
        if "bad" in path:
            self.logger.log("Severity.ERROR", "no such\\noperator")
        return "bad" not in path

class Config:
    def __init__(self):
        self.flags, self.sources = [], 15
    def set_flag(self, flag):
        self.flags.append(flag.name)
    def get_tactic_sources(self):
        return self.sources
    def set_tactic_sources(self, sources):
        self.sources = sources

class Builder:
    def __init__(self, logger):
        self.logger = logger
    def create_network(self, flags):
        assert flags == 1
        return Network()
    def create_builder_config(self):
        return Config()
    def build_serialized_network(self, network, config):
        self.logger.log("Severity.VERBOSE", "chatter")
        self.logger.log("Severity.INFO", "(Sparsity) Layers eligible for sparse math: conv0, conv1 + relu1")
        self.logger.log("Severity.INFO", "(Sparsity) TRT inference plan picked sparse implementation for layers: conv0")
        tensors = [network.input, *(t for layer in network.layers for t in layer.outputs)]
        ranges = [tensor.dynamic_range for tensor in tensors]
        return json.dumps([sorted(config.flags), config.sources, ranges, config.profiling_verbosity.name]).encode()
"""


@pytest.fixture
def tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "site" / "tensorrt.py"
    path.parent.mkdir()
    path.write_text(TENSORRT % {"version": "8.6.0"})
    monkeypatch.syspath_prepend(str(path.parent))  # the child process gets this path
    return path


@pytest.mark.parametrize("sparse", [True, False])
def test_every_tensor_has_a_range_and_the_flags_are_set(tensorrt: Path, tmp_path: Path, sparse: bool) -> None:
    notes = implicit.build(tmp_path / "net.onnx", tmp_path / "net.engine", sparse=sparse, time_limit_s=60)
    flags, sources, ranges, verbosity = json.loads((tmp_path / "net.engine").read_bytes())
    assert flags == ["FP16", "INT8", *(["SPARSE_WEIGHTS"] if sparse else [])]
    assert sources == 8  # cuBLAS, cuBLASLt and cuDNN off
    assert ranges == [[-5.0, 5.0]] * 7
    assert verbosity == "DETAILED"
    assert notes.facts["sparse_eligible"] == ["conv0", "conv1 + relu1"]
    assert notes.facts["sparse_picked"] == ["conv0"]
    assert (notes.version, notes.options["implicit_int8"]) == ("8.6.0", True)


def test_a_network_it_cannot_parse(tensorrt: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"bad\.onnx: the TensorRT builder refused it: no such operator"):
        implicit.build(tmp_path / "bad.onnx", tmp_path / "net.engine", sparse=True, time_limit_s=60)


@pytest.mark.parametrize("version", ["10.3.0", "11.0.0"])
def test_newer_versions_are_not_asked(tensorrt: Path, tmp_path: Path, version: str) -> None:
    tensorrt.write_text(TENSORRT % {"version": version})
    with pytest.raises(RuntimeUnavailable, match=f"TensorRT {version} has no INT8 without Q/DQ"):
        implicit.build(tmp_path / "net.onnx", tmp_path / "net.engine", sparse=True, time_limit_s=60)
