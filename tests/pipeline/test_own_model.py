"""The README's ten-line recipe on a user's own network, weights and data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

RECIPE = """\
version: 1
model:
  source: file
  params: {path: my_model.py, object: build}
  checkpoint: my_weights.safetensors
data: {source: npz, params: {path: my_data.npz}}
training: {epochs: 6, batch_size: 32, optimizer: {lr: 0.05}}
nm: {fine_tune: {}}
quantize: {qat: {epochs: 1, optimizer: {lr: 0.001}}}
deploy: [{runtime: openvino}]
benchmark: {rounds: 5, round_ms: 2.0, warmup_ms: 5.0}
export: {min_top1_agreement: 0.9}
"""

MODEL = """\
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 32)
        self.last = nn.Linear(32, 4)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.last(torch.relu(self.second(x)))


def build():
    return Net()
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with a model file, a checkpoint for it and data it can learn."""
    import torch
    from safetensors.torch import save_file
    from torch import nn

    (tmp_path / "my.yaml").write_text(RECIPE)
    (tmp_path / "my_model.py").write_text(MODEL)
    torch.manual_seed(0)
    sizes = {"first": (64, 64), "second": (64, 32), "last": (32, 4)}
    layers = {name: nn.Linear(*size) for name, size in sizes.items()}
    state = {f"{n}.{k}": v.detach() for n, layer in layers.items() for k, v in layer.state_dict().items()}
    save_file(state, tmp_path / "my_weights.safetensors")
    random = np.random.default_rng(0)
    centres = random.standard_normal((4, 64))
    labels = random.integers(0, 4, 400)
    features = (centres[labels] + 0.5 * random.standard_normal((400, 64))).astype(np.float32)
    np.savez(
        tmp_path / "my_data.npz",
        x_train=features[:320],
        y_train=labels[:320],
        x_test=features[320:],
        y_test=labels[320:],
    )
    return tmp_path


def test_a_pretrained_model_goes_straight_to_2_4_and_int8_beside_its_dense_twin(cli, own):
    done = cli("run", "my.yaml", "--trust-code", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    labels = [row["label"] for row in report["rows"]]
    assert labels == ["dense FP32", "dense FP32, fine-tuned", "dense INT8", "2:4 FP32", "2:4 INT8"]
    final = report["rows"][-1]["model"]
    held = {layer["weight"] for layer in final["layers"] if layer["pattern_held"]}
    assert held == {"first.weight", "second.weight"}
    assert final["metrics"]["accuracy"] > 0.9
    assert report["rows"][0]["optimizer_steps"] is None


def test_the_users_code_is_not_run_without_the_flag(cli, own):
    (own / "my_model.py").write_text("open('ran', 'w')\n" + MODEL)
    done = cli("run", "my.yaml")
    assert done.returncode == 2
    assert "--trust-code" in done.stderr
    assert not (own / "ran").exists()


def test_a_changed_model_file_runs_everything_again(cli, own):
    assert cli("run", "my.yaml", "--trust-code", "--until", "dense/fine_tune").returncode == 0
    (own / "my_model.py").write_text(MODEL.replace("relu(self.first", "sigmoid(self.first"))
    found = cli("explain", "my.yaml", "dense/fine_tune")
    assert "files.model.path" in found.stdout


def test_a_mistake_in_the_users_file_is_one_line_with_its_place(cli, own):
    (own / "my_model.py").write_text(MODEL.replace("return Net()", "return Nett()"))
    done = cli("run", "my.yaml", "--trust-code")
    assert done.returncode == 5
    assert "my_model.py:18" in done.stderr
    assert "Traceback" not in done.stderr


def test_truncated_data_is_one_line(cli, own):
    data = (own / "my_data.npz").read_bytes()
    (own / "my_data.npz").write_bytes(data[: len(data) // 2])
    done = cli("run", "my.yaml", "--trust-code")
    assert done.returncode == 5
    assert "my_data.npz" in done.stderr
    assert "Traceback" not in done.stderr


ASKS = """\
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 32)
        self.last = nn.Linear(32, 4)

    def forward(self, x):
        if x.shape[1] != 64:
            raise ValueError("64 features are expected")
        x = torch.relu(self.first(x))
        return self.last(torch.relu(self.second(x)))


def build():
    return Net()
"""


def test_a_network_that_torch_fx_cannot_trace_goes_by_torch_export_and_says_so(cli, own):
    (own / "my_model.py").write_text(ASKS)
    done = cli("run", "my.yaml", "--trust-code", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert any("Net cannot be traced" in note and "torch.export made of it" in note for note in report["notes"])
    last = report["rows"][-1]["model"]
    assert last["metrics"]["accuracy"] > 0.9
    assert {layer["weight"] for layer in last["layers"]} == {f"{name}.weight" for name in ("first", "second", "last")}


TASK = """\
import numpy as np
import torch


class Margin:
    metrics = {"hinge": "lower", "agreement": "higher"}

    def loss(self, outputs, batch):
        return torch.nn.functional.multi_margin_loss(outputs["output"], batch["target"])

    def evaluate(self, outputs, batch):
        logits, target = outputs["output"], batch["target"]
        right = logits[np.arange(len(target)), target][:, None]
        over = np.maximum(0, 1 - right + logits)
        over[np.arange(len(target)), target] = 0
        return {"hinge": float(over.sum(1).mean() / 4), "agreement": (logits.argmax(1) == target).mean()}


def task():
    return Margin()
"""


def test_a_task_of_ones_own_trains_gates_and_reports(cli, own):
    (own / "my_task.py").write_text(TASK)
    recipe = RECIPE + "task: {name: file, params: {path: my_task.py}}\ngates: {metric: agreement, max_drop: 0.1}\n"
    (own / "my.yaml").write_text(recipe)
    planned = cli("plan", "my.yaml")
    assert planned.returncode == 0, planned.stderr
    assert "with --trust-code: task.name file" in planned.stdout
    done = cli("run", "my.yaml", "--trust-code", "--json")
    assert done.returncode == 0, done.stderr
    assert "trusted: task.name file" in done.stderr
    assert "model.checkpoint my_weights.safetensors: 6 of 6 tensors loaded by name" in done.stderr
    report = json.loads(done.stdout)
    assert (report["metric"], report["direction"]) == ("agreement", "higher")
    assert report["metrics"] == {"hinge": "lower", "agreement": "higher"}
    assert report["rows"][-1]["model"]["metrics"]["agreement"] > 0.8
    assert {"hinge", "agreement", "loss"} == {*report["rows"][0]["model"]["metrics"]}
    (gate,) = report["gates"]
    assert gate["met"]
    assert any("6 of 6 tensors" in note for note in report["notes"])
    written = next(own.glob("runs/*/report.md")).read_text()
    assert "| model | agreement (higher is better) | hinge (lower is better) | loss (lower is better) |" in written
