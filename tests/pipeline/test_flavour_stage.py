"""The second flavour of an export, made by its stage from a branch that was trained and quantised."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify_deploy import recipe_source
from sparsify_deploy.errors import CheckFailed
from sparsify_deploy.plan import plan
from sparsify_deploy.stages.flavours import ExportFlavour
from sparsify_deploy.types import Context

pytest.importorskip("modelopt")
pytest.importorskip("onnxruntime")

RECIPE = """\
version: 1
model: {source: builtin, params: {name: resnet8, width: 8, in_channels: 1}}
data: {source: digits}
training: {steps: 60, batch_size: 32, optimizer: {lr: 0.05}}
train: {method: dense}
quantize: {calibration_batches: 2}
export: {parity_examples: 64, min_top1_agreement: 0.9}
deploy: [{runtime: onnxruntime}]
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExportFlavour, dict[str, Path], Path]:
    """The stage and its inputs, after the steps before it ran."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("flavour")
    (folder / "net.yaml").write_text(RECIPE, encoding="utf-8")
    steps = [s for s in plan(recipe_source.load(folder / "net.yaml", ())).steps if s.stage.name != "measure"]
    made: dict[tuple[str, str], Path] = {}
    for step in steps:
        inputs = {name: made[ref.step, ref.output] for name, ref in step.inputs.items()}
        if isinstance(step.stage, ExportFlavour):
            return step.stage, inputs, folder
        out = folder / step.id.replace("/", ".")
        out.mkdir()
        step.stage.run(inputs, out, Context(threads=1, device="cpu"))
        made |= {(step.id, name): out / file for name, file in step.stage.outputs.items()}
    raise AssertionError("the plan has no second flavour")


def test_its_facts_name_the_flavour_and_how_far_it_is_from_the_other(exported: Any, tmp_path: Path) -> None:
    stage, inputs, _ = exported
    facts = stage.run(inputs, tmp_path, Context(threads=1, device="cpu"))
    assert (facts["flavour"], facts["precision"], facts["calibration_batches"]) == ("onnxruntime", "INT8", 2)
    assert facts["parity"]["top1_agreement"] >= 0.9
    assert 0 < facts["between_flavours"]["max_relative"] < 0.2
    assert facts["between_flavours"]["examples"] == 64
    assert facts["outputs_with_measured_range"]
    assert facts["float_layers"] == {}
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_flavour_that_answers_otherwise_than_torch_is_refused_and_kept(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsify_deploy.graph import flavour

    stage, inputs, _ = exported
    real = flavour.to_onnxruntime_

    def squeezed(model: Any, ranges: Any) -> Any:
        return real(model, {name: (low / 50, high / 50) for name, (low, high) in ranges.items()})

    monkeypatch.setattr(flavour, "to_onnxruntime_", squeezed)
    strict = dataclasses.replace(stage, export=stage.export.model_copy(update={"min_top1_agreement": 0.99}))
    with pytest.raises(CheckFailed, match=r"agrees with torch on .* of 64 top-1 answers, .*the file is kept"):
        strict.run(inputs, tmp_path, Context(threads=1, device="cpu"))
    assert (tmp_path / "model.onnx").is_file()
