"""N:M groups run along input channels, nowhere else."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sparsify_deploy.graph.nm import density, violations


def brute_force(values, n, m):
    bad = 0
    for k in range(values.shape[0]):
        for position in itertools.product(*map(range, values.shape[2:])):
            row = [values[(k, c, *position)] for c in range(values.shape[1])]
            bad += sum(np.count_nonzero(row[i : i + m]) > n for i in range(0, len(row), m))
    return bad


@pytest.mark.parametrize("shape", [(3, 8), (2, 8, 3), (2, 8, 3, 3), (2, 4, 2, 3, 3), (2, 6, 3, 3), (2, 3)])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_against_brute_force(shape, n, m):
    rng = np.random.default_rng(1)
    values = rng.integers(-3, 4, shape) * (rng.random(shape) < 0.5)
    assert violations(values, n, m) == brute_force(values, n, m)
    assert violations(values.astype(np.int8), n, m) == brute_force(values, n, m)


def test_groups_are_input_channels_and_not_the_flattened_kernel():
    along_kernel = np.zeros((1, 4, 2, 2), np.int8)
    along_kernel[:, :, 0, :] = 1  # two of the four kernel positions, all four channels
    assert violations(along_kernel, 2, 4) == 2
    along_channels = np.zeros((1, 4, 2, 2), np.int8)
    along_channels[:, :2] = 1  # two of the four channels, all kernel positions
    assert violations(along_channels, 2, 4) == 0


def test_density():
    assert density(np.array([[0, 1, 0, -2]])) == 0.5
    assert density(np.zeros((0, 4))) == 0.0
