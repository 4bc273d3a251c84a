"""Masks: immutable, exact, and the same bytes for the same mask."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsify_deploy.errors import DataError, ModelError
from sparsify_deploy.sparsity.layers import prunable
from sparsify_deploy.sparsity.mask import Mask

TENSORS = {
    "b.weight": torch.tensor([[True, False], [False, False]]),
    "a.weight": torch.tensor([[True, True, True, False]]),
}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def test_counts_and_densities_by_hand() -> None:
    mask = Mask(TENSORS)
    assert mask.counts() == {"a.weight": (3, 4), "b.weight": (1, 4)}
    assert mask.densities() == {"a.weight": 0.75, "b.weight": 0.25}
    assert mask.density == 0.5
    assert Mask({}).density == 1.0


def test_nobody_can_write_into_a_mask() -> None:
    source = {name: tensor.clone() for name, tensor in TENSORS.items()}
    mask = Mask(source)
    source["a.weight"][:] = False
    mask["a.weight"][:] = False
    for tensor in mask.values():
        tensor[:] = False
    assert mask == Mask(TENSORS)
    with pytest.raises(TypeError):
        mask["a.weight"] = torch.ones(1)  # type: ignore[index]
    with pytest.raises(TypeError):
        hash(mask)


def test_only_bool_is_a_mask() -> None:
    with pytest.raises(TypeError, match=r"a\.weight is torch\.float32"):
        Mask({"a.weight": torch.ones(2)})


def test_equality_looks_at_names_shapes_and_bits() -> None:
    mask = Mask(TENSORS)
    assert mask == Mask(dict(reversed(TENSORS.items())))
    assert mask != Mask({"a.weight": TENSORS["a.weight"]})
    assert mask != Mask({**TENSORS, "a.weight": TENSORS["a.weight"].view(2, 2)})
    assert mask != mask.with_({"a.weight": ~TENSORS["a.weight"]})
    assert copy.deepcopy(mask) == mask == pickle.loads(pickle.dumps(mask))


def test_same_mask_same_bytes_whatever_the_order_or_memory_layout(tmp_path: Path) -> None:
    wide = torch.rand(3, 5) > 0.5
    Mask({"x": wide, **TENSORS}).save(tmp_path / "one")
    Mask({**dict(reversed(TENSORS.items())), "x": wide.t().contiguous().t()}).save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    loaded = Mask.load(tmp_path / "one")
    assert loaded == Mask({"x": wide, **TENSORS})
    assert list(loaded) == list(Mask({"x": wide, **TENSORS}))
    loaded.save(tmp_path / "three")
    assert (tmp_path / "three").read_bytes() == (tmp_path / "one").read_bytes()


def test_a_file_that_is_no_mask_is_one_clear_line(tmp_path: Path) -> None:
    from safetensors.torch import save

    for name, content in {"junk": b"hello", "empty": b"", "floats": save({"a": torch.ones(2)})}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            Mask.load(tmp_path / name)
    with pytest.raises(DataError, match="absent"):
        Mask.load(tmp_path / "absent")


def test_apply_zeroes_the_pruned_and_only_those() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.get_parameter("0.weight")[0, 0] = float("nan")
        model.get_parameter("0.weight")[0, 1] = -1.0
    kept = torch.ones(3, 4, dtype=torch.bool)
    kept[0, :2] = False
    mask = Mask.ones(prunable(model)).with_({"0.weight": kept})
    assert mask.check_holds(model) == ("0.weight",)
    mask.apply_(model)
    assert mask.check_holds(model) == ()
    weight = model.get_parameter("0.weight")
    assert weight[0, :2].tolist() == [0.0, 0.0]
    assert not torch.signbit(weight[0, :2]).any()
    assert torch.equal(weight[kept], before["0.weight"][kept])
    assert torch.equal(model.get_parameter("2.weight"), before["2.weight"])


def test_a_mask_for_another_model_is_refused() -> None:
    with pytest.raises(ModelError, match=r"has a\.weight, which the model lacks"):
        Mask(TENSORS).apply_(net())
    with pytest.raises(ModelError, match=r"0\.weight has shape \(3, 4\), its mask \(2, 2\)"):
        Mask({"0.weight": TENSORS["b.weight"]}).check_holds(net())
    with pytest.raises(ModelError, match=r"c\.weight is not in the mask"):
        Mask(TENSORS).with_({"c.weight": TENSORS["a.weight"]})
    with pytest.raises(ModelError, match="shape"):
        Mask(TENSORS).with_({"a.weight": TENSORS["b.weight"]})


def test_moves_are_where_two_masks_differ() -> None:
    old = Mask({"b": torch.tensor([[True, False], [False, True]]), "a": torch.tensor([True, True])})
    new = old.with_({"b": torch.tensor([[False, False], [True, True]])})
    assert [(name, where.tolist(), keeps.tolist()) for name, where, keeps in old.moves_to(new)] == [
        ("a", [], []),
        ("b", [0, 2], [False, True]),
    ]
