"""Random changes to training images, as a recipe asks for them: names, or a name with parameters. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from sparsify_deploy.menu import did_you_mean
from sparsify_deploy.params import NonNegative, Positive
from sparsify_deploy.params import Params as Section

Range: TypeAlias = tuple[Positive, Positive]


class RandAugment(Section):
    """torchvision's RandAugment (Cubuk 2020, arXiv 1909.13719)."""

    num_ops: int = Field(2, ge=1, description="changes made to each image, one after the other")
    magnitude: int = Field(9, ge=0, le=30, description="strength of each, 0 to 30")


class TrivialAugmentWide(Section):
    """torchvision's TrivialAugmentWide: one change of random strength (Müller & Hutter 2021, arXiv 2103.10158)."""


class RandomErasing(Section):
    """torchvision's RandomErasing: a rectangle becomes 0 (Zhong 2020, arXiv 1708.04896)."""

    probability: float = Field(0.5, gt=0.0, le=1.0, description="share of the images changed")
    scale: Range = Field((0.02, 0.33), strict=False, description="least and largest part of the area")
    ratio: Range = Field((0.3, 3.3), strict=False, description="least and largest height over width")


class RandomResizedCrop(Section):
    """torchvision's RandomResizedCrop: a random part, resized to the whole (Szegedy 2015, arXiv 1409.4842)."""

    scale: Range = Field((0.08, 1.0), strict=False, description="least and largest part of the area")
    ratio: Range = Field((0.75, 4 / 3), strict=False, description="least and largest width over height")


class ColorJitter(Section):
    """torchvision's ColorJitter; each number is the largest relative change, `hue` a part of the circle."""

    brightness: NonNegative = Field(0.4, description="largest relative change")
    contrast: NonNegative = Field(0.4, description="largest relative change")
    saturation: NonNegative = Field(0.4, description="largest relative change")
    hue: float = Field(0.0, ge=0.0, le=0.5, description="largest turn, as a part of the circle")


class Augment(Section):
    """One of torchvision's changes, with its parameters."""

    rand_augment: RandAugment | None = None
    trivial_augment_wide: TrivialAugmentWide | None = None
    random_erasing: RandomErasing | None = None
    random_resized_crop: RandomResizedCrop | None = None
    color_jitter: ColorJitter | None = None

    @model_validator(mode="after")
    def _one(self) -> Augment:
        if len(self.model_fields_set) != 1 or None in (getattr(self, name) for name in self.model_fields_set):
            raise ValueError("name one change a list item, such as rand_augment: {magnitude: 7}")
        for part in (self.random_erasing, self.random_resized_crop):
            for bounds in (part.scale, part.ratio) if part is not None else ():
                if bounds[0] > bounds[1]:
                    raise ValueError(f"a range goes from least to largest, not from {bounds[0]:g} to {bounds[1]:g}")
        for part in (self.random_erasing, self.random_resized_crop):
            if part is not None and part.scale[1] > 1.0:
                raise ValueError(f"scale is a part of the area, at most 1, not {part.scale[1]:g}")
        return self

    @property
    def name(self) -> str:
        """The change it asks for."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)


OWN = ("crop", "flip")
"""Changes that need no torchvision and have no parameters."""

PIXELS = ("rand_augment", "trivial_augment_wide", "color_jitter")
"""Changes defined on images of bytes; the others work on numbers of any range."""


def _named(value: object, info: ValidationInfo) -> object:
    known = (*OWN, *Augment.model_fields)
    if isinstance(value, str):
        if value in OWN:
            return str(value)
        if value not in known:
            raise ValueError(f"unknown name {value!r}{did_you_mean(value, known)}")
        value = {str(value): {}}
    return Augment.model_validate(value, context=info.context) if isinstance(value, Mapping) else value


_Name: TypeAlias = Literal[
    "crop", "flip", "rand_augment", "trivial_augment_wide", "random_erasing", "random_resized_crop", "color_jitter"
]
Augmentation: TypeAlias = Annotated[Augment | _Name, BeforeValidator(_named)]
"""`crop`, `flip`, or an `Augment`; one of its names alone stands for that with its defaults."""


def name_of(change: Augment | str) -> str:
    """The name a recipe gives a change."""
    return change if isinstance(change, str) else change.name


def from_torchvision(changes: tuple[Any, ...]) -> tuple[str, ...]:
    """The names of those that need torchvision."""
    return tuple(change.name for change in changes if isinstance(change, Augment))
