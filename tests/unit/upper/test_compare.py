"""A fault planted in one layer is named, on a chain and behind a residual add, between files and against an engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from sparsify_deploy import cli, deploy
from sparsify_deploy.errors import DataError, UsageError
from sparsify_deploy.graph import file
from sparsify_deploy.reporting.compare import Compared, compare, read_inputs

pytest.importorskip("onnxruntime")
Net = Callable[..., Path]


@pytest.fixture
def net(tmp_path: Path) -> Net:
    """Four 3x3 convolutions with Relu as an ONNX file, a chain or with two residual adds, in FP32 or with Q/DQ."""

    def make(name: str = "net.onnx", *, residual: bool = False, quantised: bool = False) -> Path:
        random = np.random.default_rng(0)
        nodes, weights, at = [], [], "image"
        for i in range(4):
            weight = (random.standard_normal((8, 8, 3, 3)) / 6).astype(np.float32)
            weights.append(numpy_helper.from_array(weight, f"{i}.weight"))
            sources = [at, f"{i}.weight"]
            if quantised:
                for k, (source, step) in enumerate(zip(list(sources), (0.04, 0.008), strict=True)):
                    for part in ("scale", "back"):
                        weights.append(numpy_helper.from_array(np.array(step, np.float32), f"{i}.{k}.{part}"))
                    weights.append(numpy_helper.from_array(np.array(0, np.int8), f"{i}.{k}.zero"))
                    zero = f"{i}.{k}.zero"
                    q, dq = f"{i}.{k}.q", f"{i}.{k}.dq"
                    nodes.append(helper.make_node("QuantizeLinear", [source, f"{i}.{k}.scale", zero], [q]))
                    nodes.append(helper.make_node("DequantizeLinear", [q, f"{i}.{k}.back", zero], [dq]))
                    sources[k] = f"{i}.{k}.dq"
            nodes.append(helper.make_node("Conv", sources, [f"{i}.conv"], name=f"layer{i}", pads=[1] * 4))
            made = f"{i}.conv"
            if residual and i % 2:
                nodes.append(helper.make_node("Add", [made, at], [f"{i}.sum"], name=f"add{i}"))
                made = f"{i}.sum"
            last = "logits" if i == 3 else f"{i}.relu"
            nodes.append(helper.make_node("Relu", [made], [last], name=f"relu{i}"))
            at = last
        shape = ("batch", 8, 6, 6)
        graph = helper.make_graph(
            nodes,
            "net",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
            weights,
        )
        path = tmp_path / name
        onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), path)
        return path

    return make


def broken(source: Path, tensor: str, change: Callable[[NDArray[Any]], Any]) -> Path:
    """A copy of a file with one initializer changed."""
    model = file.load(source)
    (found,) = [each for each in model.graph.initializer if each.name == tensor]
    found.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(found).copy()), tensor))
    path = source.with_name("broken.onnx")
    file.save(model, path)
    return path


def negated(values: NDArray[Any]) -> NDArray[Any]:
    values.reshape(-1)[np.abs(values).argmax()] *= -1
    return values


@pytest.mark.parametrize("residual", [False, True], ids=["chain", "residual"])
@pytest.mark.parametrize("layer", range(4))
def test_one_negated_weight_is_found_in_its_layer(net: Net, layer: int, residual: bool) -> None:
    good = net(residual=residual)
    found = compare(good, broken(good, f"{layer}.weight", negated))
    assert (found.differ, found.first, found.tolerance) == (True, f"layer{layer}", 1e-4)
    before = [row.relative for row in found.layers if row.layer[-1] < str(layer)]
    assert before == [0.0] * len(before)
    assert {row.op for row in found.layers} == {"Conv", "Relu"} | ({"Add"} if residual else set())


@pytest.mark.parametrize("residual", [False, True], ids=["chain", "residual"])
@pytest.mark.parametrize("layer", [1, 3])
def test_a_wrong_scale_is_found_in_its_layer_between_fp32_and_int8(net: Net, layer: int, residual: bool) -> None:
    float_, int8 = net("float.onnx", residual=residual), net("int8.onnx", residual=residual, quantised=True)
    same = compare(float_, int8)
    assert (same.differ, same.first, same.tolerance) == (False, None, 0.1)
    assert 0 < same.outputs[0].relative < 0.1
    wrong = compare(float_, broken(int8, f"{layer}.1.back", lambda scale: scale * np.float32(1.5)))
    assert wrong.first == f"layer{layer}"


def test_the_same_file_does_not_differ_and_a_tolerance_is_kept(net: Net) -> None:
    good = net()
    same = compare(good, good)
    assert not same.differ
    assert same.outputs[0].cosine == pytest.approx(1.0)
    assert (same.outputs[0].max_absolute, same.outputs[0].top1_agreement) == (0.0, None)
    worse = broken(good, "2.weight", lambda weight: weight * np.float32(1.01))
    assert compare(good, worse).first == "layer2"
    assert compare(good, worse, tolerance=0.02).first is None
    assert not compare(good, worse, tolerance=0.02).differ


def test_not_a_number_is_beyond_every_tolerance(net: Net) -> None:
    good = net()
    found = compare(good, broken(good, "1.weight", lambda weight: weight * np.float32("nan")), tolerance=1e6)
    assert found.differ
    assert found.first == "layer1"


def test_real_inputs_are_used(net: Net, tmp_path: Path) -> None:
    good = net()
    bad = broken(good, "0.weight", negated)
    np.savez(tmp_path / "nothing.npz", image=np.zeros((3, 8, 6, 6), np.float32))
    assert not compare(good, bad, inputs=tmp_path / "nothing.npz").differ
    np.savez(tmp_path / "ones.npz", image=np.ones((3, 8, 6, 6), np.float32))
    assert compare(good, bad, inputs=tmp_path / "ones.npz").first == "layer0"


def test_an_engine_is_compared_with_the_file_it_was_built_from_and_another(net: Net) -> None:
    pytest.importorskip("openvino")
    good = net(quantised=True)
    engine = deploy.build(good, "openvino", None, []).engine
    found = compare(good, engine)
    assert not found.differ
    assert len(found.layers) == 8
    bad = broken(good, "2.1.back", lambda scale: scale * np.float32(2))
    assert compare(bad, engine, onnx=good).first == "layer2"
    with pytest.raises(UsageError, match="none of the ONNX files given is the one it was built from"):
        compare(bad, engine)


def test_the_verb_prints_the_layer_and_ends_with_4(net: Net, capsys: pytest.CaptureFixture[str]) -> None:
    good = net()
    bad = broken(good, "1.weight", negated)
    assert cli.call(["inspect", str(good), "--compare", str(good)]) == 0
    assert "none of 8 layers differs by more than 0.0001" in capsys.readouterr().out
    assert cli.call(["inspect", "--compare", str(good), str(bad)]) == 4
    assert "the first layer that differs by more than 0.0001: layer1" in capsys.readouterr().out
    assert cli.call(["inspect", str(bad), "--compare", str(good), "--json"]) == 4
    told = json.loads(capsys.readouterr().out)
    assert (told["differ"], told["first"], len(told["layers"])) == (True, "layer1", 8)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is no .npz file"), (b"PK\x03\x04 cut", "is no .npz file"), (None, "no such file")],
)
def test_inputs_that_are_none_are_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "inputs.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_inputs(path)
    assert len(caught.value.lines) == 1


def test_an_array_without_a_name_and_python_objects_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.ones(3))
    with pytest.raises(DataError, match="without a name"):
        read_inputs(tmp_path / "one.npy")
    np.savez(tmp_path / "objects.npz", image=np.array([{}], dtype=object))
    with pytest.raises(DataError, match="plain arrays") as caught:
        read_inputs(tmp_path / "objects.npz")
    assert "allow_pickle" not in str(caught.value), "no advice to unpickle a file"


def test_wrong_inputs_and_options_are_one_line(net: Net, tmp_path: Path) -> None:
    good = net()
    np.savez(tmp_path / "other.npz", picture=np.ones((1, 8, 6, 6), np.float32))
    with pytest.raises(DataError, match=r"other\.npz: holds picture, and .*net\.onnx takes image \(float32\)"):
        compare(good, good, inputs=tmp_path / "other.npz")
    for tolerance in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match=r"--tolerance .* must be a number above 0"):
            compare(good, good, tolerance=tolerance)
    with pytest.raises(DataError, match=r"--onnx .*gone\.onnx: no such file"):
        compare(good, good, onnx=tmp_path / "gone.onnx")
    with pytest.raises(DataError, match="is not a file"):
        compare(good, tmp_path)
    with pytest.raises(DataError, match=r"gone\.onnx: no such file"):
        compare(good, tmp_path / "gone.onnx")
    for text in ("0.1", "0"):
        with pytest.raises(UsageError, match="--tolerance: goes with --compare"):
            cli.call(["inspect", str(good), "--tolerance", text])
    options = ["--compare", str(good), "--inputs", str(tmp_path / "other.npz"), "--shape", "image=1x8x6x6"]
    with pytest.raises(UsageError, match="--shape: the arrays of --inputs"):
        cli.call(["inspect", str(good), *options])


def test_a_difference_that_is_not_finite_is_null_in_json(net: Net, capsys: pytest.CaptureFixture[str]) -> None:
    good = net()
    bad = broken(good, "1.weight", lambda weight: weight * np.float32("nan"))
    assert cli.call(["inspect", str(bad), "--compare", str(good), "--json"]) == 4
    text = capsys.readouterr().out
    assert "Infinity" not in text
    assert "NaN" not in text
    assert json.loads(text)["outputs"][0]["relative"] is None


def test_files_of_two_networks_are_refused(net: Net, tmp_path: Path) -> None:
    good = net()
    model = file.load(good)
    model.graph.input[0].name = "picture"
    model.graph.node[0].input[0] = "picture"
    file.save(model, tmp_path / "other.onnx")
    with pytest.raises(DataError, match="cannot be fed the same"):
        compare(good, tmp_path / "other.onnx")


def test_outputs_without_a_layer_in_common_are_still_judged() -> None:
    found = Compared("a", "b", "random", 0.1, (), (), None)
    assert not found.differ
