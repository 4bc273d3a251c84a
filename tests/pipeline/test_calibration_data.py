"""Calibration on examples of another source, and what the labels of the data say before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsify_deploy import recipe_source
from sparsify_deploy.artifacts.fingerprint import digest, file_digest
from sparsify_deploy.errors import DataError, RecipeError
from sparsify_deploy.plan import Plan, plan
from sparsify_deploy.stages import quantize
from sparsify_deploy.stages.subject import load_tensors, save_weights
from sparsify_deploy.types import Context

RECIPE = """\
version: 1
threads: 1
model: {source: builtin, params: {name: resnet8, width: 16, in_channels: 1}}
data: {source: npz, params: {path: data.npz}}
training: {steps: 4, batch_size: 16, optimizer: {lr: 0.05}}
train: {method: dense}
quantize: {calibration_batches: 2MORE}
"""
OTHER = ", calibration_data: {source: npz, params: {path: other.npz, labels: false}}"


@pytest.fixture(autouse=True)
def _gentle(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Leave torch's process-wide settings as they are, but for the number of threads while a test runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(quantize, "reproducible", lambda context: torch.device("cpu"))
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def images(tmp_path: Path) -> np.ndarray:
    """Sixty-four images 8x8 around 0; the data of a recipe and, three times as wide, examples without labels."""
    random = np.random.default_rng(0)
    found = random.standard_normal((64, 8, 8)).astype(np.float32)
    labels = np.arange(64) % 10
    np.savez(tmp_path / "data.npz", x_train=found, y_train=labels, x_test=found[:20], y_test=labels[:20])
    np.savez(tmp_path / "other.npz", x_train=3 * found[:40])
    return found


def opened(folder: Path, more: str = "") -> Plan:
    (folder / "tiny.yaml").write_text(RECIPE.replace("MORE", more), encoding="utf-8")
    return plan(recipe_source.load(folder / "tiny.yaml"))


def stage(planned: Plan, name: str) -> Any:
    return next(step.stage for step in planned.steps if step.stage.name == name)


def prints(planned: Plan) -> dict[str, str]:
    """What the settings and the files of two steps add to their fingerprints."""
    found = {name: stage(planned, name) for name in ("train", "quantize")}
    return {
        name: digest({"settings": each, "files": {k: file_digest(path) for k, path in each.files().items()}})
        for name, each in found.items()
    }


def test_batches_come_from_the_other_source_in_the_scale_of_the_data(tmp_path: Path, images: np.ndarray) -> None:
    planned = opened(tmp_path, OTHER)
    section = stage(planned, "quantize").quantize
    (first, second) = planned.subject.calibration(2, 16, section.calibration_data)
    assert list(first) == ["input"]
    assert first["input"].shape == (16, 1, 8, 8)
    own = planned.subject.calibration(2, 16)
    assert float(torch.cat([first["input"], second["input"]]).std()) == pytest.approx(
        3 * float(torch.cat([batch["input"] for batch in own]).std()), rel=0.1
    )


def test_quantizers_are_calibrated_on_it_and_the_report_says_so(tmp_path: Path, images: np.ndarray) -> None:
    pytest.importorskip("modelopt")
    largest = {}
    for name, more in (("own", ""), ("other", OTHER)):
        planned = opened(tmp_path, more)
        (tmp_path / name).mkdir()
        save_weights(planned.subject.network(), tmp_path / name / "weights.safetensors")
        facts = stage(planned, "quantize").run(
            {"weights": tmp_path / name / "weights.safetensors"}, tmp_path / name, Context()
        )
        state = load_tensors(tmp_path / name / "quantized.safetensors")
        key = next(key for key in state if "conv1.input_quantizer" in key and "amax" in key)
        largest[name] = float(state[key].max())
        said = facts["calibration_notes"]
        assert said == (
            ["calibration draws from the 40 examples of quantize.calibration_data, not from the train split"]
            if more
            else []
        )
    assert largest["other"] == pytest.approx(3 * largest["own"], rel=0.2)


def test_only_what_calibrates_depends_on_it(tmp_path: Path, images: np.ndarray) -> None:
    without = prints(opened(tmp_path))
    first = prints(opened(tmp_path, OTHER))
    np.savez(tmp_path / "other.npz", x_train=2 * images)
    second = prints(opened(tmp_path, OTHER))
    assert without["train"] == first["train"] == second["train"]
    assert len({without["quantize"], first["quantize"], second["quantize"]}) == 3


def test_what_is_wrong_with_it_is_one_line_with_its_own_place(tmp_path: Path, images: np.ndarray) -> None:
    np.savez(tmp_path / "other.npz", x_train=np.zeros((4, 9, 9), np.float32))
    planned = opened(tmp_path, OTHER)
    with pytest.raises(DataError, match=r"^quantize.calibration_data: 'input' of one example has shape \(1, 9, 9\)"):
        planned.subject.calibration(1, 4, stage(planned, "quantize").quantize.calibration_data)
    planned = opened(tmp_path, ", calibration_data: {source: folder, params: {path: absent, labels: false}}")
    with pytest.raises(DataError, match=r"^quantize.calibration_data: .*absent: no such folder"):
        stage(planned, "quantize").files()


def test_it_runs_no_code_of_the_user(tmp_path: Path, images: np.ndarray) -> None:
    with pytest.raises(
        RecipeError, match=r"quantize.calibration_data.source: file runs Python code, which calibration"
    ):
        opened(tmp_path, ", calibration_data: {source: file, params: {path: d.py}}")


def test_labels_are_judged_when_the_data_are_opened(tmp_path: Path, images: np.ndarray) -> None:
    one = np.zeros(64, dtype=int)
    np.savez(tmp_path / "data.npz", x_train=images, y_train=one, x_test=images[:9], y_test=one[:9])
    with pytest.raises(DataError, match=r"all 64 training examples are of class 0: there is nothing to tell apart"):
        _ = opened(tmp_path).subject.examples
    rare = np.where(np.arange(64) < 3, 1, 0)
    np.savez(tmp_path / "data.npz", x_train=images, y_train=rare, x_test=images[:9], y_test=rare[:9])
    subject = opened(tmp_path).subject
    assert subject.class_counts == (61, 3)
    assert subject.data_notes[0].startswith("data: class 1 has 3 of 64 training examples (4.7 %)")
