"""A finished run's `deploy/` through `predict`: raw examples to the same answers as the data set's inputs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest

from sparsify_deploy import menu, workspace
from sparsify_deploy.errors import CheckFailed
from sparsify_deploy.predict import likeliest
from sparsify_deploy.reporting import package
from sparsify_deploy.reports import RunReport
from sparsify_deploy.types import Silent

Result = CompletedProcess[str]


def answers(folder: Path, inputs: np.ndarray) -> np.ndarray:
    """What the deployed engine says to inputs of the data set, one at a time."""
    found = package.read(folder)
    with menu.entry("runtimes", found.runtime).open(found.engine, found.params) as session:
        rows = []
        for one in inputs:
            session.bind({"input": one[None]})
            session.execute()
            rows.append(session.fetch()["output"][0])
    return np.stack(rows)


def test_raw_digits_get_the_answers_that_the_data_sets_get(
    cli: Callable[..., Result], finished: Path, tmp_path: Path
) -> None:
    import torch

    from sparsify_deploy.datasets import digits

    deploy = finished / "runs" / "tiny" / "deploy"
    report = json.loads((deploy.parent / "report.json").read_text())
    said = report["shipped"]["preprocessing"]
    assert said.startswith("identical on 8 raw test examples (array); the ")
    assert f"Preprocessing: {said}." in (finished / "stdout").read_text()
    assert "preprocessing.json" in report["shipped"]["files"]

    data = digits.open(digits.Params())
    rows = list(data.raw)  # type: ignore[attr-defined]
    for row in rows:
        np.save(tmp_path / f"{row}.npy", data.raw[row])  # type: ignore[attr-defined]
    done = cli("predict", deploy, *(f"{row}.npy" for row in rows), "--top", "10", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    logits = answers(deploy, data.split("test").take(torch.tensor(rows))["input"].numpy())
    for answer, wanted in zip(json.loads(done.stdout)["answers"], logits, strict=True):
        guesses = [asdict(guess) for guess in likeliest(wanted, "0123456789", 10)]
        assert answer["guesses"] == guesses, "to the last bit"
        assert [int(g["name"]) for g in guesses] == np.argsort(-wanted, kind="stable").tolist()


def test_another_spec_beside_the_engine_is_refused(cli: Callable[..., Result], finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "runs" / "tiny" / "deploy", tmp_path / "deploy")
    path = tmp_path / "deploy" / "preprocessing.json"
    np.save(tmp_path / "a.npy", np.zeros((8, 8)))
    path.write_text(path.read_text().replace("4.89", "4.88"))
    done = cli("predict", "deploy", "a.npy")
    assert done.returncode == 9
    assert done.stderr == (
        "sparsify-deploy: deploy/preprocessing.json: its bytes are not the ones deploy.json lists: run the recipe "
        "again, or copy the whole folder again\n"
    )


RECIPE = """\
version: 1
name: mine
threads: 1
model: {source: builtin, params: {name: resnet8, width: 4, in_channels: 1, classes: 2}}
data: {source: file, params: {path: data.py, object: OBJECT}}
training: {steps: 2, batch_size: 8}
train: {method: dense}
export: {parity_examples: 8, min_top1_agreement: 0.5}
deploy: [{runtime: onnxruntime, triton: true}]
benchmark: {rounds: 5, round_ms: 2.0, warmup_ms: 2.0}
"""

DATA = """\
import numpy as np
import torch
from sparsify_deploy.preprocessing.spec import ArrayInput, ArraySpec

x = np.random.default_rng(0).integers(0, 256, (24, 8, 8)).astype(np.uint8)
y = np.arange(24) % 2
inputs = (x[:, None].astype(np.float32) - np.float32(127)) / np.float32(64)
arrays = {"input": inputs, "target": y}
plain = {"train": arrays, "test": arrays}


class Split:
    def __len__(self):
        return 24

    def take(self, indices):
        return {"input": torch.from_numpy(inputs)[indices], "target": torch.from_numpy(y)[indices]}


class Told:
    inputs = ("input",)
    classes = ("dark", "light")
    preprocessing = ArraySpec((ArrayInput("input", "uint8", (8, 8), "HW", (MEAN,), (64.0,)),), "8x8 bytes", classes)
    raw = {0: x[0], 23: x[23]}

    def split(self, name):
        return Split()
"""


def a_run(folder: Path, mean: str, thing: str) -> RunReport:
    folder.mkdir()
    (folder / "r.yaml").write_text(RECIPE.replace("OBJECT", thing))
    (folder / "data.py").write_text(DATA.replace("MEAN", mean))
    opened = workspace.open_run(folder / "r.yaml", run_dir=folder / "run", trust_code=True)
    return opened.run(Silent(), device="cpu", checkpoint_every_s=60)


def test_preprocessing_of_the_users_own_is_said_to_be_that(tmp_path: Path) -> None:
    report = a_run(tmp_path / "a", "127.0", "plain")
    assert report.shipped is not None
    assert report.shipped.preprocessing.endswith("so preprocessing is the user's own")
    run = tmp_path / "a" / "run"
    assert not (run / "deploy" / "preprocessing.json").exists()
    assert "preprocessing.json" not in {p.name for p in (run / "triton").rglob("*")}
    assert "Preprocessing: the data set does not say how" in (run / "report.md").read_text()


def test_a_users_data_set_may_say_how_and_is_held_to_it_before_training(tmp_path: Path) -> None:
    report = a_run(tmp_path / "a", "127.0", "Told")
    assert report.shipped is not None
    assert report.shipped.preprocessing.startswith("identical on 2 raw test examples (array)")
    run = tmp_path / "a" / "run"
    assert package.read(run / "deploy").spec is not None
    assert (run / "triton" / "mine_onnxruntime" / "preprocessing.json").is_file()
    with pytest.raises(CheckFailed, match=r"makes another input than the data set of 2 of 2 .* difference 0\.0156"):
        a_run(tmp_path / "b", "128.0", "Told")
    assert not list((tmp_path / "b" / "run" / "store").glob("train-*")), "it stopped before anything was trained"
