"""The data of the GPUs: right, sourced, validated; a file of more can be named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparsify_deploy import cli
from sparsify_deploy.errors import DataError, UsageError
from sparsify_deploy.prediction.gpus import chosen, known, load, of_device

# Dense INT8 TOPS, dense FP16 TFLOPS, GB/s, as NVIDIA's data sheets have them (sparse figures halved).
PEAKS = {
    "a100": (624, 312, 2039),
    "a100-pcie": (624, 312, 1935),
    "a10": (250, 125, 600),
    "a30": (330, 165, 933),
    "l4": (242.5, 121, 300),
    "l40s": (733, 362.05, 864),
    "h100": (1979, 989.5, 3350),
    "h100-pcie": (1513, 756.5, 2000),
    "h200": (1979, 989.5, 4800),
    "orin-agx": (85, 42.5, 204.8),
}


def test_peaks_are_dense_ones_and_every_gpu_has_its_source() -> None:
    found = {name: (gpu.int8_tops, gpu.fp16_tflops, gpu.bandwidth_gb_s) for name, gpu in known().items()}
    assert found == PEAKS
    for gpu in known().values():
        assert "NVIDIA" in gpu.source
        assert gpu.int8_tops == pytest.approx(2 * gpu.fp16_tflops, rel=0.02)


def test_help_names_all_gpus() -> None:
    assert cli._GPUS.split(", ") == list(known())


def test_a_gpu_is_found_by_the_name_its_driver_gives() -> None:
    found = of_device("NVIDIA H100 80GB HBM3 sm90")
    assert found is not None
    assert found.name == "h100"
    assert of_device("none") is None
    assert of_device("NVIDIA A10; NVIDIA H100 PCIe sm90") is None


def test_an_unknown_gpu_is_a_usage_error_with_a_hint() -> None:
    with pytest.raises(UsageError, match=r"unknown GPU 'h10O'.*'h100'"):
        chosen(["h10O"])


def row(**changes: Any) -> dict[str, Any]:
    values = {
        "title": "Mine",
        "sm": "sm90",
        "device_names": ["NVIDIA Mine"],
        "int8_tops": 10,
        "int8_sparse_tops": 20,
        "fp16_tflops": 5,
        "fp16_sparse_tflops": 10,
        "tf32_tflops": None,
        "bandwidth_gb_s": 100.5,
        "source": "its data sheet",
    }
    return {k: v for k, v in {**values, **changes}.items() if v != "absent"}


def test_a_file_of_more_gpus_can_be_named_beside_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"mine": row(), "other": row(title="Other")}))
    assert [gpu.name for gpu in chosen(["a10", str(path)])] == ["a10", "mine", "other"]
    assert load(path)["mine"].bandwidth_gb_s == 100.5


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"int8_tops": 20}, "sparse int8 peak 20 is not twice the dense 20"),
        ({"fp16_sparse_tflops": 5}, "sparse fp16 peak 5 is not twice the dense 5"),
        ({"bandwidth_gb_s": 0}, "bandwidth_gb_s 0 is not a positive number"),
        ({"tf32_tflops": -1}, "tf32_tflops -1 is not a positive number"),
        ({"source": ""}, "source is empty"),
        ({"sm": "absent"}, "sm: Field required"),
        ({"int8_top": 3}, "unknown field 'int8_top'.*int8_tops"),
        ({"int8_tops": "ten"}, "int8_tops"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"mine": row(**changes)}))
    with pytest.raises(DataError, match=match) as caught:
        load(path)
    assert len(caught.value.lines) == 1


@pytest.mark.parametrize("content", [None, "", "[]", "{", '{"mine": 3}'])
def test_a_file_that_is_none_is_a_data_error(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=r"mine\.json"):
        load(path)
