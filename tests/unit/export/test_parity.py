"""Parity numbers against explicit values."""

from __future__ import annotations

import numpy as np
import pytest

from sparsify_deploy.errors import ModelError
from sparsify_deploy.export.parity import compare


def test_explicit_values():
    reference = {"a": np.float32([[1, 2], [4, 3]]), "b": np.float32([[100], [0]])}
    other = {"a": np.float32([[1, 2], [3, 3.5]]), "b": np.float32([[100], [2]])}
    parity = compare(reference, other)
    assert parity.max_absolute == 2
    assert parity.max_relative == 0.25
    assert parity.top1_agreement == 0.5
    assert parity.examples == 2


def test_no_classes_no_agreement():
    assert compare({"y": np.ones((3, 1))}, {"y": np.ones((3, 1))}).top1_agreement is None
    assert compare({"y": np.zeros((3, 1))}, {"y": np.ones((3, 1))}).max_relative == np.inf


def test_maps_answer_by_axis_1_and_only_where_the_task_says_so():
    reference, other = np.zeros((2, 3, 2, 2)), np.zeros((2, 3, 2, 2))
    reference[:, 1], other[:, 1] = 1.0, 1.0
    other[0, 2, 0, 1] = 2.0
    maps = {"output": reference}, {"output": other}
    assert compare(*maps).top1_agreement is None
    assert compare(*maps, answers=("output",)).top1_agreement == 7 / 8
    assert compare(*maps, answers=()).top1_agreement is None
    assert compare(*maps).max_relative == 2.0
    tokens = {"output": reference[:, :, 0]}, {"output": other[:, :, 0]}
    assert compare(*tokens).top1_agreement == 5 / 6


@pytest.mark.parametrize(
    ("reference", "other", "message"),
    [
        ({"a": np.ones(2)}, {"b": np.ones(2)}, "outputs differ: a against b"),
        ({"a": np.ones(2)}, {"a": np.ones(3)}, r"shape \(3,\), not \(2,\)"),
        ({"a": np.ones(2)}, {"a": np.array([1, np.nan])}, "not finite"),
        ({"a": np.ones((0, 3))}, {"a": np.ones((0, 3))}, "empty"),
        ({}, {}, "no output"),
    ],
)
def test_what_cannot_be_compared(reference, other, message):
    with pytest.raises(ModelError, match=message):
        compare(reference, other)
