"""Images in Parquet files as Hugging Face lays them out: a column of encoded images and one of labels.

Each image is decoded once, with Pillow, into bytes in memory; floats are made one batch at a time. Class names come
from the Hugging Face metadata of the schema where it is there. The images of a JPEG data set are lossy copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from sparsify_deploy.params import InputPath
from sparsify_deploy.params import Params as Base

if TYPE_CHECKING:
    from sparsify_deploy.types import DataSet

VERSION = 1
RUNS_USER_CODE = False


class Params(Base):
    """The folder, its files, its columns, and how to decode."""

    path: InputPath = Field(description="a folder of .parquet files")
    train: str = Field("train-*.parquet", description="files of the train split, a shell pattern in the folder")
    test: str = Field("test-*.parquet", description="files of the test split")
    image: str = Field("image", description="column of encoded images, {bytes, path} or bytes")
    label: str = Field("label", description="column of integer classes or float values")
    size: int | None = Field(
        None, ge=1, le=4096, description="resize to this height and width, pixels; none: as stored"
    )
    mode: Literal["RGB", "L"] = Field("RGB", description="three channels, or one of grey")
    normalize: bool = Field(True, description="mean 0, deviation 1 per channel, measured on the train split")

    @field_validator("train", "test")
    @classmethod
    def _inside(cls, value: str) -> str:
        if not value or Path(value).is_absolute() or ".." in Path(value).parts:
            raise ValueError("expected a shell pattern inside the folder, such as train-*.parquet")
        return value


def files(params: Params) -> Mapping[str, Path]:
    """Every file of both splits. Raises `DataError` where a pattern matches none or both match one."""
    from sparsify_deploy.errors import DataError

    if not params.path.is_dir():
        raise DataError(f"{params.path}: {'not a folder' if params.path.exists() else 'no such folder'}")
    found: dict[str, Path] = {}
    for split in ("train", "test"):
        matches = split_files(params, split)
        if not matches:
            raise DataError(f"{params.path}: no file matches {split} pattern {getattr(params, split)!r}")
        twice = set(matches) & set(found.values())
        if twice:
            raise DataError(
                f"{min(twice)}: is in both splits; tests on training data are worthless, narrow the patterns"
            )
        found.update({f"{split}/{path.relative_to(params.path).as_posix()}": path for path in matches})
    return found


def split_files(params: Params, split: str) -> list[Path]:
    """The files of one split, in the order of their names."""
    return sorted(p for p in params.path.glob(getattr(params, split)) if p.is_file())


def open(params: Params) -> DataSet:
    """Images `(N, C, H, W)`, C = 3 or 1; integer labels int64 `(N,)`, float labels float32."""
    from sparsify_deploy.datasets._memory import check_splits, data_set, scaling
    from sparsify_deploy.datasets._parquet import class_names, read
    from sparsify_deploy.errors import DataError

    files(params)
    train_files, test_files = split_files(params, "train"), split_files(params, "test")
    train, test = (
        read(paths, image=params.image, label=params.label, size=params.size, mode=params.mode)
        for paths in (train_files, test_files)
    )
    check_splits(train, test, str(params.path))
    classes = class_names(train_files[0], params.label)
    if classes is not None and train[1].dtype.kind == "i":
        largest = max(int(train[1].max()), int(test[1].max()))
        if largest >= len(classes):
            raise DataError(f"{params.path}: label {largest}, but the files name {len(classes)} classes")
    return data_set(train, test, scaling(train[0], normalize=params.normalize), classes)
