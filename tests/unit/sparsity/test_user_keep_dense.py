"""Patterns of layers to keep dense that match none, or all."""

from __future__ import annotations

import pytest
from torch import nn

from sparsify_deploy.errors import ModelError
from sparsify_deploy.recipe import NM
from sparsify_deploy.sparsity.layers import prunable, select
from sparsify_deploy.stages.init_mask import chosen
from sparsify_deploy.stages.project_nm import choose


def test_the_field_of_a_pattern_that_matches_nothing_is_named() -> None:
    layers = prunable(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(ModelError, match=r"^train\.params\.keep_dense: 'no' matches no prunable layer"):
        select(layers, ["no"], "train.params.keep_dense")
    with pytest.raises(ModelError, match=r"^nm\.keep_dense: 'no' matches no prunable layer"):
        choose(layers, NM(keep_dense=("no",)))


def test_a_mask_over_no_layer_is_refused() -> None:
    layers = prunable(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(ModelError, match=r"init\.keep_dense leaves no layer to prune: all are kept dense"):
        chosen(layers, {"0"}, None)
    with pytest.raises(ModelError, match="all are kept dense"):
        chosen(layers, {"0"}, "2:4")
