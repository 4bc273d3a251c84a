"""The predictor against results that were made up so that its score is known."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from gpu import engines, nets, predictor, targets
from gpu.graphs import Placement
from gpu.variants import DENSE, FP16, FP32, SPARSE

from sparsify_deploy.graph.workload import Workload
from sparsify_deploy.prediction.gpus import known

H100 = "NVIDIA H100 80GB HBM3 sm90"
TOKENS = 128
WIDTHS = {"big.0": 4096, "big.1": 4096, "big.2": 4096, "small.0": 64, "small.1": 64, "stem": 4096}
"""A product of 4096 tokens is bound by arithmetic at 4096 wide, and by its launch at 64."""


def engine_row(sparse_ms: dict[str, float], *, noise: float = 1.0) -> dict[str, Any]:
    """A row of `engines.json` whose dense layers take 0.1 ms each; `stem` holds no 2:4."""
    works, described = [], []
    for name, width in WIDTHS.items():
        work = Workload(
            name, "Linear", TOKENS * width**2, TOKENS * width, TOKENS * width, (width, width), 1, f"{name}.weight"
        )
        works.append(json.loads(json.dumps(asdict(work))))
        layer = {"name": f"/{name}/MatMul", "weight": f"{name}.weight", "precision": "INT8", "int8_in": True}
        described.append({**layer, "holds_2_4": name != "stem"})
    works.append(asdict(Workload("norm", "LayerNorm", 0, 1000, 1000)))

    def profile(times: dict[str, float]) -> dict[str, Any]:
        layers = [{"name": n, "nodes": [f"/{n}/MatMul"], "kernel": "k", "ms": times.get(n, 0.1)} for n in WIDTHS]
        return {"profile": {"layers": layers, "runs": 10, "note": ""}}

    ratios = {(SPARSE, DENSE): 1.2, (SPARSE, FP16): 1.9}
    return {
        "batch": 32,
        "workloads": works,
        "race": {
            "labels": [FP32, FP16, DENSE, SPARSE],
            "comparisons": [
                {"label": a, "baseline": b, "median": m, "low": m - 0.01, "high": m + 0.01, "claim": "faster"}
                for (a, b), m in ratios.items()
            ],
        },
        "variants": {DENSE: profile({}), SPARSE: {**profile(sparse_ms), "onnx_layers": described}},
        "control_profile": {DENSE: profile(dict.fromkeys(WIDTHS, 0.1 * noise))},
    }


def results(folder: Path, *rows: dict[str, Any], gpu: str = H100, rehearsal: bool = False) -> Path:
    whole = {
        "fingerprint": {"gpu": gpu, "rehearsal": rehearsal, "kind": "engines"},
        "rows": {f"net{i}/b32": row for i, row in enumerate(rows)},
    }
    (folder / "engines.json").write_text(json.dumps(whole))
    return folder


RIGHT = {"big.0": 0.08, "big.1": 0.08, "big.2": 0.08, "small.0": 0.12, "small.1": 0.12}


def test_a_predictor_that_is_right_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predictor.main([str(results(tmp_path, engine_row(RIGHT)))]) == 0
    said = capsys.readouterr().out
    assert "predicted, roofline from shapes, for H100" in said
    assert "sign right in 5 of 5 layers outside the noise, of 5; balanced accuracy 1.000, base rate 0.600" in said
    whole = json.loads((tmp_path / "predictor.json").read_text())
    assert whole["fingerprint"]["predicted_for"]["name"] == "h100"
    assert whole["rows"][predictor.ALL]["balanced_accuracy"] == 1.0
    check = targets.check(tmp_path)[-1]
    assert (check.word, check.value) == ("met", 1.0)


def test_wrong_signs_cost_their_share(tmp_path: Path) -> None:
    wrong = {**RIGHT, "small.1": 0.05, "big.2": 0.1005}  # one is faster unpredicted, one within the noise
    predictor.run(results(tmp_path, engine_row(RIGHT), engine_row(wrong)), None)
    rows = json.loads((tmp_path / "predictor.json").read_text())["rows"]
    assert rows["net1/b32"]["agreement"]["outside"] == 4
    assert rows["net1/b32"]["agreement"]["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    # together: faster 3 + 3, one of them not predicted; slower 2 + 1, all right
    whole = rows[predictor.ALL]
    assert (whole["outside"], whole["faster"], whole["right"]) == (9, 6, 8)
    assert whole["balanced_accuracy"] == pytest.approx((5 / 6 + 1) / 2)
    assert whole["base_rate"] == pytest.approx(6 / 9)
    assert targets.check(tmp_path)[-1].word == "met"


def test_layers_without_the_pattern_are_not_asked(tmp_path: Path) -> None:
    predictor.run(results(tmp_path, engine_row({**RIGHT, "stem": 0.5})), None)
    row = json.loads((tmp_path / "predictor.json").read_text())["rows"]["net0/b32"]
    assert {name for layer in row["layers"] for name in layer["layers"]} == {f"/{n}/MatMul" for n in RIGHT}
    assert all(layer["predicted_gain"] > 1.2 for layer in row["layers"] if "big" in layer["layers"][0])
    assert all(layer["predicted_gain"] < 1.02 for layer in row["layers"] if "small" in layer["layers"][0])


def test_noisy_profiles_leave_nothing_to_judge(tmp_path: Path) -> None:
    predictor.run(results(tmp_path, engine_row(RIGHT, noise=1.5)), None)
    whole = json.loads((tmp_path / "predictor.json").read_text())["rows"][predictor.ALL]
    assert whole["noise"] == pytest.approx(1 / 3)
    assert whole["balanced_accuracy"] is None
    assert targets.check(tmp_path)[-1].word == "not measured"


def test_networks_by_their_races(tmp_path: Path) -> None:
    predictor.run(results(tmp_path, engine_row(RIGHT)), None)
    row = json.loads((tmp_path / "predictor.json").read_text())["rows"]["net0/b32"]["networks"]
    dense, half = row[f"over {DENSE}"], row[f"over {FP16}"]
    assert dense["measured"]["median"] == 1.2
    assert 1.1 < dense["realistic"] < 1.3 < dense["ideal"] < 2
    assert half["measured"]["median"] == 1.9
    assert half["ideal"] > half["realistic"] > dense["realistic"]
    work = predictor.layers_of(engine_row(RIGHT))
    assert [layer.sparse for layer in work] == [True] * 5 + [False, False]
    assert [layer.int8 for layer in work] == [True] * 6 + [False]


@pytest.mark.parametrize("name", [None, "a100"])
def test_a_gpu_of_unknown_peaks_wants_a_name(
    name: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = results(tmp_path, engine_row(RIGHT), gpu="none", rehearsal=True)
    status = predictor.main([str(folder), *(["--gpu", name] if name else [])])
    if name is None:
        assert status == 2
        assert capsys.readouterr().err.count("\n") == 1
    else:
        assert status == 0
        assert f"for {known()[name].title}; measured: a rehearsal" in capsys.readouterr().out
        assert targets.check(tmp_path)[-1].word == "not measured"


@pytest.mark.parametrize("rows", [None, [], [{"race": {"labels": [FP32]}, "batch": 1}]])
def test_nothing_to_compare(rows: list[Any] | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if rows is not None:
        results(tmp_path, *rows)
    assert predictor.main([str(tmp_path)]) == 5
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "predictor.json").exists()


def test_workloads_are_per_example_whatever_the_files_batch(tmp_path: Path) -> None:
    fixed, free = (
        engines.workloads_of(nets.write(nets.Spec("bert", "small", Placement(), batch=batch), tmp_path))
        for batch in (8, None)
    )
    assert fixed == free
    weighted = {each["parameter"]: each for each in fixed if each["parameter"]}
    assert len(weighted) == 12
    assert weighted["layer.0.intermediate.weight"]["macs"] == 16 * 64 * 256
