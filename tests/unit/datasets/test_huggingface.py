"""Hugging Face data sets: what is read from each layout, and one line for each thing that can be wrong."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from sparsify_deploy.datasets import huggingface
from sparsify_deploy.errors import DataError, EnvironmentProblem, MissingExtra

library = pytest.importorskip("datasets")
Image = pytest.importorskip("PIL.Image")

RNG = np.random.RandomState(0)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(n: int, height: int = 6, width: int = 5) -> list[np.ndarray]:
    return [RNG.randint(0, 256, (height, width, 3)).astype("uint8") for _ in range(n)]


def images(contents: list[Any], labels: list[Any], names: tuple[str, ...] = ("cat", "dog")) -> Any:
    features = library.Features({"picture": library.Image(), "kind": library.ClassLabel(names=list(names))})
    cells = [{"bytes": content, "path": None} for content in contents]
    return library.Dataset.from_dict({"picture": cells, "kind": labels}, features=features)


def numbers(values: Any, labels: Any, feature: Any = None) -> Any:
    feature = feature or library.Sequence(library.Value("float32"), length=len(values[0]))
    features = library.Features({"x": feature, "label": library.Value("int64")})
    return library.Dataset.from_dict({"x": values, "label": labels}, features=features)


def load(path: Path, **params: object) -> Any:
    return huggingface.open(huggingface.Params.model_validate({"path": path, **params}))


def whole(split: Any) -> dict[str, torch.Tensor]:
    batch: dict[str, torch.Tensor] = split.take(torch.arange(len(split)))
    return batch


def failure(path: Path, **params: object) -> str:
    with pytest.raises(DataError) as caught:
        load(path, **params)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


def test_a_saved_dictionary_of_splits(tmp_path: Path) -> None:
    train, test = pictures(3), pictures(2)
    found = {"train": images(list(map(png, train)), [1, 0, 1]), "test": images(list(map(png, test)), [0, 1])}
    library.DatasetDict(found).save_to_disk(tmp_path / "d")
    data = load(tmp_path / "d", normalize="none")
    batch = whole(data.split("train"))
    np.testing.assert_allclose(batch["input"].numpy(), np.stack(train).transpose(0, 3, 1, 2) / 255, rtol=1e-6)
    assert batch["target"].tolist() == [1, 0, 1]
    assert data.classes == ("cat", "dog")
    assert whole(data.split("test"))["target"].tolist() == [0, 1]
    assert data.preprocessing.kind == "image"
    assert data.raw == {i: png(pixels) for i, pixels in enumerate(test)}
    listed = huggingface.files(huggingface.Params(path=tmp_path / "d"))
    assert {"dataset_dict.json", "train/state.json", "test/data-00000-of-00001.arrow"} <= set(listed)
    assert len(listed) == 7


def test_a_single_saved_set_is_train_and_gives_up_a_part(tmp_path: Path) -> None:
    images([png(p) for p in pictures(20)], [0, 1] * 10).save_to_disk(tmp_path / "d")
    assert "has no test split among train: name it as data.params.test, or set data.params.test_fraction" in failure(
        tmp_path / "d"
    )
    data = load(tmp_path / "d", test_fraction=0.2, validation_fraction=0.1)
    assert {name: len(data.split(name)) for name in data.splits} == {"train": 14, "test": 4, "validation": 2}
    assert whole(data.split("test"))["target"].bincount().tolist() == [2, 2]
    assert len(data.raw) == 4


@pytest.mark.parametrize("layout", ["train-00000.parquet", "data/train-0-of-1.parquet", "train/x.parquet"])
def test_loose_parquet_files_by_the_words_of_their_paths(tmp_path: Path, layout: str) -> None:
    content = png(pictures(1)[0])
    for name, labels in ((layout, [0, 1, 1]), (layout.replace("train", "validation"), [1])):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        images([content] * len(labels), labels).to_parquet(tmp_path / name)
    (tmp_path / "README.md").write_text("a train of thought")
    data = load(tmp_path, size=4, fit="stretch")
    assert whole(data.split("train"))["target"].tolist() == [0, 1, 1]
    assert data.classes == ("cat", "dog")
    assert data.notes == ("data: there is no split test, validation is the test split",)


def test_loose_arrow_files_alone_and_by_name(tmp_path: Path) -> None:
    for name, size in (("train", 4), ("extra", 2)):
        numbers(RNG.randn(size, 3), [0, 1] * (size // 2)).save_to_disk(tmp_path / "made" / name)
        made = tmp_path / "made" / name / "data-00000-of-00001.arrow"
        made.rename(tmp_path / f"{name}.arrow")
    data = load(tmp_path / "train.arrow", input="x", test_fraction=0.5)
    assert len(data.split("test")) == 2
    for file in (tmp_path / "made").rglob("*"):
        if file.is_file():
            file.unlink()
    data = load(tmp_path, input="x", test="extra")
    assert whole(data.split("test"))["target"].tolist() == [0, 1]


def test_columns_of_numbers(tmp_path: Path) -> None:
    values = RNG.randn(6, 3).astype("float32")
    library.DatasetDict(train=numbers(values[:4], [0, 1, 0, 1]), test=numbers(values[4:], [0, 1])).save_to_disk(
        tmp_path / "d"
    )
    data = load(tmp_path / "d", input="x")
    np.testing.assert_array_equal(whole(data.split("train"))["input"].numpy(), values[:4])
    assert data.classes is None
    assert data.preprocessing.inputs[0].shape == (3,)
    bytes_ = RNG.randint(0, 256, (4, 1, 2, 2)).astype("uint8")
    numbers(bytes_, [0, 1, 0, 1], library.Array3D((1, 2, 2), "uint8")).save_to_disk(tmp_path / "b")
    data = load(tmp_path / "b", input="x", test_fraction=0.5)
    held = data.split("test").fields["input"]
    assert held.dtype == torch.uint8
    assert whole(data.split("test"))["input"].max() <= 1.0


def test_columns_that_cannot_be_told_or_are_not_there(tmp_path: Path) -> None:
    numbers(RNG.randn(4, 3), [0, 1, 0, 1]).save_to_disk(tmp_path / "d")
    path = tmp_path / "d"
    assert failure(path, test_fraction=0.5) == (
        ": has no column of images: name the inputs as data.params.input, one of x, label"
    )
    assert failure(path, input="y", test_fraction=0.5) == ": no column is called 'y'; one of x, label"
    assert failure(path, input="x", label="lable", test_fraction=0.5).endswith("did you mean 'label'?")
    features = library.Features({"t": library.Value("string"), "label": library.ClassLabel(names=["a"])})
    library.Dataset.from_dict({"t": ["hello"], "label": [0]}, features=features).save_to_disk(tmp_path / "t")
    assert failure(tmp_path / "t", input="t", test_fraction=0.5) == (
        ": column t holds text: save it with to_parquet and use data.source text"
    )
    said = failure(tmp_path / "t", test_fraction=0.5)
    assert said.startswith(": has no column of images, and text in t: save each split with to_parquet")
    uneven = library.Dataset.from_dict({"x": [[1.0], [1.0, 2.0]], "label": [0, 1]})
    uneven.save_to_disk(tmp_path / "u")
    assert "column x has rows of several lengths" in failure(tmp_path / "u", input="x", test_fraction=0.5)
    whole_numbers = library.Dataset.from_dict({"x": [[1], [2]], "label": [0, 1]})
    whole_numbers.save_to_disk(tmp_path / "i")
    assert "column x is int64, expected uint8 or floats" in failure(tmp_path / "i", input="x", test_fraction=0.5)


def test_splits_that_are_not_there_or_have_two_roles(tmp_path: Path) -> None:
    made = images([png(p) for p in pictures(4)], [0, 1, 0, 1])
    library.DatasetDict(train=made, test=made).save_to_disk(tmp_path / "d")
    path = tmp_path / "d"
    assert failure(path, train="trian") == ": has no split 'trian'; did you mean 'train'?"
    assert "has no split 'val' for data.params.validation" in failure(path, validation="val")
    assert "one split has two roles: train train, test train" in failure(path, test="train")
    assert "has a test split of its own: remove data.params.test_fraction" in failure(path, test_fraction=0.5)


def test_a_split_that_was_published_without_labels(tmp_path: Path) -> None:
    made = {"train": numbers([[1.0], [2.0]], [0, 1]), "test": numbers([[1.0], [2.0]], [-1, -1])}
    library.DatasetDict(made).save_to_disk(tmp_path / "d")
    assert failure(tmp_path / "d", input="x") == (
        ": test: every label is -1, which stands for none: this split was published without labels"
    )


def test_bad_images_are_named_or_left_out(tmp_path: Path) -> None:
    contents = [png(p) for p in pictures(10)]
    contents[3] = b"junk"
    library.DatasetDict(train=images(contents, [0, 1] * 5), test=images([png(pictures(1)[0])], [0])).save_to_disk(
        tmp_path / "d"
    )
    path = tmp_path / "d"
    assert failure(path).startswith(": train: row 3: the image cannot be decoded")
    data = load(path, unreadable="skip", max_unreadable=0.1)
    assert data.notes == (f"data: the train split leaves out 1 of 10 images that cannot be read: {path}: train: row 3",)
    assert whole(data.split("train"))["target"].tolist() == [0, 1, 0, 0, 1, 0, 1, 0, 1]
    assert "1 of 10 images of the train split cannot be read, more than" in failure(path, unreadable="skip")


def test_images_outside_the_files_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png(pictures(1)[0]))
    import pyarrow as pa
    from pyarrow import parquet

    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = pa.array([{"bytes": None, "path": str(tmp_path / "x.png")}] * 2, struct)
    (tmp_path / "d").mkdir()
    parquet.write_table(pa.table({"image": cells, "label": [0, 0]}), tmp_path / "d" / "train.parquet")
    assert "train: row 0: no image bytes" in failure(tmp_path / "d", test_fraction=0.5)


def test_damaged_and_empty_folders(tmp_path: Path) -> None:
    assert failure(tmp_path / "absent").startswith(
        ": no such file or folder; a data set of the hub is data.params.name"
    )
    (tmp_path / "empty").mkdir()
    assert ": holds no file" in failure(tmp_path / "empty")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("hello")
    assert ": holds neither what save_to_disk leaves nor" in failure(tmp_path / "other")
    images([png(pictures(1)[0])] * 2, [0, 1]).save_to_disk(tmp_path / "d")
    arrow = tmp_path / "d" / "data-00000-of-00001.arrow"
    content = arrow.read_bytes()
    for bad in (b"", b"junk" * 9, content[: len(content) // 2]):
        arrow.write_bytes(bad)
        assert failure(tmp_path / "d", test_fraction=0.5)
    (tmp_path / "d" / "state.json").write_text("{")
    assert "cannot be read as save_to_disk leaves it" in failure(tmp_path / "d", test_fraction=0.5)
    (tmp_path / "train.parquet").write_bytes(b"junk")
    assert ": not a readable Parquet file" in failure(tmp_path / "train.parquet")


@pytest.mark.parametrize(
    "wrong", [{}, {"path": "d", "name": "x"}, {"path": "d", "revision": "main"}, {"name": "x", "size": 0}]
)
def test_params_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        huggingface.Params.model_validate(wrong)


class Hub:
    """Stands for the hub: what it answers, and how often it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: Exception | None, found: Any = None) -> None:
        import huggingface_hub

        self.asked: list[Any] = []
        self.loaded: list[Any] = []

        def info(_: object, name: str, **settings: Any) -> None:
            self.asked.append((name, settings))
            if answer is not None:
                raise answer

        def load_dataset(name: str, config: str | None, **settings: Any) -> Any:
            self.loaded.append((name, config, settings))
            return found

        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
        monkeypatch.setattr(library, "load_dataset", load_dataset)


