"""A small transformer of Hugging Face on texts: dense, 2:4 and INT8, through the whole command line."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

RECIPE = """\
version: 1
seed: 1
threads: 1
model:
  source: transformers
  params: {path: network, classes: 3}
data:
  source: text
  params: {path: texts, tokenizer: network, max_length: 16}
training: {epochs: 12, batch_size: 32, optimizer: {name: adamw, lr: 0.002}}
nm: {permute: channel_swap, fine_tune: {}}
quantize: {calibration_batches: 4, qat: {epochs: 1, optimizer: {lr: 0.0002}}}
deploy: [{runtime: openvino}, {runtime: onnxruntime}]
benchmark: {rounds: 5, round_ms: 2.0, warmup_ms: 2.0}
export: {min_top1_agreement: 0.9}
gates: {max_drop: 0.1}
"""

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(60)))

TORCHVISION = """\
import importlib.abc
import sys


class Declare(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            try:
                torch.ops.torchvision.nms.default
            except AttributeError:
                self.declared = torch.library.Library("torchvision", "DEF")
                DECLARED.append(self.declared)
                for name in ("nms", "qnms"):
                    self.declared.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


DECLARED = []
sys.meta_path.insert(0, Declare())
"""
"""As the fixture `torchvision` does, for a process of its own."""


@pytest.fixture
def folder(torchvision: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe, a network with a tokenizer and trained-looking weights but no classifier, and texts of three topics."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokenizers: Any = pytest.importorskip("tokenizers")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(TORCHVISION)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    network = tmp_path / "network"
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=160,
    )
    transformers.BertModel(config).save_pretrained(network)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(network / "tokenizer.json"))
    (network / "tokenizer_config.json").write_text('{"pad_token": "[PAD]"}')
    (tmp_path / "texts").mkdir()
    chance = random.Random(0)
    for split, count in (("train", 384), ("test", 96)):
        with (tmp_path / "texts" / f"{split}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("text", "label"))
            for i in range(count):
                topic = [f"w{20 * (i % 3) + chance.randrange(20)}" for _ in range(chance.randint(2, 10))]
                other = [f"w{chance.randrange(60)}" for _ in range(len(topic) // 3)]
                rows.writerow((" ".join(chance.sample(topic + other, len(topic + other))), i % 3))
    (tmp_path / "bert.yaml").write_text(RECIPE)
    return tmp_path


def test_a_transformer_goes_to_2_4_and_int8_on_both_runtimes(folder: Path, cli: Callable[..., Any]) -> None:
    planned = cli("plan", "bert.yaml")
    assert planned.returncode == 0, planned.stderr
    done = cli("run", "bert.yaml", "--json")
    assert done.returncode == 0, done.stderr
    assert "Loading weights" not in done.stderr
    report = json.loads(done.stdout)
    rows = {row["label"]: row["model"] for row in report["rows"]}
    assert list(rows) == ["dense FP32", "dense FP32, fine-tuned", "dense INT8", "2:4 FP32", "2:4 INT8"]
    found = {label: model["metrics"]["accuracy"] for label, model in rows.items()}
    assert found["dense FP32"] < 0.6  # the classifier is new
    assert min(list(found.values())[1:]) > 0.8, found
    last = {layer["name"]: layer for layer in rows["2:4 INT8"]["layers"]}
    inside = {name: layer for name, layer in last.items() if name.startswith("bert.encoder.layer.")}
    assert len(inside) == 12
    assert all(layer["pattern_held"] and layer["int8_in"] and layer["precision"] == "INT8" for layer in inside.values())
    into_the_stream = {name for name, layer in inside.items() if not layer["int8_out"]}
    assert into_the_stream == {
        f"bert.encoder.layer.{i}.{n}.dense" for i in (0, 1) for n in ("attention.output", "output")
    }
    assert any("bring no classifier of this size" in note for note in report["notes"])
    assert {race["runtime"] for race in report["benchmarks"]} == {"openvino", "onnxruntime"}
    again = cli("run", "bert.yaml", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["rows"] == report["rows"]


def test_init_writes_a_recipe_that_plans_at_once(folder: Path, cli: Callable[..., Any]) -> None:
    made = cli("init", "--model", "transformers:network", "--data", "text:texts", "-o", "made.yaml")
    assert made.returncode == 0, made.stderr
    text = (folder / "made.yaml").read_text()
    assert 'params: {path: "network", classes: 3, task: "sequence_classification", pretrained: true}' in text
    assert 'params: {path: "texts", tokenizer: "network"}' in text
    assert "name: adamw" in text
    planned = cli("plan", "made.yaml")
    assert planned.returncode == 0, planned.stderr
    assert "bert.encoder.layer.1.attention.self.query" in planned.stdout
    none = cli("init", "--model", "transformers:./nowhere", "--data", "text:texts", "-o", "other.yaml")
    assert none.returncode != 0
    assert len(none.stderr.strip().splitlines()) == 1
