"""Pruned weights stay zero at every step, and RigL follows a hand-worked table."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from sparsify_deploy.errors import Diverged, ModelError, UsageError
from sparsify_deploy.sparsity.mask import Mask
from sparsify_deploy.training.methods import dense, gradual, rigl, snfs, static
from sparsify_deploy.training.methods import set as set_
from sparsify_deploy.training.methods._rewiring import replaced
from sparsify_deploy.training.optimizer import build_optimizer, slots
from sparsify_deploy.training.settings import Optimizer, Schedule
from sparsify_deploy.training.updater import HoldMask
from sparsify_deploy.types import Context

OPTIMIZERS = [
    Optimizer(lr=0.05, weight_decay=0.01),
    Optimizer(lr=0.05, nesterov=True),
    Optimizer(name="adam", lr=0.01, weight_decay=0.01),
    Optimizer(name="adamw", lr=0.01),
]


class Watch(HoldMask):
    """Fails at the first step after which a pruned weight or slot is not zero."""

    steps = 0

    def after_step(self, step):
        self.steps += 1
        for name, parameter in self.parameters.items():
            pruned = ~self.mask[name]
            assert not parameter.detach()[pruned].any(), (name, step)
            for slot in slots(self._optimizer, parameter):
                assert not slot[pruned].any(), (name, step)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: f"{o.name}{'-nesterov' if o.nesterov else ''}")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_mask_holds_after_every_step(tiny, tmp_path, optimizer, precision):
    trainer = tiny.trainer(tmp_path, tiny.settings(optimizer=optimizer, precision=precision, clip_norm=5.0))
    watch = Watch(trainer.model, trainer.optimizer, tiny.mask())
    before = {name: p.detach().clone() for name, p in watch.parameters.items()}
    trainer.fit(watch)
    assert watch.steps == 12
    for name, parameter in watch.parameters.items():
        kept = tiny.mask()[name]
        assert (parameter[kept] != before[name][kept]).float().mean() > 0.5


@pytest.mark.parametrize("let_go", range(12))
def test_letting_go_of_the_mask_for_one_step_is_noticed(tiny, tmp_path, let_go):
    class Careless(HoldMask):
        def after_backward(self, step):
            return step == let_go or super().after_backward(step)

    trainer = tiny.trainer(tmp_path)
    with pytest.raises(AssertionError, match="are not zero"):
        trainer.fit(Careless(trainer.model, trainer.optimizer, tiny.mask()))


def test_clipping_sees_the_masked_gradient(tiny, tmp_path):
    optimizer = Optimizer(lr=1.0, momentum=0.0, weight_decay=0.0)
    settings = tiny.settings(steps=1, clip_norm=1e-3, optimizer=optimizer, schedule=Schedule(name="constant"))
    trainer = tiny.trainer(tmp_path, settings)
    held = HoldMask(trainer.model, trainer.optimizer, tiny.mask(0.2))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.fit(held)
    moved = sum(((p - q) ** 2).sum().item() for p, q in zip(trainer.model.parameters(), before, strict=True))
    assert moved**0.5 == pytest.approx(1e-3, rel=1e-3)


def test_holding_masks_weights_and_slots_at_once(tiny, tmp_path):
    trainer = tiny.trainer(tmp_path)
    weight = trainer.model[5].weight
    trainer.optimizer.state[weight] = {"momentum_buffer": torch.ones_like(weight)}
    mask = tiny.mask()
    HoldMask(trainer.model, trainer.optimizer, mask)
    assert mask.check_holds(trainer.model) == ()
    assert torch.equal(trainer.optimizer.state[weight]["momentum_buffer"].bool(), mask["5.weight"])


def test_a_mask_of_another_model_is_a_model_error(tiny, tmp_path):
    trainer = tiny.trainer(tmp_path)
    for wrong in ({"9.weight": torch.ones(2, 2)}, {"5.weight": torch.ones(2, 2)}):
        with pytest.raises(ModelError, match=next(iter(wrong))):
            HoldMask(trainer.model, trainer.optimizer, Mask({k: v.bool() for k, v in wrong.items()}))


@pytest.mark.parametrize("method", [static, rigl, set_, snfs])
def test_sparse_methods_ask_for_a_mask_and_dense_refuses_one(tiny, tmp_path, method):
    trainer = tiny.trainer(tmp_path)
    with pytest.raises(UsageError, match="init"):
        method.train(trainer, None, method.Params())
    with pytest.raises(UsageError, match="takes no mask"):
        dense.train(trainer, tiny.mask(), dense.Params())
    with pytest.raises(UsageError, match="takes no mask"):
        gradual.train(trainer, tiny.mask(), gradual.Params(), 0.5)


def test_static_returns_the_mask_it_held(tiny, tmp_path):
    trainer = tiny.trainer(tmp_path)
    assert static.train(trainer, tiny.mask(), static.Params()) == tiny.mask()
    assert tiny.mask().check_holds(trainer.model) == ()
    assert trainer.history.densities == tiny.mask().densities()


def test_dense_trains_every_weight(tiny, tmp_path):
    trainer = tiny.trainer(tmp_path)
    dense.train(trainer, None, dense.Params())
    assert all((p != 0).all() for name, p in trainer.model.named_parameters() if name.endswith("weight"))
    assert trainer.history.densities == {}


#          index      0     1     2    3    4     5    6    7
KEPT = torch.tensor([[1, 1, 0, 1, 0, 1, 0, 1]]).bool()
WEIGHT = torch.tensor([[5.0, -1.0, 0, 2.0, 0, 0.5, 0, 3.0]])
GRADIENT = torch.tensor([[9.0, 4.0, -3.0, 9.0, 1.0, 0.2, 3.0, 9.0]])
# 5 active, n = 2. Kept by |w|: 0, 7, 3. Dropped: 1 and 5. Candidates by |g|: 1 (4), then 2 and 6 (3, tie: 2), 4, 5.
AFTER = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 1]]).bool()
WEIGHT_AFTER = torch.tensor([[5.0, -1.0, 0, 2.0, 0, 0, 0, 3.0]])
SLOT = torch.tensor([[10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 16.0, 17.0]])
SLOT_AFTER = torch.tensor([[10.0, 11.0, 0, 13.0, 0, 0, 0, 17.0]])


def one_update(optimizer_settings, slot_names):
    model = nn.Linear(8, 1)
    with torch.no_grad():
        model.weight.copy_(WEIGHT)
    optimizer = build_optimizer(model, optimizer_settings)
    held = HoldMask(model, optimizer, Mask({"weight": KEPT}))
    # Set after holding, so that also the slots of weights about to grow hold something that must be reset; what
    # stays pruned (4, 6) holds nothing in a run.
    slot = SLOT.clone()
    slot[0, [4, 6]] = 0.0
    optimizer.state[model.weight] = {"step": torch.tensor(41.0), **{name: slot.clone() for name in slot_names}}
    model.weight.grad = GRADIENT.clone()
    updater = rigl.RigL(held, rigl.Params(update_every=10, drop_fraction=0.5, end_fraction=1.0), 100)
    return model, optimizer, updater


@pytest.mark.parametrize(
    ("settings", "slot_names"),
    [
        (Optimizer(), ["momentum_buffer"]),
        (Optimizer(name="adam"), ["exp_avg", "exp_avg_sq"]),
        (Optimizer(name="adamw"), ["exp_avg", "exp_avg_sq"]),
    ],
    ids=["sgd", "adam", "adamw"],
)
def test_one_update_by_hand(settings, slot_names):
    model, optimizer, updater = one_update(settings, slot_names)
    assert updater.after_backward(10) is False
    assert torch.equal(updater.mask["weight"], AFTER)
    assert torch.equal(model.weight, WEIGHT_AFTER)
    for name in slot_names:
        assert torch.equal(optimizer.state[model.weight][name], SLOT_AFTER)
    assert optimizer.state[model.weight]["step"] == 41
    (update,) = updater.updates
    assert (update.step, update.changed, update.densities) == (10, 1, {"weight": 5 / 8})
    assert update.drop_fraction == pytest.approx(0.25 * (1 + 0.95105652))


@pytest.mark.parametrize("step", [0, 1, 9, 11, 100, 110])
def test_other_steps_train_and_do_not_rewire(step):
    model, _, updater = one_update(Optimizer(), ["momentum_buffer"])
    assert updater.after_backward(step) is True
    assert torch.equal(updater.mask["weight"], KEPT)
    assert torch.equal(model.weight.grad, GRADIENT * KEPT)


def test_a_dense_layer_stays_dense():
    model = nn.Linear(8, 1)
    before = model.weight.detach().clone()
    optimizer = build_optimizer(model, Optimizer())
    held = HoldMask(model, optimizer, Mask({"weight": torch.ones(1, 8).bool()}))
    model.weight.grad = GRADIENT.clone()
    updater = rigl.RigL(held, rigl.Params(update_every=10), 100)
    assert updater.after_backward(10) is False
    assert torch.equal(model.weight, before)
    assert updater.updates[0].changed == 0


def test_a_just_grown_zero_is_not_taken_for_a_pruned_weight():
    weight = torch.tensor([0.0, 0.0, 0.0, 4.0])
    mask = torch.tensor([False, False, True, True])
    assert replaced(weight, mask, torch.tensor([1.0, 0, 0, 0]), 0.0, None).tolist() == [False, False, True, True]


def test_a_gradient_that_is_not_finite_is_divergence():
    model, _, updater = one_update(Optimizer(), ["momentum_buffer"])
    model.weight.grad[0, 3] = torch.nan
    with pytest.raises(Diverged, match="gradient of weight is not finite at step 10"):
        updater.after_backward(10)


def test_rewiring_moves_the_mask_keeps_counts_and_stops_at_the_end(tiny, tmp_path):
    trainer = tiny.trainer(tmp_path, tiny.settings(steps=20))
    params = rigl.Params(update_every=4, drop_fraction=0.4, end_fraction=0.75)
    start = tiny.mask()
    final = rigl.train(trainer, start, params)
    assert [update.step for update in trainer.history.updates] == [4, 8, 12]
    assert final != start
    assert final.counts() == start.counts()
    assert final.check_holds(trainer.model) == ()
    assert all(update.densities == start.densities() for update in trainer.history.updates)
    assert trainer.history.updates[0].changed > 0
    assert trainer.history.dense_gradient_every == 4


def test_an_update_replaces_the_gradient_step(tiny, tmp_path):
    trainer = tiny.trainer(tmp_path, tiny.settings(steps=5))
    biases = []

    class Spy(rigl.RigL):
        def after_step(self, step):
            biases.append(trainer.model[5].bias.detach().clone())

    held = HoldMask(trainer.model, trainer.optimizer, tiny.mask())
    trainer.fit(Spy(held, rigl.Params(update_every=3, end_fraction=1.0), 5))
    assert [torch.equal(a, b) for a, b in itertools.pairwise(biases)] == [False, False, True, False]


def test_with_accumulation_growth_uses_the_averaged_gradient(tiny, tmp_path):
    seen = []

    class Spy(rigl.RigL):
        def after_backward(self, step):
            if step == 1:
                seen.append(held.parameters["5.weight"].grad.clone())
            return super().after_backward(step)

    for accumulate in (1, 4):
        trainer = tiny.trainer(tmp_path / str(accumulate), tiny.settings(steps=4, accumulate=accumulate, batch_size=2))
        held = HoldMask(trainer.model, trainer.optimizer, tiny.mask())
        trainer.fit(Spy(held, rigl.Params(update_every=1, end_fraction=1.0), 4))
        assert [update.step for update in trainer.history.updates] == [1, 2, 3]
    assert not torch.equal(*seen)


def test_a_run_too_short_to_rewire_says_so(tiny, tmp_path):
    recorder = tiny.recorder()
    trainer = tiny.trainer(tmp_path, context=Context(progress=recorder))
    final = rigl.train(trainer, tiny.mask(), rigl.Params(update_every=9, end_fraction=0.75))
    assert final == tiny.mask()
    assert trainer.history.notes == tuple(recorder.said)
    assert "the mask never moves: update_every 9 does not come before step 9" in recorder.said[0]
    assert trainer.history.dense_gradient_every is None
