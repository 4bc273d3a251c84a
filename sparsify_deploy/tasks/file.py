"""A task of your own: a function, class or object in a Python file.

It gives an object with `metrics`, a mapping of name to "higher" or "lower" of which gates take the first; with
`loss(outputs, batch)`, a scalar tensor, the mean over the examples; and with `evaluate(outputs, batch)`, every metric
of numpy arrays over all examples at once:

    class task:
        metrics = {"error": "lower"}

        def loss(self, outputs, batch):
            return (outputs["output"] - batch["target"]).abs().mean()

        def evaluate(self, outputs, batch):
            return {"error": abs(outputs["output"] - batch["target"]).mean()}

`loss` among what `evaluate` gives is the loss over all examples; left out, it is computed by `loss`. A network that
gives one tensor has the output `output`. An `example_inputs(batch)` may replace fields of the batch that a network is
traced and exported with. An `answers(outputs)` may name the outputs whose largest value, over the last axis or of maps
`(N, classes, H, W)` over the classes, INT8 files are to have in common with torch. The file is executed with its folder
importable; only the file itself enters the fingerprint of a run, not what it imports. All of it is tried on a batch of
the data before anything runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from sparsify_deploy.params import InputPath
from sparsify_deploy.params import Params as Base

if TYPE_CHECKING:
    from sparsify_deploy.types import Task

VERSION = 1
RUNS_USER_CODE = True


class Params(Base):
    """The file, what to take from it, and what to call it with."""

    path: InputPath = Field(description="a .py file, which is executed")
    object: str = Field("task", description="a function or class that gives the task, or the task itself")
    arguments: dict[str, str | int | float | bool | None] = Field({}, description="keyword arguments of the call")


def files(params: Params) -> Mapping[str, Path]:
    """The Python file; files that it imports are not listed."""
    return {"path": params.path}


def create(params: Params) -> Task:
    """Execute the file and check what it gives.

    Raises `DataError` with the file and line where the user's code failed, or with what is wrong with the task.
    """
    from sparsify_deploy.errors import DataError
    from sparsify_deploy.safety import usercode
    from sparsify_deploy.tasks._own import checked

    made = usercode.make(params.path, params.object, params.arguments, ready=(), error=DataError)
    return checked(made, params.path, params.object)
