"""The recipes that come with the project: valid, found by editors, and free of choices that make no sense."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsify_deploy.recipe_source import SCHEMA_FILE, load

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))


def test_the_named_ones_are_there() -> None:
    assert {"digits", "smoke", "mnist-lenet", "cifar10-resnet20"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_is_valid_without_its_data(path: Path) -> None:
    recipe = load(path)
    assert recipe.name == path.stem
    assert recipe.dense_branch, "a verdict needs the dense twin"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_names_the_schema_for_editors(path: Path) -> None:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    prefix, _, target = first.partition("$schema=")
    assert prefix == "# yaml-language-server: "
    assert (path.parent / target).resolve() == SCHEMA_FILE.resolve()


def test_data_of_ones_own_is_given_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load(FOLDER / "mnist-lenet.yaml", ["data.params.path=mine.npz"])
    assert recipe.data.params.model_dump()["path"] == tmp_path / "mine.npz"
    assert load(FOLDER / "mnist-lenet.yaml").data.params.model_dump()["path"] == FOLDER / "../data/mnist.npz"


def test_the_demo_rewires_often_and_early_enough() -> None:
    recipe = load(FOLDER / "digits.yaml")
    assert recipe.training is not None
    assert recipe.training.epochs is not None
    assert recipe.train is not None
    params = recipe.train.params.model_dump()
    steps = recipe.training.epochs * (1437 // recipe.training.batch_size)
    assert steps * params["end_fraction"] / params["update_every"] >= 6
