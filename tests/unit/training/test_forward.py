"""torch.compile and the memory format as switches: the same training, or one line."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from sparsify_deploy.errors import EnvironmentProblem, Interrupted, ModelError
from sparsify_deploy.sparsity.mask import Mask
from sparsify_deploy.training import forward
from sparsify_deploy.training.updater import Dense, HoldMask
from sparsify_deploy.types import Context


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Nothing that was compiled before is found, and nothing stays."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    yield
    torch.compiler.reset()


def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 4))


def run(tiny, folder, stop_after=0, model=None, held=False, **settings):
    calls = iter(range(1, 99))
    trainer = tiny.trainer(
        folder,
        tiny.settings(steps=6, **settings),
        model=model or network(),
        context=Context(stop_requested=lambda: next(calls) == stop_after, checkpoint_every_s=1e9),
        augment=("flip",),
    )
    updater = HoldMask(trainer.model, trainer.optimizer, Mask(_mask(trainer.model))) if held else Dense()
    return trainer, trainer.fit(updater)


def _mask(model):
    weights = {name: p for name, p in model.named_parameters() if p.ndim == 2}
    return {name: torch.arange(p.numel()).reshape(p.shape) % 3 > 0 for name, p in weights.items()}


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")


@needs_compiler
def test_compiled_training_holds_masks_and_resumes_bit_for_bit(tiny, tmp_path):
    whole, history = run(tiny, tmp_path / "whole", held=True, compile=True)
    with pytest.raises(Interrupted):
        run(tiny, tmp_path / "cut", stop_after=3, held=True, compile=True)
    again, _ = run(tiny, tmp_path / "cut", held=True, compile=True)
    assert tiny.differing(tiny.state(whole), tiny.state(again)) == []
    assert len(history.losses) == 6
    # the names are the network's own, so that what is saved is loaded without the compiler
    assert list(whole.model.state_dict()) == list(network().state_dict())
    for name, kept in _mask(whole.model).items():
        assert (dict(whole.model.named_parameters())[name].detach()[~kept] == 0).all()


@needs_compiler
def test_the_compiled_pass_is_what_trains(tiny, tmp_path):
    """The same numbers but for rounding, without dropout, whose draws are the compiler's own; and the module's own
    code is traced once, not run at each step."""

    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
            self.calls = 0

        def forward(self, x):
            if not torch.compiler.is_compiling():
                self.calls += 1
            return self.inner(x)

    torch.manual_seed(3)
    start = Counted().state_dict()
    made = []
    for name, compile_ in (("plain", False), ("compiled", True)):
        model = Counted()
        model.load_state_dict(start)
        made.append(run(tiny, tmp_path / name, model=model, compile=compile_)[0].model)
    assert (made[0].calls, made[1].calls) == (6, 0)
    for key, tensor in made[0].state_dict().items():
        assert torch.allclose(tensor, made[1].state_dict()[key], atol=1e-5), key


class Breaks(nn.Module):
    """What torch.compile cannot put into one graph."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))

    def forward(self, x):
        return self.inner(x if x.sum().item() > 0 else -x)


def test_what_does_not_compile_is_one_line_and_nothing_runs_in_its_place(tiny, tmp_path):
    with pytest.raises(
        ModelError, match=r"^training.compile: torch.compile cannot do this network as one graph \("
    ) as e:
        run(tiny, tmp_path, model=Breaks(), compile=True)
    assert str(e.value).endswith("set compile false")
    assert len(e.value.lines) == 1


def test_without_a_compiler_the_line_says_what_to_install(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "no-such-compiler"))
    with pytest.raises(EnvironmentProblem, match=r"^training.compile needs a C\+\+ compiler and finds none.*install g"):
        run(tiny, tmp_path, compile=True)


def test_the_memory_format_goes_there_and_back_with_equal_values(tiny):
    model = tiny.network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = list(model.parameters())
    forward.channels_last_(model)
    assert model[0].weight.stride() != before["0.weight"].stride()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    forward.contiguous_(model)
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
    assert all(tensor.stride() == before[name].stride() for name, tensor in model.state_dict().items())


def test_only_images_are_laid_out():
    batch = {
        "input": torch.zeros(2, 3, 4, 4),
        "ids": torch.zeros(2, 3, 4, 4, dtype=torch.int64),
        "flat": torch.zeros(2, 3),
    }
    made = forward.laid_out(batch)
    assert made["input"].is_contiguous(memory_format=torch.channels_last)
    assert made["ids"] is batch["ids"]
    assert made["flat"] is batch["flat"]
