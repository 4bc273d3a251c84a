"""torchvision's sets for classification by name: MNIST, CIFAR10, SVHN, Food101 and more.

torchvision finds and checks the files; images pass through the same resizing and scaling as those of other sources,
with each kept in memory as bytes. With `download` the set enters the fingerprint of a run by its name, whose checksums
torchvision holds; without, by the content of its files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from sparsify_deploy.datasets._params import NORMALIZE, Images, Normalize
from sparsify_deploy.menu import did_you_mean
from sparsify_deploy.params import InputPath

if TYPE_CHECKING:
    from sparsify_deploy.types import DataSet

VERSION = 2
RUNS_USER_CODE = False


@dataclass(frozen=True)
class Set:
    """Where below the root its files are, and what its splits are called; True and False where it takes `train`."""

    files: tuple[str, ...]
    train: str | bool | None
    test: str | bool | None
    others: tuple[str, ...] = ()


SETS: Mapping[str, Set] = {
    **{name: Set((f"{name}/raw",), True, False) for name in ("MNIST", "FashionMNIST", "KMNIST")},
    "CIFAR10": Set(("cifar-10-batches-py",), True, False),
    "CIFAR100": Set(("cifar-100-python",), True, False),
    "USPS": Set(("usps.bz2", "usps.t.bz2"), True, False),
    "SVHN": Set(("train_32x32.mat", "test_32x32.mat"), "train", "test"),
    "STL10": Set(("stl10_binary",), "train", "test"),
    "GTSRB": Set(("gtsrb",), "train", "test"),
    "Food101": Set(("food-101",), "train", "test"),
    "DTD": Set(("dtd",), "train", "test", ("val",)),
    "Flowers102": Set(("flowers-102",), "train", "test", ("val",)),
    "OxfordIIITPet": Set(("oxford-iiit-pet",), "trainval", "test"),
    "Country211": Set(("country211",), "train", "test", ("valid",)),
    "FGVCAircraft": Set(("fgvc-aircraft-2013b",), "train", "test", ("val",)),
    "RenderedSST2": Set(("rendered-sst2",), "train", "test", ("val",)),
    "Imagenette": Set(("imagenette2",), "train", "val"),
    "EuroSAT": Set(("eurosat",), None, None),
}
"""The sets there are; EuroSAT is one split, of which `test_fraction` makes two."""


class Params(Images):
    """Which set, where its files are, and how to decode."""

    name: str = Field(description="such as MNIST, CIFAR10, SVHN, Food101, as torchvision spells it")
    path: InputPath = Field(description="the root folder, which torchvision calls root")
    download: bool = Field(False, description="fetch the files where they are missing, which takes a network")
    validation: str | None = Field(None, description="the set's own validation split, such as val; none: there is none")
    normalize: Normalize = Field("data", description=NORMALIZE)

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in SETS:
            raise ValueError(f"unknown set {name!r}{did_you_mean(name, SETS)}")
        return name


def files(params: Params) -> Mapping[str, Path]:
    """The files of the set below the root, none with `download`. Raises DataError where there are none."""
    from sparsify_deploy.errors import DataError

    if params.download:
        return {}
    found: dict[str, Path] = {}
    for name in SETS[params.name].files:
        place = params.path / name
        inside = sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]
        found |= {file.relative_to(params.path).as_posix(): file for file in inside if file.is_file()}
    if not found:
        places = " and ".join(SETS[params.name].files)
        raise DataError(
            f"{params.path}: holds no {params.name} ({places}): name the folder that does, or set data.params.download"
        )
    return found


def open(params: Params) -> DataSet:
    """Images `(N, C, H, W)`, C = 3 or 1; labels int64 `(N,)`."""
    from functools import partial

    from sparsify_deploy.datasets import _torchvision
    from sparsify_deploy.datasets._encoded import image_set
    from sparsify_deploy.datasets._memory import normalization

    files(params)
    opened = _torchvision.splits(SETS[params.name], params)
    stored = {split: _torchvision.encoded(found, params, split) for split, found in opened.items()}
    affine_of = partial(normalization, params.normalize, grey=params.mode == "L")
    where = f"{params.path}: {params.name}"
    return image_set(stored, params, affine_of, where, classes=_torchvision.class_names(opened["train"]))
