"""Splits taken from the train split: in proportion, the same every time, disjoint; in every source that has them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sparsify_deploy.datasets import digits, file, folder, npz, parquet
from sparsify_deploy.datasets._params import WithSplits
from sparsify_deploy.datasets._splits import hold_out, parted
from sparsify_deploy.errors import DataError

LABELS = np.repeat([0, 1, 2], [60, 30, 10])


def held(test: float = 0.2, validation: float = 0.1, seed: int = 0, labels: np.ndarray = LABELS) -> Any:
    params = WithSplits(test_fraction=test, validation_fraction=validation, split_seed=seed)
    return hold_out(labels, params, "here")


def test_each_class_is_held_out_in_proportion_and_each_row_goes_to_one_split() -> None:
    found = held()
    assert np.bincount(LABELS[found.test]).tolist() == [12, 6, 2]
    assert np.bincount(LABELS[found.validation]).tolist() == [6, 3, 1]
    assert sorted([*found.train, *found.test, *found.validation]) == list(range(100))
    assert found.notes == (
        "data: the test split is 20 of 100 training examples, held out (test_fraction 0.2, split_seed 0)",
        "data: the validation split is 10 of 100 training examples, held out (validation_fraction 0.1, split_seed 0)",
    )


def test_the_same_seed_gives_the_same_rows_and_another_others() -> None:
    np.testing.assert_array_equal(held(seed=3).test, held(seed=3).test)
    assert held(seed=3).test.tolist() != held(seed=4).test.tolist()
    golden = held(validation=0.0).test[:6].tolist()
    assert golden == [2, 4, 10, 11, 22, 26], "another numpy, or another way of drawing: every result changes"


def test_rows_are_drawn_and_not_the_first_of_each_class() -> None:
    assert held().test[:12].tolist() != list(range(12))


def test_asking_for_validation_leaves_the_test_split_as_it_is() -> None:
    np.testing.assert_array_equal(held().test, held(validation=0.0).test)


def test_a_class_of_one_example_stays_in_train() -> None:
    for fraction, count in ((0.4, 2), (0.8, 3)):
        found = held(fraction, 0.0, labels=np.array([0, 0, 0, 0, 1]))
        assert 4 in found.train
        assert len(found.test) == count


def test_other_targets_are_held_out_by_row() -> None:
    found = held(0.25, 0.0, labels=np.linspace(0, 1, 40))
    assert len(found.test) == 10
    assert found.test.tolist() == sorted(set(found.test.tolist()))


@pytest.mark.parametrize(
    ("test", "validation", "labels", "text"),
    [
        (0.001, 0.0, LABELS, "here: data.params.test_fraction 0.001 is 0 of 100 training examples: change it"),
        (0.9, 0.2, LABELS, "here: data.params.validation_fraction 0.2 is 20 of 100 training examples: change it"),
        (0.5, 0.0, np.arange(4), "test_fraction 0.5 leaves no example: no class has one to spare"),
    ],
)
def test_shares_that_come_to_nothing(test: float, validation: float, labels: np.ndarray, text: str) -> None:
    with pytest.raises(DataError, match=text):
        held(test, validation, labels=labels)


def test_a_split_that_is_there_is_not_made_again() -> None:
    pair = (np.zeros((100, 1)), LABELS)
    with pytest.raises(DataError, match=r"here: has a test split of its own: remove data.params.test_fraction"):
        parted(pair, pair, None, WithSplits(test_fraction=0.1), "here")
    with pytest.raises(DataError, match=r"here: has a validation split of its own: remove data.params.validation_"):
        parted(pair, pair, pair, WithSplits(validation_fraction=0.1), "here")
    with pytest.raises(DataError, match=r"here: has no test split: name it, or set data.params.test_fraction"):
        parted(pair, None, None, WithSplits(), "here")


def test_digits_give_up_a_part_for_validation_and_keep_their_test_split() -> None:
    plain, divided = digits.open(digits.Params()), digits.open(digits.Params(validation_fraction=0.1))
    assert (len(divided.split("train")), len(divided.split("validation"))) == (1293, 144)
    assert torch.equal(divided.split("test").fields["input"], plain.split("test").fields["input"])
    train = divided.split("train").take(torch.arange(1293))["input"]
    assert float(train.mean()) == pytest.approx(0, abs=1e-5)
    with pytest.raises(DataError, match=r"there is no validation split: set data.params.validation_fraction, such as"):
        plain.split("validation")


def archive(path: Path, **others: Any) -> Path:
    x = np.arange(100, dtype=np.float32).repeat(3).reshape(100, 3)
    np.savez(path / "d.npz", x_train=x, y_train=LABELS, **others)
    return path / "d.npz"


def test_npz_without_a_test_split(tmp_path: Path) -> None:
    path = archive(tmp_path)
    data = npz.open(npz.Params(path=path, test_fraction=0.2, validation_fraction=0.1))
    rows = {name: data.split(name).fields["input"][:, 0].int().tolist() for name in data.splits}
    assert sorted(row for some in rows.values() for row in some) == list(range(100))
    assert data.split("test").fields["target"].tolist() == LABELS[rows["test"]].tolist()
    assert {i: raw[0] for i, raw in data.raw.items()} == {i: rows["test"][i] for i in data.raw}
    with pytest.raises(DataError, match=r"no array is called 'x_test'"):
        npz.open(npz.Params(path=path))


def test_npz_with_three_splits_of_its_own(tmp_path: Path) -> None:
    other = {"x_test": np.ones((5, 3), np.float32), "y_test": np.arange(5) % 3}
    more = {"x_val": np.zeros((4, 3), np.float32), "y_val": np.arange(4) % 3}
    path = archive(tmp_path, **other, **more)
    data = npz.open(npz.Params(path=path, validation_inputs="x_val", validation_targets="y_val"))
    assert {name: len(data.split(name)) for name in data.splits} == {"train": 100, "test": 5, "validation": 4}
    with pytest.raises(DataError, match=r"has a test split of its own"):
        npz.open(npz.Params(path=path, test_fraction=0.2))
    with pytest.raises(ValueError, match=r"go together"):
        npz.Params(path=path, validation_inputs="x_val")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Ten images of each of two classes in one split, told apart by their colour."""
    for k, name in enumerate(("cat", "dog")):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (8, 8), (100 * k + i, 0, 0)).save(tmp_path / "train" / name / f"{i}.png")
    return tmp_path


