"""Networks of torchvision, by name.

https://docs.pytorch.org/vision/stable/models.html. With `pretrained` its default weights are downloaded, or taken
from torch's cache; without a network give a file as `model.checkpoint`. The version of torchvision is not part of a
run's fingerprint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from sparsify_deploy.params import Params as Base

if TYPE_CHECKING:
    from torch import nn

VERSION = 2
RUNS_USER_CODE = False

_IMAGENET = 1000


class Params(Base):
    """What torchvision.models.get_model takes."""

    name: str = Field(min_length=1, description="such as resnet50 or mobilenet_v2")
    classes: int = Field(_IMAGENET, ge=1, le=1_000_000, description="number of outputs")
    pretrained: bool = Field(False, description="download its default weights, which have 1000 classes")
    arguments: dict[str, str | int | float | bool | None] = Field({}, description="further arguments of the network")

    @model_validator(mode="after")
    def _classes_of_weights(self) -> Params:
        if self.pretrained and self.classes != _IMAGENET:
            raise ValueError(
                f"the pretrained weights have {_IMAGENET} classes: leave classes out, or use source "
                "timm, which makes a new classifier"
            )
        return self


def files(params: Params) -> Mapping[str, Path]:
    """No file: what is downloaded is known by the network's name."""
    return {}


def build(params: Params) -> nn.Module:
    """A classifier for `(B, 3, H, W)`; torch's global RNG decides what is not pretrained.

    Raises ModelError for a name or argument that torchvision does not know, EnvironmentProblem where torchvision does
    not load or the weights cannot be downloaded.
    """
    from sparsify_deploy.errors import ModelError
    from sparsify_deploy.models._zoo import imported, near, offline

    models = imported("torchvision").models
    if params.name not in (known := models.list_models()):
        raise ModelError(f"model.params.name: torchvision has no network {params.name!r}{near(params.name, known)}")
    given = {**params.arguments, "num_classes": params.classes}
    try:
        model: nn.Module = models.get_model(params.name, weights="DEFAULT" if params.pretrained else None, **given)
    except (TypeError, ValueError, RuntimeError) as error:
        text = " ".join(str(error).split())[:300]
        raise ModelError(f"model.params: torchvision cannot make {params.name}: {text}") from error
    except OSError as error:  # urllib's errors are of this class
        raise offline(error, f"torchvision {params.name}") from error
    return model
