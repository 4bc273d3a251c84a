"""A weight that a new mask lets in starts from nothing, whatever lay in its place."""

from __future__ import annotations

import torch

from sparsify_deploy.training.settings import Optimizer


def test_a_weight_grown_where_something_was_left_behind_starts_at_zero(tiny, tmp_path):
    from sparsify_deploy.training.updater import HoldMask

    trainer = tiny.trainer(tmp_path, tiny.settings(optimizer=Optimizer(name="adam", lr=0.01)))
    mask = tiny.mask()
    held = HoldMask(trainer.model, trainer.optimizer, mask)
    name = "5.weight"
    weight, grown = held.parameters[name], ~mask[name]
    with torch.no_grad():
        weight.fill_(3.0)
    trainer.optimizer.state[weight] = {key: torch.full_like(weight, 2.0) for key in ("exp_avg", "exp_avg_sq")}
    held.rewire_to(mask.with_({name: torch.ones_like(mask[name])}))
    for tensor, kept in ((weight, 3.0), *((slot, 2.0) for slot in trainer.optimizer.state[weight].values())):
        assert bool((tensor[grown] == 0).all())
        assert bool((tensor[~grown] == kept).all())
