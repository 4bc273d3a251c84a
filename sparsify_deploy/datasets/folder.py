"""A folder of images, one folder a class in each split: ROOT/train/CLASS/*.jpg and ROOT/test/CLASS/*.jpg.

Classes are numbered in the order of their names. Each image is decoded once, with Pillow, into bytes in memory (size x
size x 3 each), and becomes floats one batch at a time. A file that cannot be decoded stops the run with its name, or is
left out and counted up to a limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from sparsify_deploy.datasets._params import NORMALIZE, Images, Normalize
from sparsify_deploy.params import InputPath

if TYPE_CHECKING:
    from sparsify_deploy.types import DataSet

VERSION = 2
RUNS_USER_CODE = False

_TEST_NAMES = ("test", "val", "validation")


class Params(Images):
    """The folder, its splits, and how images become arrays."""

    path: InputPath = Field(
        description="the folder that holds the folders of the splits; with labels false, images anywhere in it"
    )
    train: str = Field("train", description="folder of the train split")
    test: str | None = Field(None, description="folder of the test split; none: test, val or validation, whichever is")
    validation: str | None = Field(None, description="folder of the validation split; none: there is none")
    size: int = Field(224, ge=1, le=4096, description="height and width of every image, pixels")
    normalize: Normalize = Field("imagenet", description=NORMALIZE)


def files(params: Params) -> Mapping[str, Path]:
    """Every image of every split, by its path in the folder. Raises DataError where a split is missing or empty."""
    _check_folder(params)
    if not params.labels:
        return {image.relative_to(params.path).as_posix(): image for image in images(params.path)}
    found = {}
    for split, folder in split_folders(params).items():
        for label in class_folders(folder):
            for image in images(label):
                found[f"{split}/{label.name}/{image.relative_to(label).as_posix()}"] = image
    return found


def _check_folder(params: Params) -> None:
    from sparsify_deploy.errors import DataError

    if not params.path.is_dir():
        raise DataError(f"{params.path}: {'not a folder' if params.path.exists() else 'no such folder'}")


def split_folders(params: Params) -> dict[str, Path]:
    """The folders of the splits there are. Raises DataError where one is missing or stands for two."""
    from sparsify_deploy.errors import DataError

    _check_folder(params)
    found = {"train": params.path / params.train}
    if not found["train"].is_dir():
        raise DataError(
            f"{params.path}: has no folder {params.train} for the train split: make one, or name "
            "another as data.params.train (. for the classes right here)"
        )
    if params.validation is not None:
        found["validation"] = params.path / params.validation
        if not found["validation"].is_dir():
            raise DataError(f"{params.path}: has no folder {params.validation}, which data.params.validation names")
    for name in (params.test,) if params.test is not None else _TEST_NAMES:
        if name != params.validation and (params.path / name).is_dir():
            found["test"] = params.path / name
            break
    if "test" not in found and (params.test is not None or not params.test_fraction):
        wanted = params.test if params.test is not None else " or ".join(_TEST_NAMES)
        raise DataError(
            f"{params.path}: has no folder {wanted} for the test split: make one, name it by data.params.test, "
            "or set data.params.test_fraction, such as 0.2, to hold out some of the train split"
        )
    if len(set(found.values())) < len(found):
        raise DataError(
            f"{params.path}: one folder is two splits: {', '.join(f'{k} {v.name}' for k, v in found.items())}"
        )
    return found


def class_folders(folder: Path) -> list[Path]:
    """The folders of the classes, by name. Raises DataError where there is none."""
    from sparsify_deploy.errors import DataError

    found = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not found:
        raise DataError(
            f"{folder}: has no folders; expected one a class, with its images inside (images without classes: "
            "data.params.labels false, for calibration)"
        )
    for each in found:
        if not each.name.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in each.name):
            raise DataError(f"{each}: the name of a class is not UTF-8: rename the folder")
    return found


def images(folder: Path) -> list[Path]:
    """The files below a folder, by path; hidden ones are left out. Raises DataError where there is none."""
    from sparsify_deploy.errors import DataError

    found = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    if not found:
        raise DataError(f"{folder}: holds no file: put images into it, or remove it")
    return found


def open(params: Params) -> DataSet:
    """Images `(N, C, size, size)` and classes int64 `(N,)`."""
    from functools import partial

    from sparsify_deploy.datasets._encoded import image_set
    from sparsify_deploy.datasets._folder import classes_of, stored
    from sparsify_deploy.datasets._memory import normalization
    from sparsify_deploy.preprocessing.images import check_pillow

    check_pillow("the folder data set")
    affine_of = partial(normalization, params.normalize, grey=params.mode == "L")
    if not params.labels:
        _check_folder(params)
        return image_set(
            {"train": stored([(image, 0) for image in images(params.path)], labels=False)},
            params,
            affine_of,
            str(params.path),
        )
    found = {split: class_folders(folder) for split, folder in split_folders(params).items()}
    classes = classes_of(found, params.path)
    splits = {
        split: stored([(image, classes.index(folder.name)) for folder in folders for image in images(folder)])
        for split, folders in found.items()
    }
    return image_set(splits, params, affine_of, str(params.path), classes=classes)
