"""An INT8 network over INT64 tokens, with a free batch and a free length, in every runtime that this machine has."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sparsify_deploy import deploy, menu
from sparsify_deploy.errors import DataError, ModelError
from sparsify_deploy.export.axes import FreeAxes
from sparsify_deploy.export.onnx import export
from sparsify_deploy.graph import file
from sparsify_deploy.graph.int8_weights import store_int8_weights_
from sparsify_deploy.quantization import int8
from sparsify_deploy.runtimes import _metadata, _tensors, _trt_build, onnxruntime, tensorrt_rtx
from sparsify_deploy.stages.flavours import write_onnxruntime
from sparsify_deploy.types import AxisSizes, IOTensor, Silent

pytest.importorskip("modelopt")
pytest.importorskip("onnxruntime")
NAMES = ("input_ids", "attention_mask")
FREE = FreeAxes({name: {1: "length"} for name in NAMES}, {"length": AxisSizes(2, 7, 16)})
LENGTHS = ((1, 2), (3, 7), (2, 16))


class Tokens(nn.Module):
    """Two-headed attention, an MLP and a classifier over tokens; hidden ones by the smallest float, as BERT does it."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(50, 32), nn.Embedding(16, 32)
        self.query, self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.norm, self.up, self.down, self.head = (
            nn.LayerNorm(32),
            nn.Linear(32, 64),
            nn.Linear(64, 32),
            nn.Linear(32, 8),
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.norm(self.tokens(input_ids) + self.places(places))
        hidden = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * torch.finfo(torch.float32).min
        q, k, v = (
            layer(x).view(x.shape[0], x.shape[1], 2, 16).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = torch.softmax(q @ k.transpose(-1, -2) / 4.0 + hidden, -1) @ v
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        x = x + self.down(torch.relu(self.up(x)))
        logits: Tensor = self.head(x[:, 0])
        return logits


def tokens(count: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * count + length)
    mask = torch.ones(count, length, dtype=torch.int64)
    mask[-1, length // 2 + 1 :] = 0
    return {"input_ids": torch.randint(0, 50, (count, length), generator=generator), "attention_mask": mask}


def arrays(count: int, length: int) -> dict[str, NDArray[Any]]:
    return {name: values.numpy() for name, values in tokens(count, length).items()}


@dataclass(frozen=True)
class Made:
    module: nn.Module
    tensorrt: Path
    onnxruntime: Path

    def answer(self, count: int, length: int) -> NDArray[Any]:
        with torch.no_grad():
            answered: NDArray[Any] = self.module(**tokens(count, length)).numpy()
        return answered


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("tokens")
    torch.manual_seed(0)
    quantized = int8.prepare(Tokens().eval(), int8.Int8Settings())
    calibration = [tokens(16, length) for length in (5, 7, 16)]
    int8.calibrate_(quantized, calibration, NAMES)
    module, source, target = quantized.module.eval(), folder / "tensorrt.onnx", folder / "ort.onnx"
    export(module, tokens(1, 7), NAMES, source, free=FREE)
    written = file.load(source)
    store_int8_weights_(written)
    file.save(written, source)
    write_onnxruntime(source, target, [{name: values.numpy() for name, values in each.items()} for each in calibration])
    return Made(module, source, target)


def close(found: NDArray[Any], expected: NDArray[Any], share: float = 0.05) -> None:
    """Within `share` of the largest value: a few quantisation steps."""
    assert found.shape == expected.shape
    assert float(np.abs(found - expected).max()) <= share * float(np.abs(expected).max())


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("fixed", [False, True])
def test_lengths_that_change_from_run_to_run(made, tmp_path, name, fixed) -> None:
    runtime = menu.entry("runtimes", name)
    if reason := runtime.unavailable_reason():
        pytest.skip(reason)
    engine, share = tmp_path / f"net{runtime.SUFFIX}", 0.15 if name == "onnxruntime" else 0.05  # it rounds outputs too
    runtime.build(made.onnxruntime if name == "onnxruntime" else made.tensorrt, engine, runtime.Params())
    if fixed:
        for count, length in LENGTHS:
            shapes = dict.fromkeys(NAMES, (count, length))
            with runtime.open(engine, runtime.Params(), shapes=shapes) as session:
                assert [each.shape for each in session.inputs] == [(count, length)] * 2
                session.bind(arrays(count, length))
                session.execute()
                close(session.fetch()["output"], made.answer(count, length), share)
                with pytest.raises(DataError, match="has shape"):
                    session.bind(arrays(count, length + 1))
        return
    with runtime.open(engine, runtime.Params()) as session:
        assert session.inputs == tuple(IOTensor(each, (None, None), "int64") for each in NAMES)
        for count, length in (*LENGTHS, LENGTHS[0]):
            session.bind(arrays(count, length))
            session.execute()
            close(session.fetch()["output"], made.answer(count, length), share)


def test_every_engine_keeps_the_sizes_of_its_axes(made, tmp_path) -> None:
    for name, source in (("openvino", made.tensorrt), ("onnxruntime", made.onnxruntime)):
        runtime = menu.entry("runtimes", name)
        if reason := runtime.unavailable_reason():
            pytest.skip(reason)
        engine = tmp_path / f"{name}{runtime.SUFFIX}"
        runtime.build(source, engine, runtime.Params())
        tensors = [IOTensor(each, (None, None), "int64") for each in NAMES]
        assert _metadata.typical_shapes(engine, tensors, 4) == dict.fromkeys(NAMES, (4, 7))
        if name == "openvino":
            found = deploy.inspect(engine, "2:4", trust=False, profile=True)
            assert found.profile is not None
            assert found.profile.layers


def test_typical_shapes_of_what_is_known_alone() -> None:
    sizes = {"ids": {"1": [2, 7, 16]}}
    tensors = [IOTensor("ids", (None, None), "int64"), IOTensor("image", (None, 3), "float32")]
    assert _tensors.typical_shapes(tensors, 4, sizes) == {"ids": (4, 7)}
    assert _tensors.typical_shapes([IOTensor("ids", (2, None), "int64")], 4, sizes) == {"ids": (2, 7)}
    assert _tensors.typical_shapes([IOTensor("ids", (None, None, None), "int64")], 4, sizes) == {}


def test_bench_takes_the_typical_length_and_says_so(made) -> None:
    found = deploy.bench(
        [made.tensorrt, made.onnxruntime],
        runtime="onnxruntime",
        batch_sizes=(1, 3),
        threads=1,
        rounds=3,
        round_ms=1.0,
        trust=False,
        progress=Silent(),
    )
    assert [race.batch_size for race in found.races] == [1, 3]
    assert "input_ids (7) an example, attention_mask (7) an example" in found.inputs


@pytest.mark.skipif(tensorrt_rtx.unavailable_reason() is not None, reason=str(tensorrt_rtx.unavailable_reason()))
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_real_build_with_a_free_batch_and_length(made, tmp_path, precision) -> None:
    engine = tmp_path / "net.rtx.engine"
    params = tensorrt_rtx.Params(precision=precision, opt_batch=8, max_batch=16)
    notes = tensorrt_rtx.build(made.tensorrt, engine, params)
    assert notes.facts["axis_sizes"] == {name: {"1": [2, 7, 16]} for name in NAMES}
    assert notes.facts["layers_parsed"] > 20
    assert json.loads(_metadata.metadata_path(engine).read_text())["facts"]["axis_sizes"]["input_ids"] == {
        "1": [2, 7, 16]
    }


@pytest.mark.skipif(tensorrt_rtx.unavailable_reason() is not None, reason=str(tensorrt_rtx.unavailable_reason()))
def test_a_range_that_is_asked_for_goes_before_the_file(made, tmp_path) -> None:
    wrong = tensorrt_rtx.Params.model_validate({"shapes": {"input_ids": {"min": [1], "opt": [1], "max": [1]}}})
    with pytest.raises(ModelError, match=r"params\.shapes\.input_ids: does not fit the file's \(\?, \?\)"):
        tensorrt_rtx.build(made.tensorrt, tmp_path / "net.rtx.engine", wrong)


class Network:
    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.tensors = [type("Tensor", (), {"name": name, "shape": shape}) for name, shape in shapes.items()]
        self.num_inputs, self.sizes = len(self.tensors), {}

    def get_input(self, i: int) -> Any:
        return self.tensors[i]

    def create_optimization_profile(self) -> Any:
        return self

    def set_shape(self, name: str, *sizes: tuple[int, ...]) -> None:
        self.sizes[name] = sizes

    def add_optimization_profile(self, profile: Any) -> None:
        self.added = profile


def test_the_profile_goes_from_the_least_to_the_largest_size() -> None:
    network = Network({"ids": (-1, -1), "image": (-1, 3, 8), "fixed": (2, -1), "scalar": ()})
    request = {
        "shapes": {},
        "min_batch": 1,
        "opt_batch": 4,
        "max_batch": 32,
        "axis_sizes": {"ids": {"1": [2, 7, 16]}, "fixed": {"1": [2, 7, 16]}},
    }
    assert _trt_build.add_profile(network, network, network, request) is None
    assert network.sizes == {
        "ids": ((1, 2), (4, 7), (32, 16)),
        "image": ((1, 3, 8), (4, 3, 8), (32, 3, 8)),
        "fixed": ((2, 2), (2, 7), (2, 16)),
    }
    assert network.added is network
    failed = _trt_build.add_profile(network, network, network, {**request, "axis_sizes": {}})
    assert "input 'ids' has the dynamic axis 1 and no range for it" in failed["reason"]


def test_fp16_takes_tokens_as_they_are_and_hides_what_is_masked(made, tmp_path) -> None:
    from sparsify_deploy.graph.float16 import save, to_float16

    model, done = to_float16(file.load(made.tensorrt))
    assert done.half > 10
    path = tmp_path / "half.onnx"
    save(model, path)
    assert {each.dtype for each in file.inputs(file.load(path))} == {"int64"}
    with onnxruntime.open(path, onnxruntime.Params()) as session:
        for count, length in LENGTHS:
            session.bind(arrays(count, length))
            session.execute()
            close(session.fetch()["output"], made.answer(count, length))


def test_triton_serves_a_free_length_and_warms_up_at_the_typical_one(made, tmp_path) -> None:
    from sparsify_deploy.reporting import triton

    engine = tmp_path / "net.onnx"
    onnxruntime.build(made.onnxruntime, engine, onnxruntime.Params())
    record = _metadata.check(engine, trust=False)
    text = triton.config("net", triton.described(engine, record, made.onnxruntime, why="test"))
    assert text.count("data_type: TYPE_INT64\n  dims: [ -1 ]") == 2
    assert text.count("data_type: TYPE_INT64 dims: [ 7 ] zero_data: true") == 4


def test_a_text_longer_than_the_positions_is_one_line(made) -> None:
    with onnxruntime.open(made.onnxruntime, onnxruntime.Params()) as session:
        session.bind(arrays(1, 17))
        with pytest.raises(ModelError, match="ONNX Runtime failed while running") as caught:
            session.execute()
    assert "\n" not in str(caught.value)