def test_without_a_network_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    hub = Hub(monkeypatch, httpx.ConnectError("Name or service not known"))
    with pytest.raises(EnvironmentProblem, match=r"some/set: the Hugging Face hub cannot be reached .*save_to_disk"):
        huggingface.open(huggingface.Params(name="some/set"))
    assert hub.asked[0][1]["timeout"] <= 10
    assert hub.loaded == []


def test_a_name_the_hub_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    response = httpx.Response(404, request=httpx.Request("GET", "https://example.org"))
    Hub(monkeypatch, RepositoryNotFoundError("404", response=response))
    with pytest.raises(DataError, match="the hub has no data set 'some/set' at revision v1 that you may read"):
        huggingface.open(huggingface.Params(name="some/set", revision="v1"))
    Hub(monkeypatch, HFValidationError("bad"))
    with pytest.raises(DataError, match="'a b' is no name of the hub"):
        huggingface.open(huggingface.Params(name="a b"))


def test_a_set_of_the_hub_is_noted_unless_a_commit_pins_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = images([png(p) for p in pictures(2)], [0, 1])
    hub = Hub(monkeypatch, None, library.DatasetDict(train=made, test=made))
    data = huggingface.open(huggingface.Params(name="some/set", config="small"))
    assert hub.loaded == [("some/set", "small", {"revision": None})]
    assert len(data.notes) == 1
    assert "some/set is what the hub has as its latest" in data.notes[0]
    assert huggingface.open(huggingface.Params(name="some/set", revision="0" * 40)).notes == ()
    assert huggingface.files(huggingface.Params(name="some/set")) == {}


def test_offline_the_copy_in_the_cache_is_used_without_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    made = images([png(p) for p in pictures(2)], [0, 1])
    hub = Hub(monkeypatch, RuntimeError("asked"), library.DatasetDict(train=made, test=made))
    monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: True)
    assert len(huggingface.open(huggingface.Params(name="some/set")).split("train")) == 2
    assert hub.asked == []


def test_nothing_is_printed_and_the_library_stays_as_it_was(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    images([png(p) for p in pictures(4)], [0, 1, 0, 1]).save_to_disk(tmp_path / "d")
    library.enable_progress_bars()
    before = library.logging.get_verbosity(), logging.getLogger("huggingface_hub").level
    capfd.readouterr()
    load(tmp_path / "d", test_fraction=0.5)
    assert capfd.readouterr() == ("", "")
    assert not library.are_progress_bars_disabled()
    assert (library.logging.get_verbosity(), logging.getLogger("huggingface_hub").level) == before


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"data source datasets needs datasets.*sparsify-deploy\[hf\]"):
        load(tmp_path)
