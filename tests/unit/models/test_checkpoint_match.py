"""Checkpoints that fit in part, by order, behind a prefix, or only by unpickling objects."""

from __future__ import annotations

import hashlib
import os
import pickle
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sparsify_deploy.errors import ModelError
from sparsify_deploy.models._checkpoint import Loaded, load_checkpoint
from sparsify_deploy.models._pickled import objects_in


def net(classes: int = 2) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, classes))


class Named(nn.Module):
    """The same as `net`, under other names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4)})
        self.head = nn.Linear(4, 2)


def save(value: object, path: Path) -> Path:
    with path.open("wb") as out:
        torch.save(value, out)
    return path


def prefixed(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}


def refused(model: nn.Module, path: Path, **options: object) -> str:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ModelError) as caught:
        load_checkpoint(model, path, **options)  # type: ignore[arg-type]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{path}: ")


# -- behind a prefix -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrap", "under", "dropped"),
    [
        (lambda s: s, (), ()),
        (lambda s: prefixed("module.", s), (), ("module.",)),
        (lambda s: {"state_dict": prefixed("model.", s), "epoch": 3}, ("state_dict",), ("model.",)),
        (lambda s: prefixed("_orig_mod.", s), (), ("_orig_mod.",)),
        (lambda s: {"model": prefixed("module._orig_mod.", s)}, ("model",), ("_orig_mod.", "module.")),
        (lambda s: prefixed("net._orig_mod.model.", s), (), ("_orig_mod.", "net.model.")),
        (
            lambda s: {"state_dict": {k: v * 0 for k, v in s.items()}, "state_dict_ema": prefixed("module.", s)},
            ("state_dict_ema",),
            ("module.",),
        ),
        (lambda s: {"state_dict": {"model": s}}, ("state_dict", "model"), ()),
    ],
)
def test_one_rule_takes_off_what_wrappers_put_in_front(tmp_path: Path, wrap, under, dropped) -> None:
    source, model = net(), net()
    found = load_checkpoint(model, save(wrap(source.state_dict()), tmp_path / "w.ckpt"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))
    assert (found.under, found.dropped, found.tensors, found.of) == (under, dropped, 9, 9)
    assert (found.missing, found.misshaped, found.unexpected, found.share) == ((), (), (), 1.0)
    for word in (*under, *dropped):
        assert word in found.line


def test_a_few_names_that_fit_by_chance_are_no_prefix(tmp_path: Path) -> None:
    state = {
        "features.0.weight": torch.ones(4, 3, 3, 3),
        "features.0.bias": torch.ones(4),
        "classifier.w": torch.ones(2),
    }
    message = refused(net(), save(state, tmp_path / "w.pt"), partial=True)
    assert message.startswith("nothing in it fits the model, it is of another network: ")
    assert "unexpected (features.0.weight, features.0.bias, classifier.w)" in message


def test_names_outside_the_prefix_are_unexpected(tmp_path: Path) -> None:
    state = {**prefixed("model.", net().state_dict()), "criterion.weight": torch.ones(2)}
    path = save({"state_dict": state}, tmp_path / "w.ckpt")
    assert "1 unexpected (criterion.weight)" in refused(net(), path)
    found = load_checkpoint(net(), path, partial=True)
    assert (found.unexpected, found.dropped, found.tensors) == (("criterion.weight",), ("model.",), 9)


# -- in part -------------------------------------------------------------------------------------------------------


def test_a_new_classifier_stays_as_initialised(tmp_path: Path) -> None:
    source, model = net(classes=7), net(classes=2)
    head = model[3].weight.clone()
    state = {k: v for k, v in source.state_dict().items() if k != "3.bias"}
    path = save({**state, "extra": torch.ones(1)}, tmp_path / "w.pt")
    assert refused(net(), path).endswith(
        "model.checkpoint_partial: true loads what fits and leaves the rest as initialised"
    )
    found = load_checkpoint(model, path, partial=True)
    assert torch.equal(model[0].weight, source[0].weight)
    assert torch.equal(model[3].weight, head)
    assert found.missing == ("3.bias",)
    assert found.misshaped == ("3.weight (7, 4), the model has (2, 4)",)
    assert found.unexpected == ("extra",)
    parameters = sum(p.numel() for p in model.parameters())
    assert found.share == pytest.approx((parameters - 10) / parameters)
    assert found.line == (
        f"model.checkpoint w.pt: 7 of 9 tensors loaded by name, {found.share:.1%} of the parameters; left as "
        "initialised: 1 missing (3.bias); 1 of another shape (3.weight (7, 4), the model has (2, 4)); not used: "
        "1 unexpected (extra)"
    )
    assert found.facts["missing"] == ["3.bias"]


@pytest.mark.parametrize(
    "state", [{}, {"a.weight": torch.ones(3)}, {"0.weight": torch.ones(9)}, {"1.num_batches_tracked": torch.tensor(3)}]
)
def test_a_file_of_another_network_is_refused_even_in_part(tmp_path: Path, state) -> None:
    assert refused(net(), save(state, tmp_path / "w.pt"), partial=True).startswith("nothing in it fits the model")


def test_what_is_not_loaded_may_be_broken(tmp_path: Path) -> None:
    state = {**net().state_dict(), "3.weight": torch.full((7, 4), torch.nan)}
    load_checkpoint(net(), save(state, tmp_path / "w.pt"), partial=True)
    state["0.weight"] = state["0.weight"] * torch.inf
    assert "NaN or infinity (0.weight)" in refused(net(), save(state, tmp_path / "w.pt"), partial=True)


def test_the_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    other = nn.Sequential(nn.Conv2d(3, 8, 5), nn.Linear(8, 2))
    message = refused(net(), save(other.state_dict(), tmp_path / "w.pt"))
    assert message.startswith("does not fit the model: ")
    assert "of another shape (0.weight (8, 3, 5, 5), the model has (4, 3, 3, 3)" in message
    assert "checkpoint_" not in message


# -- by order ------------------------------------------------------------------------------------------------------


def test_renamed_tensors_load_in_their_order(tmp_path: Path) -> None:
    source, model = Named(), net()
    path = save(source.state_dict(), tmp_path / "w.pth")
    assert refused(model, path).endswith(
        "its shapes are the model's in order: model.checkpoint_match: order loads it so"
    )
    found = load_checkpoint(model, path, match="order")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))
    assert torch.equal(model[1].running_var, source.stem["norm"].running_var)
    assert (found.match, found.tensors, found.of) == ("order", 8, 8)
    assert "by order, whatever their names" in found.line
    less = {k: v for k, v in source.state_dict().items() if "batches" not in k}
    load_checkpoint(net(), save(less, tmp_path / "less.pth"), match="order")


def test_the_first_misfit_in_order_is_named(tmp_path: Path) -> None:
    state = Named().state_dict()
    state["stem.norm.bias"] = torch.ones(5)
    assert refused(net(), save(state, tmp_path / "w.pt"), match="order") == (
        "does not fit the model by order: tensor 4 is stem.norm.bias (5,), the model has 1.bias (4,) there"
    )
    state["stem.norm.bias"] = torch.ones(4, dtype=torch.int64)
    assert "tensor 4 is stem.norm.bias" in refused(net(), save(state, tmp_path / "w.pt"), match="order")
    state = Named().state_dict()
    swapped = {name: state[name] for name in sorted(state)}
    assert list(swapped)[2:4] == ["stem.conv.bias", "stem.conv.weight"]
    assert "tensor 1 is head.bias" in refused(net(), save(swapped, tmp_path / "w.pt"), match="order")
    order = ["stem.conv.weight", "stem.conv.bias", "stem.norm.bias", "stem.norm.weight"]
    swapped = {name: state[name] for name in (*order, *(name for name in state if name not in order))}
    assert "tensor 3 is stem.norm.bias (4,), the model has 1.weight (4,) there" in refused(
        net(), save(swapped, tmp_path / "w.pt"), match="order"
    )
    del state["head.bias"]
    assert refused(net(), save(state, tmp_path / "w.pt"), match="order").endswith("it holds 7 tensors, the model has 8")


def test_a_file_that_sorts_its_tensors_has_no_order(tmp_path: Path) -> None:
    """Twelve equal layers fit by shape, but the third of a .safetensors is layer 10."""
    layers = [nn.Linear(3, 3, bias=False) for _ in range(12)]
    source = nn.ModuleDict({f"layer{i}": layer for i, layer in enumerate(layers)})
    path = tmp_path / "w.safetensors"
    save_file(source.state_dict(), path)
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(12)))
    assert refused(model, path, match="order").startswith("a .safetensors file holds its tensors sorted by name")
    assert "order" not in refused(model, path)
    load_checkpoint(model, save(source.state_dict(), tmp_path / "w.pt"), match="order")
    assert all(torch.equal(model[i].weight, layer.weight) for i, layer in enumerate(layers))


# -- with objects --------------------------------------------------------------------------------------------------


def lightning(tmp_path: Path) -> Path:
    settings = types.SimpleNamespace(lr=0.1)
    return save({"state_dict": prefixed("model.", net().state_dict()), "settings": settings}, tmp_path / "w.ckpt")


def test_a_pickle_is_read_only_if_it_is_trusted(tmp_path: Path) -> None:
    path = lightning(tmp_path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    message = refused(net(), path)
    assert message.startswith("holds Python objects besides tensors, and reading those could run code: resave")
    assert message.endswith(f"if you trust the file (sha256 {digest}), add --trust-code")
    found = load_checkpoint(net(), path, trusted=True)
    assert found.unpickled
    assert "unpickled with its code" in found.line
    assert not load_checkpoint(net(), save(net().state_dict(), tmp_path / "p.pt"), trusted=True).unpickled


def test_a_whole_module_is_read_if_it_is_trusted(tmp_path: Path) -> None:
    source, model = net(), net()
    load_checkpoint(model, save(source, tmp_path / "w.pt"), trusted=True)
    assert torch.equal(model[0].weight, source[0].weight)
    load_checkpoint(model, save({"model": source, "epoch": 2}, tmp_path / "v.pt"), trusted=True)


def test_a_trusted_pickle_whose_classes_are_gone_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(lightning(tmp_path).read_bytes().replace(b"SimpleNamespace", b"SimpleNamezpace"))
    message = refused(net(), tmp_path / "w.pt", trusted=True)
    assert "SimpleNamezpace" in message


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("ran",))


@pytest.mark.parametrize("new", [True, False])
def test_objects_are_named_without_making_them(tmp_path: Path, new: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tensors = {"a": net().state_dict(), "b": nn.Parameter(torch.ones(2)), "c": torch.float16, "d": [1, "x", {2}]}
    for name, value, expected in (
        ("plain.pt", tensors, ()),
        ("module.pt", net(), ("torch.nn.modules.container.Sequential", "torch.nn.modules.conv.Conv2d")),
        ("evil.pt", {"w": Evil()}, ("posix.mkdir",)),
        ("space.pt", {"s": types.SimpleNamespace(), "w": torch.ones(1)}, ("types.SimpleNamespace",)),
    ):
        with Path(name).open("wb") as out:
            torch.save(value, out, _use_new_zipfile_serialization=new)
        assert objects_in(Path(name))[:2] == expected
    assert not Path("ran").exists()
    Path("four.pt").write_bytes(pickle.dumps(Evil(), protocol=4))
    assert objects_in(Path("four.pt")) == ("posix.mkdir",)


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04" + b"x" * 90, bytes(100), b"\x80\x02c"])
def test_what_is_no_pickle_holds_no_objects(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.pt").write_bytes(content)
    assert objects_in(tmp_path / "w.pt") == ()
    assert objects_in(tmp_path / "absent.pt") == objects_in(tmp_path) == ()
    (tmp_path / "w.safetensors").write_bytes(pickle.dumps(Evil()))
    assert objects_in(tmp_path / "w.safetensors") == ()
    (tmp_path / "escape.pt").write_bytes(b"cposix\nmkdir\n.cwhat\n\\`\n.")  # whatever follows a pickle
    assert objects_in(tmp_path / "escape.pt") == ("posix.mkdir", "what.\\`")


def test_the_facts_of_a_load_are_json() -> None:
    import json

    facts = Loaded("w.pt", "names", 1, 2, 0.5, missing=("a",)).facts
    assert json.loads(json.dumps(facts)) == facts


def test_by_order_a_new_classifier_stays_as_initialised_and_nothing_else_may(tmp_path: Path) -> None:
    source, model = Named(), net(classes=5)
    path = save(source.state_dict(), tmp_path / "w.pt")
    head = model[3].weight.detach().clone()
    assert "order with model.checkpoint_partial: true loads it so" in refused(model, path)
    assert "tensor 7 is head.weight (2, 4), the model has 3.weight (5, 4)" in refused(model, path, match="order")
    found = load_checkpoint(model, path, match="order", partial=True)
    assert torch.equal(model[0].weight, source.stem["conv"].weight)
    assert torch.equal(model[1].running_var, source.stem["norm"].running_var)
    assert torch.equal(model[3].weight, head)
    assert (found.tensors, found.of, found.missing) == (6, 8, ())
    assert [text.split()[0] for text in found.misshaped] == ["3.weight", "3.bias"]
    wider = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6, 2))
    assert "tensor 1 is stem.conv.weight" in refused(wider, path, match="order", partial=True)
