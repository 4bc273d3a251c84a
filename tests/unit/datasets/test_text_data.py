"""Texts with labels from three kinds of files, and one line for each thing that can be wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from sparsify_deploy.datasets import text
from sparsify_deploy.datasets._labels import judge
from sparsify_deploy.errors import DataError
from sparsify_deploy.types import AxisSizes

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TRAIN = [("good film", 1), ("a bad plot", 0), ("very very good", 1), ("bad", 0)]
TEST = [("not bad", 1), ("not a good film", 0)]


@pytest.fixture
def tokenizer(tmp_path: Path, make_tokenizer) -> Path:
    return make_tokenizer(tmp_path / "tokenizer")


def write(path: Path, rows: list, columns: tuple[str, ...] = ("text", "label"), names: list[str] | None = None) -> None:
    table = {column: [row[i] for row in rows] for i, column in enumerate(columns)}
    if path.suffix == ".parquet":
        made = pa.table(table)
        if names is not None:
            info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
            made = made.replace_schema_metadata({"huggingface": json.dumps(info)})
        pq.write_table(made, path)
    elif path.suffix == ".csv":
        cells = [columns, *rows]
        path.write_text("".join(",".join(f'"{cell}"' for cell in row) + "\n" for row in cells), encoding="utf-8")
    else:
        lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(params=["parquet", "csv", "jsonl"])
def folder(request, tmp_path: Path) -> Path:
    made = tmp_path / "data"
    made.mkdir()
    write(made / f"train.{request.param}", TRAIN)
    write(made / f"test.{request.param}", TEST)
    return made


def load(path: Path, tokenizer: Path, **params: object):
    return text.open(text.Params.model_validate({"path": path, "tokenizer": tokenizer, **params}))


def failure(path: Path, tokenizer: Path, **params: object) -> str:
    with pytest.raises(DataError) as caught:
        load(path, tokenizer, **params)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_any_kind_of_file_gives_the_same_tokens(folder, tokenizer) -> None:
    data = load(folder, tokenizer)
    assert data.inputs == ("input_ids", "attention_mask")
    assert data.classes is None
    assert data.splits == ("train", "test")
    batch = data.split("train").take(torch.tensor([1, 3]))
    assert batch["input_ids"].tolist() == [[2, 11, 5, 7, 3], [2, 5, 3, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["target"].tolist() == [0, 0]
    assert {value.dtype for value in batch.values()} == {torch.int64}
    assert data.split("test").take(torch.tensor([0, 1]))["target"].tolist() == [1, 0]


def test_lengths_differ_between_batches_and_are_described(folder, tokenizer) -> None:
    data = load(folder, tokenizer, max_length=5)
    train = data.split("train")
    assert [train.take(torch.tensor([i]))["input_ids"].shape[1] for i in range(4)] == [4, 5, 5, 3]
    assert data.dynamic_axes == {"input_ids": {1: "length"}, "attention_mask": {1: "length"}}
    # an empty text has 2; those of the files 4, 5, 5, 3 in training, 4 and (cut from 6) 5 in the test
    assert data.axis_sizes == {"length": AxisSizes(least=2, typical=4, largest=5)}
    assert data.notes == ("data: 1 of 6 texts (16.7%) were cut at max_length 5 tokens",)


def test_exactly_so_many_examples_of_each_class(folder, tokenizer) -> None:
    from sparsify_deploy.training.batches import class_batches

    train = load(folder, tokenizer).split("train")
    (batch,) = class_batches(train, seed=0, per_class=2, batch_size=4, classes=None)
    assert batch["input_ids"].shape == (4, 5)
    assert batch["attention_mask"].sum(1).sort().values.tolist() == [3, 4, 5, 5]
    assert batch["target"].tolist() == [0, 1, 0, 1]
    first, second = class_batches(train, seed=0, per_class=2, batch_size=2, classes=None)
    assert {*map(len, (first["target"], second["target"]))} == {2}


def test_one_length_for_all(folder, tokenizer) -> None:
    data = load(folder, tokenizer, pad="max_length", max_length=7, token_type_ids=True)
    assert data.inputs == ("input_ids", "attention_mask", "token_type_ids")
    batch = data.split("test").take(torch.arange(2))
    assert {batch[name].shape for name in data.inputs} == {torch.Size([2, 7])}
    assert not data.dynamic_axes
    assert not data.axis_sizes
    assert not data.notes


def test_the_spec_makes_the_same_inputs_of_the_raw_texts(folder, tokenizer) -> None:
    from sparsify_deploy.preprocessing.spec import from_json
    from sparsify_deploy.preprocessing.text import Encoder

    data = load(folder, tokenizer, token_type_ids=True)
    assert data.raw == {0: "not bad", 1: "not a good film"}
    assert data.preprocessing_files == {"tokenizer.json": tokenizer / "tokenizer.json"}
    spec = from_json(data.preprocessing.to_json())
    made = Encoder.open(data.preprocessing_files["tokenizer.json"], spec)(list(data.raw.values()))
    batch = data.split("test").take(torch.arange(2))
    for name in data.inputs:
        np.testing.assert_array_equal(made[name], batch[name].numpy())


def test_labels_by_name_are_numbered_in_their_order(tmp_path, tokenizer) -> None:
    write(tmp_path / "train.csv", [("good", "up"), ("bad", "down"), ("a film", "up")])
    write(tmp_path / "test.csv", [("bad", "down")])
    data = load(tmp_path, tokenizer)
    assert data.classes == ("down", "up")
    assert data.split("train").targets.tolist() == [1, 0, 1]
    write(tmp_path / "test.csv", [("bad", "down"), ("good", "upp")])
    message = failure(tmp_path, tokenizer)
    assert message.startswith(f"{tmp_path}/test.csv: record 2: label 'upp' is not one of the 2 classes")
    assert "did you mean 'up'" in message


def test_class_names_of_the_metadata(tmp_path, tokenizer) -> None:
    for split, rows in (("train", TRAIN), ("test", TEST)):
        write(tmp_path / f"{split}.parquet", rows, names=["negative", "positive"])
    assert load(tmp_path, tokenizer).classes == ("negative", "positive")
    write(tmp_path / "test.parquet", [*TEST, ("film", 2)], names=["negative", "positive"])
    assert failure(tmp_path, tokenizer) == (
        f"{tmp_path}/test.parquet: row 2: label 2 is out of range, expected 0 to 1, one of negative, positive"
    )
    write(tmp_path / "test.parquet", [("film", -1)])
    assert "row 0: label -1 is out of range" in failure(tmp_path, tokenizer)


def test_float_labels_are_values(tmp_path, tokenizer) -> None:
    for split in ("train", "test"):
        write(tmp_path / f"{split}.csv", [("good", "0.5"), ("bad", "-2")])
    data = load(tmp_path, tokenizer)
    assert data.classes is None
    batch = data.split("train").take(torch.arange(2))
    assert batch["target"].dtype == torch.float32
    assert batch["target"].tolist() == [0.5, -2.0]


def test_pairs(tmp_path, tokenizer) -> None:
    for split in ("train", "test"):
        rows = [("good", "good film", 1), ("bad", "a", 0)]
        write(tmp_path / f"{split}.jsonl", rows, ("first", "second", "label"))
    data = load(tmp_path, tokenizer, text="first", text_pair="second", token_type_ids=True)
    batch = data.split("train").take(torch.arange(2))
    assert batch["input_ids"].tolist() == [[2, 4, 3, 4, 6, 3], [2, 5, 3, 11, 3, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0]]
    assert data.preprocessing.pair
    assert data.raw[0] == ("good", "good film")


def test_one_file_is_divided_the_same_way_each_time(tmp_path, tokenizer) -> None:
    path = tmp_path / "all.jsonl"
    write(path, [(" ".join(["good" if i % 2 else "bad"] * (i + 1)), i % 2) for i in range(20)])
    assert "has no test split" in failure(path, tokenizer)
    first, second = (load(path, tokenizer, test_fraction=0.2, validation_fraction=0.1) for _ in range(2))
    sizes = {name: len(first.split(name)) for name in first.splits}
    assert sizes == {"train": 14, "test": 4, "validation": 2}
    lengths = {name: first.split(name).tokens.lengths.tolist() for name in sizes}
    assert lengths == {name: second.split(name).tokens.lengths.tolist() for name in sizes}
    assert sorted(each for some in lengths.values() for each in some) == list(range(3, 23))
    assert sorted(first.split("test").targets.tolist()) == [0, 0, 1, 1]
    for name in first.splits:
        batch = first.split(name).take(torch.arange(sizes[name]))
        assert [4 if target else 5 for target in batch["target"]] == batch["input_ids"][:, 1].tolist()
    assert any("test split is 4 of 20" in note for note in first.notes)
    assert list(text.files(text.Params(path=path, tokenizer=tokenizer))) == [
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "train/all.jsonl",
    ]


def test_a_validation_split_that_is_not_there(folder, tokenizer) -> None:
    with pytest.raises(DataError, match=r"there is no validation split: set data.params.validation_fraction"):
        load(folder, tokenizer).split("validation")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("row", [("  ", 1), ("", 0), ("good", None)])
def test_rows_without_text_or_label(tmp_path, tokenizer, suffix, row) -> None:
    cells = ("good", "") if suffix == "csv" and row[1] is None else row
    write(tmp_path / f"train.{suffix}", [*TRAIN, cells])
    write(tmp_path / f"test.{suffix}", TEST)
    message = failure(tmp_path, tokenizer)
    place = {"csv": "record 5", "jsonl": "line 5", "parquet": "row 4"}[suffix]
    empty = "label" if row[1] is None else "text"
    assert message == (
        f"{tmp_path}/train.{suffix}: {place}: {empty} is empty; mend it, or set data.params.unreadable: skip"
    )
    assert "1 of 5 rows" in failure(tmp_path, tokenizer, unreadable="skip", max_unreadable=0.1)
    data = load(tmp_path, tokenizer, unreadable="skip", max_unreadable=0.2)
    assert len(data.split("train")) == 4
    assert data.notes == (
        f"data: the train split leaves out 1 of 5 rows without text or label: train.{suffix} {place}",
    )


def test_columns_that_are_not_there_or_no_text(folder, tokenizer) -> None:
    assert "no column is called 'txet'; did you mean 'text'?" in failure(folder, tokenizer, text="txet")
    assert "no column is called 'labels'; did you mean 'label'?" in failure(folder, tokenizer, label="labels")
    if next(folder.iterdir()).suffix != ".csv":
        message = failure(folder, tokenizer, text="label", label="text")
        assert "label holds int, expected text" in message


def test_a_text_that_is_not_unicode(tmp_path, tokenizer) -> None:
    write(tmp_path / "train.jsonl", [*TRAIN, ("\ud800", 1)])
    write(tmp_path / "test.jsonl", TEST)
    assert "line 5: text is not valid Unicode" in failure(tmp_path, tokenizer)
    (tmp_path / "train.jsonl").write_bytes(b'{"text": "caf\xe9", "label": 0}\n')
    assert "byte 13 is not UTF-8" in failure(tmp_path, tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.parquet", b"PAR1", "not a readable Parquet file"),
        ("train.jsonl", b'{"text": "a"\n', "line 1: not valid JSON"),
        ("train.jsonl", b"[1]\n", "line 1: holds no JSON object"),
        ("train.csv", b'text,label\n"good,1\n', "not valid CSV"),
        ("train.csv", b"text,label\ngood,1,2\n", "record 1 has 3 cells, the header 2"),
        ("train.csv", b"", "no column is called 'text'; it has none"),
        ("train.csv", b"text,label\n", "no rows"),
    ],
)
def test_damaged_files(tmp_path, tokenizer, name, content, message) -> None:
    (tmp_path / name).write_bytes(content)
    write(tmp_path / "test.csv", TEST)
    found = failure(tmp_path, tokenizer)
    assert message in found
    assert str(tmp_path / name) in found


def test_splits_that_are_missing_or_the_same(folder, tokenizer, tmp_path) -> None:
    assert "matches test pattern 'none*': set data.params.test, or set data.params.test_fraction" in failure(
        folder, tokenizer, test="none*"
    )
    assert "is in two splits" in failure(folder, tokenizer, test="t*")
    assert "has a test split of its own" in failure(folder, tokenizer, test_fraction=0.2)
    assert "no such file or folder" in failure(tmp_path / "nowhere", tokenizer)
    (tmp_path / "notes.txt").write_text("good")
    assert "is no .parquet, .csv or .jsonl file" in failure(tmp_path / "notes.txt", tokenizer, test_fraction=0.2)


def test_the_tokenizer_is_missed_before_anything_is_read(folder, tmp_path) -> None:
    with pytest.raises(DataError, match="no such folder; expected a tokenizer's"):
        text.files(text.Params(path=folder, tokenizer=tmp_path / "none"))


@pytest.mark.parametrize("wrong", [{"label": "text"}, {"text_pair": "text"}, {"train": "../x*"}, {"max_length": 0}])
def test_params_that_make_no_sense(tmp_path, wrong) -> None:
    with pytest.raises(ValidationError):
        text.Params.model_validate({"path": tmp_path, "tokenizer": tmp_path, **wrong})


def test_ag_news_is_read_in_one_line(data_dir, tmp_path, make_tokenizer) -> None:
    if not (data_dir / "ag_news").is_dir():
        pytest.skip("no ag_news")
    data = load(data_dir / "ag_news", make_tokenizer(tmp_path))
    assert (len(data.split("train")), len(data.split("test"))) == (6600, 1000)
    assert data.classes == ("World", "Sports", "Business", "Sci/Tech")


def test_labels_of_texts_are_judged_as_those_of_other_sources(folder, tokenizer) -> None:
    assert judge(load(folder, tokenizer)).class_counts == (2, 2)
    write(folder / f"train{next(folder.glob('train*')).suffix}", [(words, 1) for words, _ in TRAIN])
    with pytest.raises(DataError, match="all 4 training examples are of class 1: there is nothing to tell apart"):
        judge(load(folder, tokenizer))
