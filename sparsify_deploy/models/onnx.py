"""An ONNX file, quantised or not, for the deploy half alone: built, raced and judged as it is, not trained.

Data that the file keeps in other files of its folder enter the fingerprint of a run with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, NoReturn

from pydantic import Field

from sparsify_deploy.params import InputPath
from sparsify_deploy.params import Params as Base

VERSION = 1
RUNS_USER_CODE = False

Shape = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False)]


class Params(Base):
    """The file, and sizes for free axes where there are no data to give them."""

    path: InputPath = Field(description="a .onnx file")
    shapes: dict[str, Shape] = Field(
        {}, description="without data: the shape of one example of an input with free axes, as in {tokens: [128]}"
    )


def files(params: Params) -> Mapping[str, Path]:
    """The file, and those beside it that hold its weights."""
    from sparsify_deploy.models._external_data import locations

    beside = locations(params.path)
    return {"path": params.path, **{f"path[{name}]": params.path.parent / name for name in beside}}


def build(params: Params) -> NoReturn:
    """`ModelError`: a file is taken as it is."""
    from sparsify_deploy.errors import ModelError

    raise ModelError(
        f"model.source onnx has no torch network: {params.path.name} can be built and raced, not trained, projected or "
        "quantised; name the network itself for that, such as model.source file"
    )
