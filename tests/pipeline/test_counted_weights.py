"""Sizes and shares of a run's models are of the same weights in each row, and of the bytes that the files hold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

RECIPE = """\
version: 1
model: {source: file, params: {path: my_model.py, object: Net}}
data: {source: npz, params: {path: my_data.npz}}
training: {steps: 4, batch_size: 16}
nm: {fine_tune: {}}
quantize: {calibration_batches: 1}
deploy: [{runtime: openvino}]
benchmark: {rounds: 5, round_ms: 1.0, warmup_ms: 1.0}
export: {min_top1_agreement: 0.0, parity_examples: 8}
"""

MODEL = """\
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.grow = nn.ConvTranspose1d(8, 8, 2, stride=2)
        self.read = nn.LSTM(8, 16, batch_first=True, bidirectional=True)
        self.first, self.again = nn.Linear(32, 32), nn.Linear(32, 32)
        self.again.weight = self.first.weight
        self.last = nn.Linear(32, 4)

    def forward(self, x):
        x = self.grow(x.unflatten(1, (8, 4)))
        x, _ = self.read(x.transpose(1, 2))
        return self.last(torch.relu(self.again(torch.relu(self.first(x[:, -1])))))
"""

COUNTED = {"grow.weight": 8 * 8 * 2, "first.weight": 32 * 32, "last.weight": 4 * 32} | {
    f"read.weight_{side}_l0{way}": 64 * size for side, size in (("ih", 8), ("hh", 16)) for way in ("", "_reverse")
}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with a recipe, a network of layers of all kinds, and data."""
    (tmp_path / "my.yaml").write_text(RECIPE)
    (tmp_path / "my_model.py").write_text(MODEL)
    random = np.random.default_rng(0)
    parts = {"train": 64, "test": 32}
    data = {f"x_{name}": random.standard_normal((count, 32)).astype(np.float32) for name, count in parts.items()}
    np.savez(tmp_path / "my_data.npz", **data, **{f"y_{n}": np.arange(count) % 4 for n, count in parts.items()})
    return tmp_path


@pytest.mark.slow
def test_every_row_counts_the_same_weights_and_the_bytes_of_the_files(cli, own):
    import onnx
    from onnx import numpy_helper

    done = cli("run", "my.yaml", "--trust-code", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    for row in report["rows"]:
        assert {layer["weight"]: layer["weights"] for layer in row["model"]["layers"]} == COUNTED, row["label"]
    for chain in report["chains"]:
        assert {layer["weight"]: layer["weights"] for layer in chain["layers"]} == COUNTED
    final = {row["label"]: row["model"]["bytes_stored"] for row in report["rows"]}
    for branch, label in (("dense", "dense INT8"), ("sparse", "2:4 INT8")):
        (path,) = own.glob(f"runs/*/onnx/{branch}/model.onnx")
        stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer if t.name in COUNTED}
        assert sum(values.nbytes for values in stored.values()) == final[label]
        assert stored["first.weight"].dtype == np.int8
        assert stored["read.weight_hh_l0"].dtype == stored["grow.weight"].dtype == np.float32
