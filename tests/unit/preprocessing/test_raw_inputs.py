"""What the data sets say of raw examples, proved as a run proves it: the same bits, or the run stops."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sparsify_deploy.datasets import digits, folder, npz
from sparsify_deploy.errors import CheckFailed
from sparsify_deploy.preprocessing.spec import ImageSpec, read
from sparsify_deploy.stages.raw_inputs import write_preprocessing

RANDOM = np.random.default_rng(0)


def picture(height: int = 21, width: int = 17) -> Image.Image:
    return Image.fromarray(RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def a_folder(root: Path, **params: Any) -> Any:
    for split, count in (("train", 3), ("test", 6)):
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                (root / split / label / f"{i}.jpg").write_bytes(encoded(picture(), "JPEG"))
    (root / "test" / "cat" / "1.jpg").write_bytes(b"cut")
    return folder.open(folder.Params(path=root, size=14, unreadable="skip", max_unreadable=0.5, **params))


def an_archive(root: Path, shape: tuple[int, ...], dtype: str, **params: Any) -> Any:
    def draw(count: int) -> np.ndarray:
        return RANDOM.integers(0, 256, (count, *shape)).astype(dtype)

    arrays = {"x_train": draw(12), "y_train": np.arange(12) % 3, "x_test": draw(11), "y_test": np.arange(11) % 3}
    np.savez(root / "a.npz", **arrays)
    return npz.open(npz.Params.model_validate({"path": root / "a.npz", **params}))


def parquet_files(root: Path, **params: Any) -> Any:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    from sparsify_deploy.datasets import parquet

    for name, count in (("train-0", 5), ("test-0", 7), ("test-1", 6)):
        images = pa.array([{"bytes": encoded(picture(8, 8))} for _ in range(count)])
        pq.write_table(
            pa.table({"image": images, "label": pa.array([i % 2 for i in range(count)])}), root / f"{name}.parquet"
        )
    return parquet.open(parquet.Params.model_validate({"path": root, **params}))


MADE: dict[str, Callable[[Path], Any]] = {
    "digits": lambda root: digits.open(digits.Params()),
    "digits, larger": lambda root: digits.open(digits.Params(size=12)),
    "folder": a_folder,
    "folder, grey, stretched": lambda root: a_folder(root, mode="L", fit="stretch", normalize="data"),
    "folder, 0 to 1": lambda root: a_folder(root, normalize="none"),
    "npz NHW": lambda root: an_archive(root, (6, 5), "uint8"),
    "npz NHWC": lambda root: an_archive(root, (6, 5, 3), "uint8"),
    "npz NCHW": lambda root: an_archive(root, (3, 6, 5), "float64"),
    "npz, bytes as they are": lambda root: an_archive(root, (7,), "uint8"),
    "npz, floats as they are": lambda root: an_archive(root, (7,), "float32"),
    "npz, not normalised": lambda root: an_archive(root, (6, 5, 3), "uint8", normalize=False),
    "parquet": parquet_files,
    "parquet, resized, grey": lambda root: parquet_files(root, size=5, mode="L", normalize="none"),
}


@pytest.mark.parametrize("name", MADE)
def test_raw_examples_become_what_the_data_set_gives(name: str, tmp_path: Path) -> None:
    data = MADE[name](tmp_path)
    found = write_preprocessing(SimpleNamespace(examples=data), tmp_path / "out")  # type: ignore[arg-type]
    assert found is not None
    rows = torch.tensor(list(data.raw))
    assert found.examples == len(rows)
    assert len(rows) >= 7, "a file that is no image may be among those chosen"
    assert rows.max() > 8, "spread over the split"
    assert found.inputs["input"].tobytes() == data.split("test").take(rows)["input"].numpy().tobytes()
    assert read(tmp_path / "out" / "preprocessing.json") == data.preprocessing


def texts(root: Path, *, pair: bool = False, **params: Any) -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    from sparsify_deploy.datasets import text

    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "long"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    (root / "words").mkdir()
    made.save(str(root / "words" / "tokenizer.json"))
    (root / "words" / "tokenizer_config.json").write_text('{"pad_token": "[PAD]"}')
    for split, count in (("train", 6), ("test", 20)):
        rows = [f"{'long ' * (i % 4)}film,{'bad' if i % 2 else 'good'},{i % 2}" for i in range(count)]
        (root / f"{split}.csv").write_text("\n".join(["text,second,label", *rows]) + "\n")
    more = {"text_pair": "second", "token_type_ids": True} if pair else {}
    given = {"path": root, "tokenizer": root / "words", "max_length": 6, **more, **params}
    return text.open(text.Params.model_validate(given))


@pytest.mark.parametrize("params", [{}, {"pad": "max_length"}, {"pair": True}], ids=str)
def test_raw_texts_become_the_tokens_that_the_data_set_gives(params: dict[str, Any], tmp_path: Path) -> None:
    data = texts(tmp_path, **params)
    found = write_preprocessing(SimpleNamespace(examples=data), tmp_path / "out")  # type: ignore[arg-type]
    assert found is not None
    assert (found.kind, found.examples) == ("text", 8)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["preprocessing.json", "tokenizer.json"]
    batch = data.split("test").take(torch.tensor(list(data.raw)))
    assert {*found.inputs} == {*data.inputs}
    for name, values in found.inputs.items():
        assert values.tobytes() == batch[name].numpy().tobytes()
    assert found.inputs["input_ids"].shape == (8, 6)
    assert read(tmp_path / "out" / "preprocessing.json") == data.preprocessing
    for change in ({"max_length": 5}, {"pad_id": 7}, {"pad": "longest", "pad_side": "left"}):
        other = dataclasses.replace(data, preprocessing=dataclasses.replace(data.preprocessing, **change))
        with pytest.raises(CheckFailed, match=r"input_ids|attention_mask"):
            write_preprocessing(SimpleNamespace(examples=other), tmp_path / "out")  # type: ignore[arg-type]


def of_images(root: Path, **changes: Any) -> SimpleNamespace:
    data = a_folder(root)
    assert isinstance(data.preprocessing, ImageSpec)
    return SimpleNamespace(examples=dataclasses.replace(data, **{"preprocessing": data.preprocessing, **changes}))


def test_a_spec_with_a_wrong_mean_stops_the_run(tmp_path: Path) -> None:
    spec = a_folder(tmp_path / "a").preprocessing
    last_bit = tuple(float(np.nextafter(np.float32(v), np.float32(999))) for v in spec.shift)
    for changes, says in (
        ({"shift": (0.0, 0.0, 0.0)}, r"largest difference 2\.1"),
        ({"shift": last_bit}, "than the data set of [78] of"),
        ({"divisor": (58.0,)}, "another input than the data set"),
        ({"fit": "stretch"}, r"of [78] of [78] raw test examples, the first being 0 \(largest"),
        ({"size": 13}, r"as float32 \(\d, 3, 13, 13\) and float32 \(\d, 3, 14, 14\)"),
        ({"input": "pixels"}, "makes the inputs pixels, the data set input"),
    ):
        where = tmp_path / "".join(changes) / says[:3].strip()
        subject = of_images(where / "data", preprocessing=dataclasses.replace(spec, **changes))
        with pytest.raises(CheckFailed, match=says):
            write_preprocessing(subject, where / "out")  # type: ignore[arg-type]


def test_raw_examples_of_other_rows_stop_the_run(tmp_path: Path) -> None:
    subject = of_images(tmp_path / "data")
    raw = subject.examples.raw
    turned = dict(zip(raw, [*list(raw.values())[:-2], *list(raw.values())[:-3:-1]], strict=True))
    wrong = SimpleNamespace(examples=dataclasses.replace(subject.examples, raw=turned))
    with pytest.raises(CheckFailed, match=f"2 of [78] raw test examples, the first being {list(raw)[-2]}"):
        write_preprocessing(wrong, tmp_path / "out")  # type: ignore[arg-type]


def test_a_spec_without_raw_examples_proves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="no `raw`: give a few raw test examples"):
        write_preprocessing(of_images(tmp_path / "data", raw={}), tmp_path / "out")  # type: ignore[arg-type]


def test_a_data_set_that_says_nothing_leaves_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "preprocessing.json").write_text("of an earlier attempt")
    subject = of_images(tmp_path / "data", preprocessing=None)
    assert write_preprocessing(subject, tmp_path / "out") is None  # type: ignore[arg-type]
    assert list((tmp_path / "out").iterdir()) == []
