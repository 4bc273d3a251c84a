"""A network of your own: a function, class or module instance in a Python file.

The file is executed each time the network is built, with its folder importable, so `from layers import Block` beside
it works. Only the file itself enters the fingerprint of a run: after changing a file it imports, change this one
too, or start a new run. A module instance made at the top of the file is as good as a function.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from sparsify_deploy.params import InputPath
from sparsify_deploy.params import Params as Base

if TYPE_CHECKING:
    from torch import nn

VERSION = 2
RUNS_USER_CODE = True


class Params(Base):
    """The file, what to take from it, and what to call it with."""

    path: InputPath = Field(description="a .py file, which is executed")
    object: str = Field("model", description="a function or class that gives a torch.nn.Module, or such a module")
    arguments: dict[str, str | int | float | bool | None] = Field({}, description="keyword arguments of the call")


def files(params: Params) -> Mapping[str, Path]:
    """The Python file; files that it imports are not listed."""
    return {"path": params.path}


def build(params: Params) -> nn.Module:
    """Execute the file and make the network; torch's global RNG decides its weights.

    Raises `ModelError` with the file and line where the user's code failed, or with what it gave instead of a module.
    """
    from torch import nn

    from sparsify_deploy.errors import ModelError
    from sparsify_deploy.safety import usercode

    made = usercode.make(params.path, params.object, params.arguments, ready=nn.Module, error=ModelError)
    if not isinstance(made, nn.Module):
        kind = type(made).__name__
        raise ModelError(f"{params.path}: {params.object} gives {kind}, expected a torch.nn.Module")
    return made
