"""Grey pictures of 16 bits are the picture of 8 bits, and pixels without a known range are refused."""

from __future__ import annotations

import io

import numpy as np
import pytest

pytest.importorskip("PIL")

from PIL import Image

from sparsify_deploy.errors import DataError
from sparsify_deploy.preprocessing.images import Decoder

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def encoded(values: np.ndarray, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", [None, 8])
def test_sixteen_bits_are_the_same_picture_as_eight(kind: str, mode: str, size: int | None) -> None:
    decode = Decoder(mode, size)
    eight = decode(encoded(GREY, kind), "8")
    sixteen = decode(encoded(GREY.astype(np.uint16) * 257, kind), "16")
    np.testing.assert_array_equal(sixteen, eight)
    if size is None:
        np.testing.assert_array_equal(eight[0], GREY)


def test_what_lies_between_two_steps_goes_to_the_nearer_one() -> None:
    values = np.array([[0, 128, 129, 257, 65535 - 129, 65535 - 128, 65535]], np.uint16)
    np.testing.assert_array_equal(Decoder("L", None)(encoded(values, "PNG"), "x")[0], [[0, 0, 1, 1, 254, 255, 255]])


@pytest.mark.parametrize(
    ("values", "words"),
    [(GREY.astype(np.int32), "32-bit integer pixels"), (GREY.astype(np.float32) / 255, "floating-point pixels")],
)
def test_pixels_without_a_range_are_refused(values: np.ndarray, words: str) -> None:
    with pytest.raises(DataError, match=f"a.tif: the image cannot be decoded .*{words} have no known range: save it"):
        Decoder("L", None)(encoded(values, "TIFF"), "a.tif")
