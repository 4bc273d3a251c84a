"""What a recipe's distillation section may not ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsify_deploy.errors import RecipeError
from sparsify_deploy.recipe import Recipe
from sparsify_deploy.recipe_source import load

BASE = "version: 1\nmodel: {params: {name: resnet8, in_channels: 1}}\ndata: {}\ntraining: {steps: 4}\n"
BOTH = "nm: {fine_tune: {}}\nquantize: {qat: {}}\n"


def loaded(folder: Path, text: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(BASE + text, encoding="utf-8")
    return load(path)


def mistakes_of(folder: Path, text: str) -> list[str]:
    try:
        loaded(folder, text)
    except RecipeError as error:
        return [line.partition("recipe.yaml")[2].lstrip(":") for line in error.lines]
    return []


@pytest.mark.parametrize(
    "text",
    [
        BOTH + "distillation: {}\n",
        BOTH + "train: {method: dense}\ndistillation: {weight: 1.0, features: ['layer*.conv1']}\n",
        BOTH + "train: {method: dense}\ndense_branch: false\ndistillation: {teacher: teacher.safetensors}\n",
        BOTH + "dense_branch: false\ndistillation: {}\n",
        BOTH + "distillation: {phases: [qat]}\n",
        "nm: {fine_tune: {}}\ndistillation: {phases: [fine_tune]}\n",
        "nm: {fine_tune: {}, permute: channel_swap}\ndistillation: {phases: [fine_tune]}\n",
    ],
)
def test_these_go_together(tmp_path: Path, text: str) -> None:
    assert mistakes_of(tmp_path, text) == []


@pytest.mark.parametrize(
    ("text", "place", "says"),
    [
        ("distillation: {}\n", "5:1: distillation.phases.0", "fine_tune has no effect without nm.fine_tune: add it"),
        ("distillation: {}\n", "5:1: distillation.phases.1", "qat has no effect without quantize.qat: add it"),
        ("nm: {}\ndistillation: {phases: [fine_tune]}\n", "6:25: distillation.phases.0", "without nm.fine_tune"),
        (
            "nm: {fine_tune: {}}\nquantize: {}\ndistillation: {phases: [fine_tune, qat]}\n",
            "7:36: distillation.phases.1",
            "or leave qat out",
        ),
        (
            BOTH + "train: {method: dense}\ndense_branch: false\ndistillation: {}\n",
            "9:1: distillation",
            "the teacher is the dense baseline: set dense_branch true, or name a teacher checkpoint",
        ),
        (
            "nm: {fine_tune: {}, permute: channel_swap}\ndistillation: {phases: [fine_tune], features: [conv1]}\n",
            "6:37: distillation.features",
            "nm.permute reorders channels: use logits, or permute none",
        ),
        (BOTH + "distillation: {weight: 0.0}\n", "7:24: distillation.weight", "a number above 0"),
        (BOTH + "distillation: {weight: 1.5}\n", "7:24: distillation.weight", "at most 1"),
        (BOTH + "distillation: {temperature: 0.0}\n", "7:29: distillation.temperature", "a number above 0"),
        (BOTH + "distillation: {phases: []}\n", "7:16: distillation.phases", "at least 1"),
        (BOTH + "distillation: {phases: [train]}\n", "7:25: distillation.phases.0", "one of fine_tune, qat"),
        (BOTH + "distillation: {wieght: 0.5}\n", "7:16: distillation.wieght", "weight"),
    ],
)
def test_these_do_not(tmp_path: Path, text: str, place: str, says: str) -> None:
    found = mistakes_of(tmp_path, text)
    assert any(line.startswith(f"{place}: ") and says in line for line in found), found


def test_a_teachers_path_starts_at_the_recipes_folder_and_each_phase_gets_its_distillation(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, BOTH + "distillation: {teacher: teacher.pt, phases: [qat]}\n")
    assert recipe.distilled("fine_tune") is None
    found = recipe.distilled("qat")
    assert found is not None
    assert found.teacher == tmp_path / "teacher.pt"
    assert loaded(tmp_path, BOTH).distilled("qat") is None
