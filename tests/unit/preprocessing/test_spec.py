"""How raw examples become inputs: written and read back as data, strictly, and carried out float for float."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sparsify_deploy.datasets._memory import UNIT, Affine, imagenet, numbers, standardising
from sparsify_deploy.errors import DataError
from sparsify_deploy.preprocessing.images import Decoder
from sparsify_deploy.preprocessing.prepare import prepare
from sparsify_deploy.preprocessing.spec import ArrayInput, ArraySpec, ImageSpec, TextSpec, from_json, read, samples

IMAGE = ImageSpec("RGB", 8, "crop", (1.5,), (255.0,), classes=("cat", "dög"))
TEXT = TextSpec(16, pad="max_length", pair=True, classes=("no", "yes"))
ARRAYS = ArraySpec(
    (
        ArrayInput("a", "uint8", (4, 5, 3), "HWC", (1.0, 2.0, 3.0), (4.0,)),
        ArrayInput("b", "int64", (None,)),
    ),
    example="pixels and tokens",
)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("spec", [IMAGE, TEXT, ARRAYS], ids=lambda spec: spec.kind)
def test_a_spec_comes_back_from_its_text(spec: Any, tmp_path: Path) -> None:
    path = tmp_path / "preprocessing.json"
    path.write_text(spec.to_text(), encoding="utf-8")
    assert read(path) == spec
    assert from_json(spec.to_json()) == spec
    assert read(path).to_text() == spec.to_text()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": 2}, "format 2, this program reads 1: use the version that wrote it"),
        ({"kind": "audio"}, "kind 'audio', expected one of image, text, array"),
        ({"kind": ["image"]}, "kind ['image']"),
        ({"mean": [0.0]}, "mean: Unexpected keyword argument"),
        ({"size": "8"}, "size: Input should be a valid integer"),
        ({"size": 0}, "size is 0, at least 1 pixel"),
        ({"fit": "pad"}, "fit: Input should be 'stretch' or 'crop'"),
        ({"shift": [1.0, 2.0]}, "shift and divisor have one number or 3"),
        ({"shift": []}, "one number a channel, or one for all"),
        ({"divisor": [0.0]}, "a divisor is 0"),
        ({"divisor": [1e-60]}, "a divisor is 0"),
        ({"shift": [float("nan")]}, "finite number"),
        ({"classes": "ab"}, "classes: "),
        ({"dtype": "float16"}, "dtype: Input should be 'float32'"),
    ],
)
def test_a_file_that_is_not_quite_a_spec_is_refused_in_one_line(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError) as caught:
        from_json(json.dumps(IMAGE.to_json() | changes).encode(), "here.json")
    (line,) = caught.value.lines
    assert line.startswith("here.json: ")
    assert says in line


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"{}", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_spec_at_all_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "preprocessing.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"preprocessing\.json: does not say how raw examples become inputs"):
        read(path)
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["../tokenizer.json", "/etc/passwd", "", ".."])
def test_a_tokenizer_lies_beside_its_spec(name: str) -> None:
    with pytest.raises(DataError, match="expected the name of a file beside this one"):
        from_json(TEXT.to_json() | {"tokenizer": name})


def test_a_missing_field_is_named() -> None:
    values = IMAGE.to_json()
    del values["mode"]
    with pytest.raises(DataError, match="mode: Field required"):
        from_json(values)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("fit", ["crop", "stretch"])
def test_images_become_bit_for_bit_what_the_data_sets_give(mode: Any, fit: Any) -> None:
    random = np.random.default_rng(0)
    files = [png(random.integers(0, 256, (20 + i, 31, 3), dtype=np.uint8)) for i in range(4)]
    pixels = np.stack([Decoder(mode, 12, fit)(file, "x") for file in files])
    for affine in (UNIT, imagenet(grey=mode == "L"), standardising(pixels)):
        spec = from_json(ImageSpec(mode, 12, fit, *numbers(affine)).to_json())
        made = prepare(spec, files)["input"]
        wanted = affine(torch.from_numpy(pixels)).numpy()
        assert made.dtype == wanted.dtype
        assert made.tobytes() == wanted.tobytes()


def test_every_byte_and_many_scales_give_the_floats_of_torch() -> None:
    """Subtract, then divide, each in float32: any other order or a reciprocal differs in some last bit."""
    random = np.random.default_rng(1)
    every = np.arange(256, dtype=np.uint8)
    for _ in range(50):
        shift, divisor = random.uniform(0, 255, 1).astype(np.float32), random.uniform(0.1, 99, 1).astype(np.float32)
        spec = ArraySpec((ArrayInput("x", "uint8", (256,), "any", *((float(v[0]),) for v in (shift, divisor))),))
        made = prepare(from_json(spec.to_json()), [every])["x"][0]
        wanted = Affine(torch.from_numpy(shift), torch.from_numpy(divisor))(torch.from_numpy(every))
        assert made.tobytes() == wanted.numpy().tobytes()


def test_axes_go_where_their_layout_says() -> None:
    a, b = np.arange(60, dtype=np.uint8).reshape(4, 5, 3), np.arange(7)
    made = prepare(ARRAYS, [{"a": a, "b": b}])
    assert made["a"].shape == (1, 3, 4, 5)
    assert made["a"][0, 2, 1, 3] == (float(a[1, 3, 2]) - 3.0) / 4.0
    assert made["b"].dtype == np.int64
    assert made["b"].tolist() == [list(range(7))]
    grey = ArraySpec((ArrayInput("x", "float32", (2, 2), "HW"),))
    assert prepare(grey, [np.eye(2)])["x"].shape == (1, 1, 2, 2)
    assert prepare(grey, [np.eye(2)])["x"].dtype == np.float32


@pytest.mark.parametrize(
    ("spec", "example", "says"),
    [
        (IMAGE, "text", "a text, but this model takes image files"),
        (IMAGE, np.zeros(3), "an array, but this model takes image files"),
        (IMAGE, b"not an image", "the image cannot be decoded"),
        (ARRAYS, b"bytes", "an image file, but this model takes arrays"),
        (ARRAYS, np.zeros(3), "holds a; this model takes a, b"),
        (ARRAYS, {"a": np.zeros((4, 5, 3)), "b": np.arange(3)}, r"a holds float64, this model takes bytes \(uint8"),
        (
            ARRAYS,
            {"a": np.zeros((4, 5), np.uint8), "b": np.arange(3)},
            r"a has shape \(4, 5\), this model takes",
        ),
        (ARRAYS, {"a": np.zeros((4, 5, 3), np.uint8), "b": np.zeros(3)}, "b holds float64, this model takes whole"),
        (ArraySpec((ArrayInput("x", "float32", (2,)),)), np.array([1.0, np.nan]), "not finite"),
        (ArraySpec((ArrayInput("x", "float32", (2,)),)), np.array(["a", "b"]), "holds <U1, this model takes numbers"),
    ],
)
def test_an_example_of_another_kind_is_named(spec: Any, example: Any, says: str) -> None:
    with pytest.raises(DataError, match=f"^mine: .*{says}"):
        prepare(spec, [example], names=["mine"])


def test_images_of_unlike_sizes_make_no_batch() -> None:
    files = [png(np.zeros((4, 4 + i, 3), dtype=np.uint8)) for i in range(2)]
    spec = ImageSpec("RGB", None, "stretch", (0.0,), (255.0,))
    assert prepare(spec, files[1:])["input"].shape == (1, 3, 4, 5)
    with pytest.raises(DataError, match=r"example 1: becomes \(3, 4, 5\), the first of its batch \(3, 4, 4\)"):
        prepare(spec, files)


def test_raw_examples_are_spread_over_a_split() -> None:
    assert samples(3) == [0, 1, 2]
    assert samples(80) == [0, 10, 20, 30, 40, 50, 60, 70]
    assert samples(0) == []
