"""Arrays in a NumPy .npz archive, such as Keras' mnist.npz.

Bytes (uint8) stay bytes in memory and become floats one batch at a time. Images are standardised by the mean and
deviation of each channel of the train split. Feature vectors of floats are taken as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from sparsify_deploy.datasets._params import MaybeUnlabelled
from sparsify_deploy.params import InputPath

if TYPE_CHECKING:
    from sparsify_deploy.types import DataSet

VERSION = 1
RUNS_USER_CODE = False

_SPLITS = ("train", "test", "validation")


class Params(MaybeUnlabelled):
    """The archive, the names of its arrays, and how to read them."""

    path: InputPath = Field(description="a .npz file")
    train_inputs: str = Field("x_train", description="name of an array")
    train_targets: str = Field("y_train", description="name of an array")
    test_inputs: str = Field("x_test", description="name of an array")
    test_targets: str = Field("y_test", description="name of an array")
    validation_inputs: str | None = Field(None, description="none: there is no validation split")
    validation_targets: str | None = Field(None, description="its targets")
    layout: Literal["auto", "NHWC", "NCHW", "NHW", "none"] = Field(
        "auto", description="axes of the inputs; auto: 3 axes NHW, 4 by where 1, 3 or 4 channels are, else none"
    )
    normalize: bool = Field(True, description="images: mean 0, deviation 1 per channel, measured on the train split")

    @model_validator(mode="after")
    def _both(self) -> Params:
        if (self.validation_inputs is None) != (self.validation_targets is None):
            raise ValueError("validation_inputs and validation_targets go together: name both arrays")
        return self


def files(params: Params) -> Mapping[str, Path]:
    """The archive."""
    return {"path": params.path}


def open(params: Params) -> DataSet:
    """Images `(N, C, H, W)` or the arrays as they are, float32; integer targets int64 `(N,)`, others float32."""
    import numpy as np

    from sparsify_deploy.datasets import _npz
    from sparsify_deploy.datasets._memory import check_splits, data_set, targets, unlabelled
    from sparsify_deploy.datasets._splits import parted
    from sparsify_deploy.errors import DataError
    from sparsify_deploy.preprocessing.spec import samples

    where = str(params.path)
    names: dict[str, tuple[str, ...]] = {
        split: (getattr(params, f"{split}_inputs"), getattr(params, f"{split}_targets")) for split in _SPLITS
    }
    if not params.labels:
        names = {"train": (params.train_inputs,)}
    optional = names["test"] if params.test_fraction and params.labels else ()
    wanted = [name for some in names.values() for name in some if name is not None]
    held_out = dict.fromkeys(
        (params.test_inputs, params.test_targets), ", or set data.params.test_fraction, such as 0.2"
    )
    arrays = _npz.read(params.path, wanted, optional, held_out)
    there = {split: some for split, some in names.items() if all(name in arrays for name in some)}
    layout = _npz.layout_of(arrays[params.train_inputs], params.layout, f"{where}: {params.train_inputs}")
    inputs = {split: _npz.inputs_of(arrays[x], layout, f"{where}: {x}") for split, (x, *_) in there.items()}
    if not params.labels:
        if not inputs["train"].size:
            raise DataError(f"{where}: {params.train_inputs} is empty")
        return unlabelled(inputs["train"], _npz.affine_of(inputs["train"], layout, normalize=params.normalize))
    pairs = {split: (inputs[split], targets(arrays[y], f"{where}: {y}")) for split, (_, y) in there.items()}
    parts = parted(pairs["train"], pairs.get("test"), pairs.get("validation"), params, where)
    check_splits(parts.train, parts.test, where, parts.validation)
    affine = _npz.affine_of(parts.train[0], layout, normalize=params.normalize)
    source = params.train_inputs if parts.test_rows is not None else params.test_inputs
    rows = parts.test_rows if parts.test_rows is not None else np.arange(len(arrays[source]))
    spec = _npz.spec_of(arrays[source], layout, affine, f"one example as {source} of {params.path.name} holds it")
    raw = {i: np.array(arrays[source][rows[i]]) for i in samples(len(rows))}
    return data_set(
        parts.train, parts.test, affine, notes=parts.notes, preprocessing=spec, raw=raw, validation=parts.validation
    )
