"""Archives: layouts, scaling, and one line for each thing that can be wrong with one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from sparsify_deploy.datasets import npz
from sparsify_deploy.errors import DataError

RNG = np.random.RandomState(0)


def arrays(shape: tuple[int, ...] = (28, 28), dtype: str = "uint8", train: int = 40, test: int = 10) -> dict:
    def inputs(n: int):
        if dtype == "uint8":
            return RNG.randint(0, 256, (n, *shape)).astype("uint8")
        return RNG.randn(n, *shape).astype(dtype)

    return {
        "x_train": inputs(train),
        "y_train": np.arange(train, dtype=np.uint8) % 10,
        "x_test": inputs(test),
        "y_test": np.arange(test, dtype=np.uint8) % 10,
    }


@pytest.fixture
def save(tmp_path: Path):
    def _save(content: dict, name: str = "d.npz") -> Path:
        np.savez_compressed(tmp_path / name, **content)
        return tmp_path / name

    return _save


def load(path: Path, **params: object):
    return npz.open(npz.Params.model_validate({"path": path, **params}))


def whole(split) -> dict[str, torch.Tensor]:
    return split.take(torch.arange(len(split)))


def failure(path: Path, **params: object) -> str:
    with pytest.raises(DataError) as caught:
        load(path, **params)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def test_grey_bytes_become_standardised_images(save) -> None:
    content = arrays()
    data = load(save(content))
    train, test = whole(data.split("train")), whole(data.split("test"))
    assert train["input"].shape == (40, 1, 28, 28)
    assert train["input"].dtype == torch.float32
    assert train["target"].tolist() == content["y_train"].tolist()
    assert train["target"].dtype == torch.int64
    pixels = content["x_train"].astype(np.float64) / 255
    expected = (content["x_test"] / 255.0 - pixels.mean()) / pixels.std()
    np.testing.assert_allclose(test["input"][:, 0].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert data.split("train").fields["input"].dtype == torch.uint8
    assert data.inputs == ("input",)
    assert data.classes is None


@pytest.mark.parametrize("dtype", ["uint8", "float64"])
def test_colours_are_standardised_each_by_itself(save, dtype: str) -> None:
    content = arrays((5, 6, 3), dtype)
    content["x_train"][..., 1] //= 2
    x = whole(load(save(content)).split("train"))["input"]
    assert x.shape == (40, 3, 5, 6)
    assert x.mean((0, 2, 3)).abs().max() < 1e-5
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3), rtol=1e-5, atol=1e-5)
    raw = content["x_train"].astype(np.float64).transpose(0, 3, 1, 2)
    mean, std = raw.mean((0, 2, 3), keepdims=True), raw.std((0, 2, 3), keepdims=True)
    np.testing.assert_allclose(x.numpy(), (raw - mean) / std, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_statistics_cover_every_example_of_a_large_split(save, dtype: str) -> None:
    content = arrays((2, 2), dtype, train=9001)
    content["x_train"][8900:] = 3
    x = whole(load(save(content)).split("train"))["input"]
    assert x.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert x.std(correction=0).item() == pytest.approx(1.0, abs=1e-5)


def test_without_normalize_bytes_are_0_to_1_and_floats_stay(save) -> None:
    content = arrays()
    x = whole(load(save(content), normalize=False).split("train"))["input"]
    np.testing.assert_allclose(x[:, 0].numpy(), content["x_train"] / 255.0, rtol=1e-6)
    content = arrays((3, 6, 6), "float32")
    x = whole(load(save(content), normalize=False).split("train"))["input"]
    np.testing.assert_array_equal(x.numpy(), content["x_train"])


def test_features_stay_as_they_are(save) -> None:
    content = arrays((7,), "float64")
    content["y_train"], content["y_test"] = (content[x][:, 0] for x in ("x_train", "x_test"))
    batch = whole(load(save(content)).split("train"))
    np.testing.assert_array_equal(batch["input"].numpy(), content["x_train"].astype(np.float32))
    assert batch["target"].dtype == torch.float32
    assert batch["target"].shape == (40,)
    flat = arrays((9,))
    x = whole(load(save(flat)).split("train"))["input"]
    np.testing.assert_allclose(x.numpy(), flat["x_train"] / 255.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "layout", "result"),
    [
        ((8, 9, 3), "auto", (3, 8, 9)),
        ((3, 8, 9), "auto", (3, 8, 9)),
        ((8, 9, 2), "NHWC", (2, 8, 9)),
        ((2, 8, 9), "NCHW", (2, 8, 9)),
        ((3, 4, 3), "NCHW", (3, 4, 3)),
        ((8, 9), "NHW", (1, 8, 9)),
        ((8, 9), "none", (8, 9)),
        ((5,), "auto", (5,)),
        ((2, 3, 4, 5), "auto", (2, 3, 4, 5)),
    ],
)
def test_layouts(save, shape: tuple[int, ...], layout: str, result: tuple[int, ...]) -> None:
    assert load(save(arrays(shape)), layout=layout).split("test").take(torch.tensor([0]))["input"].shape[1:] == result


def test_a_transposed_image_keeps_its_pixels_in_place(save) -> None:
    content = arrays((6, 7, 3))
    x = whole(load(save(content), normalize=False).split("test"))["input"]
    assert x[2, 1, 3, 4].item() == pytest.approx(content["x_test"][2, 3, 4, 1] / 255)


@pytest.mark.parametrize("kind", ["uint8", "int32", "int64", ">i2", "bool"])
def test_integer_labels_of_any_kind(save, kind: str) -> None:
    content = arrays()
    for key in ("y_train", "y_test"):
        content[key] = (content[key] % 2).astype(kind)
    assert whole(load(save(content)).split("train"))["target"].tolist() == [0, 1] * 20
    content["y_train"], content["y_test"] = content["y_train"][:, None], content["y_test"][:, None]
    assert whole(load(save(content)).split("train"))["target"].shape == (40,)


def test_a_constant_channel_is_not_divided_by_zero(save) -> None:
    content = arrays((6, 6, 3))
    content["x_train"][..., 2] = 51
    x = whole(load(save(content)).split("train"))["input"]
    assert not x[:, 2].any()
    assert x.isfinite().all()


def test_names_can_be_chosen_and_are_suggested(save) -> None:
    content = arrays()
    path = save({"images": content["x_train"], **{k: content[k] for k in ("y_train", "x_test", "y_test")}})
    assert len(load(path, train_inputs="images").split("train")) == 40
    assert failure(path, train_inputs="imags") == "no array is called 'imags'; did you mean 'images'?"
    assert failure(path, train_inputs="qqq").startswith("no array is called 'qqq'; one of images, y_train")


def broken(**changes: object) -> dict:
    return {**arrays(), **changes}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (broken(x_train=np.array([{}, {}], dtype=object)), "x_train holds Python objects, expected numbers"),
        (broken(y_train=np.zeros(39, dtype=int)), "the train split has 40 inputs and 39 targets"),
        (broken(x_test=np.zeros((0, 28, 28), "uint8"), y_test=np.zeros(0, "uint8")), "the test split is empty"),
        (
            broken(x_test=np.zeros((10, 27, 28), "uint8")),
            "train inputs have shape (1, 28, 28), test inputs (1, 27, 28)",
        ),
        (broken(x_test=np.zeros((10, 28, 28), "float32")), "train inputs are uint8, test inputs float32"),
        (broken(y_test=np.zeros(10, "float32")), "train and test targets are unlike: int64 () and float32 ()"),
        (broken(x_train=np.zeros((40, 28, 28), "int32")), "x_train: inputs of type int32, expected uint8"),
        (broken(x_train=np.zeros((40, 28, 28), "uint16")), "x_train: inputs of type uint16, expected uint8"),
        (broken(x_train=np.zeros((40, 28, 28), "complex64")), "x_train: inputs of type complex64"),
        (broken(x_train=np.full((40, 2, 2), "a")), "x_train: inputs of type <U1"),
        (broken(y_train=np.full(40, "a")), "y_train: targets of type <U1, expected integers"),
        (broken(y_train=np.arange(40) - 3), "y_train: label -3 at index 0; labels start at 0"),
        (broken(y_train=np.int64(3)), "y_train is no array of examples"),
        (broken(y_train=np.zeros((40, 10), "int64")), "train and test targets are unlike: int64 (10,) and int64 ()"),
        (broken(x_train=np.uint8(3)), "x_train is no array of examples"),
        (broken(x_train=np.zeros((40, 5, 5, 5), "uint8")), "x_train: cannot tell where the channels of (40, 5, 5, 5)"),
        (broken(x_train=np.zeros((40, 3, 5, 3), "uint8")), "x_train: cannot tell where the channels of (40, 3, 5, 3)"),
    ],
)
def test_contents_that_are_wrong(save, content: dict, says: str) -> None:
    assert failure(save(content)).startswith(says)


def test_masks_are_whole_numbers_of_any_shape_and_mean_what_a_task_says(save) -> None:
    masks = np.arange(40 * 4, dtype="int16").reshape(40, 2, 2) - 1
    data = load(save(arrays() | {"y_train": masks, "y_test": masks[:10]}))
    target = whole(data.split("train"))["target"]
    assert target.dtype == torch.int64
    assert target.tolist() == masks.tolist()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_floats_that_are_not_finite(save, value: float) -> None:
    content = arrays((7,), "float64", train=5000)
    content["x_train"][4500, 3] = value
    assert failure(save(content)).startswith(f"x_train: {value} at index (4500, 3); values must be finite")
    content["x_train"][4500, 3] = 0
    content["y_train"] = np.full(5000, value)
    assert failure(save(content)).startswith(f"y_train: {value} at index (0,)")


def test_a_layout_that_does_not_fit(save) -> None:
    assert failure(save(arrays()), layout="NCHW") == "x_train: layout NCHW has 4 axes, the array has shape (40, 28, 28)"


def test_files_that_are_none(save, tmp_path: Path) -> None:
    assert failure(tmp_path / "absent.npz") == "no such file"
    assert failure(tmp_path) == "is a folder, expected a .npz file"
    np.save(tmp_path / "one.npy", np.zeros(3))
    assert failure(tmp_path / "one.npy").startswith("one bare array, expected a .npz archive")


@pytest.mark.parametrize("content", [b"", b"junk" * 40, b"PK\x03\x04" + b"x" * 50, b"\x93NUMPY" + b"x" * 50])
def test_junk(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "d.npz"
    path.write_bytes(content)
    assert "damaged or cut short" in failure(path)


def test_cut_short_and_damaged_inside(save) -> None:
    path = save(arrays())
    content = path.read_bytes()
    for kept in (0.2, 0.7, 0.99):
        path.write_bytes(content[: int(len(content) * kept)])
        assert "damaged or cut short" in failure(path)
    middle = len(content) // 3
    path.write_bytes(content[:middle] + bytes(64) + content[middle + 64 :])
    assert failure(path).startswith("x_train cannot be read, damaged or cut short")


def test_params_are_strict() -> None:
    for wrong in ({"layout": "HWC"}, {"normalise": True}, {"normalize": 1}):
        with pytest.raises(ValidationError):
            npz.Params.model_validate({"path": Path("d.npz"), **wrong})


def test_real_mnist(real_data: Path) -> None:
    path = real_data / "mnist" / "mnist.npz"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    data = load(path)
    assert (len(data.split("train")), len(data.split("test"))) == (60_000, 10_000)
    scale = data.split("train").affine["input"]
    assert (scale.shift / 255).item() == pytest.approx(0.1307, abs=1e-4)  # the constants everybody uses
    assert (scale.divisor / 255).item() == pytest.approx(0.3081, abs=1e-4)
