"""Tiny ONNX files and the numpy answer to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

CHANNELS, SIZE, KERNELS = 16, 8, 32


@dataclass(frozen=True)
class TinyNet:
    """Q/DQ -> 3x3 convolution with Q/DQ weights -> ReLU, as an ONNX file, and the same in numpy."""

    path: Path
    weight: NDArray[np.float32]

    def example(self, batch: int) -> dict[str, NDArray[Any]]:
        values = np.random.default_rng(batch).standard_normal((batch, CHANNELS, SIZE, SIZE))
        return {"image": values.astype(np.float32)}

    def answer(self, image: NDArray[Any]) -> NDArray[np.float32]:
        quantised = np.clip(np.rint(image / np.float32(0.05)), -128, 127) * np.float32(0.05)
        weight = np.clip(np.rint(self.weight / np.float32(0.01)), -128, 127) * np.float32(0.01)
        padded = np.pad(quantised, ((0, 0), (0, 0), (1, 1), (1, 1)))
        result = np.zeros((len(image), KERNELS, SIZE, SIZE), np.float32)
        for row in range(3):
            for column in range(3):
                part = padded[:, :, row : row + SIZE, column : column + SIZE]
                result += np.einsum("bchw,kc->bkhw", part, weight[:, :, row, column], dtype=np.float32)
        return np.maximum(result, 0)


@pytest.fixture
def tiny_net(tmp_path: Path) -> Callable[..., TinyNet]:
    """`tiny_net(batch=1, last="Relu")`; a text as batch makes a dynamic axis of that name."""

    def make(batch: int | str = 1, last: str = "Relu", external: bool = False) -> TinyNet:
        weight = (np.random.default_rng(0).standard_normal((KERNELS, CHANNELS, 3, 3)) * 0.1).astype(np.float32)
        nodes = [
            helper.make_node("QuantizeLinear", ["image", "scale", "zero"], ["q"], name="q"),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"], name="dq"),
            helper.make_node("QuantizeLinear", ["weight", "scales", "zeros"], ["wq"], axis=0, name="wq"),
            helper.make_node("DequantizeLinear", ["wq", "scales", "zeros"], ["wdq"], axis=0, name="wdq"),
            helper.make_node("Conv", ["dq", "wdq"], ["conv"], pads=[1, 1, 1, 1], name="/conv"),
            helper.make_node(last, ["conv"], ["logits"], name="/last"),
        ]
        constants = [
            numpy_helper.from_array(weight, "weight"),
            numpy_helper.from_array(np.float32(0.05), "scale"),
            numpy_helper.from_array(np.int8(0), "zero"),
            numpy_helper.from_array(np.full(KERNELS, 0.01, np.float32), "scales"),
            numpy_helper.from_array(np.zeros(KERNELS, np.int8), "zeros"),
        ]
        shapes = [[batch, CHANNELS, SIZE, SIZE], [batch, KERNELS, SIZE, SIZE]]
        image = helper.make_tensor_value_info("image", TensorProto.FLOAT, shapes[0])
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, shapes[1])
        graph = helper.make_graph(nodes, "tiny", [image], [logits], constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        path = tmp_path / "tiny.onnx"
        onnx.save(model, path, save_as_external_data=external, location="tiny.data", size_threshold=64)
        return TinyNet(path, weight)

    return make
