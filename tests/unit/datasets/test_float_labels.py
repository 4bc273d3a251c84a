"""Class labels that were saved as real numbers are told from values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sparsify_deploy.datasets import npz
from sparsify_deploy.datasets._labels import judge
from sparsify_deploy.errors import DataError
from sparsify_deploy.tasks import regression

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        (np.eye(3, dtype="f4")[np.arange(12) % 3], True),
        (np.eye(3, dtype="i8")[np.arange(12) % 3], True),
        (np.ones((12, 3), "i8"), False),
        (np.eye(3, dtype="f4")[np.arange(12) % 3] * 0.5, False),
        (np.tile(np.float32([[1, 1, 0]]), (12, 1)), False),
        (RANDOM.random((12, 3), dtype="f4"), False),
        (np.ones((12, 1), "f4"), False),
        (np.linspace(0, 1, 12, dtype="f4"), False),
    ],
)
def test_one_hot_rows_get_a_note(tmp_path: Path, targets: np.ndarray, told: bool) -> None:
    x = RANDOM.random((12, 4), dtype="f4")
    np.savez(tmp_path / "d.npz", x_train=x, y_train=targets, x_test=x, y_test=targets)
    notes = judge(npz.open(npz.Params(path=tmp_path / "d.npz"))).notes
    assert [note.startswith("data: each target is a row of 3 zeros and ones") for note in notes] == [True] * told


def test_whole_numbers_for_several_values_are_called_labels() -> None:
    task = regression.create(regression.Params())
    outputs = {"output": np.zeros((3, 10), "f4")}
    with pytest.raises(DataError, match="class labels have to be saved as integers"):
        task.evaluate(outputs, {"target": np.array([0.0, 3.0, 9.0], "f4")})
    with pytest.raises(DataError) as caught:
        task.evaluate(outputs, {"target": np.array([0.0, 3.5, 9.0], "f4")})
    assert "integers" not in str(caught.value)
