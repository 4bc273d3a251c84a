"""The digits: the same as scikit-learn's, split once for all."""

from __future__ import annotations

import gzip
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from sparsify_deploy.datasets import digits
from sparsify_deploy.errors import DataError, MissingExtra

GOLDEN_FIRST = [3, 7, 13, 19, 36, 38, 43, 48]
GOLDEN_SUM = 313_341


def whole(split) -> dict[str, torch.Tensor]:
    return split.take(torch.arange(len(split)))


def test_are_scikit_learns_digits_split_in_two() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    data = digits.open(digits.Params())
    train, test = whole(data.split("train")), whole(data.split("test"))
    assert train["input"].shape == (1437, 1, 8, 8)
    assert test["input"].shape == (360, 1, 8, 8)
    assert train["target"].dtype == torch.int64
    bunch = datasets.load_digits()
    scale = data.split("train").affine["input"]
    back = torch.cat([train["input"], test["input"]]) * scale.divisor + scale.shift
    rows = torch.cat([back.reshape(1797, 64).round(), torch.cat([train["target"], test["target"]])[:, None].float()], 1)
    theirs = np.column_stack([bunch.images.reshape(1797, 64), bunch.target]).astype(np.float32)
    assert sorted(map(tuple, rows.numpy())) == sorted(map(tuple, theirs))


def test_the_split_is_fixed_and_even() -> None:
    data = digits.open(digits.Params())
    train, test = whole(data.split("train")), whole(data.split("test"))
    assert torch.bincount(test["target"]).tolist() == [36, 37, 35, 37, 36, 36, 36, 36, 35, 36]
    assert torch.bincount(train["target"]).sum() == 1437
    _, labels = digits._read(digits._file())
    assert digits._test_indices(labels)[:8].tolist() == GOLDEN_FIRST
    assert int(digits._test_indices(labels).sum()) == GOLDEN_SUM
    assert data.inputs == ("input",)
    assert data.classes == tuple("0123456789")


@pytest.mark.parametrize("size", [8, 16, 28])
def test_train_inputs_have_mean_0_and_deviation_1(size: int) -> None:
    x = whole(digits.open(digits.Params(size=size)).split("train"))["input"]
    assert x.shape == (1437, 1, size, size)
    assert x.dtype == torch.float32
    assert x.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert x.std().item() == pytest.approx(1.0, abs=1e-4)


def test_take_gives_the_rows_asked_for() -> None:
    split = digits.open(digits.Params()).split("test")
    everything = whole(split)
    some = split.take(torch.tensor([7, 7, 0]))
    assert torch.equal(some["input"], everything["input"][[7, 7, 0]])
    assert torch.equal(some["target"], everything["target"][[7, 7, 0]])
    some["input"].zero_()
    assert torch.equal(split.take(torch.tensor([7]))["input"], everything["input"][[7]])


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtra, match=r"the digits data set needs scikit-learn.*sparsify-deploy\[train\]"):
        digits.files(digits.Params())


def test_a_damaged_installation_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_loader("sklearn", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(DataError, match="no such file"):
        digits.files(digits.Params())
    path = tmp_path / "datasets" / "data" / "digits.csv.gz"
    path.parent.mkdir(parents=True)
    for content in (b"junk", gzip.compress(b"1,2\n" * 50)[:20], gzip.compress(b"1,2\n3,4\n"), gzip.compress(b"a,b\n")):
        path.write_bytes(content)
        with pytest.raises(DataError, match="reinstall") as caught:
            digits.open(digits.Params())
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [7, 257, 16.0])
def test_sizes_that_make_no_sense_are_refused(size: object) -> None:
    with pytest.raises(ValidationError):
        digits.Params.model_validate({"size": size})
