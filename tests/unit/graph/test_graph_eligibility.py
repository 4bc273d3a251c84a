"""The three answers, with the numbers in the reason; and bytes."""

from __future__ import annotations

import pytest

from sparsify_deploy.graph.eligibility import int8_advice, pattern_possible, rule_of_thumb
from sparsify_deploy.graph.size import bytes_as_stored, bytes_compressed


@pytest.mark.parametrize(
    ("shape", "groups", "m", "ok", "reason"),
    [
        ((64, 3, 7, 7), 1, 4, False, "C_in 3 is not a multiple of 4"),
        ((64, 4, 3, 3), 1, 4, True, "C_in 4 is a multiple of 4"),
        ((64, 4, 3, 3), 1, 8, False, "C_in 4 is not a multiple of 8"),
        ((64, 4, 3, 3), 2, 4, False, "grouped convolution (2 groups): sparse kernels take ungrouped ones only"),
        ((10, 512), 1, 4, True, "C_in 512 is a multiple of 4"),
    ],
)
def test_pattern_possible(shape, groups, m, ok, reason):
    answer = pattern_possible(shape, groups, m)
    assert (answer.ok, answer.reason) == (ok, reason)


@pytest.mark.parametrize(
    ("shape", "groups", "ok", "reason"),
    [
        ((10, 512), 1, False, "C_out 10 is not a multiple of 8"),
        ((16, 24, 3, 3), 1, False, "C_in 24 is not a multiple of 16"),
        ((8, 16, 1, 1), 1, True, "C_out 8 is a multiple of 8 and C_in 16 of 16"),
        ((8, 16, 1, 1), 4, False, "grouped convolution (4 groups): sparse kernels take ungrouped ones only"),
        ((8, 3, 1, 1), 1, False, "C_in 3 is not a multiple of 4"),
    ],
)
def test_rule_of_thumb(shape, groups, ok, reason):
    answer = rule_of_thumb(shape, groups, 4)
    assert (answer.ok, answer.reason) == (ok, reason)


def test_int8_advice_only_says_may():
    assert int8_advice((8, 64, 3, 3)).ok
    answer = int8_advice((8, 48, 3, 3))
    assert not answer.ok
    assert "C_in 48" in answer.reason
    assert "may not" in answer.reason


def test_bytes():
    shape = (64, 32, 3, 3)
    weights = 64 * 32 * 9
    assert bytes_as_stored(shape, "FP32") == 4 * weights
    assert bytes_as_stored(shape, "INT8") == weights
    assert bytes_as_stored((3, 3), "INT4") == 5
    assert bytes_compressed(shape, "INT8", False) == weights
    assert bytes_compressed(shape, "INT8", True) == 0.625 * weights
    assert bytes_as_stored(shape, "FP32") / bytes_compressed(shape, "INT8", True) == pytest.approx(6.4)
    assert bytes_compressed(shape, "FP16", True) == 1.125 * weights
