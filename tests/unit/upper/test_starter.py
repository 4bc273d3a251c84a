"""`init` writes a recipe that is valid, can be planned at once, and follows from the network and the data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sparsify_deploy import console, recipe_source, starter
from sparsify_deploy.__main__ import main
from sparsify_deploy.errors import DataError, ModelError, UsageError
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


def save(folder: Path, x: NDArray[np.float32], y: NDArray[np.generic]) -> None:
    """`d.npz`, the same examples in both splits."""
    np.savez(folder / "d.npz", x_train=x, y_train=y, x_test=x, y_test=y)


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


def test_set_gives_parameters_of_network_and_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for label in ("cat", "dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (20, 20), (i, 0, 0)).save(tmp_path / "photos" / label / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    sets = ["data.params.train=.", "data.params.test_fraction=0.25", "data.params.size=16", "model.params.width=8"]
    found = begin("builtin:resnet8", "folder:photos", Path("r.yaml"), sets=sets)
    recipe = recipe_source.load(tmp_path / "r.yaml")
    assert found.examples == 12
    assert recipe.data is not None
    assert recipe.data.params.model_dump()["size"] == 16
    assert recipe.model.params.model_dump()["width"] == 8
    (tmp_path / "recipes").mkdir()
    (tmp_path / "other").symlink_to("photos")
    begin("builtin:resnet8", "folder:photos", Path("recipes/r.yaml"), sets=[*sets, "data.params.path=other"])
    assert '"../other"' in (tmp_path / "recipes" / "r.yaml").read_text()


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ("training.epochs=1", "init takes model.params.KEY=VALUE and data.params.KEY=VALUE"),
        ("data.params.size", "init takes model.params.KEY=VALUE"),
        ("data.params.nope=1", "^init: data.params.nope: unknown key"),
        ("model.params.width=[1]", "^init: model.params.width: expected a whole number, found a list"),
        ("model.params.name.deeper=1", "model.params.name: is .* has no fields: set it as a whole"),
    ],
)
def test_set_of_anything_else_is_refused(tmp_path: Path, item: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        begin("builtin:resnet8", "digits", tmp_path / "r.yaml", sets=[item])
    assert list(tmp_path.iterdir()) == []


def test_real_targets_make_it_regression(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\ndef build():\n"
        "    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))\n"
    )
    x, y = np.random.default_rng(0).normal(size=(20, 16)).astype("f4"), np.linspace(0, 1, 20, dtype="f4")
    save(tmp_path, x, y)
    monkeypatch.chdir(tmp_path)
    begin("file:net.py:build", "npz:d.npz", Path("r.yaml"), trust_code=True)
    recipe = recipe_source.load(tmp_path / "r.yaml")
    assert recipe.task.name == "regression"
    assert recipe.gates.max_drop is None


SEGMENTS = """
from torch import nn
from torch.nn import functional


def build():
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3, 3, padding=1))


class Task:
    metrics = {"pixels": "higher"}

    def loss(self, outputs, batch):
        return functional.cross_entropy(outputs["output"], batch["target"])

    def evaluate(self, outputs, batch):
        return {"pixels": float((outputs["output"].argmax(1) == batch["target"]).mean())}
