"""Layers of an engine timed by the runtime's own profiler, under the names of the ONNX file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparsify_deploy import menu
from sparsify_deploy.errors import DataError, ModelError
from sparsify_deploy.runtimes import _profiles, onnxruntime, openvino


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("batch", [2, "n"])
def test_every_weighted_layer_is_timed_under_its_onnx_name(
    tiny_net: Callable[..., Any], tmp_path: Path, runtime: str, batch: int | str
) -> None:
    net, chosen = tiny_net(batch), menu.entry("runtimes", runtime)
    engine = tmp_path / f"engine{chosen.SUFFIX}"
    chosen.build(net.path, engine, chosen.Params())
    before = sorted(tmp_path.iterdir())
    found = chosen.profile(engine, chosen.Params(), net.example(2))
    assert sorted(tmp_path.iterdir()) == before, "a profile leaves no file"
    assert found.runs == _profiles.RUNS >= 20
    (conv,) = [layer for layer in found.layers if "/conv" in layer.nodes]
    assert conv.ms > 0
    assert conv.kernel
    if runtime == "openvino":
        assert "logits" in conv.nodes, "the ReLU is fused into it; OpenVINO calls it by the output it makes"
        assert conv.precision
    assert len({layer.name for layer in found.layers}) == len(found.layers)


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
def test_inputs_that_do_not_fit_are_refused(tiny_net: Callable[..., Any], tmp_path: Path, runtime: str) -> None:
    net, chosen = tiny_net(1), menu.entry("runtimes", runtime)
    engine = tmp_path / f"engine{chosen.SUFFIX}"
    chosen.build(net.path, engine, chosen.Params())
    with pytest.raises(DataError, match="image"):
        chosen.profile(engine, chosen.Params(), net.example(3))
    with pytest.raises(DataError, match="no input"):
        chosen.profile(engine, chosen.Params(), {"other": net.example(1)["image"]})


def test_onnx_runtimes_events_become_one_layer_a_node_without_the_warm_up() -> None:
    def event(name: str, us: float, kind: str = "Node") -> dict[str, Any]:
        return {"cat": kind, "name": name, "dur": us, "args": {"op_name": "QLinearConv"}}

    warm = [event("conv_token_3_kernel_time", 9e6)] * _profiles.WARM_UP
    runs = [event("conv_token_3_kernel_time", 250.0)] * _profiles.RUNS
    others = [event("conv_fence_before", 9e6), event("model_run", 9e6, "Session")]
    (layer,) = onnxruntime._profile_of([*warm, *others, *runs]).layers
    assert (layer.name, layer.nodes, layer.kernel, layer.ms) == ("conv_token_3", ("conv",), "QLinearConv", 0.25)


def test_a_pause_of_the_machine_is_not_the_layers_time() -> None:
    assert _profiles.middle_half([1.0, 2.0, 3.0, 900.0]) == 2.5
    assert _profiles.middle_half([4.0]) == 4.0


def test_openvinos_parts_of_a_node_have_the_nodes_name() -> None:
    assert openvino._onnx_name("fc/WithoutBiases/DequantizationMultiply") == "fc"
    assert openvino._onnx_name("layer1/WithoutBiases/conv") == "layer1/WithoutBiases/conv"
    assert openvino._said({"a": SimpleNamespace(value="x"), "b": "y"}, "a") == "x"
    assert openvino._said({"b": "y"}, "b") == "y"
    assert openvino._said({}, "c") == ""


def test_the_lower_precision_is_offered_once_and_judged_by_the_cpu(
    tiny_net: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    label, params = openvino.lower_precision(openvino.Params()) or ("", None)
    assert (label, params) == ("BF16", openvino.Params(precision="bf16"))
    assert openvino.lower_precision(params) is None
    net = tiny_net(1)
    for capabilities, runs in ((["FP32", "BF16"], True), (["FP32"], False)):
        core = SimpleNamespace(
            get_property=lambda device, name, found=capabilities: found, read_model=openvino._core().read_model
        )
        with monkeypatch.context() as patch:
            patch.setattr(openvino, "_core", lambda core=core: core)
            notes = openvino.build(net.path, tmp_path / "engine.xml", params)
        assert notes.runs_here is runs
        assert bool(notes.warnings) is not runs


def test_a_file_that_is_no_engine_is_not_profiled(tmp_path: Path) -> None:
    broken = tmp_path / "engine.onnx"
    broken.write_bytes(b"nothing")
    with pytest.raises(ModelError):
        onnxruntime.profile(broken, onnxruntime.Params(), {})
