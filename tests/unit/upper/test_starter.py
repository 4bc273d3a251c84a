"""`init` writes a recipe that is valid, can be planned at once, and follows from the network and the data."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from sparsify_deploy import console, recipe_source, starter
from sparsify_deploy.errors import DataError, UsageError
from sparsify_deploy.recipe import Recipe
from sparsify_deploy.starter import Start
from sparsify_deploy.workspace import open_run

NET = """
import torch
from torch import nn


def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 10))
"""


def begin(model: str, data: str, output: Path, **changed: object) -> starter.Start:
    options: dict[str, object] = {"checkpoint": None, "trust_code": False, "force": False, **changed}
    return starter.start(model, data, output, **options)  # type: ignore[arg-type]


def test_the_recipe_is_valid_and_fits_the_data(tmp_path: Path) -> None:
    found = begin("builtin:resnet8", "digits", tmp_path / "r.yaml")
    recipe = recipe_source.load(tmp_path / "r.yaml")
    assert isinstance(recipe, Recipe)
    assert recipe.model.params.model_dump()["in_channels"] == 1
    assert recipe.model.params.model_dump()["classes"] == 10
    assert recipe.nm is not None
    assert recipe.quantize is not None
    assert recipe.gates.max_drop == 0.01
    assert found.examples == 1437
    assert {layer.name for layer in found.layers if not layer.projected} == {"conv1", "fc"}
    text = (tmp_path / "r.yaml").read_text()
    assert "#   not conv1: C_in 1 is not a multiple of 4" in text
    assert "# 2:4 by the hardware's rule of thumb: 8 of 10 layers." in text


def test_the_recipe_can_be_planned_at_once(tmp_path: Path) -> None:
    begin("builtin:resnet8", "digits", tmp_path / "r.yaml")
    steps = open_run(tmp_path / "r.yaml", run_dir=tmp_path / "run").status()
    assert {"dense/model.report", "sparse/project_nm", "sparse/quantize"} <= {status.step.id for status in steps}


def test_few_examples_get_smaller_batches_and_more_epochs(tmp_path: Path, torchvision: ModuleType) -> None:
    for split, count in (("train", 20), ("test", 4)):
        for label in ("cat", "dog"):
            (tmp_path / "images" / split / label).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 40), (i, 0, 0)).save(tmp_path / "images" / split / label / f"{i}.png")
    (tmp_path / "recipes").mkdir()
    found = begin("torchvision:resnet18", f"folder:{tmp_path / 'images'}", tmp_path / "recipes" / "r.yaml")
    recipe = recipe_source.load(found.recipe)
    assert recipe.model.params.model_dump()["classes"] == 2
    assert recipe.training is not None
    assert (recipe.training.batch_size, recipe.training.epochs) == (10, 20)


def test_your_own_file_needs_trust_and_a_network_with_layernorm_gets_adamw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"init: runs code .* add --trust-code: model.source file: .*net.py \(sha256"):
        begin("file:net.py:build", "digits", Path("r.yaml"))
    assert not (tmp_path / "r.yaml").exists()
    begin("file:net.py:build", "digits", Path("r.yaml"), trust_code=True)
    recipe = recipe_source.load(tmp_path / "r.yaml")
    assert recipe.training is not None
    assert recipe.training.optimizer.name == "adamw"
    assert recipe.model.params.model_dump()["path"] == tmp_path / "net.py"


def test_a_recipe_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("mine")
    with pytest.raises(UsageError, match="exists already; name another file, or add --force"):
        begin("builtin:resnet8", "digits", tmp_path / "r.yaml")
    assert (tmp_path / "r.yaml").read_text() == "mine"
    begin("builtin:resnet8", "digits", tmp_path / "r.yaml", force=True)
    assert recipe_source.load(tmp_path / "r.yaml").nm is not None


@pytest.mark.parametrize(
    ("model", "data", "text"),
    [
        ("tim:resnet50", "digits", "--model tim:resnet50: no source 'tim'; did you mean 'timm'"),
        ("builtin", "digits", "--model builtin: builtin needs a name, as in builtin:NAME"),
        ("builtin:resnet9", "digits", "^init: model.params.name: expected one of"),
        ("builtin:resnet8", "fodler:x", "--data fodler:x: no source 'fodler'; did you mean 'folder'"),
        ("builtin:resnet8", "npz:x.npz:y", "npz takes a path and nothing after it"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path: Path, model: str, data: str, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        begin(model, data, tmp_path / "r.yaml")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is a folder; name the recipe in it, such as .*recipe\.yaml"):
        begin("builtin:resnet8", "digits", tmp_path, force=True)
    assert list(tmp_path.parent.glob(f"{tmp_path.name}.partial")) == []


def test_the_next_command_can_be_pasted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for code, trust in ((True, " --trust-code"), (False, "")):
        console.started(Start(tmp_path / "a b.yaml", (), 3, code), as_json=False)
        assert capsys.readouterr().out.endswith(f"plan '{tmp_path}/a b.yaml'{trust}\n")


def test_data_that_is_not_there_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        begin("builtin:resnet8", f"npz:{tmp_path / 'none.npz'}", tmp_path / "r.yaml")
    assert list(tmp_path.iterdir()) == []
