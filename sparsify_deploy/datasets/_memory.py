"""Data sets that lie in memory: arrays as they were stored, turned into floats one batch at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from sparsify_deploy.datasets._splits import GET_VALIDATION
from sparsify_deploy.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparsify_deploy.preprocessing.spec import Raw, Spec

    Pair = tuple[NDArray[Any], NDArray[Any]]

_CHUNK = 4096

SPLITS = ("train", "test", "validation")
UNLABELLED = "data.params.labels is false: examples without labels are good for quantize.calibration_data alone"


@dataclass(frozen=True)
class Affine:
    """`(x - shift) / divisor` in float32; both broadcast against `(B, ...)`."""

    shift: Tensor
    divisor: Tensor

    def __call__(self, values: Tensor) -> Tensor:
        """A new tensor."""
        return values.to(torch.float32).sub(self.shift).div_(self.divisor)


UNIT = Affine(torch.zeros(()), torch.full((), 255.0))
"""Bytes to 0..1."""

HALF = Affine(torch.full((), 127.5), torch.full((), 127.5))
"""Bytes to -1..1."""


@dataclass(frozen=True)
class MemorySplit:
    """Fields of equal length along axis 0; `uint8` fields are stored so and leave `take` as float32."""

    fields: Mapping[str, Tensor]
    affine: Mapping[str, Affine] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        """The examples at int64 `indices` `(B,)`, each field batched along axis 0."""
        rows = {name: values[indices] for name, values in self.fields.items()}
        return {name: self.affine[name](value) if name in self.affine else value for name, value in rows.items()}


@dataclass(frozen=True)
class MemoryDataSet:
    """A `types.DataSet` in memory; `notes` say what a reader of a report must know of it.

    `preprocessing` says how a raw example becomes the inputs; `raw` holds a few of the test split so, by index.
    `advice` says how this source could have a validation split. A set without labels has no test split either.
    """

    train: MemorySplit
    test: MemorySplit | None
    inputs: tuple[str, ...] = ("input",)
    classes: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    preprocessing: Spec | None = None
    raw: Mapping[int, Raw] = field(default_factory=dict)
    validation: MemorySplit | None = None
    advice: str = GET_VALIDATION

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits there are."""
        return tuple(name for name in SPLITS if getattr(self, name) is not None)

    def split(self, name: Literal["train", "test", "validation"]) -> MemorySplit:
        """One of `splits`. Raises DataError for another."""
        found: MemorySplit | None = {"train": self.train, "test": self.test, "validation": self.validation}[name]
        if found is None and self.test is None:
            raise DataError(UNLABELLED)
        if found is None:
            raise DataError(f"data: there is no {name} split: {self.advice}")
        return found


def data_set(
    train: Pair,
    test: Pair,
    affine: Affine | None,
    classes: tuple[str, ...] | None = None,
    *,
    notes: tuple[str, ...] = (),
    preprocessing: Spec | None = None,
    raw: Mapping[int, Raw] | None = None,
    validation: Pair | None = None,
) -> MemoryDataSet:
    """A data set of two or three (inputs, targets) pairs whose inputs pass through `affine`."""
    scale = {} if affine is None else {"input": affine}

    def split(pair: Pair) -> MemorySplit:
        return MemorySplit({"input": tensor(pair[0]), "target": tensor(pair[1])}, scale)

    return MemoryDataSet(
        split(train),
        split(test),
        classes=classes,
        notes=notes,
        preprocessing=preprocessing,
        raw=raw if raw is not None else {},
        validation=split(validation) if validation is not None else None,
    )


def unlabelled(
    inputs: NDArray[Any], affine: Affine | None, notes: tuple[str, ...] = (), preprocessing: Spec | None = None
) -> MemoryDataSet:
    """Inputs alone, in one split; good for calibration."""
    scale = {} if affine is None else {"input": affine}
    split = MemorySplit({"input": tensor(inputs)}, scale)
    return MemoryDataSet(split, None, notes=notes, preprocessing=preprocessing)


