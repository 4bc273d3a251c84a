"""What a recipe's init, train and nm sections may not ask of one another."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsify_deploy.errors import RecipeError
from sparsify_deploy.recipe_source import load

BASE = "version: 1\nmodel: {params: {name: resnet8, in_channels: 1}}\ndata: {}\ntraining: {steps: 4}\n"


def mistakes_of(folder: Path, text: str) -> list[str]:
    path = folder / "recipe.yaml"
    path.write_text(BASE + text, encoding="utf-8")
    try:
        load(path)
    except RecipeError as error:
        return [line.partition("recipe.yaml")[2].lstrip(":") for line in error.lines]
    return []


@pytest.mark.parametrize(
    "text",
    [
        "sparsity: 0.9\ninit: {}\ntrain: {method: static}\n",
        "init: {criterion: random, pattern: '2:4'}\ntrain: {method: static}\n",
        "sparsity: 0.9\ntrain: {method: gradual}\n",
        "init: {criterion: snip, pattern: '2:4'}\ntrain: {method: set, params: {pattern: '2:4'}}\n",
        "train: {method: sr_ste}\n",
        "nm: {via: ['4:8'], fine_tune: {}}\n",
        "nm: {via: ['8:16', '4:8'], fine_tune: {}}\n",
        "nm: {pattern: '1:4', via: ['2:4'], fine_tune: {}}\n",
    ],
)
def test_these_go_together(tmp_path: Path, text: str) -> None:
    assert mistakes_of(tmp_path, text) == []


@pytest.mark.parametrize(
    ("text", "place", "says"),
    [
        ("sparsity: 0.9\ntrain: {method: set}\n", "6:17: train.method", "set needs a starting mask: add an init"),
        ("sparsity: 0.9\ninit: {}\ntrain: {method: imp}\n", "6:1: init", "has no effect with train.method imp"),
        ("train: {method: gradual}\n", "5:17: train.method", "gradual needs the share of weights to drop"),
        ("sparsity: 0.9\ntrain: {method: sr_ste}\n", "5:11: sparsity", "has no effect with train.method sr_ste"),
        ("sparsity: 0.9\nnm: {}\n", "5:11: sparsity", "has no effect without an init section"),
        (
            "init: {criterion: snip, pattern: '2:4'}\ntrain: {method: rigl}\n",
            "5:34: init.pattern",
            "rigl would move weights out of 2:4: set train.params.pattern 2:4",
        ),
        ("init: {pattern: '2:4'}\ntrain: {method: snfs}\n", "5:17: init.pattern", "snfs does not keep a pattern"),
        ("nm: {fill: false, fill_batches: 2}\n", "5:33: nm.fill_batches", "has no effect with nm.fill false"),
        (
            "sparsity: 0.9\ntrain: {method: imp, params: {finetune_fraction: 0.1}}\n",
            "6:22: train.params",
            "finetune_fraction has no effect with retrain weight_rewind",
        ),
        ("init: {}\ntrain: {method: static}\n", "5:1: init", "needs the share of weights to drop"),
        (
            "sparsity: 0.9\ninit: {pattern: '2:4'}\ntrain: {method: static}\n",
            "5:11: sparsity",
            "has no effect beside init.pattern 2:4",
        ),
        (
            "sparsity: 0.9\ninit: {criterion: synflow, samples_per_class: 2}\ntrain: {method: static}\n",
            "6:47: init.samples_per_class",
            "has no effect with init.criterion synflow",
        ),
        (
            "sparsity: 0.9\ninit: {criterion: snip, batches: 2, samples_per_class: 2}\ntrain: {method: static}\n",
            "6:34: init.batches",
            "has no effect beside samples_per_class",
        ),
        (
            "init: {pattern: '2:4', allocation: erk}\ntrain: {method: static}\n",
            "5:36: init.allocation",
            "has no effect beside init.pattern 2:4",
        ),
        ("init: {pattern: '4:2'}\ntrain: {method: static}\n", "5:17: init.pattern", "N must be below M"),
        ("nm: {via: ['1:4'], fine_tune: {}}\n", "5:12: nm.via.0", "1:4 does not contain 2:4"),
        ("nm: {via: ['2:4'], fine_tune: {}}\n", "5:12: nm.via.0", "2:4 does not contain 2:4"),
        ("nm: {via: ['3:6'], fine_tune: {}}\n", "5:12: nm.via.0", "3:6 does not contain 2:4"),
        ("nm: {via: ['4:8', '8:16'], fine_tune: {}}\n", "5:12: nm.via.0", "4:8 does not contain 8:16"),
        ("nm: {via: ['4:8']}\n", "5:6: nm.via", "has no effect without nm.fine_tune"),
        ("nm: {pattern: '4:8', permute: stripe_groups}\n", "5:31: nm.permute", "use channel_swap"),
        ("nm: {pattern: '9:17'}\n", "5:15: nm.pattern", "M at most 16"),
    ],
)
def test_these_do_not(tmp_path: Path, text: str, place: str, says: str) -> None:
    found = mistakes_of(tmp_path, text)
    assert any(line.startswith(f"{place}: ") and says in line for line in found), found
