"""SET: growth is uniform over the free positions, and the optimizer's own step comes first."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsify_deploy.sparsity.mask import Mask
from sparsify_deploy.training.methods import set as set_
from sparsify_deploy.training.methods._rewiring import replaced
from sparsify_deploy.training.optimizer import build_optimizer
from sparsify_deploy.training.settings import Optimizer
from sparsify_deploy.training.updater import HoldMask


def test_every_free_position_grows_equally_often():
    """12 weights, 6 active, 2 dropped: 8 free positions, each grown in a quarter of 4000 draws, +- 5 sigma."""
    weight = torch.tensor([6.0, -5.0, 4.0, -3.0, 2.0, -1.0, 0, 0, 0, 0, 0, 0])
    mask = weight != 0
    grown = torch.zeros(12)
    for step in range(4000):
        new = replaced(weight, mask, set_.scores(mask, "layer", 3, step), 1 / 3 + 1e-9, None)
        assert int(new.sum()) == 6
        assert bool(new[:4].all())
        grown += new
    shares = grown[4:] / 4000
    assert shares.sum().item() == pytest.approx(2.0)
    assert (shares - 0.25).abs().max() < 5 * (0.25 * 0.75 / 4000) ** 0.5


def test_pairs_grow_independently_of_position():
    mask = torch.zeros(5, dtype=torch.bool)
    mask[0] = True
    seen = {
        int(replaced(torch.ones(5), mask, set_.scores(mask, "a", 0, s), 0.999999, None).nonzero()) for s in range(9)
    }
    assert seen == {0}  # floor(0.999999) = 0 weights are dropped
    draws = [set_.scores(mask, name, seed, step) for name in "ab" for seed in (0, 1) for step in (3, 6)]
    assert len({tuple(d.tolist()) for d in draws}) == 8
    assert torch.equal(set_.scores(mask, "a", 0, 3), draws[0])


@pytest.mark.parametrize("anneal", ["cosine", "constant"])
def test_one_update_by_hand(anneal):
    """The optimizer has stepped; then weight 5 (0.5) and weight 1 (-1) go; what grows is chosen by the scores."""
    model = nn.Linear(8, 1, bias=False)
    kept = torch.tensor([[1, 1, 0, 1, 0, 1, 0, 1]]).bool()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[5.0, -1.0, 0, 2.0, 0, 0.5, 0, 3.0]]))
    optimizer = build_optimizer(model, Optimizer())
    held = HoldMask(model, optimizer, Mask({"weight": kept}))
    optimizer.state[model.weight] = {"momentum_buffer": torch.full((1, 8), 9.0) * kept}
    model.weight.grad = torch.ones(1, 8)
    params = set_.Params(update_every=10, drop_fraction=0.5, end_fraction=1.0, anneal=anneal)
    updater = set_.SET(held, params, 100, 1)
    assert updater.after_backward(9) is True  # the gradient step is not replaced
    assert torch.equal(model.weight.grad, kept.float())
    updater.after_step(8)
    assert not updater.updates
    updater.after_step(9)
    scores = set_.scores(kept, "weight", 1, 10)[0]
    survivors, free = [0, 3, 7], [1, 2, 4, 5, 6]
    grown = sorted(free, key=lambda i: -scores[i].item())[:2]
    expected = torch.tensor([[i in survivors or i in grown for i in range(8)]])
    assert torch.equal(updater.mask["weight"], expected)
    values = {0: 5.0, 3: 2.0, 7: 3.0, 1: -1.0, 5: 0.5}
    assert model.weight[0].tolist() == [values.get(i, 0.0) if expected[0, i] else 0.0 for i in range(8)]
    slot = optimizer.state[model.weight]["momentum_buffer"][0]
    assert slot.tolist() == [9.0 if expected[0, i] and kept[0, i] else 0.0 for i in range(8)]
    (update,) = updater.updates
    assert update.step == 10
    assert update.drop_fraction == pytest.approx(0.5 if anneal == "constant" else 0.25 * (1 + 0.95105652))
