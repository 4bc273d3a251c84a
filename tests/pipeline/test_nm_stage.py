"""The N:M stage by itself: patterns on the way, layers left out by measurement, N:M masks, teachers."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsify_deploy import recipe_source
from sparsify_deploy.errors import DataError, Interrupted, ModelError, UsageError
from sparsify_deploy.plan import plan
from sparsify_deploy.reports import LayerSensitivity, Score, SensitivityReport, dump
from sparsify_deploy.sparsity.layers import prunable
from sparsify_deploy.sparsity.mask import Mask
from sparsify_deploy.sparsity.nm import is_nm, nm_mask
from sparsify_deploy.stages import project_nm, quantize, train
from sparsify_deploy.stages.choice import keep_worst
from sparsify_deploy.stages.project_nm import choose
from sparsify_deploy.stages.subject import Subject, save_weights
from sparsify_deploy.training import checkpoint
from sparsify_deploy.training.settings import Distillation
from sparsify_deploy.types import Context

RECIPE = """\
version: 1
threads: 1
model: {source: builtin, params: {name: resnet8, width: 16, in_channels: 1}}
data: {source: npz, params: {path: data.npz}}
training: {steps: 4, batch_size: 16, optimizer: {lr: 0.05}}
nm: {fill_batches: 2, fine_tune: {steps: 7}}
quantize: {calibration_batches: 2, qat: {steps: 3, optimizer: {lr: 0.001}}}
"""


@pytest.fixture(autouse=True)
def _gentle(monkeypatch):
    """Leave torch's process-wide settings as they are, but for the number of threads while a test runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for module in (project_nm, quantize, train):
        monkeypatch.setattr(module, "reproducible", lambda context: torch.device("cpu"))
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def stages(tmp_path) -> dict[str, Any]:
    (tmp_path / "tiny.yaml").write_text(RECIPE, encoding="utf-8")
    random = np.random.default_rng(1)
    images = random.standard_normal((80, 8, 8)).astype(np.float32)
    labels = random.integers(0, 10, 80)
    np.savez(tmp_path / "data.npz", x_train=images[:64], y_train=labels[:64], x_test=images[64:], y_test=labels[64:])
    return {step.id: step.stage for step in plan(recipe_source.load(tmp_path / "tiny.yaml")).steps}


@pytest.fixture
def stage(stages) -> project_nm.ProjectNM:
    return stages["sparse/project_nm"]


