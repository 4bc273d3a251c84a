"""One layer in INT8 and all others in float, and everything as before afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsify_deploy.errors import ModelError
from sparsify_deploy.quantization.folding import fold_batchnorm
from sparsify_deploy.quantization.int8 import Int8Settings, Quantized, calibrate_, only, prepare


class Block(nn.Module):
    """Two convolutions around a residual add, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(x + self.second(x))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def made(batches, lively) -> tuple[nn.Module, Quantized]:
    model = lively(Block().eval())
    quantized = prepare(model, Int8Settings())
    calibrate_(quantized, batches, ("x",))
    return model, quantized


def enabled(quantized: Quantized) -> set[str]:
    return {n for n, m in quantized.module.named_modules() if "quantizer" in n.rpartition(".")[2] and m.is_enabled}


@torch.no_grad()
def test_no_layer_is_the_folded_float_network_to_the_bit(made, batches):
    model, quantized = made
    x = batches[0]["x"]
    with only(quantized, ()):
        assert enabled(quantized) == set()
        assert torch.equal(quantized.module(x), fold_batchnorm(model)(x))
    assert not torch.equal(quantized.module(x), fold_batchnorm(model)(x))


@torch.no_grad()
@pytest.mark.parametrize("layer", ["first", "second", "head"])
def test_one_layer_is_a_network_prepared_for_it_alone(made, batches, layer):
    model, quantized = made
    others = tuple({"first", "second", "head"} - {layer})
    alone = prepare(model, Int8Settings(keep_float=others, residual=False, pooling=False))
    calibrate_(alone, batches, ("x",))
    before = quantized.module(batches[1]["x"])
    everything = enabled(quantized)
    with only(quantized, (layer,)):
        assert enabled(quantized) == {f"{layer}.weight_quantizer", f"{layer}.input_quantizer"}
        assert torch.equal(quantized.module(batches[1]["x"]), alone.module(batches[1]["x"]))
    assert enabled(quantized) == everything
    assert any("add" in name for name in everything)
    assert torch.equal(quantized.module(batches[1]["x"]), before)


def test_all_come_back_after_an_error_and_what_was_off_stays_off(made):
    _, quantized = made
    quantized.module.get_submodule("head.input_quantizer").disable()
    everything = enabled(quantized)
    with pytest.raises(ZeroDivisionError), only(quantized, ("first",)):
        raise ZeroDivisionError
    assert enabled(quantized) == everything
    assert "head.input_quantizer" not in everything


def test_a_layer_without_quantizers_is_an_error_that_names_it(made):
    with (
        pytest.raises(ModelError, match=r"norm\.input_quantizer: there is no such quantizer"),
        only(made[1], ("norm",)),
    ):
        pass
