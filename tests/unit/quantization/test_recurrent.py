"""Recurrent layers stay as they are beside quantised ones: one operator in the file, any length."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("modelopt")

from torch import nn  # noqa: E402

from sparsify_deploy.export.axes import FreeAxes  # noqa: E402
from sparsify_deploy.export.onnx import export  # noqa: E402
from sparsify_deploy.graph import file  # noqa: E402
from sparsify_deploy.quantization import int8  # noqa: E402
from sparsify_deploy.quantization.int8 import Int8Settings  # noqa: E402
from sparsify_deploy.types import AxisSizes  # noqa: E402


class Reader(nn.Module):
    """`(N, T)` tokens to `(N, 4)`, by one layer called under two names."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.g = kind(8, 16, batch_first=True)
        self.again = kind(16, 16, batch_first=True)
        self.same = self.again
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        y = self.again(self.g(self.embed(x))[0])[0]
        return self.fc(self.same(y)[0].mean(1))


@pytest.mark.parametrize(("kind", "operator"), [(nn.LSTM, "LSTM"), (nn.GRU, "GRU"), (nn.RNN, "RNN")])
def test_a_recurrent_layer_is_one_operator_of_any_length(kind, operator, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    net = Reader(kind)
    batches = [{"x": torch.randint(0, 20, (4, 6))} for _ in range(2)]
    quantized = int8.prepare(net, Int8Settings())
    int8.calibrate_(quantized, batches, ("x",))
    rows = {row.name: row for row in quantized.placement}
    assert rows["fc"].quantised
    assert rows["g"] == rows["g"].__class__("g", kind.__name__, False, "float: recurrent layers are not quantised")
    assert type(quantized.module.get_submodule("g")) is kind
    path = tmp_path / "net.onnx"
    export(
        quantized.module, batches[0], ("x",), path, free=FreeAxes({"x": {1: "length"}}, {"length": AxisSizes(1, 6, 9)})
    )
    operators = [node.op_type for node in file.load(path).graph.node]
    assert operators.count(operator) == 3
    assert "Sigmoid" not in operators
    session = onnxruntime.InferenceSession(str(path))
    for length in (1, 6, 9):
        x = torch.randint(0, 20, (3, length))
        with torch.no_grad():
            expected = quantized.module(x).numpy()
        (found,) = session.run(None, {"x": x.numpy()})
        assert np.abs(found - expected).max() < 0.03 * np.abs(expected).max()
