"""1,797 handwritten digits, 8x8, that come with scikit-learn.

Alpaydin & Kaynak 1998, UCI "Optical Recognition of Handwritten Digits" (its test part). The split is ours and fixed:
1,437 to train and 360 to test, each digit in equal proportion. Small enough for tests and
first steps, too small for claims.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from sparsify_deploy.datasets._params import WithValidation

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sparsify_deploy.types import DataSet

VERSION = 1
RUNS_USER_CODE = False

_TEST_EXAMPLES = 360


class Params(WithValidation):
    """How large the images shall be."""

    size: int = Field(8, ge=8, le=256, description="height and width, pixels; above 8 interpolated bilinearly")


def files(params: Params) -> Mapping[str, Path]:
    """scikit-learn's own file, found without importing scikit-learn."""
    return {"digits": _file()}


def open(params: Params) -> DataSet:
    """Images `(N, 1, size, size)` with mean 0 and deviation 1 over the train split; targets 0..9."""
    import numpy as np
    import torch

    from sparsify_deploy.datasets._memory import data_set, numbers, standardising
    from sparsify_deploy.datasets._splits import parted
    from sparsify_deploy.preprocessing.spec import ArrayInput, ArraySpec, samples

    pixels, labels = _read(_file())
    x = torch.from_numpy(pixels)
    if params.size != 8:
        x = torch.nn.functional.interpolate(x, size=(params.size,) * 2, mode="bilinear", align_corners=False)
    is_test = np.zeros(len(labels), dtype=bool)
    is_test[_test_indices(labels)] = True
    train, test = ((x.numpy()[part], labels[part]) for part in (~is_test, is_test))
    parts = parted(train, test, None, params, "digits")
    affine, classes = standardising(parts.train[0]), tuple("0123456789")
    shape = (params.size, params.size)
    spec = ArraySpec(
        (ArrayInput("input", "float32", shape, "HW", *numbers(affine)),),
        example=f"a grey image {params.size}x{params.size}, 0 (paper) to 16 (ink)",
        classes=classes,
    )
    raw = {i: test[0][i, 0].copy() for i in samples(len(test[0]))}
    return data_set(
        parts.train, test, affine, classes, notes=parts.notes, preprocessing=spec, raw=raw, validation=parts.validation
    )


def _file() -> Path:
    from importlib.util import find_spec

    from sparsify_deploy.errors import DataError, MissingExtra

    spec = find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra("scikit-learn", "train", "the digits data set")
    path = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    if not path.is_file():
        raise DataError(f"{path}: no such file; this scikit-learn is incomplete or unknown, reinstall it")
    return path


def _read(path: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Pixels `(N, 1, 8, 8)` from 0 to 16, labels `(N,)`."""
    import gzip
    import zlib

    import numpy as np

    from sparsify_deploy.errors import DataError

    try:
        with gzip.open(path, "rt", encoding="ascii") as file:
            table: NDArray[Any] = np.loadtxt(file, delimiter=",")
    except (OSError, EOFError, ValueError, zlib.error) as exc:
        raise DataError(f"{path}: damaged, reinstall scikit-learn ({exc})") from exc
    if table.shape != (1797, 65):
        raise DataError(f"{path}: a table of {table.shape}, expected (1797, 65); reinstall scikit-learn")
    return table[:, :64].reshape(-1, 1, 8, 8).astype(np.float32), table[:, 64].astype(np.int64)


def _test_indices(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """A fifth of each digit, drawn once for all; the largest remainders make the total exact."""
    import numpy as np

    # RandomState, because numpy promises its stream for ever, and default_rng's not.
    random = np.random.RandomState(0)
    counts = np.bincount(labels, minlength=10)
    exact = counts * _TEST_EXAMPLES / counts.sum()
    take = np.floor(exact).astype(int)
    rest = np.argsort(take - exact, kind="stable")[: _TEST_EXAMPLES - take.sum()]
    take[rest] += 1
    chosen = [random.permutation(np.flatnonzero(labels == digit))[: take[digit]] for digit in range(10)]
    return np.sort(np.concatenate(chosen))
