"""Hugging Face `datasets`: a folder of `save_to_disk`, local parquet or arrow files, or a name on the hub.

A column of images is decoded from its encoded bytes as the sources folder and parquet do it; a column of numbers gives
arrays, floats as they are and bytes (uint8) to 0..1. Class names come from a ClassLabel column. Code of a data set is
never run. Local files enter the fingerprint of a run by content and need no network; a data set of the hub enters by
its name and revision alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from sparsify_deploy.datasets._params import NORMALIZE, Images, Normalize
from sparsify_deploy.params import InputPath

if TYPE_CHECKING:
    from sparsify_deploy.types import DataSet

VERSION = 2
RUNS_USER_CODE = False


class Params(Images):
    """Where the data set is, its splits, its columns, and how to decode."""

    path: InputPath | None = Field(None, description="a folder of save_to_disk, or with .parquet or .arrow files")
    name: str | None = Field(None, description="in place of path: a data set of the hub, such as ylecun/mnist")
    config: str | None = Field(None, description="of the hub's data set, where it has several")
    revision: str | None = Field(None, description="of the hub's data set: a commit pins it; none: its latest")
    train: str = Field("train", description="the train split; of loose files those with this word in their path")
    test: str | None = Field(None, description="the test split; none: test, validation, valid or val, whichever is")
    validation: str | None = Field(None, description="the validation split; none: there is none")
    input: str | None = Field(None, description="column of images or numbers; none: the only column of images")
    label: str | None = Field(None, description="column of classes or values; none: the only ClassLabel, or label")
    normalize: Normalize = Field("data", description=f"images: {NORMALIZE}")

    @model_validator(mode="after")
    def _one_place(self) -> Params:
        if (self.path is None) == (self.name is None):
            raise ValueError("give one of path (local) and name (on the hub)")
        for field in ("config", "revision"):
            if self.path is not None and getattr(self, field) is not None:
                raise ValueError(f"{field} is of a data set of the hub: remove it, or give name in place of path")
        return self


def files(params: Params) -> Mapping[str, Path]:
    """Every file of a local data set, by its path in the folder; none of the hub's. Raises DataError."""
    return {} if params.path is None else local_files(params.path)


def local_files(path: Path) -> dict[str, Path]:
    """The files of a folder without hidden ones and the library's caches, or one file. Raises DataError."""
    from sparsify_deploy.errors import DataError

    if path.is_file():
        return {path.name: path}
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder; a data set of the hub is data.params.name, not path")
    inside = sorted((p.relative_to(path), p) for p in path.rglob("*") if p.is_file())
    found = {
        below.as_posix(): file
        for below, file in inside
        if not any(part.startswith(".") for part in below.parts) and not file.name.startswith("cache-")
    }
    if not found:
        raise DataError(f"{path}: holds no file, expected a folder of save_to_disk, or .parquet or .arrow files")
    return found


def open(params: Params) -> DataSet:
    """Images `(N, C, H, W)` or arrays `(N, ...)`; integer labels int64 `(N,)`, float labels float32."""
    from sparsify_deploy.datasets import _huggingface

    with _huggingface.quiet() as library:
        if params.path is not None:
            return _huggingface.data_set_of(_huggingface.local(library, files(params), params), (), params)
        return _huggingface.data_set_of(*_huggingface.from_hub(library, params), params)
