"""The stages that build and race engines: what takes part, what is left out and why, what is checked and kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsify_deploy.errors import CheckFailed
from sparsify_deploy.export.axes import FreeAxes
from sparsify_deploy.recipe import Benchmark, Export
from sparsify_deploy.reporting.layer_verdict import times_of
from sparsify_deploy.reports import SAME_GRAPH, BenchmarkReport, load
from sparsify_deploy.runtimes import openvino
from sparsify_deploy.stages import build_engine
from sparsify_deploy.stages.benchmark import BenchmarkEngines, Variant
from sparsify_deploy.stages.build_engine import BuildEngine
from sparsify_deploy.types import BuildNotes, Context, Progress

torch = pytest.importorskip("torch")

BENCHMARK = Benchmark(batch_sizes=(2, 3), rounds=5, round_ms=1.0, warmup_ms=1.0)


class Split:
    """Forty examples of 16 features with their labels."""

    def __len__(self) -> int:
        return 40

    def take(self, indices: Any) -> dict[str, Any]:
        x = torch.from_numpy(np.random.default_rng(0).standard_normal((40, 16)).astype(np.float32))
        return {"x": x[indices], "label": torch.arange(40)[indices] % 8}


class Subject:
    """What the stages use of a subject: 40 examples, and the share of positive answers as accuracy."""

    seed = 3
    examples = SimpleNamespace(inputs=("x",), split=lambda name: Split())
    opened_task = SimpleNamespace(evaluate=lambda outputs, batch: {"accuracy": float((outputs["y"] > 0).mean())})

    measured = True
    packages = ("torch",)
    free_axes = FreeAxes()

    def example(self, count: int = 1) -> dict[str, Any]:
        return Split().take(torch.arange(count))

    def test_arrays(self, count: int | None = None) -> dict[str, Any]:
        return {name: values.numpy() for name, values in self.example(40 if count is None else count).items()}

    timed_arrays = test_arrays

    def answers(self, outputs: Any) -> None:
        """Its task does not say which outputs are answers."""


@pytest.fixture
def net(tmp_path: Path) -> Callable[..., Path]:
    """A Gemm of 16 to 8 features that holds 2:4, as an ONNX file; `scale` multiplies its weights."""

    def make(name: str = "net.onnx", scale: float = 1.0) -> Path:
        weight = np.random.default_rng(1).standard_normal((8, 16)).astype(np.float32) * np.float32(scale)
        weight[:, 1::2] = 0
        graph = helper.make_graph(
            [helper.make_node("Gemm", ["x", "fc.weight", "bias"], ["y"], name="fc", transB=1)],
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("n", 16))],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("n", 8))],
            [numpy_helper.from_array(weight, "fc.weight"), numpy_helper.from_array(np.zeros(8, np.float32), "bias")],
        )
        onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / name)
        return tmp_path / name

    return make


def built(onnx_file: Path, folder: Path) -> Path:
    folder.mkdir()
    openvino.build(onnx_file, folder / "model.xml", openvino.Params())
    return folder


def stage(*variants: Variant) -> BenchmarkEngines:
    return BenchmarkEngines(Subject(), "openvino", openvino.Params(), BENCHMARK, variants)  # type: ignore[arg-type]


def run(chosen: Any, inputs: dict[str, Path], out: Path) -> BenchmarkReport:
    out.mkdir(exist_ok=True)
    chosen.run(inputs, out, Context())
    for file in chosen.outputs.values():
        assert (out / file).exists()
    return load(BenchmarkReport, out / "benchmark.json")


FLOAT = Variant("dense FP32", "float", "onnx", kept=True)
LOWER = Variant("dense BF16", "float", "lower_precision", kept=True)
TWIN = Variant(SAME_GRAPH, "sparse", "dense_weights")
FINAL = Variant("2:4 INT8", "engine", "engine")


def test_the_race_holds_every_variant_and_profiles_the_final_ones(net: Callable[..., Path], tmp_path: Path) -> None:
    inputs = {"float": net(), "sparse": net(), "engine": built(net(), tmp_path / "engine")}
    report = run(stage(FLOAT, TWIN, FINAL), inputs, tmp_path / "out")
    assert [(race.labels, race.batch_size) for race in report.races] == [
        (("dense FP32", SAME_GRAPH, "2:4 INT8"), 2),
        (("dense FP32", SAME_GRAPH, "2:4 INT8"), 3),
    ]
    assert set(report.profiles) == {SAME_GRAPH, "2:4 INT8"}
    for profile in report.profiles.values():
        assert times_of("fc", profile, "y")
    assert (report.metrics, report.left_out) == ({}, {})


def test_an_engine_the_verdict_may_ship_is_left_with_its_record_and_no_other(
    net: Callable[..., Path], tmp_path: Path
) -> None:
    inputs = {"float": net(), "sparse": net(), "engine": built(net(), tmp_path / "engine")}
    other = Variant("sparse FP32", "sparse", "onnx")
    run(stage(FLOAT, other, TWIN, FINAL), inputs, tmp_path / "out")
    raced = tmp_path / "out" / "raced"
    assert [folder.name for folder in raced.iterdir()] == [FLOAT.folder] == ["dense-fp32"]
    assert sorted(p.name for p in (raced / "dense-fp32").iterdir()) == ["model.bin", "model.xml", "model.xml.json"]


def test_the_same_graph_is_raced_with_no_zero_in_its_weights(net: Callable[..., Path], tmp_path: Path) -> None:
    inputs = {"sparse": net(), "engine": built(net(), tmp_path / "engine")}
    run(stage(TWIN, FINAL), inputs, tmp_path / "out")
    (file,) = (tmp_path / "out").rglob("dense_weights.onnx")
    (weight, _) = [numpy_helper.to_array(tensor) for tensor in onnx.load(file).graph.initializer]
    assert (weight != 0).all()


@pytest.mark.parametrize("native", [True, False])
def test_the_lower_precision_races_with_its_own_accuracy_or_is_left_out_with_the_reason(
    net: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    real = openvino.build

    def build(source: Path, engine: Path, params: openvino.Params, *, progress: Progress | None = None) -> BuildNotes:
        asked.append(params.precision)
        notes = real(source, engine, openvino.Params())
        lacking = params.precision == "bf16" and not native
        return dataclasses.replace(notes, runs_here=not lacking, warnings=("no BF16 here",) if lacking else ())

    asked: list[str] = []
    opened: list[str] = []
    real_open = openvino.open

    def as_f32(engine: Path, params: openvino.Params, **more: Any) -> Any:
        opened.append(params.precision)
        return real_open(engine, openvino.Params(), **more)

    monkeypatch.setattr(openvino, "build", build)
    monkeypatch.setattr(openvino, "open", as_f32)
    inputs = {"float": net(), "engine": built(net(), tmp_path / "engine")}
    asked.clear()
    report = run(stage(FLOAT, LOWER, FINAL), inputs, tmp_path / "out")
    assert asked == ["f32", "bf16"]
    if native:
        assert report.races[0].labels == ("dense FP32", "dense BF16", "2:4 INT8")
        assert set(report.metrics) == {"dense BF16"}
        assert 0.0 < report.metrics["dense BF16"]["accuracy"] < 1.0
        assert "bf16" in opened
        assert (tmp_path / "out" / "raced" / LOWER.folder / "model.xml").is_file()
    else:
        assert report.races[0].labels == ("dense FP32", "2:4 INT8")
        assert (report.metrics, report.left_out) == ({}, {"dense BF16": "no BF16 here"})
        assert not (tmp_path / "out" / "raced" / LOWER.folder).exists()


def test_a_runtime_that_cannot_run_here_races_nothing_and_says_why(
    net: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino, "cannot_run_reason", lambda: "no device")
    monkeypatch.setattr(openvino, "build", pytest.fail)
    report = run(stage(FLOAT), {"float": net()}, tmp_path / "out")
    assert (report.not_run, report.races, report.profiles) == ("no device", (), {})


def build(onnx_file: Path, out: Path, **limits: Any) -> dict[str, Any]:
    out.mkdir()
    chosen = BuildEngine(Subject(), "openvino", openvino.Params(), 16, Export(**limits))  # type: ignore[arg-type]
    return dict(chosen.run({"onnx": onnx_file}, out, Context()))


def test_an_engine_is_compared_with_its_file_on_test_examples_and_its_layers_are_kept(
    net: Callable[..., Path], tmp_path: Path
) -> None:
    facts = build(net(), tmp_path / "out", parity_examples=25)
    assert facts["parity"]["examples"] == 25
    assert facts["parity"]["max_relative"] < 1e-5
    (layer,) = facts["file_layers"]
    assert (layer["name"], layer["pattern_held"], layer["blocks"]) == ("fc", True, 32)
    assert 0.0 < facts["metrics"]["accuracy"] < 1.0


@pytest.mark.parametrize("quantised", [False, True])
def test_an_engine_that_answers_otherwise_is_refused(
    net: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantised: bool
) -> None:
    other, real = net("other.onnx", scale=-1.0), openvino.build
    monkeypatch.setattr(openvino, "build", lambda source, engine, params, **k: real(other, engine, params))
    if quantised:
        rows = build_engine.file_part
        monkeypatch.setattr(
            build_engine,
            "file_part",
            lambda layers: tuple(dataclasses.replace(row, precision="INT8") for row in rows(layers)),
        )
    match = r"agrees with ONNX Runtime on .* export.min_top1" if quantised else r"differs from ONNX Runtime by"
    with pytest.raises(CheckFailed, match=match) as caught:
        build(net(), tmp_path / "out")
    assert len(caught.value.lines) == 1
    assert "net.onnx" in str(caught.value)


def test_a_bf16_engine_is_held_to_its_answers_and_not_to_the_fp32_limit(
    net: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coarse, real = net("coarse.onnx", scale=1.01), openvino.build
    for precision, refused in (("f32", True), ("bf16", False)):

        def build_as(source: Path, engine: Path, params: Any, precision: str = precision, **_: Any) -> BuildNotes:
            return dataclasses.replace(real(coarse, engine, params), options={"precision": precision})

        monkeypatch.setattr(openvino, "build", build_as)
        if refused:
            with pytest.raises(CheckFailed, match="max_relative_difference"):
                build(net(), tmp_path / precision)
        else:
            assert build(net(), tmp_path / precision)["parity"]["max_relative"] > 1e-3
