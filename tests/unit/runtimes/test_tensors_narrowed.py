"""INT64 inputs of a file whose engine takes INT32."""

from __future__ import annotations

import numpy as np
import pytest

from sparsify_deploy.errors import DataError
from sparsify_deploy.runtimes import _tensors
from sparsify_deploy.types import IOTensor

TAKES = (IOTensor("ids", (None,), "int32"), IOTensor("wide", (None,), "int64"), IOTensor("x", (None,), "float32"))


def test_int64_becomes_int32_where_the_engine_takes_that_and_nothing_else_changes():
    largest = np.array([-(2**31), 2**31 - 1])
    given = {"ids": largest, "wide": np.array([2**40]), "x": np.zeros(2, np.float32)}
    found = _tensors.narrowed(given, TAKES)
    assert {name: array.dtype.name for name, array in found.items()} == {
        "ids": "int32",
        "wide": "int64",
        "x": "float32",
    }
    assert found["ids"].tolist() == largest.tolist()
    assert found["wide"].tolist() == [2**40]
    _tensors.checked(found, TAKES)


def test_a_value_beyond_int32_is_refused():
    with pytest.raises(DataError, match="input 'ids' has values beyond INT32"):
        _tensors.narrowed({"ids": np.array([2**31])}, TAKES)
