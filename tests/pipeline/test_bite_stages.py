"""Stages run by themselves: what they are scored on, what they hold, and when they refuse their own result."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsify_deploy import recipe_source
from sparsify_deploy.errors import CheckFailed
from sparsify_deploy.plan import plan
from sparsify_deploy.sparsity.layers import prunable
from sparsify_deploy.sparsity.mask import Mask
from sparsify_deploy.sparsity.nm import is_nm, nm_mask
from sparsify_deploy.stages import export_onnx, init_mask, measure, project_nm, train
from sparsify_deploy.stages.subject import Subject, load_weights_, save_weights
from sparsify_deploy.training.loop import predict
from sparsify_deploy.types import Context

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

RECIPE = """\
version: 1
threads: 1
sparsity: 0.6
model: {source: builtin, params: {name: resnet8, width: 16, in_channels: 1}}
data: {source: npz, params: {path: data.npz}}
training: {steps: 4, batch_size: 16, optimizer: {lr: 0.05}}
init: {criterion: synflow, params: {rounds: 5}, keep_dense: [conv1, fc]}
train: {method: static}
nm: {fill_batches: 3, fine_tune: {steps: 3}}
quantize: {calibration_batches: 2}
deploy: [{runtime: onnxruntime}]
"""


@pytest.fixture(autouse=True)
def _gentle(monkeypatch):
    """Leave torch's process-wide settings as they are, but for the number of threads while a test runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for module in (export_onnx, init_mask, measure, project_nm, train):
        monkeypatch.setattr(module, "reproducible", lambda context: torch.device("cpu"))
    yield
    torch.set_num_threads(threads)


def write_data(path: Path, train_labels: Any, test_labels: Any) -> None:
    random = np.random.default_rng(0)
    images = random.standard_normal((112, 8, 8)).astype(np.float32)
    np.savez(path, x_train=images[:64], y_train=train_labels, x_test=images[64:], y_test=test_labels)


def stages_in(folder: Path) -> dict[str, Any]:
    """Stage by step id of the recipe in `folder`."""
    return {step.id: step.stage for step in plan(recipe_source.load(folder / "tiny.yaml")).steps}


@pytest.fixture
def stages(tmp_path) -> dict[str, Any]:
    (tmp_path / "tiny.yaml").write_text(RECIPE, encoding="utf-8")
    random = np.random.default_rng(1)
    write_data(tmp_path / "data.npz", random.integers(0, 10, 64), random.integers(0, 10, 48))
    return stages_in(tmp_path)


