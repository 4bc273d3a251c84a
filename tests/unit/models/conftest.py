"""Tiny transformers with random weights, saved as their library saves them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TEXT = ("bert", "distilbert", "roberta")

_SMALL = {"vocab_size": 50, "max_position_embeddings": 40, "initializer_range": 0.5}
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {**_SMALL, **_SIZES}),
    "roberta": ("Roberta", {**_SMALL, **_SIZES, "type_vocab_size": 1}),
    "distilbert": ("DistilBert", {**_SMALL, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}),
    "vit": ("ViT", {**_SIZES, "image_size": 16, "patch_size": 4, "hidden_dropout_prob": 0.1}),
}


@pytest.fixture
def transformers(torchvision: ModuleType) -> Any:
    """transformers, whose classes import torchvision."""
    return pytest.importorskip("transformers")


@pytest.fixture
def saved(transformers: Any, tmp_path: Path) -> Callable[..., Path]:
    """Save a tiny network of a kind and return its folder."""

    def save(kind: str, *, classes: int = 3, head: bool = True, **settings: Any) -> Path:
        torch = importlib.import_module("torch")
        name, given = _CONFIGS[kind]
        config = getattr(transformers, f"{name}Config")(**{**given, "num_labels": classes, **settings})
        task = "Image" if kind == "vit" else "Sequence"
        torch.manual_seed(5)
        model = getattr(transformers, f"{name}For{task}Classification" if head else f"{name}Model")(config)
        folder = tmp_path / f"{kind}-{classes}-{head}"
        model.save_pretrained(folder)
        return folder

    return save
