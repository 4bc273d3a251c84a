"""Averages, choosing, mixing and memory formats through the stages that train: what they leave on disk."""

from __future__ import annotations

import dataclasses
import importlib.util
import random
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sparsify_deploy import recipe_source
from sparsify_deploy.errors import DataError, Interrupted, ModelError
from sparsify_deploy.plan import plan
from sparsify_deploy.preprocessing.spec import ImageSpec
from sparsify_deploy.sparsity.mask import Mask
from sparsify_deploy.sparsity.nm import is_nm
from sparsify_deploy.stages import project_nm, quantize, train, training_checks
from sparsify_deploy.stages.subject import Subject, load_tensors
from sparsify_deploy.stages.training_checks import check_training, unmet_by_training
from sparsify_deploy.training.settings import EMA, Training
from sparsify_deploy.types import Context

RECIPE = """\
version: 1
threads: 1
sparsity: 0.5
model: {source: builtin, params: {name: resnet8, width: 16, in_channels: 1}}
data: {source: digits, augment: AUGMENT}
training: {steps: 6, batch_size: 16, optimizer: {lr: 0.05}, TRAINING}
init: {criterion: random}
train: {method: rigl, params: {update_every: 2}, training: {TRAIN}}
nm: {fill_batches: 2, fine_tune: {steps: 6}}
quantize: {calibration_batches: 2, qat: {steps: 4, optimizer: {lr: 0.001}}}
"""


