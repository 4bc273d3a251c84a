"""Networks of timm (PyTorch Image Models), by name.

https://github.com/huggingface/pytorch-image-models. With `pretrained` its weights come from the Hugging Face hub, or
from that hub's cache; without a network give a file as `model.checkpoint`. The version of timm is not part of a run's
fingerprint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from sparsify_deploy.params import Params as Base

if TYPE_CHECKING:
    from torch import nn

VERSION = 2
RUNS_USER_CODE = False


class Params(Base):
    """What timm.create_model takes."""

    name: str = Field(min_length=1, description="such as resnet50 or tf_efficientnet_lite0.in1k")
    classes: int | None = Field(None, ge=1, le=1_000_000, description="none: the network's own, 1000 for most")
    in_channels: int = Field(3, ge=1, le=4096, description="pretrained weights of the first layer are summed to fit")
    pretrained: bool = Field(False, description="download its weights; a new classifier where classes differ")
    arguments: dict[str, str | int | float | bool | None] = Field({}, description="further arguments of the network")


def files(params: Params) -> Mapping[str, Path]:
    """No file: what is downloaded is known by the network's name."""
    return {}


def build(params: Params) -> nn.Module:
    """A network for `(B, in_channels, H, W)`; torch's global RNG decides what is not pretrained.

    Raises ModelError for a name or argument that timm does not know, EnvironmentProblem where timm or the hub fails.
    """
    from sparsify_deploy.errors import ModelError
    from sparsify_deploy.models._zoo import imported, near, offline

    timm = imported("timm")
    if params.name.partition(".")[0] not in (known := timm.list_models()):
        hint = near(params.name, known)
        raise ModelError(f"model.params.name: timm {timm.__version__} has no network {params.name!r}{hint}")
    given = {**params.arguments, "in_chans": params.in_channels}
    if params.classes is not None:
        given["num_classes"] = params.classes
    try:
        model: nn.Module = timm.create_model(params.name, pretrained=params.pretrained, **given)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        text = " ".join(str(error).split())[:300]
        raise ModelError(f"model.params: timm cannot make {params.name}: {text}") from error
    except OSError as error:  # what the hub raises where it cannot be reached
        raise offline(error, f"timm {params.name}") from error
    return model
