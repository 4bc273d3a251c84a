"""The sensitivity of layers: its numbers by hand, weights untouched, a stop in between, and the verb end to end."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsify_deploy import recipe_source
from sparsify_deploy.artifacts import durable
from sparsify_deploy.errors import DataError, Interrupted, ModelError
from sparsify_deploy.plan import plan
from sparsify_deploy.quantization import int8
from sparsify_deploy.reports import SensitivityReport, load
from sparsify_deploy.sparsity.layers import prunable
from sparsify_deploy.sparsity.mask import Mask
from sparsify_deploy.sparsity.nm import is_nm, nm_mask
from sparsify_deploy.stages import sensitivity as stage_module
from sparsify_deploy.stages.quantize import settings_of
from sparsify_deploy.stages.sensitivity import PARTIAL, Sensitivity, projected
from sparsify_deploy.stages.subject import save_weights
from sparsify_deploy.training.batches import generator
from sparsify_deploy.training.loop import predict
from sparsify_deploy.types import Context

pytest.importorskip("modelopt")

RECIPE = """\
version: 1
threads: 1
seed: 5
model: {source: builtin, params: {name: resnet8, width: 16, in_channels: 1}}
data: {source: npz, params: {path: data.npz}}
nm: {keep_dense: ["*downsample*"]}
quantize: {calibration_batches: 2, keep_float: [conv1]}
"""
COUNT = 40


@pytest.fixture(autouse=True)
def _gentle(monkeypatch):
    """Leave torch's process-wide settings as they are, but for the number of threads while a test runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(stage_module, "reproducible", lambda context: torch.device("cpu"))
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def stage(tmp_path) -> Sensitivity:
    """The stage of a small recipe, on 40 of its 96 training examples."""
    (tmp_path / "tiny.yaml").write_text(RECIPE, encoding="utf-8")
    random = np.random.default_rng(0)
    images = random.standard_normal((120, 8, 8)).astype(np.float32)
    labels = random.integers(0, 10, 120)
    np.savez(tmp_path / "data.npz", x_train=images[:96], y_train=labels[:96], x_test=images[96:], y_test=labels[96:])
    found = plan(recipe_source.load(tmp_path / "tiny.yaml"), sensitivity=True)
    (made,) = [s.stage for s in found.steps if isinstance(s.stage, Sensitivity)]
    return dataclasses.replace(made, examples=COUNT)


@pytest.fixture
def start(stage, tmp_path) -> dict[str, Path]:
    """A network with lively BatchNorms, half of whose weights in one layer are pruned."""
    model = stage.subject.network()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 2, generator=generator)
                module.weight.uniform_(0.5, 2, generator=generator)
        layers = {layer.name: layer for layer in prunable(model)}
        for layer in layers.values():
            layer.weight[layer.weight.abs() < 1e-3] = -0.0
    one = layers["layer2.0.conv1"]
    mask = Mask({one.parameter: torch.rand(one.weight.shape, generator=generator) < 0.5})
    mask.apply_(model)
    paths = {"weights": tmp_path / "start.safetensors", "mask": tmp_path / "start.mask"}
    save_weights(model, paths["weights"])
    mask.save(paths["mask"])
    return paths


