"""Settings that several sources of examples share: splits taken from the train split, and inputs without labels."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sparsify_deploy.params import Fraction
from sparsify_deploy.params import Params as Base


class WithValidation(Base):
    """A source whose train split can give up some examples for validation."""

    validation_fraction: Fraction = Field(
        0.0, description="share of the train split held out for validation, the same of each class; 0: none"
    )
    split_seed: int = Field(0, ge=0, lt=2**31, description="which examples are held out; other splits stay as they are")


class WithSplits(WithValidation):
    """A source that may come without a test split as well."""

    test_fraction: Fraction = Field(
        0.0, description="share of the train split held out for testing, where there is no test split; 0: none"
    )


class MaybeUnlabelled(WithSplits):
    """A source that may hold inputs alone."""

    labels: bool = Field(
        True, description="false: inputs alone, in no class and one split, as quantize.calibration_data may be"
    )


class Images(MaybeUnlabelled):
    """A source of encoded images."""

    size: int | None = Field(
        None, ge=1, le=4096, description="height and width of every image, pixels; none: as stored"
    )
    fit: Literal["crop", "stretch"] = Field(
        "crop", description="crop: shorter side to size / 0.875, then the middle; stretch: to size x size as it is"
    )
    mode: Literal["RGB", "L"] = Field("RGB", description="three channels, or one of grey")
    unreadable: Literal["raise", "skip"] = Field("raise", description="what to do with an image that cannot be read")
    max_unreadable: Fraction = Field(0.01, description="skip: the largest share of a split that may be left out")


NORMALIZE = (
    "by ImageNet's mean and deviation, as most pretrained networks expect; half: to -1..1, as others do (timm's tf_ "
    "networks, many vision transformers); by this train split's; or to 0..1"
)
Normalize = Literal["imagenet", "half", "data", "none"]
