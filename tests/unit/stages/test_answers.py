"""Only what the task takes for an answer is counted as one where a file is compared with torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sparsify_deploy.errors import CheckFailed
from sparsify_deploy.recipe import Export, Recipe
from sparsify_deploy.stages.export_onnx import check_parity, network_of, write_onnx
from sparsify_deploy.stages.subject import Subject

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, sign=1.0):
        super().__init__()
        self.fc, self.out = nn.Linear(4, 8), nn.Linear(8, 3)
        self.sign = sign

    def forward(self, x):
        y = torch.relu(self.fc(x))
        GIVES
"""


@pytest.fixture
def opened(tmp_path: Path):
    def make(gives: str, sign: float, task: str = "classification") -> Subject:
        (tmp_path / "net.py").write_text(NET.replace("GIVES", gives), encoding="utf-8")
        x = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
        y = x[:, :3] if task == "regression" else np.arange(30) % 3
        np.savez(tmp_path / "d.npz", x_train=x[:20], y_train=y[:20], x_test=x[20:], y_test=y[20:])
        model = {"source": "file", "params": {"path": "net.py", "object": "Net", "arguments": {"sign": sign}}}
        data = {"source": "npz", "params": {"path": "d.npz"}}
        given = {"version": 1, "model": model, "data": data, "task": {"name": task}}
        recipe = Recipe.model_validate(given, context={"folder": tmp_path})
        assert recipe.data is not None
        return Subject(recipe.model, recipe.data, recipe.task, recipe.seed)

    return make


FEATURES = 'return {"logits": self.out(y), "features": self.sign * y}'
VALUES = "return self.sign * self.out(y)"


@pytest.mark.parametrize(
    ("gives", "task", "agreement"), [(FEATURES, "classification", 1.0), (VALUES, "regression", None)]
)
def test_features_and_values_have_no_largest_one_that_counts(opened, tmp_path, gives, task, agreement) -> None:
    other = opened(gives, -1.0, task)
    path = tmp_path / "model.onnx"
    write_onnx(other, Export(), network_of(other, None, {}), path)
    subject = opened(gives, 1.0, task)
    found = check_parity(subject, Export(), network_of(subject, None, {}), path, quantised=True)
    assert found.top1_agreement == agreement
    assert found.max_relative > 1


def test_logits_that_differ_are_still_refused(opened, tmp_path) -> None:
    other = opened(VALUES, -1.0)
    path = tmp_path / "model.onnx"
    write_onnx(other, Export(), network_of(other, None, {}), path)
    subject = opened(VALUES, 1.0)
    with pytest.raises(CheckFailed, match="of 10 top-1 answers"):
        check_parity(subject, Export(), network_of(subject, None, {}), path, quantised=True)
