"""Parquet images: what is decoded, and one line for each thing that can be wrong."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from sparsify_deploy.datasets import parquet
from sparsify_deploy.errors import DataError, MissingExtra

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
Image = pytest.importorskip("PIL.Image")

RNG = np.random.RandomState(0)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(n: int, height: int = 6, width: int = 5) -> list[np.ndarray]:
    return [RNG.randint(0, 256, (height, width, 3)).astype("uint8") for _ in range(n)]


def write(path: Path, images: list, labels: list, *, names: list[str] | None = None, column: str = "image") -> None:
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [None if i is None else {"bytes": i, "path": None} for i in images]
    table = pa.table({column: pa.array(cells, struct), "label": pa.array(labels)})
    if names is not None:
        info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, path)


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, list[np.ndarray], list[np.ndarray]]:
    """Three train rows in two files and two test rows, of two classes."""
    train, test = pictures(3), pictures(2)
    write(tmp_path / "train-00001-of-00002.parquet", [png(train[2])], [1], names=["cat", "dog"])
    write(tmp_path / "train-00000-of-00002.parquet", list(map(png, train[:2])), [0, 1], names=["cat", "dog"])
    write(tmp_path / "test-00000-of-00001.parquet", list(map(png, test)), [1, 0], names=["cat", "dog"])
    return tmp_path, train, test


def load(path: Path, **params: object):
    return parquet.open(parquet.Params.model_validate({"path": path, **params}))


def whole(split) -> dict[str, torch.Tensor]:
    return split.take(torch.arange(len(split)))


def failure(path: Path, **params: object) -> str:
    with pytest.raises(DataError) as caught:
        load(path, **params)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


def test_images_labels_and_class_names(folder) -> None:
    path, train, test = folder
    data = load(path, normalize="none")
    batch = whole(data.split("train"))
    expected = np.stack(train).transpose(0, 3, 1, 2) / 255.0
    np.testing.assert_allclose(batch["input"].numpy(), expected, rtol=1e-6)
    assert batch["target"].tolist() == [0, 1, 1]
    assert batch["target"].dtype == torch.int64
    assert data.split("train").fields["input"].dtype == torch.uint8
    np.testing.assert_allclose(whole(data.split("test"))["input"].numpy()[1, 2], test[1][..., 2] / 255.0, rtol=1e-6)
    assert data.classes == ("cat", "dog")
    assert data.inputs == ("input",)


def test_normalized_by_the_train_split(folder) -> None:
    path, train, test = folder
    data = load(path)
    pixels = np.stack(train).transpose(0, 3, 1, 2).astype(np.float64)
    mean, std = pixels.mean((0, 2, 3), keepdims=True), pixels.std((0, 2, 3), keepdims=True)
    expected = (np.stack(test).transpose(0, 3, 1, 2) - mean) / std
    np.testing.assert_allclose(whole(data.split("test"))["input"].numpy(), expected, rtol=1e-5, atol=1e-5)


def test_grey_and_resized(folder) -> None:
    path, train, _ = folder
    x = whole(load(path, mode="L", normalize="none").split("train"))["input"]
    assert x.shape == (3, 1, 6, 5)
    grey = np.asarray(Image.fromarray(train[0]).convert("L")) / 255.0
    np.testing.assert_allclose(x[0, 0].numpy(), grey, rtol=1e-6)
    assert whole(load(path, size=4).split("test"))["input"].shape == (2, 3, 4, 4)


def test_more_rows_than_a_batch_and_than_a_job_stay_in_order(tmp_path: Path) -> None:
    n = 1300
    flat = [np.full((2, 2, 3), (i % 256, i // 256, 7), dtype="uint8") for i in range(n)]
    write(tmp_path / "train-0.parquet", [png(i) for i in flat], list(range(n)))
    write(tmp_path / "test-0.parquet", [png(flat[0])], [0])
    split = load(tmp_path, normalize="none").split("train")
    batch = split.take(torch.arange(n))
    back = (batch["input"] * 255).round().long()
    assert torch.equal(back[:, 0, 0, 0] + 256 * back[:, 1, 1, 1], torch.arange(n))
    assert torch.equal(batch["target"], torch.arange(n))


def test_names_come_only_from_metadata(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / f"{split}-0.parquet", [png(pictures(1)[0])], [3])
    assert load(tmp_path).classes is None
    write(tmp_path / "train-0.parquet", [png(pictures(1)[0])], [3], names=["a", "b"])
    assert load(tmp_path).classes == ("a", "b")


def test_plain_binary_columns_and_float_labels(tmp_path: Path) -> None:
    for split in ("train", "test"):
        table = pa.table({"img": [png(p) for p in pictures(2)], "label": [0.5, 1.5]})
        pq.write_table(table, tmp_path / f"{split}-0.parquet")
    batch = whole(load(tmp_path, image="img").split("train"))
    assert batch["target"].tolist() == [0.5, 1.5]
    assert batch["target"].dtype == torch.float32


def test_files_are_listed_by_split(folder) -> None:
    path, _, _ = folder
    assert list(parquet.files(parquet.Params(path=path)).items()) == [
        ("train/train-00000-of-00002.parquet", path / "train-00000-of-00002.parquet"),
        ("train/train-00001-of-00002.parquet", path / "train-00001-of-00002.parquet"),
        ("test/test-00000-of-00001.parquet", path / "test-00000-of-00001.parquet"),
    ]


def test_files_that_are_none(folder, tmp_path: Path) -> None:
    path, _, _ = folder
    assert failure(tmp_path / "absent") == ": no such folder"
    assert failure(path / "test-00000-of-00001.parquet") == ": not a folder"
    assert failure(path, test="valid-*.parquet") == (
        ": no file matches test pattern 'valid-*.parquet': set data.params.test, "
        "or set data.params.test_fraction, such as 0.2"
    )
    assert failure(path, train="*.parquet").startswith("/test-00000-of-00001.parquet: is in two splits")


def test_columns_are_suggested(folder) -> None:
    path, _, _ = folder
    assert failure(path, image="imge").endswith("no column is called 'imge'; did you mean 'image'?")
    assert failure(path, label="fine").endswith("no column is called 'fine'; one of image, label")


def test_columns_of_the_wrong_kind(folder) -> None:
    path, _, _ = folder
    assert "the image column label is int64, expected encoded images" in failure(path, image="label")
    assert "column image is struct" in failure(path, label="image")


def test_a_bad_image_names_file_and_row(folder) -> None:
    path, _, _ = folder
    good = [png(p) for p in pictures(2)]
    for bad in (b"junk", b"", good[0][: len(good[0]) // 2]):
        for row, images in ((0, [bad, *good]), (2, [*good, bad])):
            write(path / "test-00000-of-00001.parquet", images, [0, 1, 0])
            expected = f"/test-00000-of-00001.parquet: row {row}: the image cannot be decoded"
            assert failure(path).startswith(expected)


def test_a_bad_image_far_down_has_its_own_row(tmp_path: Path) -> None:
    good = png(pictures(1)[0])
    write(tmp_path / "train-0.parquet", [good] * 1200 + [b"junk", good], [0] * 1202)
    write(tmp_path / "test-0.parquet", [good] * 100 + [b"junk"], [0] * 101)
    assert failure(tmp_path).startswith("/train-0.parquet: row 1200: the image cannot be decoded")
    write(tmp_path / "train-0.parquet", [good], [0])
    assert failure(tmp_path).startswith("/test-0.parquet: row 100: the image cannot be decoded")


def test_missing_cells_and_odd_sizes(folder) -> None:
    path, _, _ = folder
    good, test = png(pictures(1)[0]), path / "test-00000-of-00001.parquet"
    write(test, [good, None], [0, 1])
    assert ": row 1: no image bytes" in failure(path)
    write(test, [good, good], [0, None])
    assert "column label has an empty value" in failure(path)
    write(test, [good, good], [0, -1])
    assert "label -1 at index 1" in failure(path)
    write(test, [good, png(pictures(1, 7, 5)[0])], [0, 1])
    assert ": row 1: an image of (7, 5), the first is of (6, 5): set size to resize" in failure(path)
    assert len(load(path, size=6).split("test")) == 2
    write(test, [png(pictures(1, 7, 5)[0])], [0])
    assert "train inputs have shape (3, 6, 5), test inputs (3, 7, 5)" in failure(path)
    write(test, [], pa.array([], pa.int64()))
    assert failure(path).endswith("test-00000-of-00001.parquet: no rows")


def test_truncated_and_junk_files(folder) -> None:
    path, _, _ = folder
    file = path / "train-00001-of-00002.parquet"
    content = file.read_bytes()
    for bad in (b"", b"junk" * 20, content[: len(content) // 2], content[:-3]):
        file.write_bytes(bad)
        assert failure(path).startswith(f"/{file.name}: not a readable Parquet file, damaged or cut short")
    file.write_bytes(content[:8] + bytes(60) + content[68:])
    assert f"/{file.name}: " in failure(path)


@pytest.mark.parametrize(("module", "package"), [("pyarrow", "pyarrow"), ("PIL", "Pillow")])
def test_missing_packages_name_the_extra(folder, monkeypatch: pytest.MonkeyPatch, module: str, package: str) -> None:
    path, _, _ = folder
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=rf"the parquet data set needs {package}.*sparsify-deploy\[train\]"):
        load(path)


@pytest.mark.parametrize(
    "wrong", [{"train": "/etc/*"}, {"train": "../*.parquet"}, {"test": ""}, {"size": 0}, {"mode": "CMYK"}]
)
def test_params_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        parquet.Params.model_validate({"path": Path("."), **wrong})


def test_real_cifar10(real_data: Path) -> None:
    path = real_data / "cifar10"
    if not path.is_dir():
        pytest.skip(f"{path} is not there")
    # Test files for both roles would be refused, so the smaller train file plays train.
    data = load(path, train="train-00000-*.parquet")
    assert (len(data.split("train")), len(data.split("test"))) == (25_000, 10_000)
    assert data.classes is not None
    assert data.classes[0] == "airplane"
    assert torch.bincount(data.split("test").fields["target"]).tolist() == [1000] * 10
    scale = data.split("train").affine["input"]
    torch.testing.assert_close(scale.shift.flatten() / 255, torch.tensor([0.4914, 0.4822, 0.4465]), atol=5e-3, rtol=0)
