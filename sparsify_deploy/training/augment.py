"""Random changes to training images `(N, C, H, W)`, as pure functions of the images and a generator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsify_deploy.errors import DataError
from sparsify_deploy.training.image_settings import Augment, name_of
from sparsify_deploy.training.vision import IMAGES, Pixels, changed


def crop(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pad height and width by an eighth (at least one pixel) of zeros on each side, then crop each image at random."""
    count, _, height, width = images.shape
    pad_y, pad_x = max(1, height // 8), max(1, width // 8)
    padded = F.pad(images, (pad_x, pad_x, pad_y, pad_y))
    rows = torch.randint(2 * pad_y + 1, (count, 1), generator=generator) + torch.arange(height)
    columns = torch.randint(2 * pad_x + 1, (count, 1), generator=generator) + torch.arange(width)
    picked = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability one half."""
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


AUGMENTATIONS: Mapping[str, Callable[[Tensor, torch.Generator], Tensor]] = {"crop": crop, "flip": flip}


def augmented(
    batch: Mapping[str, Tensor],
    changes: Sequence[Augment | str],
    generator: torch.Generator,
    pixels: Pixels | None = None,
) -> dict[str, Tensor]:
    """`batch` with its field `input` changed by each of `changes` in turn; `DataError` where that holds no images.

    `pixels` tells what bytes the images were, which some changes need.
    """
    result = dict(batch)
    for change in changes:
        images = result.get(IMAGES)
        if images is None or images.ndim != 4:
            found = f"has shape {tuple(images.shape)}" if images is not None else f"is missing ({', '.join(batch)})"
            raise DataError(
                f"data.augment {name_of(change)} needs a field {IMAGES!r} of shape (N, C, H, W), which {found}"
            )
        if isinstance(change, Augment):
            result[IMAGES] = changed(images, change, generator, pixels)
        else:
            result[IMAGES] = AUGMENTATIONS[change](images, generator)
    return result