@pytest.fixture
def out(tmp_path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def changed(stage: Any, **nm: Any) -> Any:
    return dataclasses.replace(stage, nm=stage.nm.model_copy(update=nm))


def with_mask(subject: Subject, folder: Path, n: int, m: int) -> tuple[dict[str, Path], Mask]:
    """Files of a network on N:M in every layer whose channels it divides, and its mask."""
    model = subject.network()
    mask = Mask({x.parameter: nm_mask(x.weight, n, m) for x in prunable(model) if x.weight.shape[1] % m == 0})
    mask.apply_(model)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # as after training, far from the identity it begins with
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    paths = {"weights": folder / "start.safetensors", "mask": folder / "start.mask"}
    save_weights(model, paths["weights"])
    mask.save(paths["mask"])
    return paths, mask


def other_weights(subject: Subject, path: Path) -> Path:
    """A network of the same architecture from another seed."""
    save_weights(dataclasses.replace(subject, seed=subject.seed + 1).network(), path)
    return path


class StopAfter:
    def __init__(self, steps):
        self.left = steps

    def __call__(self):
        self.left -= 1
        return self.left == 0


# -- patterns on the way -------------------------------------------------------------------------------------------


def test_each_pattern_on_the_way_is_projected_refilled_and_trained_for_its_share(stage, out):
    stage = changed(stage, via=("8:16", "4:8"))
    facts = stage.run({}, out, Context())
    chosen = [row["layer"] for row in facts["layers"] if row["projected"]]
    assert len(chosen) == facts["projected"] == 8
    assert facts["pattern"] == "2:4"
    assert [(step["pattern"], step["projected"]) for step in facts["via"]] == [("8:16", 8), ("4:8", 8)]
    kept = []
    for label, n, m in (("fine_tune", 8, 16), ("fine_tune-2", 4, 8), ("fine_tune-3", 2, 4)):
        content = checkpoint.read(out / f"{label}.checkpoint")
        held = Mask(content["updater"]["mask"])
        assert all(is_nm(held[f"{name}.weight"], n, m) for name in chosen)
        assert not any(is_nm(held[f"{name}.weight"], n // 2, m // 2) for name in chosen if m > 4)
        assert set(held.densities().values()) == {0.5}
        zeros = {name: content["model"][name] == 0 for name in held}
        assert all(torch.equal(zeros[name] | held[name], torch.ones_like(held[name])) for name in held)
        kept.append((held, content["step"]))
    assert [steps for _, steps in kept] == [2, 2, 3]
    assert Mask.load(out / "mask.safetensors") == kept[-1][0]
    history = facts["history"]
    assert history["steps"] == 7
    assert [level["steps"] for level in history["levels"]] == [2, 2, 3]
    assert [step for step, _ in history["losses"]] == [1, 2, 3, 4, 5, 6, 7]
    model = stage.subject.network(out / "weights.safetensors")
    assert kept[-1][0].check_holds(model) == ()
    # The same work as one fit at the same density: less than dense training for all seven steps.
    once = changed(stage, via=()).run({}, out / "once", Context())
    assert facts["cost"]["relative_training_flops"] == pytest.approx(once["cost"]["relative_training_flops"])
    assert 0.5 < facts["cost"]["relative_training_flops"] < 0.6
    assert "via" not in once


def test_what_the_tighter_pattern_keeps_lies_in_the_looser_one_but_for_what_is_refilled(stage, out):
    stage = dataclasses.replace(changed(stage, via=("4:8",), fill=False), training=None)
    facts = stage.run({}, out, Context())
    model = stage.subject.network()
    mask = Mask.load(out / "mask.safetensors")
    for layer in prunable(model):
        if layer.parameter in mask:
            loose = nm_mask(layer.weight, 4, 8)
            assert torch.equal(mask[layer.parameter], nm_mask(layer.weight * loose, 2, 4, loose))
    direct = dataclasses.replace(changed(stage, via=()), training=None).run({}, out, Context())
    for way, straight in zip(facts["layers"], direct["layers"], strict=True):
        if way["projected"]:
            assert way["kept_weights"] < straight["kept_weights"], "groups of fewer than two are not refilled here"


def test_a_layer_that_the_looser_pattern_does_not_divide_goes_to_the_last_one_directly(stage, out):
    stage = dataclasses.replace(changed(stage, via=("6:12",), pattern="2:4"), training=None)
    facts = stage.run({}, out, Context())
    assert facts["via"][0]["projected"] == 0
    assert {row["reason"] for row in facts["via"][0]["layers"][1:3]} == {"C_in 16 is not a multiple of 12"}
    assert facts["projected"] == 8


@pytest.mark.parametrize("features", [(), ("layer1.0.conv2",)])
def test_stopping_after_every_step_of_every_pattern_changes_nothing(stage, out, features):
    distillation = Distillation(weight=0.5, features=features)
    stage = dataclasses.replace(changed(stage, via=("4:8",)), distillation=distillation)
    teacher = {"teacher": other_weights(stage.subject, out / "teacher.safetensors")}
    for folder in ("whole", "cut"):
        (out / folder).mkdir()
    whole = stage.run(teacher, out / "whole", Context())
    stops = 0
    while True:
        try:
            again = stage.run(teacher, out / "cut", Context(stop_requested=StopAfter(1)))
            break
        except Interrupted:
            stops += 1
    assert stops == 5, "of seven steps the last of either pattern is not one to stop after"
    for file in stage.outputs.values():
        assert (out / "whole" / file).read_bytes() == (out / "cut" / file).read_bytes()
    assert again["layers"] == whole["layers"]
    assert again["via"] == whole["via"]
    assert again["history"]["losses"] == whole["history"]["losses"]


def test_more_patterns_than_steps_are_refused_before_anything_runs(stage):
    short = stage.training.model_copy(update={"steps": 2})
    stage = dataclasses.replace(changed(stage, via=("8:16", "4:8")), training=short)
    with pytest.raises(UsageError, match=r"2 steps cannot be shared by 3 patterns \(8:16, 4:8, 2:4\)"):
        stage.preflight()


# -- permutation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_channels_are_permuted_before_the_projection_and_the_mask_with_them(stage, out, masked):
    said = []

    class Said:
        def update(self, label: str, done: int, total: int, note: str = "") -> None:
            pass

        def say(self, message: str) -> None:
            said.append(message)

    stage = dataclasses.replace(changed(stage, fill=False), training=None)
    model = stage.subject.network()
    generator = torch.Generator().manual_seed(0)
    mask = Mask({x.parameter: torch.rand(x.weight.shape, generator=generator) < 0.6 for x in prunable(model)})
    inputs = {}
    if masked:
        mask.apply_(model)
        inputs = {"weights": out / "start.safetensors", "mask": out / "start.mask"}
        save_weights(model, inputs["weights"])
        mask.save(inputs["mask"])
    (out / "plain").mkdir()
    plain = stage.run(inputs, out / "plain", Context())
    permuted = changed(stage, permute="channel_swap")
    facts = permuted.run(inputs, out, Context(progress=Said()))
    found = facts["permutation"]
    rows = {row["layer"]: row for row in found["layers"]}
    assert set(rows) == {row["layer"] for row in facts["layers"] if row["projected"]}
    assert found["method"] == "channel_swap"
    assert found["permuted"] > 4
    assert found["kept_after"] > found["kept_before"] * 1.005
    assert found["max_difference"] < 1e-9
    for before, after in zip(plain["layers"], facts["layers"], strict=True):
        if before["projected"]:
            row = rows[before["layer"]]
            assert before["kept_l1"] == pytest.approx(row["kept_before"] / row["whole"], rel=1e-5)
            assert after["kept_l1"] == pytest.approx(row["kept_after"] / row["whole"], rel=1e-5)
    kept = Mask.load(out / "mask.safetensors")
    assert all(is_nm(kept[f"{name}.weight"], 2, 4) for name in rows)
    network = stage.subject.network(out / "weights.safetensors")
    assert kept.check_holds(network) == ()
    if masked:
        assert {k: v for k, v in kept.counts().items() if k in ("conv1.weight", "fc.weight")} == {
            k: v for k, v in mask.counts().items() if k in ("conv1.weight", "fc.weight")
        }, "layers that are not projected keep as many"
        assert kept["conv1.weight"].ne(mask["conv1.weight"]).any(), "its output channels moved"
    assert len(said) == 1
    assert "outputs differ by" in said[0]


def test_a_mask_that_is_on_the_pattern_is_not_permuted_away(stage, out):
    stage = dataclasses.replace(changed(stage, permute="channel_swap"), training=None)
    inputs, mask = with_mask(stage.subject, out, 2, 4)
    facts = stage.run(inputs, out, Context())
    assert {row["kept_l1"] for row in facts["layers"] if row["projected"]} == {1.0}
    assert facts["permutation"]["permuted"] == 0
    assert Mask.load(out / "mask.safetensors") == mask


def test_a_permuted_stage_goes_on_exactly(stage, out):
    stage = changed(stage, permute="channel_swap", via=("4:8",))
    for folder in ("whole", "cut"):
        (out / folder).mkdir()
    whole = stage.run({}, out / "whole", Context())
    for after in (2, 1, 2):
        with pytest.raises(Interrupted):
            stage.run({}, out / "cut", Context(stop_requested=StopAfter(after)))
    again = stage.run({}, out / "cut", Context())
    for file in stage.outputs.values():
        assert (out / "whole" / file).read_bytes() == (out / "cut" / file).read_bytes()
    assert again["permutation"] == whole["permutation"]


# -- masks that are N:M already ------------------------------------------------------------------------------------


@pytest.mark.parametrize("via", [(), ("4:8",)])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_a_mask_that_is_on_the_pattern_already_loses_nothing(stage, out, n, m, via):
    """Not by rule of thumb are conv1, of one channel, and fc, of ten outputs: fc has a mask all the same."""
    stage = dataclasses.replace(changed(stage, pattern=f"{n}:{m}", via=via if (n, m) == (2, 4) else ()), training=None)
    inputs, mask = with_mask(stage.subject, out, n, m)
    assert "fc.weight" in mask
    facts = stage.run(inputs, out, Context())
    rows = {row["layer"]: row for row in facts["layers"]}
    assert facts["projected"] == len(mask) == 9
    for name, row in rows.items():
        if name == "conv1":
            assert not row["projected"]
            continue
        assert (row["kept_l1"], row["refilled"]) == (1.0, 0)
        assert row["kept_weights"] == int(mask[f"{name}.weight"].sum())
        assert row["reason"] == f"its mask is {n}:{m} already"
    assert Mask.load(out / "mask.safetensors") == mask
    before, after = stage.subject.network(inputs["weights"]), stage.subject.network(out / "weights.safetensors")
    assert all(torch.equal(x, y) for x, y in zip(before.parameters(), after.parameters(), strict=True))


def test_a_layer_on_a_tighter_pattern_is_not_loosened_on_the_way(stage, out):
    stage = dataclasses.replace(changed(stage, pattern="1:4", via=("2:4",)), training=None)
    inputs, mask = with_mask(stage.subject, out, 1, 4)
    facts = stage.run(inputs, out, Context())
    assert facts["via"][0]["projected"] == 0
    assert facts["via"][0]["layers"][-1]["reason"] == "its mask is 1:4 already: stays"
    assert Mask.load(out / "mask.safetensors") == mask


def test_a_sparse_mask_that_fits_by_chance_is_chosen_by_the_rule_and_refilled(stage, out):
    model = stage.subject.network()
    mask = Mask({x.parameter: torch.zeros(x.weight.shape, dtype=torch.bool) for x in prunable(model)})
    answers = choose(prunable(model), stage.nm, mask)
    assert not answers["fc"].ok
    assert answers["layer1.0.conv1"].reason.startswith("C_out 16")
    mask.save(out / "start.mask")
    facts = dataclasses.replace(stage, training=None).run({"mask": out / "start.mask"}, out, Context())
    assert {row["refilled"] for row in facts["layers"] if row["layer"] == "layer1.0.conv1"} == {16 * 16 * 9 // 2}


# -- the worst layers ----------------------------------------------------------------------------------------------


def measured(drops: Mapping[str, float | None], direction: str = "higher", metric: str = "accuracy") -> Any:
    ranked = sorted((name for name, drop in drops.items() if drop is not None), key=lambda x: -(drops[x] or 0.0))
    rows = tuple(
        LayerSensitivity(
            layer=name,
            parameter=f"{name}.weight",
            shape=(16, 16, 3, 3),
            projected=Score(0.5, drop, 0.0) if drop is not None else None,
            rank=ranked.index(name) + 1 if drop is not None else None,
            reason="",
            quantized=None,
            quantized_reason="",
        )
        for name, drop in drops.items()
    )
    return SensitivityReport(metric, direction, "train", 64, "2:4", 0.6, 1.0, None, None, "", rows)


def test_the_layers_that_lose_most_stay_dense(stage, out):
    names = [layer.name for layer in prunable(stage.subject.network())]
    drops: dict[str, float | None] = dict.fromkeys(names, 0.001)
    drops |= {"layer2.0.conv1": 0.0123, "layer3.0.conv2": 0.2, "conv1": None, "fc": None}
    path = out / "sensitivity.json"
    path.write_text(dump(measured(drops)), encoding="utf-8")
    stage = dataclasses.replace(changed(stage, keep_worst_dense=2), training=None)
    assert stage.inputs == ("weights", "mask", "sensitivity")
    facts = stage.run({"sensitivity": path}, out, Context())
    reasons = {row["layer"]: row["reason"] for row in facts["layers"] if not row["projected"]}
    assert set(reasons) == {"conv1", "fc", "layer2.0.conv1", "layer3.0.conv2"}
    assert reasons["layer3.0.conv2"] == (
        "kept dense: number 1 of the worst 2 (nm.keep_worst_dense): accuracy -0.2000 when projected alone"
    )
    assert reasons["layer2.0.conv1"].startswith("kept dense: number 2 of the worst 2")
    assert "accuracy -0.0123 when" in reasons["layer2.0.conv1"]
    mask = Mask.load(out / "mask.safetensors")
    assert {f"{name}.weight" for name in names} - set(mask) == {f"{name}.weight" for name in reasons}
    before, after = stage.subject.network(), stage.subject.network(out / "weights.safetensors")
    assert torch.equal(before.layer3[0].conv2.weight, after.layer3[0].conv2.weight)


def test_only_layers_that_would_be_projected_are_ranked_and_a_metric_may_be_better_when_lower(stage):
    layers = prunable(stage.subject.network())
    nm = stage.nm.model_copy(update={"keep_dense": ("layer3.*",), "keep_worst_dense": 1})
    drops: dict[str, float | None] = dict.fromkeys((x.name for x in layers), 0.001)
    drops |= {"layer3.0.conv2": 9.0, "layer2.0.conv2": 0.5}
    found = keep_worst(layers, choose(layers, nm), nm, measured(drops, "lower", "rmse"))
    assert list(found) == ["layer2.0.conv2"]
    assert "rmse +0.5000 when projected alone" in found["layer2.0.conv2"].reason


def test_a_layer_without_a_measurement_is_an_error(stage):
    layers = prunable(stage.subject.network())
    nm = stage.nm.model_copy(update={"keep_worst_dense": 1})
    with pytest.raises(DataError, match=r"sensitivity of layer1\.0\.conv1 was not measured"):
        keep_worst(layers, choose(layers, nm), nm, measured({"fc": 0.1}))


def test_layers_that_lose_nothing_are_not_kept_and_a_count_without_effect_is_said(stage, out, tmp_path):
    said = []

    class Said:
        def update(self, label: str, done: int, total: int, note: str = "") -> None:
            pass

        def say(self, message: str) -> None:
            said.append(message)

    inputs, mask = with_mask(stage.subject, out, 2, 4)
    path = out / "sensitivity.json"
    path.write_text(dump(measured({})), encoding="utf-8")
    stage = dataclasses.replace(changed(stage, keep_worst_dense=2), training=None)
    facts = stage.run({**inputs, "sensitivity": path}, out, Context(progress=Said()))
    assert facts["projected"] == len(mask)
    assert said == ["nm.keep_worst_dense 2: only 0 layers would be projected and lose by it"]


# -- teachers ------------------------------------------------------------------------------------------------------


def ran(stage: Any, inputs: dict[str, Path], folder: Path, output: str) -> tuple[bytes, Any]:
    folder.mkdir(exist_ok=True)
    facts = stage.run(inputs, folder, Context())
    return (folder / stage.outputs[output]).read_bytes(), facts


@pytest.mark.parametrize("step", ["sparse/project_nm", "dense/fine_tune"])
def test_the_teacher_is_the_baseline_or_a_checkpoint_or_the_networks_own_start(stages, out, step):
    stage = stages[step]
    alone, facts = ran(stage, {}, out / "alone", "weights")
    assert "distillation" not in facts
    taught = dataclasses.replace(stage, distillation=Distillation(weight=0.5, temperature=2.0))
    assert taught.inputs[:3] == ("weights", "mask", "teacher")
    assert "teacher" not in stage.inputs
    start = out / "start.safetensors"
    save_weights(stage.subject.network(), start)
    by_itself, facts = ran(taught, {}, out / "itself", "weights")
    assert facts["distillation"] == {"temperature": 2.0, "weight": 0.5, "features": [], "relative_flops": 1 / 3}
    assert by_itself != alone
    assert ran(taught, {"teacher": start}, out / "baseline", "weights")[0] == by_itself
    other = other_weights(stage.subject, out / "other.safetensors")
    by_other = ran(taught, {"teacher": other}, out / "other", "weights")[0]
    assert by_other != by_itself
    named = dataclasses.replace(taught, distillation=taught.distillation.model_copy(update={"teacher": other}))
    assert "teacher" not in named.inputs
    assert named.files()["distillation.teacher"] == other
    assert ran(named, {}, out / "named", "weights")[0] == by_other


def test_a_teacher_that_does_not_fit_is_refused_before_anything_runs(stages, out, tmp_path):
    (out / "other.safetensors").write_bytes(b"no weights")
    for step in ("sparse/project_nm", "dense/fine_tune", "sparse/quantize"):
        stage = stages[step]
        broken = dataclasses.replace(stage, distillation=Distillation(teacher=out / "other.safetensors"))
        with pytest.raises(ModelError, match=r"other\.safetensors: not a readable safetensors file"):
            broken.preflight()
        folder = dataclasses.replace(stage, distillation=Distillation(teacher=out))
        with pytest.raises(DataError, match=r"distillation\.teacher: .* is a folder"):
            folder.files()
        unknown = dataclasses.replace(stage, distillation=Distillation(features=("layer1.0.conv3",)))
        with pytest.raises(ModelError, match=r"'layer1\.0\.conv3' matches no module.*did you mean 'layer1\.0\.conv"):
            unknown.preflight()


def test_quantisation_is_taught_with_the_mask_held_by_a_teacher_that_is_folded_as_well(stages, out):
    pytest.importorskip("modelopt")
    stage = stages["sparse/quantize"]
    inputs, mask = with_mask(stage.subject, out, 2, 4)
    inputs["teacher"] = shutil.copy(inputs["weights"], out / "teacher.safetensors")
    taught = dataclasses.replace(
        stage, distillation=Distillation(weight=1.0, features=("layer*.conv1", "layer2.0.conv2"))
    )
    state, facts = ran(taught, inputs, out / "features", "quantized")
    assert facts["distillation"]["features"] == [
        "layer1.0.conv1", "layer2.0.conv1", "layer2.0.conv2", "layer3.0.conv1",
    ]  # fmt: skip
    # The teacher has the student's weights. A convolution before BatchNorm would be far from one after it.
    assert 0.0 < facts["history"]["losses"][0][1] < 0.02
    model = quantize.rebuild(stage.subject, stage.quantize, out / "features" / "quantized.safetensors").module
    assert mask.check_holds(model) == ()
    assert ran(stage, inputs, out / "alone", "quantized")[0] != state
    normalised = dataclasses.replace(stage, distillation=Distillation(features=("layer1.0.bn1",)))
    with pytest.raises(ModelError, match=r"'layer1\.0\.bn1' matches no module .*BatchNorm is folded"):
        normalised.preflight()