@pytest.fixture
def out(tmp_path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def answers(subject: Subject, split: str) -> Any:
    outputs, _ = predict(subject.network(), subject.examples.split(split), subject.examples.inputs)
    return next(iter(outputs.values())).argmax(axis=1)


def sparse_start(subject: Subject, folder: Path) -> tuple[dict[str, Path], Mask]:
    """Files of a network with 40 % of each weight left, and its mask."""
    model = subject.network()
    generator = torch.Generator().manual_seed(5)
    mask = Mask(
        {layer.parameter: torch.rand(layer.weight.shape, generator=generator) < 0.4 for layer in prunable(model)}
    )
    mask.apply_(model)
    paths = {"weights": folder / "start.safetensors", "mask": folder / "start.mask"}
    save_weights(model, paths["weights"])
    mask.save(paths["mask"])
    return paths, mask


def test_a_model_and_its_engine_are_scored_on_the_test_split_alone(stages, tmp_path, out):
    subject = stages["dense/train"].subject
    # Every test example is answered rightly and no training example is.
    wrong = (answers(subject, "train") + 1) % 10
    write_data(tmp_path / "data.npz", wrong, answers(subject, "test"))
    stages = stages_in(tmp_path)
    report = dataclasses.replace(stages["dense/train.report"], runtime=None, params=None)
    facts = report.run({}, out, Context())
    assert facts["metrics"]["accuracy"] == 1.0
    engine = stages["dense/build_engine.onnxruntime"].run({"onnx": out / "model.onnx"}, out, Context())
    assert engine["metrics"]["accuracy"] == 1.0


def test_calibration_sees_training_examples_alone(stages):
    subject = stages["dense/quantize"].subject
    known = {row.numpy().tobytes() for row in subject.examples.split("train").take(torch.arange(64))["input"]}
    seen = [row for batch in subject.calibration(3, 16) for row in batch["input"]]
    assert len(seen) == 48
    assert all(row.numpy().tobytes() in known for row in seen)


def test_the_criterion_says_how_many_rounds_there_are(stages, out):
    rounds: list[tuple[int, int]] = []

    class Seen:
        def update(self, label: str, done: int, total: int, note: str = "") -> None:
            rounds.append((done, total))

        def say(self, message: str) -> None:
            pass

    stages["sparse/init_mask"].run({}, out, Context(progress=Seen()))
    assert rounds == [(k, 5) for k in range(1, 6)]


def test_training_holds_the_mask_it_was_given(stages, out):
    stage = stages["sparse/train"]
    inputs, mask = sparse_start(stage.subject, out)
    stage.run(inputs, out, Context())
    trained = stage.subject.network(out / "weights.safetensors")
    assert Mask.load(out / "mask.safetensors") == mask
    assert mask.check_holds(trained) == ()
    assert not torch.equal(trained.fc.weight, stage.subject.network(inputs["weights"]).fc.weight)


@pytest.mark.parametrize("fine_tuned", [True, False])
def test_a_projected_network_holds_its_mask_with_and_without_fine_tuning(stages, out, fine_tuned):
    stage = stages["sparse/project_nm"]
    inputs, sparse = sparse_start(stage.subject, out)
    if not fine_tuned:
        stage = dataclasses.replace(stage, training=None)
    facts = stage.run(inputs, out, Context())
    mask = Mask.load(out / "mask.safetensors")
    after, before = stage.subject.network(out / "weights.safetensors"), stage.subject.network(inputs["weights"])
    chosen = [row["layer"] for row in facts["layers"] if row["projected"]]
    assert len(chosen) == facts["projected"] == 8
    assert all(is_nm(mask[f"{name}.weight"], 2, 4) for name in chosen)
    assert not is_nm(sparse["layer1.0.conv1.weight"], 2, 4)
    assert mask.check_holds(after) == ()
    assert torch.equal(after.fc.weight, before.fc.weight) is not fine_tuned


def test_without_refill_projection_only_takes_weights_away(stages, out):
    stage = stages["sparse/project_nm"]
    inputs, sparse = sparse_start(stage.subject, out)
    stage = dataclasses.replace(stage, training=None, nm=stage.nm.model_copy(update={"fill": False}))
    stage.run(inputs, out, Context())
    mask = Mask.load(out / "mask.safetensors")
    before = dict(stage.subject.network(inputs["weights"]).named_parameters())
    after = dict(stage.subject.network(out / "weights.safetensors").named_parameters())
    for name in mask:
        assert not bool((mask[name] & ~sparse[name]).any())
        assert torch.equal(after[name], before[name] * mask[name])


def test_refilled_weights_are_where_the_dense_gradient_of_the_calibration_batches_is_largest(stages, out):
    stage = dataclasses.replace(stages["sparse/project_nm"], training=None)
    subject = stage.subject
    inputs, sparse = sparse_start(subject, out)
    facts = stage.run(inputs, out, Context())
    mask = Mask.load(out / "mask.safetensors")
    model = subject.network(inputs["weights"]).eval()
    for batch in subject.calibration(3, 16):
        loss = subject.opened_task.loss({"output": model(batch["input"])}, batch)
        (loss / 3).backward()
    refilled = 0
    for row in facts["layers"]:
        if not row["projected"]:
            continue
        name = f"{row['layer']}.weight"
        weight = model.get_parameter(name)
        kept = groups(nm_mask(weight, 2, 4, sparse[name]))
        grown, gradient = groups(mask[name]) & ~kept, groups(weight.grad.abs())
        assert bool((groups(mask[name]).sum(1) == 2).all())
        least = gradient.masked_fill(~grown, float("inf")).amin(1)
        best_left = gradient.masked_fill(kept | grown, -1.0).amax(1)
        some = grown.any(1)
        assert bool((least[some] >= best_left[some] * (1 - 1e-4)).all()), name
        refilled += int(grown.sum())
    assert refilled > 100


def groups(tensor: Any) -> Any:
    """A weight `(K, C, ...)` as rows `(groups, 4)` of consecutive input channels."""
    return tensor.detach().movedim(1, -1).reshape(-1, 4)


@pytest.mark.parametrize("quantised", [False, True])
def test_a_file_that_answers_otherwise_than_torch_is_refused(stages, out, monkeypatch, quantised):
    stage = stages["dense/export_onnx"]
    if not quantised:
        stage = dataclasses.replace(stage, quantize=None)
    assert stage.run({}, out, Context())["parity"]["top1_agreement"] == 1.0
    real = export_onnx.write_onnx

    def turned(subject: Subject, settings: Any, model: Any, path: Path) -> None:
        """Write the network that likes best what `model` likes least."""
        kept = {name: value.clone() for name, value in model.fc.state_dict().items()}
        model.fc.load_state_dict({name: -value for name, value in kept.items()})
        real(subject, settings, model, path)
        model.fc.load_state_dict(kept)

    monkeypatch.setattr(export_onnx, "write_onnx", turned)
    with pytest.raises(CheckFailed, match="agrees with torch" if quantised else "differs from torch"):
        stage.run({}, out, Context())


@pytest.mark.parametrize("spoilt", [None, "layer1.0.conv1.weight", "layer2.0.downsample.0.weight", "fc.weight"])
def test_a_file_whose_values_break_the_pattern_of_its_mask_is_refused(stages, out, spoilt):
    stage = dataclasses.replace(stages["sparse/export_onnx"], quantize=None)
    model = stage.subject.network()
    weights: Mapping[str, Any] = {layer.parameter: layer.weight for layer in prunable(model)}
    mask = Mask({name: nm_mask(w, 2, 4) for name, w in weights.items() if w.shape[1] % 4 == 0})
    spoilt_weight = weights[spoilt].detach().clone() if spoilt in weights else None
    mask.apply_(model)
    if spoilt is not None:
        assert spoilt_weight is not None, sorted(weights)
        with torch.no_grad():
            weights[spoilt].copy_(spoilt_weight)
    save_weights(model, out / "w.safetensors")
    mask.save(out / "m.safetensors")
    inputs = {"weights": out / "w.safetensors", "mask": out / "m.safetensors"}
    if spoilt is None:
        checked = stage.run(inputs, out, Context())["nm_checked"]
        assert {row["parameter"]: row["violations"] for row in checked} == dict.fromkeys(mask, 0)
        return
    with pytest.raises(CheckFailed, match=f"break 2:4 .* in {spoilt}"):
        stage.run(inputs, out, Context())


def test_weights_of_another_step_load_into_the_network(stages, out):
    """The start that the other tests here rest on: masked, and not the untrained network."""
    subject = stages["sparse/train"].subject
    inputs, mask = sparse_start(subject, out)
    model = subject.network()
    assert len(mask.check_holds(model)) == len(mask)
    load_weights_(model, inputs["weights"])
    assert mask.check_holds(model) == ()