"""


def test_a_task_of_the_users_own_for_masks_goes_to_int8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.py").write_text(SEGMENTS)
    x = np.random.default_rng(0).normal(size=(40, 3, 8, 8)).astype("f4")
    save(tmp_path, x, x.argmax(1))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"classification needs logits .*; for several labels an example write a task"):
        begin("file:net.py:build", "npz:d.npz", Path("r.yaml"), trust_code=True)
    with pytest.raises(UsageError, match="runs code that it names"):
        begin("builtin:resnet8", "npz:d.npz", Path("r.yaml"), task="file:net.py:Task")
    assert not Path("r.yaml").exists()
    begin("file:net.py:build", "npz:d.npz", Path("r.yaml"), trust_code=True, task="file:net.py:Task")
    recipe = recipe_source.load(Path("r.yaml"))
    assert recipe.task.name == "file"
    assert recipe.gates.max_drop is None
    few = ("training.epochs=1", "nm=null", "quantize.qat.epochs=1", "export.min_top1_agreement=0.999")
    arguments = ["run", "r.yaml", "--trust-code", "--quiet", "--until", "export_onnx"]
    assert main([*arguments, *(word for each in few for word in ("--set", each))]) == 0
    assert Path("runs/r/report.json").is_file()


@pytest.mark.parametrize(
    ("target", "outputs", "method", "expected"),
    [
        ("np.arange(8)", ("output",), "", ["output"]),
        ("np.arange(8)", ("logits", "features"), "", ["logits"]),
        ("np.arange(8)", ("scores", "features"), "", []),
        ("np.ones(8, 'f4')", ("output",), "", []),
        ("np.ones((8, 2, 2), 'i8')", ("output",), "", []),
        ("np.ones((8, 2, 2), 'i8')", ("output",), "def answers(self, outputs): return [*outputs]", ["output"]),
    ],
)
def test_what_answers_where_a_task_does_not_say(
    tmp_path: Path, target: str, outputs: tuple[str, ...], method: str, expected: list[str]
) -> None:
    (tmp_path / "own.py").write_text(
        f"import numpy as np\n{SEGMENTS}\n    {method}\n\n\n"
        f"def data():\n    half = dict(x=np.ones((8, 3, 4, 4), 'f4'), target={target})\n"
        "    return dict(train=half, test=half)\n"
    )
    (tmp_path / "r.yaml").write_text(
        "version: 1\nmodel: {source: file, params: {path: own.py, object: build}}\n"
        "data: {source: file, params: {path: own.py, object: data}}\n"
        "task: {name: file, params: {path: own.py, object: Task}}\nnm: {}\n"
    )
    subject = open_run(tmp_path / "r.yaml", trust_code=True).plan.subject
    assert list(subject.answers(dict.fromkeys(outputs))) == expected


def test_a_part_with_a_name_that_graphs_need_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.flat, self.meta = nn.Flatten(), nn.Linear(64, 10)\n\n"
        "    def forward(self, x):\n        return self.meta(self.flat(x))\n"
    )
    with pytest.raises(ModelError, match=r"^Net has a part called 'meta', a name that torch\.fx needs in its graphs: "):
        begin(f"file:{tmp_path / 'net.py'}:Net", "digits", tmp_path / "r.yaml", trust_code=True)


@pytest.mark.parametrize(
    ("model", "data", "task", "said"),
    [
        ("builtin:resnet8", "digits", "clasification", "--task clasification: no source 'clasification'"),
        ("builtin:resnet8", "digits", "file", "--task file: file needs a path"),
        ("builtin:resnet8", "digits", "regression", "regression needs a target"),
        ("onnx:net.onnx", None, "regression", "--task regression: measures answers to examples: give --data too"),
    ],
)
def test_a_task_that_does_not_fit_is_refused(tmp_path: Path, model: str, data: str, task: str, said: str) -> None:
    with pytest.raises((UsageError, DataError, ModelError)) as caught:
        begin(model, data, tmp_path / "r.yaml", task=task)
    assert str(caught.value).startswith(said)
    assert list(tmp_path.iterdir()) == []


def test_arrays_of_three_axes_are_images_unless_the_layout_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\ndef build():\n"
        "    return nn.Sequential(nn.Conv1d(6, 16, 3), nn.Flatten(), nn.Linear(16 * 14, 2))\n"
    )
    x, y = np.random.default_rng(0).normal(size=(20, 6, 16)).astype("f4"), np.arange(20) % 2
    save(tmp_path, x, y)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"such as data\.params\.layout none for arrays that are no grey images$"):
        begin("file:net.py:build", "npz:d.npz", Path("r.yaml"), trust_code=True)
    begin("file:net.py:build", "npz:d.npz", Path("r.yaml"), trust_code=True, sets=["data.params.layout=none"])


def test_set_reaches_into_a_parameter_as_it_does_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\ndef build(deep=0, wide=8, name=''):\n"
        "    assert (deep, wide, name) == (2, 16, 'a b')\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, wide), nn.ReLU(), nn.Linear(wide, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    sets = ["model.params.arguments={deep: 2, wide: 4}", "model.params.arguments.wide=16"]
    begin(
        "file:net.py:build",
        "digits",
        Path("r.yaml"),
        trust_code=True,
        sets=[*sets, "model.params.arguments.name=a b"],
    )
    recipe = recipe_source.load(tmp_path / "r.yaml")
    assert recipe.model.params.model_dump()["arguments"] == {"deep": 2, "wide": 16, "name": "a b"}


def test_the_head_gives_commands_that_work_and_notes_say_what_is_odd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Net(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.w = nn.Parameter(torch.zeros(16, 32))\n"
        "        self.out = nn.Linear(32, 4)\n\n    def forward(self, x):\n        return self.out(x @ self.w)\n"
    )
    x, y = np.random.default_rng(0).normal(size=(20, 16)).astype("f4"), np.eye(4, dtype="f4")[np.arange(20) % 4]
    save(tmp_path, x, y)
    monkeypatch.chdir(tmp_path)
    found = begin("file:net.py:Net", "npz:d.npz", Path("r.yaml"), trust_code=True)
    labels, weights = found.notes
    assert labels.startswith("data: each target is a row of 4 zeros and ones that sum to 1")
    assert "y.argmax(1)" in labels
    assert weights == (
        "128 of 640 weights are in Conv and Linear layers, which can be projected; outside of them, and never "
        "projected: w (512)"
    )
    text = (tmp_path / "r.yaml").read_text()
    assert all(f"# {note}\n" in text for note in found.notes)
    assert "sparsify-deploy run r.yaml --trust-code\n" in text
    assert begin("builtin:resnet8", "digits", tmp_path / "plain.yaml").notes == ()
    assert "--trust-code" not in (tmp_path / "plain.yaml").read_text()


def test_heads_of_training_alone_are_refused_before_a_recipe_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.out = nn.Linear(64, 10)\n\n    def forward(self, x):\n        y = self.out(x.flatten(1))\n"
        "        return (y, y) if self.training else y\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="gives output_0, output_1 in training and output in evaluation"):
        begin("file:net.py:Net", "digits", Path("r.yaml"), trust_code=True)
    assert not (tmp_path / "r.yaml").exists()


def test_the_networks_folder_says_tokenizer_positions_and_size(
    tmp_path: Path, torchvision: ModuleType, make_tokenizer: Callable[..., Path]
) -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = transformers.BertConfig(vocab_size=12, max_position_embeddings=8, **small)
    transformers.BertForSequenceClassification(bert).save_pretrained(tmp_path / "bert")
    make_tokenizer(tmp_path / "bert")
    (tmp_path / "texts").mkdir()
    rows = "".join(f"{'good film ' * i},a\nbad plot,b\n" for i in range(1, 9))
    for split in ("train", "test"):
        (tmp_path / "texts" / f"{split}.csv").write_text(f"text,label\n{rows}")
    begin(f"transformers:{tmp_path / 'bert'}", f"text:{tmp_path / 'texts'}", tmp_path / "t.yaml")
    recipe = recipe_source.load(tmp_path / "t.yaml")
    assert recipe.data is not None
    given = recipe.data.params.model_dump()
    assert (given["max_length"], given["tokenizer"]) == (8, tmp_path / "bert")
    vit = transformers.ViTConfig(image_size=16, patch_size=8, num_labels=2, **small)
    transformers.ViTForImageClassification(vit).save_pretrained(tmp_path / "vit")
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            (tmp_path / "images" / split / label).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (20, 20), (i, 0, 0)).save(tmp_path / "images" / split / label / f"{i}.png")
    begin(f"transformers:{tmp_path / 'vit'}", f"folder:{tmp_path / 'images'}", tmp_path / "v.yaml")
    recipe = recipe_source.load(tmp_path / "v.yaml")
    assert recipe.data is not None
    assert recipe.data.params.model_dump()["size"] == 16


def test_a_set_of_torchvision_needs_folder_and_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="torchvision needs a folder and a name, as in torchvision:FOLDER:NAME"):
        begin("builtin:resnet8", "torchvision:CIFAR10", tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("data", "mean", "found"),
    [
        ({"path": "d"}, (0.5, 0.5, 0.5), {"path": "d", "normalize": "half"}),
        ({"path": "d"}, (0.485, 0.456, 0.406), {"path": "d"}),
        ({"path": "d", "normalize": "none"}, (0.5, 0.5, 0.5), {"path": "d", "normalize": "none"}),
    ],
)
def test_images_are_scaled_as_timm_says_its_network_was_trained(data, mean, found) -> None:
    network = SimpleNamespace(pretrained_cfg={"mean": mean, "std": (0.5, 0.5, 0.5)})
    subject = SimpleNamespace(check_network=lambda: network)
    assert starter._scaled(starter._Source("folder", data), subject).params == found
    assert starter._scaled(starter._Source("digits", {}), subject).params == {}