def numbers(affine: Affine) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Its shift and divisor as a `preprocessing.spec` has them: one number a channel, or one for all."""
    shift, divisor = (tuple(map(float, values.flatten().tolist())) for values in (affine.shift, affine.divisor))
    return shift, divisor


def scaling(values: NDArray[Any], *, normalize: bool) -> Affine | None:
    """What makes inputs of images `(N, C, H, W)`, uint8 or float32: standardised, or bytes to 0..1, or as they are."""
    if normalize:
        return standardising(values)
    return UNIT if values.dtype == np.uint8 else None


def standardising(values: NDArray[Any]) -> Affine:
    """What gives each channel (axis 1) of `values` `(N, C, ...)` mean 0 and deviation 1.

    The mean and deviation of bytes come from a histogram and are exact. A constant channel is divided by 1, not 0.
    """
    count, channels = values.size // values.shape[1], values.shape[1]
    if values.dtype == np.uint8:
        histogram = np.zeros((channels, 256), dtype=np.int64)
        for start in range(0, len(values), _CHUNK):
            for channel in range(channels):
                part = values[start : start + _CHUNK, channel].reshape(-1)
                histogram[channel] += np.bincount(part, minlength=256)
        levels = np.arange(256.0)
        mean = histogram @ levels / count
        variance = histogram @ levels**2 / count - mean**2
    else:
        axes = tuple(axis for axis in range(values.ndim) if axis != 1)
        mean = values.mean(axis=axes, dtype=np.float64)
        variance = np.zeros(channels)
        for start in range(0, len(values), _CHUNK):
            part = values[start : start + _CHUNK].astype(np.float64)
            variance += ((part - mean.reshape(-1, *(1,) * (values.ndim - 2))) ** 2).sum(axis=axes)
        variance /= count
    deviation = np.sqrt(np.maximum(variance, 0.0))
    deviation[deviation == 0.0] = 255.0 if values.dtype == np.uint8 else 1.0
    shape = (1, channels, *(1,) * (values.ndim - 2))
    return Affine(*(torch.tensor(v, dtype=torch.float32).reshape(shape) for v in (mean, deviation)))


def imagenet(*, grey: bool) -> Affine:
    """What gives bytes the mean and deviation that ImageNet classifiers are trained on; grey: of its luminance."""
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    if grey:
        luminance = torch.tensor([0.299, 0.587, 0.114])
        mean, deviation = (mean @ luminance).reshape(1), (deviation @ luminance).reshape(1)
    return Affine(255 * mean.reshape(1, -1, 1, 1), 255 * deviation.reshape(1, -1, 1, 1))


def normalization(which: str, values: NDArray[np.uint8], *, grey: bool) -> Affine:
    """What makes inputs of bytes `(N, C, H, W)`: `imagenet`, `half` (-1..1), `data` (of `values`) or `none` (0..1)."""
    if which == "imagenet":
        return imagenet(grey=grey)
    if which == "half":
        return HALF
    return standardising(values) if which == "data" else UNIT


def targets(values: NDArray[Any], where: str) -> NDArray[Any]:
    """Integer targets as int64, and float targets as float32, all finite. `where` begins an error.

    One integer an example `(N,)` is a class label, none negative; several `(N, ...)`, such as a mask of an image, mean
    what the task says.
    """
    if values.dtype.kind in "iub" and values.ndim >= 1:
        labels = values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
        if labels.ndim == 1 and len(labels) and int(labels.min()) < 0:
            raise DataError(f"{where}: label {int(labels.min())} at index {int(labels.argmin())}; labels start at 0")
        return labels.astype(np.int64)
    if values.dtype.kind == "f" and values.ndim >= 1:
        return floats(values, where)
    raise DataError(f"{where}: targets of type {values.dtype}, expected integers (classes) or floats (values)")


def floats(values: NDArray[Any], where: str) -> NDArray[np.float32]:
    """`values` as float32, refused where one is not finite."""
    with np.errstate(over="ignore"):
        result = values.astype(np.float32, copy=False)
    for start in range(0, len(result), _CHUNK):
        bad = np.argwhere(~np.isfinite(result[start : start + _CHUNK]))
        if len(bad):
            bad[0][0] += start
            value = values[tuple(bad[0])]
            raise DataError(f"{where}: {value} at index {tuple(map(int, bad[0]))}; values must be finite in float32")
    return result


def tensor(values: NDArray[Any]) -> Tensor:
    """`values` as a tensor, shared where torch can share it."""
    native = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("="))
    return torch.from_numpy(native if native.flags.writeable else native.copy())


def check_splits(train: Pair, test: Pair, where: str, validation: Pair | None = None) -> None:
    """Refuse splits that are empty, uneven or unlike each other."""
    others = {"test": test} | ({"validation": validation} if validation is not None else {})
    for name, (inputs, labels) in {"train": train, **others}.items():
        if len(inputs) != len(labels):
            raise DataError(f"{where}: the {name} split has {len(inputs)} inputs and {len(labels)} targets")
        if not inputs.size:
            raise DataError(f"{where}: the {name} split is empty")
    for name, (inputs, labels) in others.items():
        if train[0].shape[1:] != inputs.shape[1:]:
            raise DataError(f"{where}: train inputs have shape {train[0].shape[1:]}, {name} inputs {inputs.shape[1:]}")
        if train[0].dtype != inputs.dtype:
            raise DataError(f"{where}: train inputs are {train[0].dtype}, {name} inputs {inputs.dtype}")
        if train[1].dtype != labels.dtype or train[1].shape[1:] != labels.shape[1:]:
            kinds = " and ".join(f"{y.dtype} {y.shape[1:]}" for y in (train[1], labels))
            raise DataError(f"{where}: train and {name} targets are unlike: {kinds}")
