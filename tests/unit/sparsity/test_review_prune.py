"""Exact counts where scores are so small that they are denormal."""

from __future__ import annotations

import pytest
import torch

from sparsify_deploy.sparsity.prune import global_mask

SIZE = 70_001
"""Enough for the threshold to be guessed from a sample."""


@pytest.mark.parametrize("kept", [10_000, 30_000, 30_001, 50_000, 70_000])
def test_denormal_scores_above_zeros_are_counted_once(kept):
    scores = torch.zeros(SIZE)
    scores[:30_000] = 1e-40 * (1 + torch.arange(30_000) % 7)
    mask = global_mask({"weight": scores}, kept / SIZE)["weight"]
    expected = torch.zeros(SIZE, dtype=torch.bool)
    expected[torch.sort(scores, descending=True, stable=True).indices[:kept]] = True
    assert torch.equal(mask, expected)
