"""Texts through the whole pipeline: free lengths, dense to 2:4 to INT8, and engines that answer as torch does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("modelopt")
pytest.importorskip("openvino")
pytest.importorskip("onnxruntime")

MODEL = """\
import torch
from torch import nn


class Texts(nn.Module):
    def __init__(self, positions):
        super().__init__()
        self.tokens, self.places = nn.Embedding(12, 32), nn.Embedding(positions, 32)
        self.query, self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 2)

    def forward(self, input_ids, attention_mask):
        x = self.tokens(input_ids) + self.places(torch.arange(input_ids.shape[1], device=input_ids.device))
        mask = attention_mask.to(x.dtype)
        scores = self.query(x) @ self.key(x).transpose(-1, -2) / 32 ** 0.5 + (1.0 - mask[:, None]) * -1e4
        x = self.norm(x + self.out(torch.softmax(scores, -1) @ self.value(x)))
        return self.head((x * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True))


def build(positions=12):
    return Texts(positions)


class Number(Texts):
    def forward(self, input_ids, attention_mask):
        return super().forward(input_ids, attention_mask) * input_ids.detach().cpu().numpy().shape[1]


class Shape(Texts):
    def forward(self, input_ids, attention_mask):
        length = input_ids.detach().cpu().numpy().shape[1]
        return super().forward(input_ids.view(-1, length), attention_mask)


def number():
    return Number(12)


def shape():
    return Shape(12)
"""

RECIPE = """\
version: 1
name: texts
seed: 1
threads: 1
model: {source: file, params: {path: net.py, object: build}}
data: {source: text, params: {path: data, tokenizer: tokenizer, max_length: 12}}
training: {epochs: 6, batch_size: 16, optimizer: {name: adam, lr: 0.01}}
train: {method: dense}
nm: {fine_tune: {epochs: 2}}
quantize: {calibration_batches: 4}
export: {parity_examples: 48}
deploy:
  - {runtime: openvino}
  - {runtime: onnxruntime}
benchmark: {rounds: 5, round_ms: 2.0, warmup_ms: 2.0, batch_sizes: [1, 4]}
"""


@pytest.fixture
def texts(tmp_path: Path, make_tokenizer) -> Path:
    """A folder with a recipe whose texts are good exactly where "good" stands more often than "bad"."""
    make_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "data").mkdir()
    random = np.random.RandomState(0)
    for split, count in (("train", 240), ("test", 80)):
        lines = []
        for _ in range(count):
            words = random.choice(["good", "bad", "film", "plot", "a"], random.randint(1, 13)).tolist()
            label = "up" if words.count("good") > words.count("bad") else "down"
            lines.append(json.dumps({"text": " ".join(words), "label": label}) + "\n")
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "net.py").write_text(MODEL)
    (tmp_path / "texts.yaml").write_text(RECIPE)
    return tmp_path


def facts(folder: Path, stage: str) -> list[dict]:
    found = [json.loads(path.read_text()) for path in (folder / "runs/texts/store").glob("*/manifest.json")]
    return [each["measured"] for each in found if each["stage"] == stage]


def test_text_to_engines(texts: Path, cli: Callable) -> None:
    done = cli("run", "texts.yaml", "--trust-code")
    assert done.returncode == 0, done.stderr
    reports = [json.loads(path.read_text()) for path in (texts / "runs/texts/store").glob("measure-*/report.json")]
    assert sorted(each["precision"] for each in reports) == ["FP32", "FP32", "FP32", "INT8", "INT8"]
    assert sum(each["usable_sparsity"] > 0.4 for each in facts(texts, "measure")) == 2
    for each in reports:
        assert each["metrics"]["accuracy"] >= 0.8, each
        assert [latency["batch_size"] for latency in each["latency"]] == [1, 4]
    engines = facts(texts, "build_engine")
    assert len(engines) == 4
    for each in engines:
        assert each["metrics"]["accuracy"] >= 0.8, each["build"]["runtime"]
    assert "length differs between batches, 2 to 12; latencies, costs and predictions are of" in done.stdout
    for export in facts(texts, "export_onnx"):
        assert export["parity"]["examples"] == 48
        assert export["parity"]["top1_agreement"] >= 0.99
        attention = [each["work"] for each in export["workloads"] if each["work"]["op"] == "Attention"]
        typical = facts(texts, "build_engine")[0]["build"]["facts"]["axis_sizes"]["input_ids"]["1"][1]
        assert [each["macs"] for each in attention] == [2 * typical * typical * 32]
    assert (texts / "runs/texts/deploy/tokenizer.json").is_file()


@pytest.mark.parametrize(("factory", "message"), [("number", "it agrees with torch at"), ("shape", "does not take")])
def test_a_length_that_tracing_made_a_constant(texts: Path, cli: Callable, factory: str, message: str) -> None:
    short = RECIPE.replace("object: build", f"object: {factory}").replace("nm: {fine_tune: {epochs: 2}}\n", "")
    short = short.replace("quantize: {calibration_batches: 4}\n", "").replace("epochs: 6", "epochs: 1")
    (texts / "texts.yaml").write_text(short)
    done = cli("run", "texts.yaml", "--trust-code")
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == (4 if factory == "number" else 5), done.stderr
    assert message in line
    assert "a size became a constant when the network was traced" in line


def test_texts_longer_than_the_positions_of_the_network(texts: Path, cli: Callable) -> None:
    (texts / "texts.yaml").write_text(RECIPE.replace("object: build", "object: build, arguments: {positions: 11}"))
    done = cli("run", "texts.yaml", "--trust-code")
    assert done.returncode == 5
    line = done.stderr.strip().splitlines()[-1]
    assert "does not fit the data (input_ids (1, 12), attention_mask (1, 12)): " in line
    assert "index out of range in self" in line
    assert not list((texts / "runs/texts/store").glob("train-*/manifest.json"))


def test_a_recipe_without_its_tokenizer(texts: Path, cli: Callable) -> None:
    (texts / "tokenizer" / "tokenizer.json").unlink()
    done = cli("run", "texts.yaml", "--trust-code")
    assert done.returncode == 5
    assert "has no tokenizer.json; make it by transformers: AutoTokenizer" in done.stderr
    assert "Traceback" not in done.stderr
