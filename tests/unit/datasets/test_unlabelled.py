"""Examples without labels: which sources give them, what they are good for, and how they are made fit to calibrate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparsify_deploy.datasets import folder, npz, parquet
from sparsify_deploy.datasets._calibration import calibration_split
from sparsify_deploy.datasets._labels import judge
from sparsify_deploy.datasets._memory import MemoryDataSet, MemorySplit, standardising
from sparsify_deploy.errors import DataError

RNG = np.random.RandomState(0)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Six images, some in folders, without classes."""
    (tmp_path / "pictures" / "2024").mkdir(parents=True)
    for i in range(6):
        at = tmp_path / "pictures" / ("2024" if i % 2 else ".") / f"{i}.png"
        Image.fromarray(RNG.randint(0, 256, (8, 8, 3)).astype("uint8")).save(at)
    return tmp_path / "pictures"


def labelled(size: int = 8, dtype: str = "uint8", **others: object) -> MemoryDataSet:
    pixels = RNG.randint(0, 256, (4, 3, size, size)).astype(dtype)
    scale = {"input": standardising(pixels)}
    split = MemorySplit({"input": torch.from_numpy(pixels), "target": torch.tensor([0, 1, 0, 1])}, scale)
    return MemoryDataSet(split, split, **others)  # type: ignore[arg-type]


def test_a_folder_of_images_anywhere_in_it(images: Path) -> None:
    params = folder.Params(path=images, size=8, labels=False)
    assert sorted(folder.files(params)) == ["0.png", "2.png", "2024/1.png", "2024/3.png", "2024/5.png", "4.png"]
    data = folder.open(params)
    assert len(data.split("train")) == 6
    assert list(data.split("train").take(torch.arange(2))) == ["input"]


def test_they_are_no_data_to_train_on(images: Path) -> None:
    data = folder.open(folder.Params(path=images, size=8, labels=False))
    for name in ("test", "validation"):
        with pytest.raises(DataError, match=r"labels is false: examples without labels are good for quantize.calibrat"):
            data.split(name)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"labels is false: examples without labels"):
        judge(data)


def test_bad_images_and_empty_folders(images: Path, tmp_path: Path) -> None:
    (images / "2024" / "5.png").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"5.png: the image cannot be decoded"):
        folder.open(folder.Params(path=images, size=8, labels=False))
    data = folder.open(folder.Params(path=images, size=8, labels=False, unreadable="skip", max_unreadable=0.2))
    assert len(data.split("train")) == 5
    assert "leaves out 1 of 6 images that cannot be read: 2024/5.png" in data.notes[0]  # type: ignore[attr-defined]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: holds no file: put images into it"):
        folder.open(folder.Params(path=tmp_path / "empty", labels=False))
    (images / "2024").rename(tmp_path / "moved")
    for file in images.iterdir():
        file.write_bytes(b"junk")
    with pytest.raises(DataError, match=r"3 of 3 images of the train split cannot be read"):
        folder.open(folder.Params(path=images, size=8, labels=False, unreadable="skip", max_unreadable=0.99))


def test_an_archive_without_targets(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x_train=RNG.randint(0, 256, (5, 4, 4)).astype("uint8"))
    data = npz.open(npz.Params(path=tmp_path / "d.npz", labels=False))
    assert data.split("train").take(torch.arange(5))["input"].shape == (5, 1, 4, 4)
    np.savez(tmp_path / "e.npz", x_train=np.zeros((0, 4, 4), np.uint8))
    with pytest.raises(DataError, match=r"x_train is empty"):
        npz.open(npz.Params(path=tmp_path / "e.npz", labels=False))


def test_parquet_without_a_column_of_labels(images: Path, tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"image": [(images / "0.png").read_bytes()]}), tmp_path / "train-0.parquet")
    params = parquet.Params(path=tmp_path, labels=False)
    assert list(parquet.files(params)) == ["train/train-0.parquet"]
    assert len(parquet.open(params).split("train")) == 1


def test_the_scale_of_the_data_takes_the_place_of_its_own(images: Path) -> None:
    main = labelled()
    found = folder.open(folder.Params(path=images, size=8, fit="stretch", labels=False, normalize="none"))
    split = calibration_split(found, main)
    raw = found.split("train").fields["input"]  # type: ignore[attr-defined]
    torch.testing.assert_close(split.take(torch.arange(6))["input"], main.train.affine["input"](raw))


def test_what_does_not_fit_is_one_line(images: Path, tmp_path: Path) -> None:
    found = folder.open(folder.Params(path=images, size=8, labels=False))
    with pytest.raises(
        DataError, match=r"'input' of one example has shape \(3, 8, 8\), in the data \(3, 16, 16\): set"
    ):
        calibration_split(found, labelled(16))
    with pytest.raises(DataError, match=r"'input' is stored as uint8, in the data as float32"):
        calibration_split(found, labelled(dtype="float32"))
    with pytest.raises(DataError, match=r"has no 'ids', which the data has: its fields are input"):
        calibration_split(found, labelled(inputs=("ids",)))
    for split in ("train", "test"):
        (tmp_path / "main" / split / "a").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "main" / split / "a" / "0.png")
    main = folder.open(folder.Params(path=tmp_path / "main", size=8, fit="stretch"))
    with pytest.raises(
        DataError, match=r"images are read with fit crop, those of the data with stretch: set params.fit"
    ):
        calibration_split(found, main)
