"""Data of your own: a function, class or object in a Python file.

It gives a `sparsify_deploy.types.DataSet`, or simply arrays or tensors in a dict:

    {"train": {"input": x, "target": y}, "test": {"input": ..., "target": ...}, "classes": ["cat", "dog"]}

with examples along axis 0, and "validation" as "test" where there is such a split. Every field but `target` is an
input of the model, in the order given. Floats become float32, integers int64, and nothing is scaled. The file is
executed with its folder importable; only the file itself enters the fingerprint of a run, neither what it imports nor
the data it reads: change it when those change.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from sparsify_deploy.params import InputPath
from sparsify_deploy.params import Params as Base

if TYPE_CHECKING:
    from sparsify_deploy.types import DataSet

VERSION = 1
RUNS_USER_CODE = True


class Params(Base):
    """The file, what to take from it, and what to call it with."""

    path: InputPath = Field(description="a .py file, which is executed")
    object: str = Field("data", description="a function or class that gives the data set, or the data set itself")
    arguments: dict[str, str | int | float | bool | None] = Field({}, description="keyword arguments of the call")


def files(params: Params) -> Mapping[str, Path]:
    """The Python file; files that it imports or reads are not listed."""
    return {"path": params.path}


def open(params: Params) -> DataSet:
    """Execute the file and wrap or check what it gives; one example of each split is taken as a trial.

    Raises `DataError` with the file and line where the user's code failed, or with what is wrong with the data.
    """
    from sparsify_deploy.datasets._wrap import checked, wrapped
    from sparsify_deploy.errors import DataError
    from sparsify_deploy.safety import usercode

    made = usercode.make(params.path, params.object, params.arguments, ready=Mapping, error=DataError)
    where = f"{params.path}: {params.object}"
    if isinstance(made, Mapping):
        return wrapped(made, where)
    with usercode.running(params.path, DataError):
        return checked(made, where)