class Split:
    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.pixels = torch.randint(256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
        self.target = torch.randint(10, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.target)

    def take(self, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"input": (self.pixels[indices].float() - 128) / 64, "target": self.target[indices]}


class Data:
    """Grey images of bytes, with a validation split where `validation` is not 0."""

    inputs = ("input",)
    classes = None
    preprocessing = ImageSpec("L", 8, "stretch", (128.0,), (64.0,))

    def __init__(self, validation: int = 32) -> None:
        self._splits = {"train": Split(64, 1), "test": Split(16, 2), "validation": Split(validation, 3)}
        self.asked: list[str] = []

    def split(self, name: str) -> Split:
        self.asked.append(name)
        if name == "validation" and not len(self._splits[name]):
            raise DataError("data: there is no validation split: hold some out")
        return self._splits[name]


@pytest.fixture(autouse=True)
def _gentle(monkeypatch):
    """Leave torch's process-wide settings as they are, but for the number of threads while a test runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for module in (project_nm, quantize, train):
        monkeypatch.setattr(module, "reproducible", lambda context: torch.device("cpu"))
    yield
    torch.set_num_threads(threads)


def planned(folder: Path, training: str, augment: str = "[]", data: Any = None, own: str = "") -> dict[str, Any]:
    """The stages of a recipe, all on one opened data set."""
    text = RECIPE.replace("AUGMENT", augment).replace("TRAINING", training).replace("TRAIN", own)
    (folder / "tiny.yaml").write_text(text, encoding="utf-8")
    made = plan(recipe_source.load(folder / "tiny.yaml"))
    made.subject.__dict__["examples"] = data or Data()
    return {step.id: step.stage for step in made.steps}


def ran(stage: Any, folder: Path, inputs: dict[str, Path] | None = None, context: Context | None = None) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    return stage.run(inputs or {}, folder, context or Context())


def mask_for(subject: Subject, folder: Path) -> Path:
    model = subject.network()
    generator = torch.Generator().manual_seed(0)
    weights = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    mask = Mask({name: torch.rand(p.shape, generator=generator) < 0.5 for name, p in weights.items()})
    mask.save(folder / "start.mask")
    return folder / "start.mask"


class StopAfter:
    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0


EVERYTHING = "ema: {decay: 0.8}, channels_last: true, keep: best, evaluate_every: 0.5, mixup: 0.4, cutmix: 1.0"
CHANGES = "[crop, rand_augment, {random_erasing: {probability: 0.7}}]"


def test_two_of_four_holds_in_the_average_through_fine_tuning_and_quantisation(tmp_path):
    stages = planned(tmp_path, "ema: {decay: 0.8}, channels_last: true")
    ran(stages["sparse/project_nm"], tmp_path / "nm")
    weights, mask = load_tensors(tmp_path / "nm/weights.safetensors"), Mask.load(tmp_path / "nm/mask.safetensors")
    plain = planned(tmp_path, "channels_last: true")["sparse/project_nm"]
    ran(plain, tmp_path / "plain")
    assert Mask.load(tmp_path / "plain/mask.safetensors") == mask
    for name, kept in mask.items():
        assert is_nm(weights[name] != 0, 2, 4)
        assert (weights[name][~kept] == 0).all()
        assert not torch.equal(weights[name], load_tensors(tmp_path / "plain/weights.safetensors")[name])
    inputs = {"weights": tmp_path / "nm/weights.safetensors", "mask": tmp_path / "nm/mask.safetensors"}
    facts = ran(stages["sparse/quantize"], tmp_path / "int8", inputs)
    state = load_tensors(tmp_path / "int8/quantized.safetensors")
    for name in mask:
        assert (state[name][~mask[name]] == 0).all(), name
    assert facts["history"]["steps"] == 4
    again = planned(tmp_path, "channels_last: true")["sparse/quantize"]
    ran(again, tmp_path / "int8-plain", inputs)
    other = load_tensors(tmp_path / "int8-plain/quantized.safetensors")
    moved = [name for name in mask if not torch.equal(state[name], other[name])]
    assert moved
    ranges = [name for name in state if name.endswith("_amax")]
    assert ranges
    assert all(torch.equal(state[name], other[name]) for name in ranges)


def test_all_of_them_together_and_interrupted_leave_the_same_bytes(tmp_path, torchvision):
    stages = planned(tmp_path, EVERYTHING, CHANGES)
    stage = stages["sparse/train"]
    inputs = {"mask": mask_for(stage.subject, tmp_path)}
    facts = ran(stage, tmp_path / "whole", inputs)
    kill = random.Random(5).randrange(1, 6)
    with pytest.raises(Interrupted):
        ran(stage, tmp_path / "cut", inputs, Context(stop_requested=StopAfter(kill)))
    again = ran(stage, tmp_path / "cut", inputs)
    for name in ("weights.safetensors", "mask.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    for name in ("losses", "updates", "curve", "metric", "notes", "steps"):
        assert facts["history"][name] == again["history"][name]
    assert facts["history"]["metric"] == "accuracy"
    assert [step for step, _ in facts["history"]["curve"]] == [2, 4, 6]
    assert (
        Mask.load(tmp_path / "whole/mask.safetensors").check_holds(
            stage.subject.network(tmp_path / "whole/weights.safetensors")
        )
        == ()
    )


def test_the_network_is_left_in_the_format_it_is_saved_in(tmp_path, monkeypatch):
    seen = []
    stage = planned(tmp_path, "channels_last: true")["dense/train"]
    real = train.save_weights
    monkeypatch.setattr(train, "save_weights", lambda model, path: (seen.append(model), real(model, path)))
    ran(stage, tmp_path / "out")
    assert all(p.is_contiguous() for p in seen[0].parameters())


def test_the_test_split_decides_nothing(tmp_path):
    data = Data()
    stage = planned(tmp_path, "keep: best, early_stop: {patience: 1}, evaluate_every: 0.25", data=data)["dense/train"]
    stage.preflight()
    scored = []
    real = data._splits["test"].take
    data._splits["test"].take = lambda indices: (scored.append(len(indices)), real(indices))[1]
    facts = ran(stage, tmp_path / "out")
    assert set(scored) == {1}  # an example for shapes and costs, never the whole split
    history = facts["history"]
    assert history["steps"] == history["curve"][-1][0]
    assert facts["cost"]["relative_training_flops"] == pytest.approx(history["steps"] / 6)
    assert history["steps"] < 6


def test_without_a_validation_split_every_stage_says_so_before_it_runs(tmp_path):
    stages = planned(tmp_path, "keep: best", data=Data(validation=0))
    for step in ("dense/train", "sparse/train", "sparse/project_nm", "sparse/quantize"):
        with pytest.raises(DataError, match="there is no validation split"):
            stages[step].preflight()

    def two_only(name):
        return {"train": Split(8, 1), "test": Split(8, 2)}[name]

    own = SimpleNamespace(inputs=("input",), classes=None, split=two_only)
    with pytest.raises(DataError, match="measure on a split called validation, which this data set does not have"):
        planned(tmp_path, "evaluate_every: 1", data=own)["dense/train"].preflight()


def test_a_change_that_needs_bytes_is_refused_before_anything_runs(tmp_path, torchvision):
    data = Data()
    data.preprocessing = None
    for step in ("dense/train", "sparse/project_nm", "sparse/quantize"):
        with pytest.raises(DataError, match="rand_augment works on bytes"):
            planned(tmp_path, "", "[rand_augment]", data=data)[step].preflight()
    planned(tmp_path, "", "[random_erasing]", data=data)["dense/train"].preflight()
    planned(tmp_path, EVERYTHING, CHANGES)["dense/train"].preflight()


@pytest.mark.parametrize(
    ("training", "augment", "missing", "says"),
    [
        ("mixup: 0.2", "[]", "torchvision", "training.mixup needs torchvision: pip install 'sparsify-deploy[vision]'"),
        ("", "[flip, rand_augment]", "torchvision", "data.augment rand_augment needs torchvision: pip install"),
        ("", "[crop, flip]", "torchvision", ""),
        ("compile: true", "[]", "g++", "training.compile needs a C++ compiler, and there is no g++: install g++"),
        ("", "[]", "g++", ""),
    ],
)
def test_what_is_not_installed_is_said_before_the_run(tmp_path, monkeypatch, training, augment, missing, says):
    real = importlib.util.find_spec
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == missing else real(name, *a))
    monkeypatch.setattr(training_checks.shutil, "which", lambda name: None if name == missing else shutil.which(name))
    stages = planned(tmp_path, training.replace("compile: true", ""), augment)
    if training == "compile: true":
        stages = {k: v for k, v in planned(tmp_path, "", own="compile: true").items() if k == "sparse/train"}
    lines = [
        line for step in stages.values() if hasattr(step, "unmet") and step.name != "quantize" for line in step.unmet()
    ]
    mine = [line for line in lines if missing in line]
    assert bool(mine) == bool(says)
    assert all(line.startswith(says) for line in mine)


def test_nothing_trains_nothing_is_missing(tmp_path):
    subject = planned(tmp_path, "")["dense/train"].subject
    assert list(unmet_by_training(subject, None)) == []
    check_training(subject, None, nn.Linear(1, 1))


class Views(nn.Module):
    """What only runs on contiguous activations."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.head = nn.Linear(512, 10)

    def forward(self, x):
        x = self.conv(x)
        return self.head(x.view(x.shape[0], -1))


def test_a_memory_format_that_cannot_be_or_does_nothing_is_a_line(tmp_path):
    subject = planned(tmp_path, "")["dense/train"].subject
    asked = Training(steps=1, channels_last=True)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(ModelError, match=r"^training.channels_last has no effect on a network without 2-D conv"):
        check_training(subject, asked, flat)
    model = Views()
    with pytest.raises(ModelError, match=r"^training.channels_last: the network cannot run .* use reshape or flatten"):
        check_training(subject, asked, model)
    assert model.conv.weight.is_contiguous()
    check_training(subject, Training(steps=1), model)


def test_logits_of_another_shape_cannot_be_mixed(tmp_path):
    subject = planned(tmp_path, "")["dense/train"].subject
    with pytest.raises(DataError, match=r"logits of shape \(N, classes\)"):
        training_checks.mixing(subject, Training(steps=1, mixup=0.1), nn.Conv2d(1, 4, 3))
    found = training_checks.mixing(subject, Training(steps=1, mixup=0.1), subject.network())
    assert (found.mixup, found.cutmix, found.classes) == (0.1, None, 10)
    assert training_checks.mixing(subject, Training(steps=1), nn.Conv2d(1, 4, 3)) is None


def test_patterns_on_the_way_each_choose_for_themselves(tmp_path):
    stage = planned(tmp_path, "keep: best, evaluate_every: 0.25")["sparse/project_nm"]
    stage = dataclasses.replace(stage, nm=stage.nm.model_copy(update={"via": ("4:8",)}))
    facts = ran(stage, tmp_path / "out")
    history = facts["history"]
    assert [step for step, _ in history["curve"]] == [1, 2, 3, 4, 5, 6]
    assert len(history["notes"]) == 2
    assert history["notes"][1].startswith("fine_tune-2: ends with the weights of step")
    weights, mask = load_tensors(tmp_path / "out/weights.safetensors"), Mask.load(tmp_path / "out/mask.safetensors")
    assert all(is_nm(weights[name] != 0, 2, 4) for name in mask)


def test_the_default_settings_ask_for_none_of_it():
    plain = Training(steps=1)
    asked = (plain.chooses, plain.measures, plain.mixes, plain.compile, plain.channels_last, plain.ema)
    assert not any(asked)
    assert EMA().decay == 0.999


class Heads(nn.Module):
    """Two outputs in training, one in evaluation, as networks with auxiliary heads have."""

    def __init__(self, both):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(64, 10)
        self.both = both

    def forward(self, x):
        logits = self.head(self.drop(self.norm(x)).flatten(1))
        return (logits, logits * 2) if self.training and self.both else logits


def test_a_network_that_answers_otherwise_in_training_is_a_line_and_left_as_it_was(tmp_path):
    subject = planned(tmp_path, "")["dense/train"].subject
    expected = r"gives output_0, output_1 in training and output in evaluation: turn off .* \{aux_logits: false\}"
    for both, outcome in ((True, pytest.raises(ModelError, match=expected)), (False, nullcontext())):
        model = Heads(both)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        torch.manual_seed(3)
        with outcome:
            check_training(subject, Training(steps=1), model)
        drawn = torch.rand(3)
        torch.manual_seed(3)
        assert torch.equal(drawn, torch.rand(3))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert model.training
