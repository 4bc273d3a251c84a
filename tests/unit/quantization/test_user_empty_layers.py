"""Calibration of a network with layers that have no weight left."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsify_deploy.errors import ModelError
from sparsify_deploy.quantization import int8
from sparsify_deploy.quantization.int8 import Int8Settings


@pytest.mark.parametrize(
    ("emptied", "told"),
    [(True, "no weight is left in 0: lower the sparsity"), (False, "does a ReLU before it let nothing through?")],
)
def test_the_layers_behind_an_activation_of_zeros_are_named(emptied: bool, told: str) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    with torch.no_grad():
        net.get_parameter("0.bias").fill_(-1e3)
        if emptied:
            net.get_parameter("0.weight").zero_()
    with pytest.raises(ModelError) as error:
        int8.calibrate_(int8.prepare(net, Int8Settings()), [{"x": torch.ones(2, 4)}], ("x",))
    assert f"2.input_quantizer: saw only zeros during calibration; {told}" in str(error.value)
