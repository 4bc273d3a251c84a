"""Small reference networks: LeNet-300-100, LeNet-5 and the CIFAR ResNets.

LeNet: LeCun et al. 1998; the variants are those of the pruning literature (Han et al. 2015, arXiv 1506.02626).
ResNet: He et al. 2015, arXiv 1512.03385, section 4.2, with 6n+2 layers in three stages of `width`, 2 `width` and
4 `width` channels. Its shortcut is option B (1x1 convolution and BatchNorm) wherever the shape changes, because
option A's strided slice and zero padding can be neither traced nor quantised well: ResNet-20 at width 16 has 272,474
parameters, against 269,722 with option A.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from sparsify_deploy.params import Params as Base

if TYPE_CHECKING:
    from torch import nn

VERSION = 1
RUNS_USER_CODE = False

_BLOCKS = {"resnet8": 1, "resnet20": 3, "resnet32": 5, "resnet56": 9}
_SMALLEST_IMAGE = {"lenet-300-100": 1, "lenet-5": 16}  # 16: two 5x5 convolutions and two poolings leave 1x1


class Params(Base):
    """Which network, and its sizes; what is left out is as published."""

    name: Literal["lenet-300-100", "lenet-5", "resnet8", "resnet20", "resnet32", "resnet56"] = Field(
        description="the network"
    )
    width: int | None = Field(None, ge=1, le=1024, description="ResNets: channels of the first stage; none: 16")
    in_channels: int | None = Field(None, ge=1, le=4096, description="none: 1 for LeNets, 3 for ResNets")
    image_size: int | None = Field(None, ge=1, le=4096, description="LeNets: height and width, pixels; none: 28")
    classes: int = Field(10, ge=1, le=1_000_000, description="number of outputs")

    @model_validator(mode="after")
    def _fits(self) -> Params:
        if self.name in _BLOCKS and self.image_size is not None:
            raise ValueError(f"image_size has no effect on {self.name}, which takes any size: remove it")
        if self.name not in _BLOCKS and self.width is not None:
            raise ValueError(f"width has no effect on {self.name}: remove it, or choose a ResNet")
        smallest = _SMALLEST_IMAGE.get(self.name, 1)
        if self.image_size is not None and self.image_size < smallest:
            raise ValueError(f"image_size is {self.image_size}, {self.name} needs {smallest} or more")
        return self


def files(params: Params) -> Mapping[str, Path]:
    """No file: the network follows from `params` and the random state."""
    return {}


def build(params: Params) -> nn.Module:
    """A fresh network for inputs `(B, in_channels, H, W)`, giving logits `(B, classes)`; torch's global RNG decides."""
    from sparsify_deploy.models._lenet import LeNet5, LeNet300100
    from sparsify_deploy.models._resnet import ResNet

    if params.name in _BLOCKS:
        return ResNet(
            blocks=_BLOCKS[params.name],
            width=params.width or 16,
            in_channels=params.in_channels or 3,
            classes=params.classes,
        )
    lenet = LeNet300100 if params.name == "lenet-300-100" else LeNet5
    return lenet(in_channels=params.in_channels or 1, image_size=params.image_size or 28, classes=params.classes)
