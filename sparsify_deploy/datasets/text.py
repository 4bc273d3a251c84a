"""Texts with labels in Parquet, CSV or JSON Lines files, made into token numbers by a tokenizer's folder.

The network takes input_ids and attention_mask (and token_type_ids), int64 `(B, L)`; L is `max_length`, or the longest
text of each batch. Each text is tokenised once. Labels are whole numbers, names (numbered in their order), or floats.
The class names of Hugging Face's metadata are used where a Parquet file has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator, model_validator

from sparsify_deploy.datasets._params import WithSplits
from sparsify_deploy.params import Fraction, InputPath

if TYPE_CHECKING:
    from sparsify_deploy.types import DataSet

VERSION = 1
RUNS_USER_CODE = False
SUFFIXES = (".parquet", ".csv", ".jsonl")


class Params(WithSplits):
    """The files, their columns, and the tokenizer."""

    path: InputPath = Field(description="a folder of .parquet, .csv or .jsonl files, or one such file")
    tokenizer: InputPath = Field(
        description="the folder with tokenizer.json, as transformers' save_pretrained writes it"
    )
    train: str = Field("train*", description="a folder: files of the train split, a shell pattern in it")
    test: str = Field("test*", description="files of the test split; one file as path has none")
    validation: str | None = Field(None, description="files of the validation split; none: there is none")
    text: str = Field("text", description="column of texts")
    text_pair: str | None = Field(None, description="column of second texts, for pairs")
    label: str = Field("label", description="column of classes, as numbers or names, or of float values")
    max_length: int = Field(128, ge=1, description="tokens that are kept of a text, special ones included")
    pad: Literal["longest", "max_length"] = Field(
        "longest", description="longest: to the longest text of each batch, so lengths differ; or always to max_length"
    )
    token_type_ids: bool = Field(False, description="a third input, which tells the texts of a pair apart")
    unreadable: Literal["raise", "skip"] = Field("raise", description="what to do with a row without text or label")
    max_unreadable: Fraction = Field(0.01, description="skip: the largest share of a split that may be left out")

    @field_validator("train", "test", "validation")
    @classmethod
    def _inside(cls, value: str | None) -> str | None:
        if value is not None and (not value or Path(value).is_absolute() or ".." in Path(value).parts):
            raise ValueError("expected a shell pattern inside the folder, such as train-*.parquet")
        return value

    @model_validator(mode="after")
    def _columns(self) -> Params:
        if len({self.text, self.text_pair, self.label}) < 3:
            raise ValueError("text, text_pair and label are three different columns")
        return self


def files(params: Params) -> Mapping[str, Path]:
    """Every file of the data and of the tokenizer. Raises DataError where one is missing or in two splits."""
    from sparsify_deploy.preprocessing import tokenizer_files

    found = {f"tokenizer/{name}": path for name, path in tokenizer_files.files(params.tokenizer).items()}
    for split, paths in split_files(params).items():
        found.update({f"{split}/{_inside(path, params.path)}": path for path in paths})
    return found


def split_files(params: Params) -> dict[str, list[Path]]:
    """The files of each split there is, in the order of their names; one file is the train split. Raises DataError."""
    from sparsify_deploy.errors import DataError

    if params.path.is_file():
        if params.path.suffix not in SUFFIXES:
            raise DataError(f"{params.path}: is no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file")
        return {"train": [params.path]}
    if not params.path.is_dir():
        raise DataError(f"{params.path}: no such file or folder")
    found: dict[str, list[Path]] = {}
    for split in ("train", "test", "validation"):
        pattern = getattr(params, split)
        some = params.path.glob(pattern) if pattern is not None else ()
        matches = sorted(p for p in some if p.is_file() and p.suffix in SUFFIXES)
        if matches:
            found[split] = matches
        elif pattern is not None and not (split == "test" and params.test_fraction):
            advice = ", or set data.params.test_fraction, such as 0.2" if split == "test" else ""
            kinds = ", ".join(SUFFIXES)
            raise DataError(
                f"{params.path}: no file ({kinds}) matches {split} pattern {pattern!r}: set data.params.{split}{advice}"
            )
    every = [path for paths in found.values() for path in paths]
    if twice := {path for path in every if every.count(path) > 1}:
        raise DataError(f"{min(twice)}: is in two splits; tests on training data are worthless, narrow the patterns")
    return found


def open(params: Params) -> DataSet:
    """Token numbers int64 `(B, L)`; classes int64 `(N,)`, or float32 values `(N,)`."""
    from sparsify_deploy.datasets._text import text_data

    return text_data(split_files(params), params)


def _inside(path: Path, folder: Path) -> str:
    return path.name if path == folder else path.relative_to(folder).as_posix()
