"""The line a report shows for a layer's eligibility."""

from __future__ import annotations

import pytest

from sparsify_deploy.graph import eligibility


@pytest.mark.parametrize(
    ("shape", "groups", "line"),
    [
        ((64, 3, 3, 3), 1, "C_in 3 is not a multiple of 4"),
        ((300, 784), 1, "possible, not by rule of thumb: C_out 300 is not a multiple of 8"),
        ((48, 48, 3, 3), 1, "C_in 48 is not a multiple of 32: the sparse INT8 kernel may not be picked"),
        ((64, 64, 1, 1), 1, "C_out 64 is a multiple of 8 and C_in 64 of 16"),
    ],
)
def test_one_line_says_which_of_the_three_answers_is_no(shape: tuple[int, ...], groups: int, line: str) -> None:
    assert eligibility.explained(shape, groups, 4).endswith(line)
