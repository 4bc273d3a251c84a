"""The GPU scripts through a runtime whose times are known, and through ONNX Runtime: rows, engines kept, targets."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gpu import engines, implicit, nets, qdq, targets, variants
from gpu.record import load
from gpu.variants import DENSE, FP16, FP32, SPARSE, Setting, Variant
from pydantic import BaseModel

from sparsify_deploy.errors import ModelError
from sparsify_deploy.graph import file
from sparsify_deploy.graph.layers import weight_layers
from sparsify_deploy.types import BuildNotes, EngineProfile, IOTensor, LayerTime

MS = {FP32: 4.0, FP16: 2.0, DENSE: 1.2, SPARSE: 1.0}


class Params(BaseModel, extra="forbid"):
    sparse: bool = True
    min_batch: int = 1
    opt_batch: int = 1
    max_batch: int = 32
    time_limit_s: float = 300.0
    optimization_level: int | None = None
    precision: str = "fp32"
    timing_cache: str = ""


class Session:
    device = "GPU"

    def __init__(self, ms: float, tensor: IOTensor) -> None:
        self.inputs, self._ms = (tensor,), ms

    @property
    def device_ms(self) -> float:
        return self._ms

    def bind(self, inputs: Mapping[str, Any]) -> None:
        self.sum = inputs["input"].sum()

    def execute(self) -> None:
        pass

    def fetch(self) -> dict[str, Any]:
        return {"output": np.array([1.0, self.sum, self._ms])}


class FakeTensorRT:
    """Times by what the file holds and the parameters allow; a 2:4 file runs sparse kernels where it may."""

    SUFFIX = ".engine"
    Params = Params

    def __init__(self) -> None:
        self.builds: list[Params] = []
        self.refuse = ""
        self.ms = dict(MS)

    def unavailable_reason(self) -> str | None:
        return None

    cannot_run_reason = unavailable_reason

    def build(self, onnx: Path, engine: Path, params: Params, /) -> BuildNotes:
        self.builds.append(params)
        if self.refuse and self.refuse in onnx.name:
            raise ModelError(f"{onnx}: invalid weights type of Int8")
        layers = weight_layers(file.load(onnx))
        quantised, half = any(layer.int8_in for layer in layers), (layers[-1].values == 0).mean() > 0.4
        plan = SPARSE if half and quantised and params.sparse else DENSE if quantised else FP16
        plan = FP32 if plan == FP16 and params.precision == "fp32" else plan
        engine.write_text(
            json.dumps([plan, [layer.name for layer in layers], list(file.inputs(file.load(onnx))[0].shape)])
        )
        facts = {"sparse_eligible": [layer.name for layer in layers], "sparse_picked": []}
        return BuildNotes("tensorrt", "8.6.0", (engine.name,), 1.5, params.model_dump(), True, facts=facts)

    @contextmanager
    def open(self, engine: Path, params: Params, /, *, threads: int = 1, shapes: Any = None) -> Iterator[Session]:
        plan, _, shape = json.loads(engine.read_text())
        assert shapes == {"input": tuple(shape)}
        yield Session(self.ms[plan], IOTensor("input", tuple(shape), "float32"))

    def profile(self, engine: Path, params: Params, inputs: Any, /, *, threads: int = 1) -> EngineProfile:
        plan, names, _ = json.loads(engine.read_text())
        kernel = "sm90_xmma_sparse_gemm_s8" if plan == SPARSE else "sm90_xmma_gemm"
        return EngineProfile(tuple(LayerTime(name, (name,), kernel, 0.1) for name in names), 10)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    """In place of TensorRT, with small networks in place of full ones."""
    runtime = FakeTensorRT()
    for module in (engines, variants):
        monkeypatch.setattr(module.menu, "entry", lambda folder, name: runtime)

    def small(spec: nets.Spec, folder: Path) -> Path:
        return nets.write(dataclasses.replace(spec, scale="small"), folder)

    monkeypatch.setattr(variants, "race", functools.partial(variants.race, warmup_ms=0.1))
    monkeypatch.setattr(
        implicit, "build", lambda onnx, engine, **k: runtime.build(onnx, engine, Params(precision="fp16"))
    )
    monkeypatch.setattr(engines, "write", small)
    monkeypatch.setattr(qdq, "write", small)
    return runtime


def options(tmp_path: Path, *more: str) -> list[str]:
    quick = ["--work", str(tmp_path / "work"), "--rounds", "3", "--round-ms", "0.1"]
    return ["--out", str(tmp_path / "results" / "engines.json"), *quick, *more]


def test_a_row_holds_what_the_targets_and_the_predictor_need(fake: FakeTensorRT, tmp_path: Path) -> None:
    assert engines.main(options(tmp_path, "--batches", "32", "1")) == 0
    kept = load(tmp_path / "results" / "engines.json")
    assert kept["fingerprint"]["rehearsal"] is False
    assert list(kept["rows"]) == ["resnet50/b32", "bert/b32", "resnet50/b1", "bert/b1"]
    row = kept["rows"]["bert/b32"]
    assert row["race"]["clock"] == "device time"
    assert [c["median"] for c in row["race"]["comparisons"] if (c["label"], c["baseline"]) == (SPARSE, FP16)] == [2.0]
    assert row["race"]["control"]["median"] == 1.0
    sparse, dense = row["variants"][SPARSE], row["variants"][DENSE]
    assert sparse["sparse_kernels"] == 12
    assert dense["sparse_kernels"] == 0
    assert all(layer["holds_2_4"] for layer in sparse["onnx_layers"])
    assert not any(layer["holds_2_4"] for layer in dense["onnx_layers"])
    assert sparse["facts"]["sparse_eligible"][0] == "layer.0.attention.query"
    assert len(sparse["onnx_sha256"]) == 64
    assert list(row["control_profile"]) == [DENSE]
    precisions = [params.precision for params in fake.builds[:4]]
    assert precisions == ["fp32", "fp16", "fp16", "fp16"]
    assert {(p.min_batch, p.opt_batch, p.max_batch) for p in fake.builds} == {(32, 32, 32), (1, 1, 1)}


def test_a_second_call_measures_nothing_and_lost_rows_take_the_kept_engines(fake: FakeTensorRT, tmp_path: Path) -> None:
    assert engines.main(options(tmp_path, "--batches", "8")) == 0
    assert len(fake.builds) == 8
    assert engines.main(options(tmp_path, "--batches", "8")) == 0
    (tmp_path / "results" / "engines.json").unlink()
    assert engines.main(options(tmp_path, "--batches", "8")) == 0
    assert len(fake.builds) == 8
    row = load(tmp_path / "results" / "engines.json")["rows"]["bert/b8"]
    assert row["variants"][SPARSE]["facts"]["sparse_picked"] == []
    assert engines.main(options(tmp_path, "--batches", "8", "16", "--optimization-level", "5")) == 0
    assert len(fake.builds) == 16


def test_a_refused_variant_is_in_the_row_with_its_reason(
    fake: FakeTensorRT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.refuse = "integers"
    assert qdq.main(options(tmp_path)) == 0
    rows = load(tmp_path / "results" / "engines.json")["rows"]
    assert list(rows) == [f"{net}/b32" for net in qdq.NETS]
    for net, row in rows.items():
        assert "invalid weights type of Int8" in row["variants"][qdq.INTEGERS]["refused"]
        assert (qdq.ALONE in row["variants"]) == ("chain" not in net)
        assert (qdq.STREAM in row["variants"]) == net.startswith("bert")
        assert row["variants"][SPARSE]["sparse_kernels"] == row["variants"][qdq.OUTPUTS]["sparse_kernels"] > 0
        assert row["variants"][qdq.DENSE_KERNELS]["sparse_kernels"] == 0
        assert not any(layer["int8_in"] for layer in row["variants"][qdq.IMPLICIT]["onnx_layers"])
        assert row["variants"][qdq.WITHOUT]["options"]["precision"] == "fp16"
        assert qdq.INTEGERS not in row["race"]["labels"]
    assert "not measured" in capsys.readouterr().out


def test_the_result_of_a_run_and_its_float_twin(fake: FakeTensorRT, tmp_path: Path) -> None:
    run = tmp_path / "cifar"
    for branch, sparse in (("dense", False), ("sparse", True)):
        (run / "onnx" / branch).mkdir(parents=True)
        spec = nets.Spec("resnet50", "small", nets.Placement(), sparse, integers=True, batch=4)
        file.save(nets.build(spec), run / "onnx" / branch / "model.onnx")
    assert engines.main(options(tmp_path, "--nets", "--run", str(run), "--batches", "4")) == 0
    rows = load(tmp_path / "results" / "engines.json")["rows"]
    assert list(rows) == ["run:cifar/b4"]
    each = rows["run:cifar/b4"]["variants"]
    assert {layer["precision"] for layer in each[FP16]["onnx_layers"]} == {"FP32"}
    assert {layer["precision"] for layer in each[SPARSE]["onnx_layers"]} == {"INT8"}
    written = file.load(tmp_path / "work" / "nets" / "cifar-sparse.onnx")
    assert file.operators(written)["QuantizeLinear"] == file.operators(written)["DequantizeLinear"]
    assert rows["run:cifar/b4"]["race"]["labels"] == [FP32, FP16, DENSE, SPARSE]


def test_a_folder_that_is_no_finished_run(
    fake: FakeTensorRT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert engines.main(options(tmp_path, "--nets", "--run", str(tmp_path), "--batches", "4")) == 1
    assert "no finished run" in capsys.readouterr().err


def test_the_targets_of_a_measured_folder(
    fake: FakeTensorRT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert engines.main(options(tmp_path, "--batches", "32")) == 0
    folder = tmp_path / "results"
    words = [(each.word, each.value) for each in targets.check(folder)]
    ratio = pytest.approx(1.2)
    assert words == [("met", 2.0), ("met", 2.0), ("met", ratio), ("met", ratio), ("met", ratio), ("not measured", None)]
    assert targets.main([str(folder)]) == 0
    (folder / "engines.json").unlink()
    fake.ms |= {FP16: 1.5, SPARSE: 1.19}
    assert engines.main(options(tmp_path, "--batches", "32")) == 0
    found = targets.check(folder)
    assert [each.word for each in found] == ["not met"] * 4 + ["met", "not measured"]
    assert found[4].value == pytest.approx(1.19 / 1.2)  # 2:4 is not beyond the noise, so dense INT8 is shipped
    assert "dense INT8 over 2:4 INT8" in found[4].detail
    assert targets.main([str(folder)]) == 1
    assert "not met" in capsys.readouterr().out


def test_a_rehearsal_meets_no_target(tmp_path: Path) -> None:
    out = tmp_path / "engines.json"
    options = ["--work", str(tmp_path), "--rounds", "2", "--round-ms", "1", "--batches", "32", "--nets", "bert"]
    assert engines.main(["--runtime", "onnxruntime", "--scale", "small", "--out", str(out), *options]) == 0
    kept = load(out)
    assert kept["fingerprint"]["rehearsal"] is True
    row = kept["rows"]["bert/b32"]
    assert row["race"]["labels"] == [FP32, DENSE, SPARSE]
    assert row["variants"][FP16]["refused"] == "onnxruntime has no FP16 here"
    assert 0.999 < row["cosine_to_first"][DENSE] < 1
    assert row["variants"][DENSE]["profile"]["layers"]
    assert {each.word for each in targets.check(tmp_path)} == {"not measured"}


def test_predicted_signs_are_a_target_too(tmp_path: Path) -> None:
    def written(**row: Any) -> targets.Checked:
        whole = {"fingerprint": {"rehearsal": False}, "rows": {"all layers": row}}
        (tmp_path / "predictor.json").write_text(json.dumps(whole))
        return targets.check(tmp_path)[-1]

    found = written(balanced_accuracy=0.91, base_rate=0.7, outside=40, groups=50)
    assert (found.word, found.value) == ("met", 0.91)
    assert found.detail == "40 of 50 layers outside the noise, base rate 0.700"
    assert written(balanced_accuracy=0.89, base_rate=0.7, outside=40, groups=50).word == "not met"
    assert written(balanced_accuracy=None, why_none="one sign alone").detail == "one sign alone"


def test_without_the_runtime_one_line_and_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sparsify_deploy import menu

    if menu.entry("runtimes", "tensorrt").unavailable_reason() is None:
        pytest.skip("TensorRT works here")
    assert engines.main(options(tmp_path)) == 3
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_variants_without_a_race_say_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runtime = SimpleNamespace(SUFFIX=".engine", cannot_run_reason=lambda: "needs a GPU")
    fake = FakeTensorRT()
    runtime.build, runtime.Params = fake.build, Params
    monkeypatch.setattr(variants.menu, "entry", lambda folder, name: runtime)
    path = nets.write(nets.Spec("linear_chain", "small", batch=2), tmp_path)
    row = variants.measure(Setting("tensorrt_rtx", tmp_path), [Variant(FP32, path, half=False)], 2)
    assert row["not_run"] == "needs a GPU"
    assert "race" not in row
    assert "FP32" in variants.summary("key", row)


def test_the_real_tensorrt_takes_the_parameters() -> None:
    from sparsify_deploy.runtimes import tensorrt

    for half, kernels in ((True, True), (False, False)):
        found = variants.params_for(Setting("tensorrt", Path("work")), Variant("x", Path("x.onnx"), half, kernels), 32)
        assert isinstance(found, tensorrt.Params)
        assert (found.precision, found.sparse) == ("fp16" if half else "fp32", kernels)
        assert (found.min_batch, found.opt_batch, found.max_batch) == (32, 32, 32)
        assert not found.library_tactics


def test_nvidias_own_builder_takes_all_four_plans(tmp_path: Path) -> None:
    from sparsify_deploy.runtimes import tensorrt_rtx

    if (reason := tensorrt_rtx.unavailable_reason()) is not None:
        pytest.skip(reason)
    setting = Setting("tensorrt_rtx", tmp_path)
    row = variants.measure(setting, engines.of_net("bert", "small", 4, tmp_path / "nets"), 4)
    assert not [each["refused"] for each in row["variants"].values() if "refused" in each]
    assert all(each["facts"]["layers_parsed"] > 12 for each in row["variants"].values())
    if tensorrt_rtx.cannot_run_reason() is not None:
        assert row["not_run"]


def test_the_worst_race_decides_on_the_shipped_plan(tmp_path: Path) -> None:
    def raced(sparse_over_dense: float) -> dict[str, Any]:
        pairs = {(SPARSE, DENSE): sparse_over_dense, (DENSE, SPARSE): 1 / sparse_over_dense}
        found = [
            {"label": a, "baseline": b, "median": m, "low": m, "high": m, "claim": "faster" if m > 1.02 else "slower"}
            for (a, b), m in pairs.items()
        ]
        return {"race": {"labels": [DENSE, SPARSE], "comparisons": found}}

    rows = {"good": raced(1.3), "worst": raced(1.015), "last": raced(0.9)}
    whole = {"fingerprint": {"rehearsal": False}, "rows": rows}
    (tmp_path / "engines.json").write_text(json.dumps(whole))
    found = targets.check(tmp_path)[4]
    assert found.value == pytest.approx(1 / 1.015)
    assert found.detail == "the worst of 3 races, worst: dense INT8 over 2:4 INT8"
