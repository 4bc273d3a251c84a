"""Images in Parquet files as Hugging Face lays them out: a column of encoded images and one of labels.

Each image is decoded once, with Pillow, into bytes in memory; floats are made one batch at a time. Class names come
from the Hugging Face metadata of the schema where it is there. The images of a JPEG data set are lossy copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from sparsify_deploy.datasets._params import NORMALIZE, Images, Normalize
from sparsify_deploy.params import InputPath

if TYPE_CHECKING:
    from sparsify_deploy.types import DataSet

VERSION = 2
RUNS_USER_CODE = False


class Params(Images):
    """The folder, its files, its columns, and how to decode."""

    path: InputPath = Field(description="a folder of .parquet files")
    train: str = Field("train-*.parquet", description="files of the train split, a shell pattern in the folder")
    test: str = Field("test-*.parquet", description="files of the test split")
    validation: str | None = Field(None, description="files of the validation split; none: there is none")
    image: str = Field("image", description="column of encoded images, {bytes, path} or bytes")
    label: str = Field("label", description="column of integer classes or float values")
    fit: Literal["crop", "stretch"] = Field(
        "stretch", description="crop: shorter side to size / 0.875, then the middle; stretch: to size x size as it is"
    )
    normalize: Normalize = Field("data", description=NORMALIZE)

    @field_validator("train", "test", "validation")
    @classmethod
    def _inside(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not value or Path(value).is_absolute() or ".." in Path(value).parts:
            raise ValueError("expected a shell pattern inside the folder, such as train-*.parquet")
        return value


def files(params: Params) -> Mapping[str, Path]:
    """Every file of every split. Raises `DataError` where a pattern matches none or two match one."""
    return {
        f"{split}/{path.relative_to(params.path).as_posix()}": path
        for split, paths in split_files(params).items()
        for path in paths
    }


def split_files(params: Params) -> dict[str, list[Path]]:
    """The files of each split there is, in the order of their names. Raises DataError."""
    from sparsify_deploy.errors import DataError

    if not params.path.is_dir():
        raise DataError(f"{params.path}: {'not a folder' if params.path.exists() else 'no such folder'}")
    asked = {"train": params.train, "test": params.test, "validation": params.validation}
    found: dict[str, list[Path]] = {}
    for split, pattern in asked.items() if params.labels else (("train", params.train),):
        matches = sorted(p for p in params.path.glob(pattern) if p.is_file()) if pattern is not None else []
        if matches:
            found[split] = matches
        elif pattern is not None and not (split == "test" and params.test_fraction):
            advice = ", or set data.params.test_fraction, such as 0.2" if split == "test" else ""
            raise DataError(
                f"{params.path}: no file matches {split} pattern {pattern!r}: set data.params.{split}{advice}"
            )
    every = [path for paths in found.values() for path in paths]
    if twice := {path for path in every if every.count(path) > 1}:
        raise DataError(f"{min(twice)}: is in two splits; tests on training data are worthless, narrow the patterns")
    return found


def open(params: Params) -> DataSet:
    """Images `(N, C, H, W)`, C = 3 or 1; integer labels int64 `(N,)`, float labels float32."""
    from functools import partial

    from sparsify_deploy.datasets._encoded import image_set
    from sparsify_deploy.datasets._memory import normalization
    from sparsify_deploy.datasets._parquet import class_names, stored

    found = split_files(params)
    label = params.label if params.labels else None
    splits = {split: stored(paths, image=params.image, label=label) for split, paths in found.items()}
    affine_of = partial(normalization, params.normalize, grey=params.mode == "L")
    classes = class_names(found["train"][0], params.label)
    return image_set(splits, params, affine_of, str(params.path), classes=classes)
