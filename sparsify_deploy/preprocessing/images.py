"""Decodes and resizes one image; the only module that knows Pillow."""

from __future__ import annotations

import io
import os
import re
import struct
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Literal

import numpy as np

from sparsify_deploy.errors import DataError, MissingExtra

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image


FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""What is decoded. Pillow knows more, PostScript among them, which it hands to another program to execute."""

MOST_PIXELS = 1 << 26
"""Of an image, 8192 x 8192: a small file may claim any size, and 4 bytes a pixel and as many again are needed."""

_LARGE = 1 << 22
_one_at_a_time = Lock()
"""Held while an image of more than `_LARGE` pixels is decoded, or every thread might hold one of `MOST_PIXELS`."""


@dataclass(frozen=True)
class Decoder:
    """Encoded bytes to pixels of `mode`, "RGB" or "L", resized to `size` x `size` pixels unless that is None.

    `fit` "stretch" ignores the aspect ratio; "crop" scales the shorter side to `size` / 0.875 and takes the middle, as
    ImageNet classifiers are commonly evaluated.
    """

    mode: str
    size: int | None
    fit: Literal["stretch", "crop"] = "stretch"

    def __call__(self, content: bytes, where: str) -> NDArray[np.uint8]:
        """One image, `(C, H, W)`. Raises DataError, which `where` begins."""
        from PIL import Image

        unreadable = (OSError, ValueError, SyntaxError, TypeError, IndexError, KeyError, EOFError, struct.error)
        bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning, OverflowError, AttributeError)
        try:
            with Image.open(io.BytesIO(content), formats=_formats()) as file:
                if (size := file.width * file.height) > MOST_PIXELS:
                    raise ValueError(f"{file.width} x {file.height} pixels, more than {MOST_PIXELS:,}: resize it first")
                with _one_at_a_time if size > _LARGE else nullcontext():
                    pixels = np.asarray(self._fitted(_eight_bit(file).convert(self.mode)))
        except (*unreadable, *bombs) as exc:
            raise DataError(f"{where}: the image cannot be decoded ({short(exc)})") from exc
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def _fitted(self, image: Image) -> Image:
        from PIL.Image import Resampling

        if self.size is None:
            return image
        if self.fit == "stretch":
            same = image.size == (self.size, self.size)
            return image if same else image.resize((self.size, self.size), Resampling.BILINEAR)
        width, height = image.size
        scale = round(self.size / 0.875) / min(width, height)
        if scale * max(width, height) > MOST_PIXELS // self.size:  # a line of one pixel becomes a very long one
            raise ValueError(f"{width} x {height} pixels cannot be cropped to a square")
        resized = image.resize((round(width * scale), round(height * scale)), Resampling.BILINEAR)
        left, top = (resized.width - self.size) // 2, (resized.height - self.size) // 2
        return resized.crop((left, top, left + self.size, top + self.size))


def _eight_bit(image: Image) -> Image:
    """Grey of 16 bits in 8, the nearest; `convert` would cut it off at 255. ValueError for pixels without a range."""
    from PIL import Image as images

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.int64)
        return images.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "32-bit integer" if image.mode == "I" else "floating-point"
        raise ValueError(f"{kind} pixels have no known range: save it with 8 or 16 bits")
    return image


@cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    from PIL import Image

    Image.init()
    # Pillow's own limit only warns, with two lines of its source, and lies above `MOST_PIXELS`.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    return tuple(name for name in FORMATS if name in Image.OPEN)


def check_pillow(purpose: str, extra: str = "train") -> None:
    """Raises MissingExtra, which names `extra`, where Pillow is not installed."""
    try:
        import PIL  # noqa: F401
    except ImportError as exc:
        raise MissingExtra("Pillow", extra, purpose) from exc


def short(exc: Exception) -> str:
    """An exception on one line."""
    text = re.sub(r" ?<_io\.BytesIO object at \w+>", "", f"{type(exc).__name__}: {exc}")
    return " ".join(text.split())[:160]


def threads() -> int:
    """How many images are decoded at a time."""
    return max(1, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))
