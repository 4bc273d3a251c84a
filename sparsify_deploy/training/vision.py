"""torchvision's random changes and mixes of training images; the only module of the training that imports it.

torchvision draws from torch's global generator, so each call runs under a fork of it that is seeded from ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsify_deploy.errors import DataError, EnvironmentProblem, MissingExtra
from sparsify_deploy.preprocessing.spec import ArraySpec, ImageSpec
from sparsify_deploy.training.image_settings import PIXELS
from sparsify_deploy.types import SOFT_TARGET

if TYPE_CHECKING:
    from sparsify_deploy.training.image_settings import Augment
    from sparsify_deploy.types import DataSet

IMAGES = "input"
"""The field whose images are changed."""

TARGET = "target"


@dataclass(frozen=True)
class Pixels:
    """How images of bytes became the numbers of a split: `(x - shift) / divisor`, each `(1 or C, 1, 1)`."""

    shift: Tensor
    divisor: Tensor

    @classmethod
    def of(cls, data: DataSet) -> Pixels | None:
        """What `data` says of its images; None where they were no bytes, or it does not tell."""
        spec = getattr(data, "preprocessing", None)
        if isinstance(spec, ImageSpec) and spec.input == IMAGES:
            return cls(*(torch.tensor(part).reshape(-1, 1, 1) for part in (spec.shift, spec.divisor)))
        if isinstance(spec, ArraySpec):
            for part in spec.inputs:
                if part.name == IMAGES and part.dtype == "uint8":
                    affine = (part.shift or (0.0,), part.divisor or (1.0,))
                    return cls(*(torch.tensor(numbers).reshape(-1, 1, 1) for numbers in affine))
        return None

    def bytes_of(self, images: Tensor) -> Tensor:
        """The bytes that `images` `(..., C, H, W)` were, rounded; exactly those they were made from."""
        return (images * self.divisor + self.shift).round_().clamp_(0, 255).to(torch.uint8)

    def numbers_of(self, pixels: Tensor) -> Tensor:
        """Bytes as the numbers a network takes."""
        return pixels.to(torch.float32).sub(self.shift).div_(self.divisor)


def changed(images: Tensor, change: Augment, generator: torch.Generator, pixels: Pixels | None) -> Tensor:
    """`images` `(N, C, H, W)`, each changed by draws of its own.

    Changes that are defined on bytes see the bytes the images were. `DataError` where those are not known, or where
    an image has neither one channel nor three.
    """
    on_bytes = change.name in PIXELS
    if on_bytes and pixels is None:
        raise DataError(
            f"data.augment {change.name} works on bytes, and this data set hands out numbers of another range: leave "
            "it out, or read the images with a source that decodes them, such as folder"
        )
    if on_bytes and images.shape[1] not in (1, 3):
        raise DataError(f"data.augment {change.name} works on 1 or 3 channels, these images have {images.shape[1]}")
    apply = _transform(change, images.shape[2], images.shape[3])
    taken = pixels.bytes_of(images) if on_bytes and pixels is not None else images
    with _drawing_from(generator):
        made = torch.stack([apply(image) for image in taken])
    return pixels.numbers_of(made) if on_bytes and pixels is not None else made


@dataclass(frozen=True)
class Mixing:
    """Whole batches mixed with themselves, rolled by one: MixUp, CutMix, or for each batch one of both.

    `classes` are the logits a soft label has one share for.
    """

    mixup: float | None
    cutmix: float | None
    classes: int

    def __call__(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """`batch` with mixed images in the field `input`, and their labels `(N, classes)` in `soft_target`.

        `DataError` where it has no images, or no integer label each below `classes`.
        """
        images, labels = batch.get(IMAGES), batch.get(TARGET)
        if images is None or images.ndim != 4:
            found = f"has shape {tuple(images.shape)}" if images is not None else f"is missing ({', '.join(batch)})"
            raise DataError(f"training.mixup and cutmix need a field {IMAGES!r} of shape (N, C, H, W), which {found}")
        if labels is None or labels.ndim != 1 or labels.dtype != torch.int64:
            raise DataError(f"training.mixup and cutmix need one integer label an example in the field {TARGET!r}")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            raise DataError(f"label {int(labels.max())} is not one of the model's {self.classes} classes")
        with _drawing_from(generator):
            mixed, soft = _mix(self)(images, labels)
        return {**batch, IMAGES: mixed, SOFT_TARGET: soft}


@contextmanager
def _drawing_from(generator: torch.Generator) -> Iterator[None]:
    seed = int(torch.randint(2**62, (1,), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@cache
def _transform(change: Augment, height: int, width: int) -> Any:
    v2 = transforms()
    settings = getattr(change, change.name)
    if change.rand_augment is not None:
        return v2.RandAugment(settings.num_ops, settings.magnitude)
    if change.random_erasing is not None:
        return v2.RandomErasing(settings.probability, settings.scale, settings.ratio)
    if change.random_resized_crop is not None:
        return v2.RandomResizedCrop((height, width), settings.scale, settings.ratio)
    if change.color_jitter is not None:
        return v2.ColorJitter(settings.brightness, settings.contrast, settings.saturation, settings.hue)
    return v2.TrivialAugmentWide()


@cache
def _mix(mixing: Mixing) -> Any:
    v2 = transforms()
    made = []
    if mixing.mixup is not None:
        made.append(v2.MixUp(alpha=mixing.mixup, num_classes=mixing.classes))
    if mixing.cutmix is not None:
        made.append(v2.CutMix(alpha=mixing.cutmix, num_classes=mixing.classes))
    return made[0] if len(made) == 1 else v2.RandomChoice(made)


def transforms() -> Any:
    """`torchvision.transforms.v2`. `MissingExtra` where it is not installed, `EnvironmentProblem` where it does not
    load beside this torch."""
    try:
        from torchvision.transforms import v2  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise MissingExtra("torchvision", "vision", "data.augment, training.mixup and cutmix") from error
    except (ImportError, RuntimeError, OSError) as error:
        text = " ".join(str(error).split())[:200]
        raise EnvironmentProblem(
            f"torchvision is installed and does not load: {text}; install torch and torchvision from one index, so "
            "that they are built for each other"
        ) from error
    return v2
