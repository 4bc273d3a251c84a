"""What comes after a transformer was built: scores, 2:4, permutation, INT8, ONNX and the runtimes of the CPU."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparsify_deploy import menu
from sparsify_deploy.errors import ModelError
from sparsify_deploy.export.axes import FreeAxes
from sparsify_deploy.export.onnx import export
from sparsify_deploy.graph import file
from sparsify_deploy.graph.layers import weight_layers
from sparsify_deploy.models import transformers as source
from sparsify_deploy.sparsity.layers import prunable
from sparsify_deploy.sparsity.permutation import permute_
from sparsify_deploy.types import outputs_of

KINDS = ("bert", "distilbert", "roberta", "vit")
ATTENTION = {
    "bert": ("bert.encoder.layer.{}.attention.self.query", "bert.encoder.layer.{}.output.dense"),
    "roberta": ("roberta.encoder.layer.{}.attention.self.query", "roberta.encoder.layer.{}.output.dense"),
    "distilbert": ("distilbert.transformer.layer.{}.attention.q_lin", "distilbert.transformer.layer.{}.ffn.lin2"),
    "vit": ("vit.layers.{}.attention.q_proj", "vit.layers.{}.mlp.fc2"),
}


def built(saved: Any, kind: str) -> nn.Module:
    task = "image_classification" if kind == "vit" else "sequence_classification"
    return source.build(source.Params(path=saved(kind), task=task)).eval()


def names(kind: str) -> tuple[str, ...]:
    return ("input",) if kind == "vit" else ("input_ids", "attention_mask")


def batch(kind: str, count: int, length: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * count + length)
    if kind == "vit":
        return {"input": torch.randn(count, 3, 16, 16, generator=generator)}
    mask = (torch.arange(length) < length - torch.arange(count)[:, None].clamp(max=length - 1)).long()
    numbers = torch.randint(3, 50, (count, length), generator=generator)
    return {"input_ids": torch.where(mask == 1, numbers, 1 if kind == "roberta" else 0), "attention_mask": mask}


def answers(path: Path, runtime: str, given: dict[str, Tensor]) -> np.ndarray[Any, Any]:
    entry = menu.entry("runtimes", runtime)
    if (reason := entry.cannot_run_reason()) is not None:
        pytest.skip(reason)
    engine = path.with_name(f"{path.stem}.{runtime}{entry.SUFFIX}")
    if not engine.exists():
        entry.build(path, engine, entry.Params())
    with entry.open(engine, entry.Params()) as session:
        session.bind({name: value.numpy() for name, value in given.items()})
        session.execute()
        found: np.ndarray[Any, Any] = session.fetch()["logits"].copy()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_float_and_int8_files_answer_as_torch_at_every_size(saved: Any, tmp_path: Path, kind: str) -> None:
    from sparsify_deploy.quantization import int8

    model = built(saved, kind)
    free = FreeAxes() if kind == "vit" else FreeAxes({name: {1: "length"} for name in names(kind)})
    quantized = int8.prepare(model, int8.Int8Settings())
    int8.calibrate_(quantized, [batch(kind, 8, length) for length in (6, 12, 30)], names(kind))
    for label, network in (("float", model), ("int8", quantized.module.eval())):
        path = tmp_path / f"{label}.onnx"
        export(network, batch(kind, 2), names(kind), path, free=free)
        inputs = {tensor.name: (tensor.dtype, tensor.shape) for tensor in file.inputs(file.load(path))}
        if kind != "vit":
            assert inputs == dict.fromkeys(names(kind), ("int64", (None, None)))
        for count, length in ((1, 1), (5, 12), (3, 33)):
            given = batch(kind, count, length)
            with torch.no_grad():
                expected = outputs_of(network, given, names(kind))["logits"].numpy()
            for runtime in ("onnxruntime", "openvino"):
                found = answers(path, runtime, given)
                # a value that rounding puts on the other side is one quantisation step off
                limit = 1e-4 if label == "float" else 0.05
                assert np.abs(found - expected).max() <= limit * np.abs(expected).max(), (label, runtime, count)


@pytest.mark.parametrize("kind", KINDS)
def test_linears_and_attention_are_int8_and_layer_norms_read_floats(saved: Any, tmp_path: Path, kind: str) -> None:
    from sparsify_deploy.quantization import int8

    model = built(saved, kind)
    quantized = int8.prepare(model, int8.Int8Settings())
    rows = {row.name: row for row in quantized.placement}
    linears = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    assert all(rows[name].quantised for name in linears)
    products = [row for row in quantized.placement if row.kind == "attention product"]
    assert len(products) == 4
    assert all(row.quantised for row in products)
    parts = dict(quantized.module.named_modules())
    norms = [node for node in quantized.module.graph.nodes if isinstance(parts.get(str(node.target)), nn.LayerNorm)]
    assert len(norms) == 5
    for node in norms:
        assert "Quantizer" not in type(parts.get(str(node.args[0].target))).__name__
        norm: Any = parts[str(node.target)]
        assert not norm.input_quantizer.is_enabled
        assert not norm.output_quantizer.is_enabled
    int8.calibrate_(quantized, [batch(kind, 8)], names(kind))
    path = tmp_path / "m.onnx"
    export(quantized.module, batch(kind, 2), names(kind), path)
    layers = {layer.weight.removesuffix(".weight"): layer for layer in weight_layers(file.load(path))}
    assert all(layers[name].int8_in and layers[name].precision == "INT8" for name in linears)
    for i in range(2):
        query, last = (name.format(i) for name in ATTENTION[kind])
        assert layers[query].int8_out
        assert not layers[last].int8_out  # the residual stream of LayerNorm, in float
        assert "Add" in layers[last].float_reader
    streaming = int8.prepare(model, int8.Int8Settings(stream=True))
    added = {row.name for row in streaming.placement if row.kind == "residual add" and row.quantised}
    assert len(added) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_network_can_be_rebuilt_from_its_state(saved: Any, kind: str) -> None:
    from sparsify_deploy.quantization import int8

    model = built(saved, kind)
    quantized = int8.prepare(model, int8.Int8Settings())
    int8.calibrate_(quantized, [batch(kind, 8)], names(kind))
    again = int8.prepare(copy.deepcopy(model), int8.Int8Settings())
    int8.load_(again, int8.state(quantized))
    values = tuple(batch(kind, 3).values())
    with torch.no_grad():
        assert torch.equal(quantized.module.eval()(*values)["logits"], again.module.eval()(*values)["logits"])


@pytest.mark.parametrize("kind", KINDS)
def test_permutation_keeps_the_outputs_and_names_what_it_cannot_do(saved: Any, kind: str) -> None:
    model = built(saved, kind)
    before = model(*batch(kind, 4).values())["logits"].detach()
    layers = [layer.name for layer in prunable(model) if layer.weight.shape[1] % 4 == 0]
    query, last = (name.format(0) for name in ATTENTION[kind])
    weight = model.get_parameter(f"{last}.weight").detach().clone()
    report = permute_(model, batch(kind, 3), names(kind), layers, 2, 4)
    torch.testing.assert_close(model(*batch(kind, 4).values())["logits"], before, rtol=1e-4, atol=1e-5)
    rows = {row.layer: row for row in report.layers}
    assert rows[last].permuted
    assert not torch.equal(model.get_parameter(f"{last}.weight"), weight)
    assert not rows[query].permuted
    assert rows[query].reason


@pytest.mark.parametrize("criterion", ["snip", "grasp"])
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_criteria_with_gradients_score_every_layer(saved: Any, kind: str, criterion: str) -> None:
    entry = menu.entry("criteria", criterion)
    model = built(saved, kind)
    example = {**batch(kind, 8), "target": torch.arange(8) % 3}

    def loss(network: nn.Module, given: Any) -> Tensor:
        outputs = outputs_of(network, given, names(kind))["logits"]
        return nn.functional.cross_entropy(outputs, given["target"])

    scores = entry.score(model, [example], loss, entry.Params(), inputs=names(kind))
    assert set(scores) == {layer.parameter for layer in prunable(model)}
    assert all(bool(score.isfinite().all()) for score in scores.values())
    assert all(bool(score.any()) for score in scores.values())


@pytest.mark.parametrize("kind", KINDS)
def test_synflow_is_refused_with_what_to_choose_instead(saved: Any, kind: str) -> None:
    entry = menu.entry("criteria", "synflow")
    model = built(saved, kind)
    with pytest.raises(ModelError, match=r"SynFlow.*choose init.criterion snip, grasp, magnitude or random"):
        entry.score(model, [batch(kind, 2)], lambda *_: None, entry.Params(), inputs=names(kind))
