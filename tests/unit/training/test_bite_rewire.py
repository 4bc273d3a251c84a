"""A weight that a new mask lets in starts from nothing, whatever lay in its place."""

from __future__ import annotations

import pytest
import torch

from sparsify_deploy.sparsity.mask import Mask
from sparsify_deploy.training.optimizer import build_optimizer, slots
from sparsify_deploy.training.settings import Optimizer
from sparsify_deploy.training.updater import HoldMask


def test_a_weight_grown_where_something_was_left_behind_starts_at_zero(tiny, tmp_path):
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


class HeldAnew(HoldMask):
    """The plain way: zero what is new, its slots too, then hold the whole mask from the start."""

    def rewire_to(self, mask):
        for name, parameter in self.parameters.items():
            new = mask[name] & ~self.mask[name]
            for tensor in (parameter.detach(), *slots(self._optimizer, parameter)):
                tensor.masked_fill_(new, 0.0)
        self.hold(mask)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moving_cheaply_is_holding_anew(memory_format, dtype):
    """Weights, slots and the next masked gradient, over several moves, bit for bit."""
    generator = torch.Generator().manual_seed(4)

    def random_mask():
        return Mask({"weight": torch.rand(6, 4, 3, 3, generator=generator) < 0.4})

    masks = [random_mask() for _ in range(4)]
    start = torch.randn(6, 4, 3, 3, generator=generator, dtype=dtype)
    gradients = [torch.randn(6, 4, 3, 3, generator=generator, dtype=dtype) for _ in range(3)]
    ends = []
    for holder in (HoldMask, HeldAnew):
        model = torch.nn.Conv2d(4, 6, 3, bias=False, dtype=dtype).to(memory_format=memory_format)
        with torch.no_grad():
            model.weight.copy_(start)
        optimizer = build_optimizer(model, Optimizer(name="adam", lr=0.1, weight_decay=0.1))
        held = holder(model, optimizer, masks[0])
        for mask, gradient in zip(masks[1:], gradients, strict=True):
            model.weight.grad = gradient.to(memory_format=memory_format)
            assert held.after_backward(0)
            optimizer.step()
            held.rewire_to(mask)
            assert held.mask == mask
            assert mask.check_holds(model) == ()
        ends.append([model.weight.detach(), *slots(optimizer, model.weight)])
    assert len(ends[0]) == 3
    assert all(map(torch.equal, *ends))
    assert ends[0][0].is_contiguous(memory_format=memory_format)
