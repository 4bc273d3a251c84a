"""Image folders: classes by name, cropping, files that are no images, and splits that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparsify_deploy.datasets import folder
from sparsify_deploy.errors import DataError

Make = Callable[..., Path]


@pytest.fixture
def images(tmp_path: Path) -> Make:
    """Writes `{split/class: number of images}` of one colour a class, `width` x `height`; returns the folder."""

    def _make(counts: dict[str, int], *, width: int = 12, height: int = 8) -> Path:
        for k, (name, count) in enumerate(counts.items()):
            (tmp_path / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                Image.new("RGB", (width, height), (10 * k, 100, 200)).save(tmp_path / name / f"{i}.png")
        return tmp_path

    return _make


def both(**extra: int) -> dict[str, int]:
    return {"train/cat": 3, "train/dog": 2, "test/cat": 1, "test/dog": 1, **extra}


def test_classes_are_numbered_by_name_and_pixels_are_standardised(images: Make) -> None:
    data = folder.open(folder.Params(path=images(both()), size=8))
    assert data.classes == ("cat", "dog")
    assert data.inputs == ("input",)
    batch = data.split("train").take(torch.arange(5))
    assert batch["input"].shape == (5, 3, 8, 8)
    assert batch["target"].tolist() == [0, 0, 0, 1, 1]
    expected = [
        (value / 255 - m) / d
        for value, m, d in zip((10, 100, 200), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)
    ]
    assert batch["input"][4].mean(dim=(1, 2)).tolist() == pytest.approx(expected, rel=1e-5)


def test_crop_keeps_the_middle_and_the_aspect_ratio(tmp_path: Path) -> None:
    pixels = np.zeros((16, 64, 3), dtype=np.uint8)
    pixels[:, 24:40] = 255  # a white square in the middle of a wide image
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / split / "a" / "x.png")

    def brightness(fit: str) -> float:
        data = folder.open(folder.Params(path=tmp_path, size=14, fit=fit, normalize="none"))
        return float(data.split("test").take(torch.arange(1))["input"].mean())

    assert brightness("crop") > 0.99
    assert brightness("stretch") == pytest.approx(0.25, abs=0.02)


def test_normalize_data_gives_mean_0_half_minus_1_to_1_and_none_0_to_1(images: Make) -> None:
    path = images(both())
    data = folder.open(folder.Params(path=path, size=8, normalize="data"))
    whole = data.split("train").take(torch.arange(5))["input"]
    assert whole.mean(dim=(0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-5)
    plain = folder.open(folder.Params(path=path, size=8, normalize="none")).split("train").take(torch.arange(1))
    assert plain["input"][0, :, 0, 0].tolist() == pytest.approx([0, 100 / 255, 200 / 255])
    half = folder.open(folder.Params(path=path, size=8, normalize="half")).split("train").take(torch.arange(1))
    assert half["input"][0, :, 0, 0].tolist() == pytest.approx([-1, 100 / 127.5 - 1, 200 / 127.5 - 1])


def test_grey_images_have_one_channel(images: Make) -> None:
    data = folder.open(folder.Params(path=images(both()), size=8, mode="L"))
    assert data.split("test").take(torch.arange(2))["input"].shape == (2, 1, 8, 8)


def test_val_is_a_test_split_too(images: Make) -> None:
    path = images({"train/a": 1, "val/a": 2})
    assert len(folder.open(folder.Params(path=path, size=8)).split("test")) == 2


def test_every_image_enters_the_fingerprint(images: Make) -> None:
    path = images(both())
    found = folder.files(folder.Params(path=path))
    assert found["train/dog/1.png"] == path / "train" / "dog" / "1.png"
    assert len(found) == 7


def test_a_file_that_is_no_image_is_named(images: Make) -> None:
    path = images(both())
    (path / "train/cat/notes.txt").write_text("hello")
    with pytest.raises(
        DataError,
        match=r"notes.txt: the image cannot be decoded \(UnidentifiedImageError: cannot identify image file\); ",
    ):
        folder.open(folder.Params(path=path, size=8))


def test_skipped_files_are_counted_and_their_labels_go_too(images: Make) -> None:
    path = images(both())
    (path / "train/cat/0.png").write_bytes(b"\x89PNG cut short")
    data = folder.open(folder.Params(path=path, size=8, unreadable="skip", max_unreadable=0.5))
    assert data.split("train").take(torch.arange(4))["target"].tolist() == [0, 0, 1, 1]
    assert data.notes == ("data: the train split leaves out 1 of 5 images that cannot be read: train/cat/0.png",)


def test_too_many_skipped_files_stop_the_run(images: Make) -> None:
    path = images(both())
    (path / "train/cat/0.png").write_bytes(b"nothing")
    with pytest.raises(
        DataError,
        match=r"1 of 5 images of the train split cannot be read, more than data.params.max_unreadable 0.1 allows",
    ):
        folder.open(folder.Params(path=path, size=8, unreadable="skip", max_unreadable=0.1))


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ({"train/a": 1}, "has no folder test or val or validation for the test split"),
        ({"test/a": 1}, "has no folder train for the train split"),
        ({"train/a": 1, "test/a": 1, "test/b": 1}, "the test split has the class 'b', which the train split has not"),
        ({"train/a": 1, "train/b": 0, "test/a": 1}, "b: holds no file"),
        ({"train": 2, "test/a": 1}, "train: has no folders; expected one a class"),
    ],
)
def test_splits_that_do_not_fit(images: Make, counts: dict[str, int], text: str) -> None:
    with pytest.raises(DataError, match=text):
        folder.open(folder.Params(path=images(counts), size=8))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder"):
        folder.files(folder.Params(path=tmp_path / "nowhere"))
