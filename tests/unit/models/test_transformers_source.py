"""Networks of Hugging Face: what they compute as graphs, what is refused, and what comes after."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from sparsify_deploy.errors import EnvironmentProblem, MissingExtra, ModelError
from sparsify_deploy.models import transformers as source
from sparsify_deploy.sparsity.tracing import trace

TEXT = ("bert", "distilbert", "roberta")
KINDS = (*TEXT, "vit")


def params(folder: Path, kind: str = "bert", **more: Any) -> source.Params:
    task = "image_classification" if kind == "vit" else "sequence_classification"
    return source.Params(path=folder, task=task, **more)


def batch(kind: str, count: int = 3, length: int = 11) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(count + length)
    if kind == "vit":
        return (torch.randn(count, 3, 16, 16, generator=generator),)
    numbers = torch.randint(3, 50, (count, length), generator=generator)
    mask = (torch.arange(length) < length - torch.arange(count)[:, None]).long()
    return torch.where(mask == 1, numbers, 1 if kind == "roberta" else 0), mask


def original(transformers: Any, folder: Path, kind: str) -> nn.Module:
    auto = transformers.AutoModelForImageClassification if kind == "vit" else None
    auto = auto or transformers.AutoModelForSequenceClassification
    model: nn.Module = auto.from_pretrained(folder, attn_implementation="eager")
    return model


def logits(model: nn.Module, kind: str, values: tuple[Tensor, ...]) -> Tensor:
    names = ("pixel_values",) if kind == "vit" else ("input_ids", "attention_mask")
    result: Tensor = model(**dict(zip(names, values, strict=True))).logits
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_computes_what_transformers_does_at_other_sizes(transformers: Any, saved: Any, kind: str) -> None:
    folder = saved(kind)
    expected, module = original(transformers, folder, kind).eval(), source.build(params(folder, kind)).eval()
    for count, length in ((1, 1), (1, 40 if kind != "roberta" else 38), (7, 13)):
        values = batch(kind, count, length)
        with torch.no_grad():
            torch.testing.assert_close(module(*values)["logits"], logits(expected, kind, values), rtol=1e-5, atol=1e-5)
    assert isinstance(module, fx.GraphModule)


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_weights_are_those_of_transformers(transformers: Any, saved: Any, kind: str) -> None:
    folder = saved(kind)
    module, expected = source.build(params(folder, kind)), original(transformers, folder, kind)
    for found in (module, copy.deepcopy(module), trace(module)):
        assert set(found.state_dict()) == set(expected.state_dict())
        assert {n for n, _ in found.named_parameters()} == {n for n, _ in expected.named_parameters()}
    linears = [name for name, part in expected.named_modules() if isinstance(part, nn.Linear)]
    called = {node.target for node in module.graph.nodes if node.op == "call_module"}
    assert set(linears) <= called
    assert all(type(module.get_submodule(name)) is nn.Linear for name in linears)


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_as_the_original_with_the_same_dropout(transformers: Any, saved: Any, kind: str) -> None:
    folder = saved(kind)
    values = batch(kind)
    found = []
    for model in (original(transformers, folder, kind).train(), source.build(params(folder, kind)).train()):
        torch.manual_seed(1)
        named = isinstance(model, fx.GraphModule)
        output = model(*values)["logits"] if named else logits(model, kind, values)
        output.square().sum().backward()
        found.append((output.detach(), {n: p.grad for n, p in model.named_parameters()}))
        torch.manual_seed(2)
        again = model(*values)["logits"] if named else logits(model, kind, values)
        assert not torch.allclose(again, output)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-4)
    for name, gradient in found[0][1].items():
        other = found[1][1][name]
        if gradient is None or other is None:
            assert gradient is None
            assert other is None
            continue
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()) + 1e-6)


def test_eval_mode_reaches_every_dropout(saved: Any) -> None:
    module = source.build(params(saved("bert")))
    dropouts = [part for part in module.eval().modules() if isinstance(part, nn.Dropout)]
    assert len(dropouts) == 8  # embeddings, classifier, and in each of two layers the weights and both outputs
    assert not any(part.training for part in dropouts)


def test_a_deeper_copy_is_no_slower_to_make_than_tracing_and_keeps_the_original(saved: Any) -> None:
    module = source.build(params(saved("bert"))).train()
    traced = trace(module)
    assert module.training
    assert not traced.training
    with torch.no_grad():
        traced.get_parameter("classifier.weight").zero_()
    assert bool(module.get_parameter("classifier.weight").any())


def test_the_module_stack_names_where_an_operation_was_written(saved: Any) -> None:
    from sparsify_deploy.quantization.tracing import path_of

    module = trace(source.build(params(saved("bert"))))
    where = {path_of(node) for node in module.graph.nodes if node.target is torch.matmul}
    assert where == {f"bert.encoder.layer.{i}.attention.self" for i in range(2)}


def test_classes_of_another_number_get_a_new_classifier_and_a_note(saved: Any, capfd: Any) -> None:
    folder = saved("bert")
    capfd.readouterr()
    torch.manual_seed(3)
    module = source.build(params(folder, classes=5)).eval()
    torch.manual_seed(3)
    again = source.build(params(folder, classes=5)).eval()
    assert module(*batch("bert"))["logits"].shape == (3, 5)
    assert torch.equal(module.get_parameter("classifier.weight"), again.get_parameter("classifier.weight"))
    (note,) = module.meta["notes"]
    assert "no classifier of this size: classifier.bias, classifier.weight start new" in note
    assert capfd.readouterr() == ("", "")
    assert source.build(params(folder, classes=3)).meta["notes"] == ()


def test_weights_without_a_classifier_are_taken_and_noted(saved: Any, capfd: Any) -> None:
    folder = saved("bert", head=False)
    capfd.readouterr()
    module = source.build(params(folder, classes=4))
    assert "classifier.bias, classifier.weight start new" in module.meta["notes"][0]
    assert capfd.readouterr() == ("", "")
    stored = source.build(params(saved("bert"), classes=4))
    assert module.state_dict().keys() == stored.state_dict().keys()


def test_untrained_networks_follow_the_random_state(saved: Any) -> None:
    folder = saved("bert")
    (folder / "model.safetensors").unlink()

    def weight(seed: int) -> Tensor:
        torch.manual_seed(seed)
        module = source.build(params(folder, pretrained=False))
        return module.get_parameter("bert.encoder.layer.0.output.dense.weight")

    assert torch.equal(weight(1), weight(1))
    assert not torch.equal(weight(1), weight(2))


def test_values_of_the_configuration_can_be_set(saved: Any) -> None:
    folder = saved("bert")
    module = source.build(params(folder, arguments={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}))
    values = batch("bert")
    assert torch.equal(module.train()(*values)["logits"], module.eval()(*values)["logits"])
    with pytest.raises(ModelError, match=r"model.params.arguments: .*has no 'hidden_dropout'; did you mean 'hidden_"):
        source.build(params(folder, arguments={"hidden_dropout": 0.0}))


def test_token_type_ids_are_a_third_input(transformers: Any, saved: Any) -> None:
    folder = saved("bert")
    module = source.build(params(folder, inputs=("input_ids", "attention_mask", "token_type_ids"))).eval()
    numbers, mask = batch("bert")
    types = (torch.arange(11) > 4).long().expand(3, 11)
    expected = original(transformers, folder, "bert").eval()(numbers, attention_mask=mask, token_type_ids=types)
    torch.testing.assert_close(module(numbers, mask, types)["logits"], expected.logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(module(numbers, mask, types * 0)["logits"], expected.logits)


@pytest.mark.parametrize(("kind", "longest"), [("bert", 40), ("distilbert", 40), ("roberta", 38)])
def test_a_text_longer_than_the_positions_is_one_line(saved: Any, kind: str, longest: int) -> None:
    module = source.build(params(saved(kind), kind)).eval()
    module(*batch(kind, 2, longest))
    with pytest.raises(ModelError, match=f"has {longest + 1} tokens, and the model has {longest} positions: set data"):
        module(*batch(kind, 2, longest + 1))
    with pytest.raises(ModelError, match="positions"):
        trace(module)(*batch(kind, 2, longest + 1))


def test_files_are_the_configuration_and_the_weights(saved: Any) -> None:
    folder = saved("bert")
    assert set(source.files(params(folder))) == {"config.json", "model.safetensors"}
    assert set(source.files(params(folder, pretrained=False))) == {"config.json"}
    assert source.files(source.Params(name="bert-base-uncased")) == {}


def test_a_folder_that_is_none(saved: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model.params.path: .*/nowhere: no such folder; name the one that holds"):
        source.build(params(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"empty holds no config.json: name a folder"):
        source.build(params(tmp_path / "empty"))
    folder = saved("bert")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no model.safetensors: add its weights, or set pretrained to false"):
        source.build(params(folder))


def _edit(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("text", ["{", "[]", '"bert"', "\xff"])
def test_a_broken_configuration_is_one_line(saved: Any, text: str) -> None:
    folder = saved("bert")
    (folder / "config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(ModelError, match=r"^model.params.path: .*bert-3-True") as caught:
        source.build(params(folder))
    assert "\n" not in str(caught.value)


def test_an_architecture_transformers_does_not_know_is_one_line(saved: Any) -> None:
    folder = saved("bert")
    _edit(folder, model_type="perceptotron", architectures=["Perceptotron"])
    with pytest.raises(ModelError, match=r"model.params.path: .*perceptotron") as caught:
        source.build(params(folder))
    assert "\n" not in str(caught.value)


def test_code_in_a_folder_is_not_run(saved: Any, tmp_path: Path) -> None:
    folder = saved("bert")
    _edit(
        folder, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForSequenceClassification": "own.Net"}
    )
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError):
        source.build(params(folder))
    assert not (tmp_path / "ran").exists()


def test_a_network_for_another_task_is_one_line(saved: Any) -> None:
    with pytest.raises(ModelError, match=r"no network for sequence classification of type 'vit'; is model.params.task"):
        source.build(params(saved("vit")))


def test_weights_of_another_architecture_are_refused(saved: Any) -> None:
    folder = saved("bert")
    _edit(folder, intermediate_size=96)
    with pytest.raises(ModelError, match=r"do not fit its config.json: bert.encoder\S+ is of another shape \(6 such"):
        source.build(params(folder))
    _edit(folder, intermediate_size=64, num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"do not fit its config.json: bert.encoder.layer.2\S+ is missing"):
        source.build(params(folder))


def test_damaged_weights_are_one_line(saved: Any) -> None:
    folder = saved("bert")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"^model.params.path: .*bert-3-True") as caught:
        source.build(params(folder))
    assert "\n" not in str(caught.value)


class _Runs:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))


def test_pickles_are_read_if_they_hold_tensors_and_never_run(transformers: Any, saved: Any, tmp_path: Path) -> None:
    folder = saved("bert")
    state = original(transformers, folder, "bert").state_dict()
    expected = source.build(params(folder)).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    module = source.build(params(folder))
    assert all(torch.equal(module.state_dict()[name], value) for name, value in expected.items())
    assert set(source.files(params(folder))) == {"config.json", "pytorch_model.bin"}
    torch.save({**state, "more": _Runs(str(tmp_path / "ran"))}, folder / "pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(ModelError, match=r"pickle that holds Python objects .* reading those could run code: save it"):
        source.build(params(folder))
    assert not (tmp_path / "ran").exists()


def test_a_name_of_the_hub_without_a_network_is_advice(transformers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        EnvironmentProblem, match=r"weights cannot be downloaded .*; give model.params.path a local"
    ) as e:
        source.build(source.Params(name="nobody/no-such-network-here"))
    assert "\n" not in str(e.value)


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"pip install 'sparsify-deploy\[hf\]'"):
        source.build(source.Params(name="bert-base-uncased"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "give either path, a folder, or name"),
        ({"name": "x", "path": "y"}, "give either path, a folder, or name"),
        ({"name": "x", "inputs": ("attention_mask",)}, "input_ids once"),
        ({"name": "x", "inputs": ("input_ids", "input_ids")}, "input_ids once"),
    ],
)
def test_mistakes_in_params(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        source.Params.model_validate(given)


def test_classes_of_the_weights_are_told_and_those_of_a_new_classifier_are_not(saved: Any) -> None:
    folder = saved("bert")
    config = json.loads((folder / "config.json").read_text())
    count = len(original(pytest.importorskip("transformers"), folder, "bert").config.id2label)
    names = [f"class {number}" for number in reversed(range(count))]
    config["id2label"] = {str(number): name for number, name in enumerate(names)}
    config["label2id"] = {name: number for number, name in enumerate(names)}
    (folder / "config.json").write_text(json.dumps(config))
    assert source.build(params(folder)).meta["classes"] == tuple(names)
    assert "classes" not in source.build(params(folder, classes=count + 4)).meta