def test_folder_without_a_test_split(images: Path) -> None:
    params = folder.Params(path=images, size=8, normalize="none", test_fraction=0.2, validation_fraction=0.1)
    assert len(folder.files(params)) == 20
    data = folder.open(params)
    assert {name: len(data.split(name)) for name in data.splits} == {"train": 14, "test": 4, "validation": 2}
    test = data.split("test").take(torch.arange(4))
    reds = (test["input"][:, 0, 0, 0] * 255).round().int()
    assert (reds // 100).tolist() == test["target"].tolist() == [0, 0, 1, 1]
    decoded = [Image.open(io.BytesIO(data.raw[i])).getpixel((0, 0))[0] for i in range(4)]
    assert decoded == reds.tolist()


def test_unreadable_images_of_a_divided_split_are_left_out_of_theirs(images: Path) -> None:
    (images / "train" / "cat" / "3.png").write_bytes(b"junk")
    params = folder.Params(
        path=images, size=8, normalize="none", test_fraction=0.5, unreadable="skip", max_unreadable=0.1
    )
    data = folder.open(params)
    assert len(data.split("train")) + len(data.split("test")) == 19
    test = data.split("test").take(torch.arange(len(data.split("test"))))
    reds = (test["input"][:, 0, 0, 0] * 255).round().int().tolist()
    raw = {i: Image.open(io.BytesIO(content)).getpixel((0, 0))[0] for i, content in data.raw.items()}
    assert raw == {i: reds[i] for i in raw}
    assert [red // 100 for red in reds] == test["target"].tolist()
    assert "leaves out 1 of 20 images" in data.notes[0]


def test_a_named_validation_folder(images: Path) -> None:
    for name in ("val", "test"):
        (images / name / "cat").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(images / name / "cat" / "0.png")
    data = folder.open(folder.Params(path=images, size=8, validation="val"))
    assert data.splits == ("train", "test", "validation")
    with pytest.raises(DataError, match=r"has no folder dev, which data.params.validation names"):
        folder.open(folder.Params(path=images, size=8, validation="dev"))
    with pytest.raises(DataError, match=r"one folder is two splits: train train, test train"):
        folder.files(folder.Params(path=images, test="train"))


def test_parquet_without_a_test_split(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "i.png").touch()
    Image.new("RGB", (4, 4)).save(tmp_path / "i.png")
    content = [(tmp_path / "i.png").read_bytes()] * 10
    pq.write_table(pa.table({"image": content, "label": [0, 1] * 5}), tmp_path / "train-0.parquet")
    params = parquet.Params(path=tmp_path, test_fraction=0.4)
    assert list(parquet.files(params)) == ["train/train-0.parquet"]
    assert parquet.open(params).split("test").fields["target"].bincount().tolist() == [2, 2]
    pq.write_table(pa.table({"image": content, "label": [0, 1] * 5}), tmp_path / "val-0.parquet")
    data = parquet.open(parquet.Params(path=tmp_path, test_fraction=0.4, validation="val-*"))
    assert len(data.split("validation")) == 10


def test_a_file_of_the_user_may_have_a_validation_split(tmp_path: Path) -> None:
    code = """
import numpy as np
def data(validation: bool):
    part = {"input": np.zeros((4, 2), "float32"), "target": np.array([0, 1, 0, 1])}
    return {"train": part, "test": part, **({"validation": part} if validation else {})}
"""
    (tmp_path / "d.py").write_text(code)
    data = file.open(file.Params(path=tmp_path / "d.py", arguments={"validation": True}))
    assert len(data.split("validation")) == 4
    without = file.open(file.Params(path=tmp_path / "d.py", arguments={"validation": False}))
    with pytest.raises(DataError, match=r"there is no validation split: give it under the key 'validation'"):
        without.split("validation")


def test_a_data_set_of_the_user_without_a_validation_split_gives_none(tmp_path: Path) -> None:
    code = """
import torch
class Part:
    def __len__(self): return 3
    def take(self, indices): return {"x": torch.zeros(len(indices), 2), "target": indices % 2}
class data:
    inputs, classes, notes = ("x",), None, ("mine",)
    def split(self, name): return Part()
"""
    (tmp_path / "d.py").write_text(code)
    data = file.open(file.Params(path=tmp_path / "d.py"))
    assert data.notes == ("mine",)  # type: ignore[attr-defined]
    assert len(data.split("test")) == 3
    with pytest.raises(DataError, match=r"d.py: data: there is no validation split: give the data set `splits`"):
        data.split("validation")
    (tmp_path / "d.py").write_text(code + "    splits = ('train', 'test', 'validation')\n")
    assert len(file.open(file.Params(path=tmp_path / "d.py")).split("validation")) == 3