@pytest.fixture
def out(tmp_path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def by_hand(stage: Sensitivity, model: torch.nn.Module) -> tuple[float, float]:
    """Accuracy and loss on the stage's examples."""
    split = stage.subject.examples.split("train")
    indices = torch.randperm(len(split), generator=generator("sensitivity", 5, 0))[:COUNT]
    scores = stage.subject.opened_task.evaluate(*predict(model, split, stage.subject.examples.inputs, indices))
    return scores["accuracy"], scores["loss"]


def run(stage: Sensitivity, inputs: dict[str, Path], out: Path, context: Context | None = None) -> SensitivityReport:
    stage.run(inputs, out, context or Context())
    return load(SensitivityReport, out / "sensitivity.json")


def test_projecting_one_layer_by_hand_gives_the_same_numbers(stage, start, out):
    found = run(stage, start, out)
    accuracy, loss = by_hand(stage, stage.subject.network(start["weights"]))
    assert (found.metric, found.direction, found.split, found.examples) == ("accuracy", "higher", "train", COUNT)
    assert (found.baseline, found.baseline_loss) == (accuracy, pytest.approx(loss, rel=1e-6))
    rows = {row.layer: row for row in found.layers}
    assert list(rows) == [layer.name for layer in prunable(stage.subject.network())]
    mask = Mask.load(start["mask"])
    tried = 0
    for name, row in rows.items():
        model = stage.subject.network(start["weights"])
        (layer,) = [layer for layer in prunable(model) if layer.name == name]
        assert (row.parameter, row.shape) == (layer.parameter, layer.shape)
        if name in ("conv1", "fc") or "downsample" in name:
            assert (row.projected, row.rank) == (None, None)
            assert row.reason
            continue
        with torch.no_grad():
            layer.weight.mul_(nm_mask(layer.weight, 2, 4, mask.get(layer.parameter)))
        after, worse = by_hand(stage, model)
        assert row.projected.metric == after
        assert row.projected.drop == pytest.approx(accuracy - after)
        assert row.projected.loss_increase == pytest.approx(worse - loss, abs=1e-6)
        tried += 1
    assert tried == 6
    assert len({row.projected.loss_increase for row in found.layers if row.projected}) == tried


def test_ranks_go_by_drop_then_loss_then_module_order(stage, start, out):
    found = run(stage, start, out)
    ranked = [row for row in found.layers if row.rank is not None]
    assert sorted(row.rank for row in ranked) == [1, 2, 3, 4, 5, 6]
    keys = [(row.projected.drop, row.projected.loss_increase) for row in found.worst_first[: len(ranked)]]
    assert keys == sorted(keys, reverse=True)
    assert [row.rank for row in found.worst_first] == [1, 2, 3, 4, 5, 6, *[None] * (len(found.layers) - 6)]


def test_one_layer_in_int8_is_a_network_prepared_with_the_others_kept_in_float(stage, start, out):
    found = run(stage, start, out)
    model = stage.subject.network(start["weights"])
    batches = stage.subject.calibration(2, stage.batch_size)
    inputs = stage.subject.examples.inputs
    everything = int8.prepare(model, settings_of(stage.quantize))
    int8.calibrate_(everything, batches, inputs)
    assert found.int8_all.metric == by_hand(stage, everything.module)[0]
    names = [row.name for row in everything.placement]
    rows = {row.layer: row for row in found.layers}
    assert rows["conv1"].quantized is None
    assert rows["conv1"].quantized_reason == "float: keep_float 'conv1'"
    for name in ("layer1.0.conv1", "layer2.0.conv1", "fc"):
        others = tuple(other for other in names if other != name)
        alone = int8.prepare(model, int8.Int8Settings(keep_float=others, residual=False, pooling=False))
        int8.calibrate_(alone, batches, inputs)
        metric, loss = by_hand(stage, alone.module)
        score = rows[name].quantized
        assert score.metric == metric
        float_loss = by_hand(stage, everything_off(everything))[1]
        assert score.loss_increase == pytest.approx(loss - float_loss, abs=1e-6)
        assert score.loss_increase != 0.0
        with int8.only(everything, ()):
            pass


def everything_off(quantized: int8.Quantized) -> torch.nn.Module:
    """The folded network, made from the quantised one by taking its quantizers' effect away for good."""
    import copy

    module = copy.deepcopy(quantized.module)
    for name, child in module.named_modules():
        if "quantizer" in name.rpartition(".")[2]:
            child.disable()
    return module


def test_a_projected_layer_gets_its_bits_back_negative_zeros_and_all(stage, start):
    model = stage.subject.network(start["weights"])
    (layer,) = [layer for layer in prunable(model) if layer.name == "layer1.0.conv1"]
    bits = layer.weight.detach().clone().view(torch.int32)
    assert (bits == -(2**31)).any()
    with projected(layer, 2, 4, None):
        assert is_nm(layer.weight, 2, 4)
        assert layer.weight.count_nonzero() > 0
    assert torch.equal(layer.weight.detach().view(torch.int32), bits)
    with pytest.raises(ZeroDivisionError), projected(layer, 1, 4, None):
        raise ZeroDivisionError
    assert torch.equal(layer.weight.detach().view(torch.int32), bits)


class Watch:
    """A progress that asks to stop once so many measurements are made."""

    def __init__(self, most: int) -> None:
        self.most, self.done, self.said = most, 0, []

    def update(self, label: str, done: int, total: int, note: str = "") -> None:
        self.done = done

    def say(self, message: str) -> None:
        self.said.append(message)

    def stop(self) -> bool:
        return self.done >= self.most


def test_stopped_and_resumed_at_every_place_gives_the_same_bytes(stage, start, out, tmp_path):
    run(stage, start, out)
    expected = (out / "sensitivity.json").read_bytes()
    other = tmp_path / "other"
    other.mkdir()
    for most in (0, 1, 4, 8, 15):
        watch = Watch(most)
        with pytest.raises(Interrupted, match=rf"stopped after {most} of \d+ measurements; the same command goes on"):
            stage.run(start, other, Context(progress=watch, stop_requested=watch.stop))
        assert not (other / "sensitivity.json").exists()
        kept = json.loads((other / PARTIAL).read_text())["found"] if most else {}
        assert len(kept) == most
    watch = Watch(10**6)
    run(stage, start, other, Context(progress=watch))
    assert (other / "sensitivity.json").read_bytes() == expected
    assert any("goes on after 15 of" in line for line in watch.said)


def test_what_is_on_disk_is_not_measured_again_unless_the_machine_differs(stage, start, out, monkeypatch):
    run(stage, start, out)
    expected = (out / "sensitivity.json").read_bytes()
    calls = []
    real = type(stage.subject.opened_task).evaluate
    monkeypatch.setattr(
        type(stage.subject.opened_task), "evaluate", lambda *a: calls.append(1) or real(*a), raising=True
    )
    run(stage, start, out)
    assert not calls
    kept: Any = durable.read_json(out / PARTIAL)
    total = len(kept["found"])
    kept["environment"]["threads"] += 1
    kept["found"]["as it stands"] = [0.0, 0.0]
    durable.write_json(out / PARTIAL, kept)
    watch = Watch(10**6)
    run(stage, start, out, Context(progress=watch))
    assert len(calls) == total
    assert any("measured anew" in line for line in watch.said)
    assert (out / "sensitivity.json").read_bytes() == expected


def test_a_network_that_cannot_be_traced_keeps_the_projected_column(stage, start, out, monkeypatch):
    def refuse(*_: Any) -> None:
        raise ModelError("ResNet cannot be traced: no way")

    monkeypatch.setattr(int8, "prepare", refuse)
    watch = Watch(10**6)
    found = run(stage, start, out, Context(progress=watch))
    assert found.not_quantized == "ResNet cannot be traced: no way"
    assert (found.int8_all, found.baseline_float) == (None, None)
    assert {row.quantized_reason for row in found.layers} == {found.not_quantized}
    assert sum(row.projected is not None for row in found.layers) == 6
    assert watch.said == ["no layer quantised alone: ResNet cannot be traced: no way"]


def test_a_score_that_is_not_finite_names_the_change(stage, start, out):
    model = stage.subject.network(start["weights"])
    with torch.no_grad():
        model.get_parameter("fc.bias")[0] = float("inf")
    save_weights(model, start["weights"])
    with pytest.raises(DataError, match=r"^as it stands: .*not all finite"):
        stage.run(start, out, Context())


def test_mistaken_patterns_show_before_anything_runs(stage):
    wrong = dataclasses.replace(stage, nm=stage.nm.model_copy(update={"keep_dense": ("nope",)}))
    with pytest.raises(ModelError, match="nope"):
        wrong.preflight()
    wrong = dataclasses.replace(stage, quantize=stage.quantize.model_copy(update={"keep_float": ("nope",)}))
    with pytest.raises(ModelError, match=r"quantize\.keep_float: 'nope'"):
        wrong.preflight()
    stage.preflight()


# -- the verb ------------------------------------------------------------------------------------------------------


def test_the_verb_runs_what_it_needs_adds_to_the_report_and_repeats_nothing(cli, recipe, tmp_path):
    first = cli("sensitivity", recipe)
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    assert lines[0] == "Sensitivity of the layers"
    assert [line.split()[0] for line in lines[3:13]] == ["1", "2", "3", "4", "5", "6", "7", "8", "-", "-"]
    assert "not projected: C_in 1 is not a multiple of 4" in first.stdout
    assert "1437 train examples" in first.stdout
    assert "\x1b" not in first.stdout
    made = {path.name.partition("-")[0] for path in (tmp_path / "runs/tiny/store").glob("*/")}
    assert made == {"init_mask", "train", "sensitivity", "last"}
    report = json.loads((tmp_path / "runs/tiny/report.json").read_text())
    assert {step["id"]: step["state"] for step in report["steps"]} == {
        "sparse/init_mask": "ran",
        "sparse/train": "ran",
        "sparse/sensitivity": "ran",
    }
    again = cli("sensitivity", recipe, "--json", "-q")
    assert again.stderr == ""
    found = json.loads(again.stdout)
    assert found == report["sensitivity"]
    assert "## Sensitivity of the layers" in (tmp_path / "runs/tiny/report.md").read_text()
    assert json.loads((tmp_path / "runs/tiny/report.json").read_text()) == report


def test_a_finished_run_stays_as_it_was_and_shows_the_sensitivity_from_then_on(cli, finished, tmp_path):
    import shutil

    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "runs" / "tiny" / "report.json"
    before = json.loads(path.read_text())
    assert before["sensitivity"] is None
    assert cli("sensitivity", "tiny.yaml", "-q").returncode == 0
    after = json.loads(path.read_text())
    assert {**before, **{k: after[k] for k in ("sensitivity", "steps", "created")}} == after
    assert {s["id"]: s["state"] for s in after["steps"] if s["state"] != "cached"} == {"sparse/sensitivity": "ran"}
    rerun = cli("run", "tiny.yaml", "--json")
    assert rerun.returncode == 0, rerun.stderr
    found = json.loads(rerun.stdout)
    assert {step["state"] for step in found["steps"]} == {"cached"}
    assert found["sensitivity"] == after["sensitivity"]
    other = json.loads(cli("run", "tiny.yaml", "--json", "--until", "sparse/train", "--set", "seed=3").stdout)
    assert other["sensitivity"] == after["sensitivity"]


def test_the_worst_layers_stay_dense_and_the_verb_has_nothing_left_to_measure(cli, recipe, tmp_path):
    short = ("--set", "train.method=static", "--set", "train.params={}", "--set", "quantize.qat=null")
    worst = (*short, "--set", "nm.keep_worst_dense=2", "--set", "dense_branch=false", "--set", "deploy=[]")
    done = cli("run", recipe, *worst, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    ranked = {row["rank"]: row["layer"] for row in report["sensitivity"]["layers"] if row["rank"]}
    (path,) = (tmp_path / "runs/tiny/store").glob("project_nm-*/manifest.json")
    rows = json.loads(path.read_text())["measured"]["layers"]
    kept = {row["layer"] for row in rows if "nm.keep_worst_dense" in row["reason"]}
    assert kept == {ranked[1], ranked[2]}
    assert {row["layer"] for row in rows if row["projected"]} == {ranked[i] for i in range(3, 9)}
    again = cli("sensitivity", recipe, *worst, "--json")
    assert json.loads(again.stdout) == report["sensitivity"]
    assert again.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("sensitivity",), 2, "RECIPE"),
        (("sensitivity", "missing.yaml"), 2, "missing.yaml"),
        (("sensitivity", "tiny.yaml", "--until", "train"), 2, "--until"),
        (("sensitivity", "tiny.yaml", "--set", "nm.keep_dense=[nope]"), 5, "nope"),
        (("sensitivity", "tiny.yaml", "--set", "quantize.keep_float=[nope]"), 5, "nope"),
        (("sensitivity", "tiny.yaml", "--set", "nm.keep_worst_dense=-1"), 2, "nm.keep_worst_dense"),
        (("sensitivity", "tiny.yaml", "--set", "model={source: file, params: {path: tiny.yaml}}"), 2, "--trust-code"),
        (("sensitivity", "tiny.yaml", "--device", "tpu"), 2, "--device"),
    ],
)
def test_nonsense_is_a_line_and_its_exit_code(cli, recipe, arguments, code, text):
    done = cli(*arguments)
    assert done.returncode == code, done.stderr
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr
