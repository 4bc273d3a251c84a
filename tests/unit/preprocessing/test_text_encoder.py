"""Texts to token numbers: cut, padded, and one line for each thing that can be wrong with a tokenizer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from sparsify_deploy.errors import DataError, MissingExtra
from sparsify_deploy.preprocessing import text, tokenizer_files
from sparsify_deploy.preprocessing.spec import TextSpec

PAD, UNK, CLS, SEP, GOOD, BAD, FILM = range(7)
BOTH = ("input_ids", "attention_mask")
ALL = (*BOTH, "token_type_ids")


@pytest.fixture
def folder(tmp_path: Path, make_tokenizer) -> Path:
    return make_tokenizer(tmp_path / "tokenizer")


def encoder(folder: Path, max_length: int = 6, **more: object) -> text.Encoder:
    return text.Encoder.open(folder / "tokenizer.json", TextSpec(max_length=max_length, **more))


def test_a_batch_is_as_long_as_its_longest_text(folder) -> None:
    batch = encoder(folder)(["good", "a very good film"])
    assert list(batch) == [*BOTH]
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == np.int64
    assert batch["input_ids"].tolist() == [[CLS, GOOD, SEP, PAD, PAD, PAD], [CLS, 11, 8, GOOD, FILM, SEP]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]
    assert encoder(folder)(["good"])["input_ids"].tolist() == [[CLS, GOOD, SEP]]


def test_always_to_max_length(folder) -> None:
    batch = encoder(folder, max_length=9, pad="max_length", inputs=ALL)(["bad", "good film"])
    assert {name: values.shape for name, values in batch.items()} == dict.fromkeys(ALL, (2, 9))
    assert batch["attention_mask"].sum(1).tolist() == [3, 4]


def test_long_texts_are_cut_and_counted(folder) -> None:
    tokens = encoder(folder, max_length=4).encode(["good good good good", "good film", ""])
    assert tokens.lengths.tolist() == [4, 4, 2]
    assert tokens.ids[:4].tolist() == [CLS, GOOD, GOOD, SEP]
    assert tokens.truncated == 1


def test_a_pair_has_two_token_types(folder) -> None:
    batch = encoder(folder, max_length=8, pair=True, inputs=ALL)([("good film", "bad"), ("good", "a bad plot")])
    assert batch["input_ids"].tolist() == [[2, 4, 6, 3, 5, 3, 0], [2, 4, 3, 11, 5, 7, 3]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1] * 6 + [0], [1] * 7]


def test_padding_on_the_left(tmp_path, make_tokenizer) -> None:
    folder = make_tokenizer(tmp_path, side="left")
    assert text.padding(folder).side == "left"
    batch = encoder(folder, pad_side="left", inputs=ALL)(["good", "a film"])
    assert batch["input_ids"].tolist() == [[PAD, CLS, GOOD, SEP], [CLS, 11, FILM, SEP]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]


def test_rows_are_taken_from_the_ragged_store_in_any_order(folder) -> None:
    chosen = encoder(folder, max_length=9)
    tokens = chosen.encode(["good", "bad film", "not very good film", "plot"])
    batch = text.padded(tokens, np.array([3, 1, 3]), chosen.spec)
    assert batch["input_ids"].tolist() == [[2, 7, 3, 0], [2, 5, 6, 3], [2, 7, 3, 0]]


def test_more_texts_than_are_encoded_at_a_time_stay_in_order(folder, monkeypatch) -> None:
    monkeypatch.setattr(text, "_AT_A_TIME", 2)
    tokens = encoder(folder).encode(["good", "bad", "film", "plot", "a"])
    assert tokens.ids.reshape(5, 3)[:, 1].tolist() == [4, 5, 6, 7, 11]


def test_the_pad_token_of_any_of_the_three_files(tmp_path, make_tokenizer) -> None:
    folder = make_tokenizer(tmp_path, pad="film")
    assert text.padding(folder) == text.Padding("film", FILM)
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "bad"}}))
    assert text.padding(folder).id == BAD
    own = json.loads((folder / "tokenizer.json").read_text())
    own["padding"] = {
        "strategy": "BatchLongest",
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 7,
        "pad_type_id": 1,
        "pad_token": "plot",
    }
    (folder / "tokenizer.json").write_text(json.dumps(own))
    assert text.padding(folder) == text.Padding("plot", 7, 1, "left")


def line(caught: pytest.ExceptionInfo[DataError]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_tokenizer_says_how_to_make_one(tmp_path) -> None:
    with pytest.raises(DataError, match="no such folder") as caught:
        tokenizer_files.files(tmp_path / "none")
    assert "save_pretrained(FOLDER)" in line(caught)
    with pytest.raises(DataError, match=r"has no tokenizer\.json; make it by transformers: AutoTokenizer") as caught:
        text.padding(tmp_path)
    line(caught)


def test_damaged_files_are_named(tmp_path, make_tokenizer) -> None:
    folder = make_tokenizer(tmp_path)
    whole = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: cannot be read as JSON") as caught:
        text.padding(folder)
    line(caught)
    for damage in ("", whole[: len(whole) // 2], "[]", "{}"):
        (folder / "tokenizer.json").write_text(damage)
        with pytest.raises(DataError, match=r"tokenizer\.json: is no tokenizer, or is damaged") as caught:
            text.padding(folder)
        line(caught)


@pytest.mark.parametrize(
    ("pad", "message"), [(None, "names no pad token"), ("[NONE]", r"'\[NONE\]' is not in the voc")]
)
def test_a_pad_token_that_is_not_there(tmp_path, make_tokenizer, pad, message) -> None:
    with pytest.raises(DataError, match=message) as caught:
        text.padding(make_tokenizer(tmp_path, pad=pad))
    line(caught)


def test_no_room_for_text_between_special_tokens(folder) -> None:
    with pytest.raises(DataError, match="max_length 2 leaves no room for text beside 2 special tokens"):
        encoder(folder, max_length=2)
    encoder(folder, max_length=3)
    with pytest.raises(DataError, match="beside 3 special tokens"):
        encoder(folder, max_length=3, pair=True)


@pytest.mark.parametrize(
    ("texts", "pair"), [(["good", None], False), (["good", "\ud800"], False), ([("a", "b"), "good"], True)]
)
def test_what_is_no_text_is_named_by_its_place(folder, texts, pair) -> None:
    with pytest.raises(DataError, match=r"^text 1: expected a (text|pair of texts) in valid Unicode$"):
        encoder(folder, pair=pair)(texts)


def test_the_package_that_is_missing(folder, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtra, match=r"text needs tokenizers, .*sparsify-deploy\[hf\]"):
        text.padding(folder)
