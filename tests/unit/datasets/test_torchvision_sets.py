"""torchvision's sets: their own files through our decoding, and one line for what is not there."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from sparsify_deploy.datasets import torchvision as source
from sparsify_deploy.errors import DataError, EnvironmentProblem, MissingExtra

Image = pytest.importorskip("PIL.Image")

RNG = np.random.RandomState(0)
PARTS = {"train": ("train", 40), "test": ("t10k", 10)}


@pytest.fixture
def mnist(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """The four files of MNIST, smaller; and their pixels."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = {}
    for split, (prefix, count) in PARTS.items():
        pixels[split] = RNG.randint(0, 256, (count, 28, 28)).astype("uint8")
        header = struct.pack(">BBBBIII", 0, 0, 8, 3, count, 28, 28)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels[split].tobytes())
        labels = (np.arange(count) % 10).astype("uint8")
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">BBBBI", 0, 0, 8, 1, count) + labels.tobytes())
    return tmp_path, pixels


def load(path: Path, name: str = "MNIST", **params: object) -> Any:
    return source.open(source.Params.model_validate({"path": path, "name": name, **params}))


def whole(split: Any) -> dict[str, torch.Tensor]:
    batch: dict[str, torch.Tensor] = split.take(torch.arange(len(split)))
    return batch


def test_mnist_pixel_by_pixel(torchvision: ModuleType, mnist: tuple[Path, dict[str, np.ndarray]]) -> None:
    path, pixels = mnist
    data = load(path, mode="L", normalize="none")
    for split in ("train", "test"):
        batch = whole(data.split(split))
        np.testing.assert_allclose(batch["input"][:, 0].numpy(), pixels[split] / 255, rtol=1e-6)
        assert batch["target"].tolist() == (np.arange(len(pixels[split])) % 10).tolist()
    assert data.classes[1] == "1 - one"
    assert data.preprocessing.mode == "L"
    assert set(data.raw) == {i * 10 // 8 for i in range(8)}


def test_a_validation_split_is_held_out(torchvision: ModuleType, mnist: tuple[Path, dict[str, np.ndarray]]) -> None:
    data = load(mnist[0], mode="L", size=14, fit="stretch", validation_fraction=0.25)
    assert {name: len(data.split(name)) for name in data.splits} == {"train": 30, "test": 10, "validation": 10}
    assert whole(data.split("validation"))["input"].shape == (10, 1, 14, 14)
    assert whole(data.split("validation"))["target"].bincount().tolist() == [1] * 10


def test_the_files_of_the_set_and_of_no_other_define_it(mnist: tuple[Path, dict[str, np.ndarray]]) -> None:
    (mnist[0] / "cifar-10-batches-py").mkdir()
    (mnist[0] / "cifar-10-batches-py" / "x").write_bytes(b"")
    found = source.files(source.Params(path=mnist[0], name="MNIST"))
    assert sorted(found) == sorted(
        f"MNIST/raw/{prefix}-{kind}"
        for prefix, _ in PARTS.values()
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
    )
    assert source.files(source.Params(path=mnist[0] / "absent", name="MNIST", download=True)) == {}


def test_a_set_of_one_split_and_of_files(torchvision: ModuleType, tmp_path: Path) -> None:
    for k, name in enumerate(("Forest", "River")):
        folder = tmp_path / "eurosat" / "2750" / name
        folder.mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((8, 8, 3), 100 * k + i, dtype="uint8")).save(folder / f"{i}.png")
    with pytest.raises(DataError, match=r"EuroSAT: has no test split: name it, or set data.params.test_fraction"):
        load(tmp_path, "EuroSAT")
    data = load(tmp_path, "EuroSAT", test_fraction=0.25, normalize="none")
    assert data.classes == ("Forest", "River")
    test = whole(data.split("test"))
    assert test["target"].tolist() == [0, 1]
    assert (test["input"][:, 0, 0, 0] * 255 // 100).tolist() == [0, 1]


def test_what_is_not_there_is_one_line(torchvision: ModuleType, mnist: tuple[Path, dict[str, np.ndarray]]) -> None:
    path = mnist[0]
    with pytest.raises(DataError, match=r"holds no CIFAR10 \(cifar-10-batches-py\): name the folder that does"):
        load(path, "CIFAR10")
    (path / "cifar-10-batches-py").mkdir()
    (path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"not the real one")
    with pytest.raises(DataError, match=r"CIFAR10: cannot be read .RuntimeError: Dataset not found or corrupted"):
        load(path, "CIFAR10")
    with pytest.raises(DataError, match=r"data.params.validation 'val': MNIST has none: set data.params.validation_fr"):
        load(path, validation="val")
    (path / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(b"cut")
    with pytest.raises(DataError, match=r"MNIST: cannot be read"):
        load(path)


def test_a_download_that_fails_is_one_line_and_silent(
    torchvision: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import socket
    import urllib.error
    import urllib.request

    waits = []

    def unreachable(*args: Any, **kwargs: Any) -> None:
        print("downloading")
        waits.append(socket.getdefaulttimeout())
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(EnvironmentProblem, match=r"MNIST: cannot be downloaded .*copy the folder"):
        load(tmp_path, download=True)
    assert capfd.readouterr() == ("", "")
    assert waits
    assert all(seconds is not None and seconds <= 60 for seconds in waits)
    assert socket.getdefaulttimeout() is None


def test_unknown_names_are_corrected() -> None:
    with pytest.raises(ValidationError, match=r"unknown set 'CIFAR-10'; did you mean 'CIFAR10'"):
        source.Params(path=Path(), name="CIFAR-10")


def test_every_set_is_one_of_torchvisions(torchvision: ModuleType) -> None:
    import inspect

    for name, known in source.SETS.items():
        taken = inspect.signature(getattr(torchvision.datasets, name)).parameters
        field = "train" if isinstance(known.train, bool) else "split"
        assert (field in taken) is (known.train is not None), name
        assert {"root", "download"} <= set(taken), name


def test_a_missing_package_names_the_extra(
    mnist: tuple[Path, dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(MissingExtra, match=r"torchvision.*sparsify-deploy\[vision\]"):
        load(mnist[0])
