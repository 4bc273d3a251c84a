"""A folder of images, one folder a class in each split: ROOT/train/CLASS/*.jpg and ROOT/test/CLASS/*.jpg.

Classes are numbered in the order of their names. Each image is decoded once, with Pillow, into bytes in memory (size x
size x 3 each), and becomes floats one batch at a time. A file that cannot be decoded stops the run with its name, or is
left out and counted up to a limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from sparsify_deploy.params import Fraction, InputPath
from sparsify_deploy.params import Params as Base

if TYPE_CHECKING:
    from sparsify_deploy.types import DataSet

VERSION = 1
RUNS_USER_CODE = False

_TEST_NAMES = ("test", "val", "validation")


class Params(Base):
    """The folder, its splits, and how images become arrays."""

    path: InputPath = Field(description="the folder that holds the folders of the splits")
    train: str = Field("train", description="folder of the train split")
    test: str | None = Field(None, description="folder of the test split; none: test, val or validation, whichever is")
    size: int = Field(224, ge=1, le=4096, description="height and width of every image, pixels")
    fit: Literal["crop", "stretch"] = Field(
        "crop", description="crop: shorter side to size / 0.875, then the middle; stretch: to size x size as it is"
    )
    mode: Literal["RGB", "L"] = Field("RGB", description="three channels, or one of grey")
    normalize: Literal["imagenet", "data", "none"] = Field(
        "imagenet",
        description="by ImageNet's mean and deviation, as pretrained networks expect; this train split's; or to 0..1",
    )
    unreadable: Literal["raise", "skip"] = Field("raise", description="what to do with a file that is no image")
    max_unreadable: Fraction = Field(0.01, description="skip: the largest share of a split that may be left out")


def files(params: Params) -> Mapping[str, Path]:
    """Every image of both splits, by its path in the folder. Raises DataError where a split is missing or empty."""
    found = {}
    for split in ("train", "test"):
        folder = split_folder(params, split)
        for label in class_folders(folder):
            for image in images(label):
                found[f"{split}/{label.name}/{image.relative_to(label).as_posix()}"] = image
    return found


def split_folder(params: Params, split: str) -> Path:
    """The folder of a split. Raises DataError."""
    from sparsify_deploy.errors import DataError

    if not params.path.is_dir():
        raise DataError(f"{params.path}: {'not a folder' if params.path.exists() else 'no such folder'}")
    named = params.train if split == "train" else params.test
    for name in (named,) if named is not None else _TEST_NAMES:
        if (folder := params.path / name).is_dir():
            return folder
    wanted = named if named is not None else " or ".join(_TEST_NAMES)
    raise DataError(f"{params.path}: has no folder {wanted} for the {split} split: make one, or name it by data.params")


def class_folders(folder: Path) -> list[Path]:
    """The folders of the classes, by name. Raises DataError where there is none."""
    from sparsify_deploy.errors import DataError

    found = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not found:
        raise DataError(f"{folder}: has no folders; expected one a class, with its images inside")
    return found


def images(folder: Path) -> list[Path]:
    """The files below a class's folder, by path; hidden ones are left out. Raises DataError where there is none."""
    from sparsify_deploy.errors import DataError

    found = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    if not found:
        raise DataError(f"{folder}: holds no file; remove the folder, or put the images of that class into it")
    return found


def open(params: Params) -> DataSet:
    """Images `(N, C, size, size)` and classes int64 `(N,)`."""
    from sparsify_deploy.datasets._folder import read
    from sparsify_deploy.datasets._memory import UNIT, check_splits, data_set, imagenet, standardising
    from sparsify_deploy.errors import DataError

    folders = {split: class_folders(split_folder(params, split)) for split in ("train", "test")}
    classes = tuple(folder.name for folder in folders["train"])
    if strange := sorted({folder.name for folder in folders["test"]} - set(classes)):
        raise DataError(f"{params.path}: the test split has the class {strange[0]!r}, which the train split has not")
    labelled = {
        split: [(image, classes.index(folder.name)) for folder in found for image in images(folder)]
        for split, found in folders.items()
    }
    (train, left_out), (test, also) = (read(labelled[split], params) for split in ("train", "test"))
    check_splits(train, test, str(params.path))
    if params.normalize == "imagenet":
        affine = imagenet(grey=params.mode == "L")
    else:
        affine = standardising(train[0]) if params.normalize == "data" else UNIT
    notes = tuple(
        f"data: the {split} split leaves out {line}" for split, line in (("train", left_out), ("test", also)) if line
    )
    return data_set(train, test, affine, classes, notes)
