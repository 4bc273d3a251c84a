"""The verbs without torch: what they refuse and why, and what they do with a small network in OpenVINO."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsify_deploy import deploy, menu
from sparsify_deploy.deploy import _params, _pattern, parse_batches
from sparsify_deploy.errors import CorruptArtifact, DataError, RuntimeUnavailable, UsageError
from sparsify_deploy.runtimes._tensors import full_shapes
from sparsify_deploy.types import IOTensor, Silent

Net = Callable[..., Path]


@pytest.fixture
def net(tmp_path: Path) -> Net:
    """A 1x1 convolution of 16 to 8 channels as an ONNX file, every second weight 0; `shape` is its input's."""

    def make(name: str = "net.onnx", shape: tuple[int | str, ...] = ("batch", 16, 4, 4)) -> Path:
        weight = np.random.default_rng(0).standard_normal((8, 16, 1, 1)).astype(np.float32)
        weight[:, ::2] = 0.0
        graph = helper.make_graph(
            [helper.make_node("Conv", ["image", "weight"], ["logits"], name="/conv")],
            "net",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, (shape[0], 8, *shape[2:]))],
            [numpy_helper.from_array(weight, "weight")],
        )
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), path)
        return path

    return make


def bench(*models: Path, sizes: tuple[int, ...] = (1,), trust: bool = False, runtime: str = "openvino") -> Any:
    return deploy.bench(
        models,
        runtime=runtime,
        batch_sizes=sizes,
        threads=1,
        rounds=5,
        round_ms=1.0,
        trust=trust,
        progress=Silent(),
    ).races


@pytest.mark.parametrize(("text", "sizes"), [("1", (1,)), ("1,8,32", (1, 8, 32)), (" 2 , 3", (2, 3))])
def test_batch_sizes_are_read(text: str, sizes: tuple[int, ...]) -> None:
    assert parse_batches(text) == sizes


@pytest.mark.parametrize("text", ["", "1,", "1;2", "x", "1.5", "0", "4,-1", "1 2"])
def test_batch_sizes_that_are_none_are_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--batch ") as caught:
        parse_batches(text)
    assert len(caught.value.lines) == 1


@pytest.mark.parametrize(("text", "pair"), [("2:4", (2, 4)), ("1:16", (1, 16)), ("15:16", (15, 16))])
def test_patterns_are_read(text: str, pair: tuple[int, int]) -> None:
    assert _pattern(text) == pair


@pytest.mark.parametrize(
    "text", ["", "2", "2:", ":4", "4:4", "5:4", "0:4", "2:17", "-2:4", "2:4:8", "a:b", "²:4", "2/4"]
)
def test_patterns_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--pattern .*expected N:M"):
        _pattern(text)


def test_parameters_are_json_where_they_parse_and_text_elsewhere() -> None:
    assert _params("openvino", ["precision=bf16"]).model_dump() == {"precision": "bf16"}
    assert _params("openvino", ['precision="f32"']).model_dump() == {"precision": "f32"}
    assert _params("openvino", []) == menu.entry("runtimes", "openvino").Params()
    found = _params("tensorrt_rtx", ['targets=["sm80", "sm86"]', "sparse=false", "max_batch=8"]).model_dump()
    assert (found["targets"], found["sparse"], found["max_batch"]) == (("sm80", "sm86"), False, 8)
    assert _params("tensorrt_rtx", ["max_batch=8", "max_batch=9"]).model_dump()["max_batch"] == 9


@pytest.mark.parametrize(
    ("runtime", "text", "message"),
    [
        ("openvino", "precison=f32", r"--set precison: .*; did you mean 'precision'\?"),
        ("openvino", "zzz=1", r"--set zzz: .*; one of precision"),
        ("openvino", "precision", r"--set precision: expected KEY=VALUE"),
        ("openvino", "precision=f16", r"--set precision: Input should be 'f32' or 'bf16'"),
        ("openvino", "precision=", r"--set precision: "),
        ("tensorrt_rtx", "max_batch=eight", r"--set max_batch: Input should be a valid integer"),
        ("tensorrt_rtx", "max_batch=true", r"--set max_batch: Input should be a valid integer"),
        ("tensorrt_rtx", 'targets=["sm86", "sm99"]', r"--set targets: Input should be 'sm80'"),
        ("tensorrt_rtx", "max_batch=0", r"--set max_batch: .*greater than or equal to 1"),
        ("tensorrt_rtx", "min_batch=64", r"--set .*min_batch <= opt_batch <= max_batch"),
        ("opnvino", "a=1", r"--runtime opnvino: unknown runtime; did you mean 'openvino'\?"),
    ],
)
def test_a_wrong_parameter_is_one_line_that_names_it(runtime: str, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        _params(runtime, [text])
    assert len(caught.value.lines) == 1


def test_an_engine_lies_beside_its_model_and_ends_as_its_runtime_wants(net: Net, tmp_path: Path) -> None:
    model = net()
    built = deploy.build(model, "openvino", None, [])
    assert built.engine == tmp_path / "net.openvino.xml"
    assert built.engine.is_file()
    assert deploy.build(model, "openvino", tmp_path / "other.xml", ["precision=f32"]).engine.name == "other.xml"
    with pytest.raises(UsageError, match=r"-o .*other\.engine: engines of openvino end in \.xml"):
        deploy.build(model, "openvino", tmp_path / "other.engine", [])
    with pytest.raises(UsageError, match=r"-o .*: the folder .*gone does not exist"):
        deploy.build(model, "openvino", tmp_path / "gone" / "other.xml", [])
    with pytest.raises(UsageError, match="unknown runtime"):
        deploy.build(model, "opnvino", None, [])
    assert sorted(p.name for p in tmp_path.glob("*.xml")) == ["net.openvino.xml", "other.xml"]


def test_the_model_is_judged_before_the_runtime_and_the_runtime_before_it_builds(
    net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = menu.entry("runtimes", "openvino")
    monkeypatch.setattr(runtime, "unavailable_reason", lambda: "openvino is not installed")
    monkeypatch.setattr(runtime, "build", pytest.fail)
    with pytest.raises(DataError, match=r"gone\.onnx"):
        deploy.build(tmp_path / "gone.onnx", "openvino", None, [])
    with pytest.raises(RuntimeUnavailable, match=r"^openvino is not installed$"):
        deploy.build(net(), "openvino", None, [])
    with pytest.raises(RuntimeUnavailable, match=r"^openvino is not installed$"):
        bench(net())
    monkeypatch.setattr(runtime, "unavailable_reason", lambda: None)
    monkeypatch.setattr(runtime, "cannot_run_reason", lambda: "no device")
    with pytest.raises(RuntimeUnavailable, match=r"^no device$"):
        bench(net())


def test_files_race_under_their_names_at_each_batch_size(net: Net) -> None:
    first, second = net("a.onnx"), net("b.onnx")
    races = bench(first, second, sizes=(1, 3))
    assert [(race.labels, race.batch_size) for race in races] == [(("a.onnx", "b.onnx"), 1), (("a.onnx", "b.onnx"), 3)]
    assert races[0].compare("b.onnx", "a.onnx").median > 0
    assert sorted(p.name for p in first.parent.iterdir()) == ["a.onnx", "b.onnx"], "scratch engines lie elsewhere"


def test_files_of_one_name_are_told_apart_by_their_folders(net: Net) -> None:
    first, second = net("x/net.onnx"), net("y/net.onnx")
    (race,) = bench(first, second)
    assert race.labels == (str(first), str(second))
    with pytest.raises(UsageError, match="each file once"):
        bench(first, first)


def test_names_that_differ_in_a_folders_sign_alone_do_not_collide(
    net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a/b.onnx", "a_b.onnx", "c/b.onnx"):
        net(name)
    monkeypatch.chdir(tmp_path)
    (race,) = bench(Path("a/b.onnx"), Path("a_b.onnx"), Path("c/b.onnx"))
    assert race.labels == ("a/b.onnx", "a_b.onnx", "c/b.onnx")


def test_an_engine_races_beside_the_onnx_file_it_came_from(net: Net) -> None:
    model = net()
    engine = deploy.build(model, "openvino", None, []).engine
    (race,) = bench(model, engine, runtime="onnxruntime")
    assert race.labels == ("net.onnx", "net.openvino.xml")


def test_an_engine_is_opened_only_with_its_record_or_on_trust(net: Net) -> None:
    engine = deploy.build(net(), "openvino", None, []).engine
    record = engine.with_name(engine.name + ".json")
    text = record.read_text()
    record.unlink()
    with pytest.raises(UsageError, match="--trust-engine"):
        bench(engine)
    assert bench(engine, trust=True)[0].labels == (engine.name,)
    record.write_text(text.replace(json.loads(text)["files"][engine.name], "0" * 64))
    with pytest.raises(CorruptArtifact):
        bench(engine, trust=True)


@pytest.mark.parametrize("params", [None, {"precision": "f64"}, 3])
def test_a_record_whose_parameters_are_damaged_is_a_corrupt_artifact(net: Net, params: object) -> None:
    engine = deploy.build(net(), "openvino", None, []).engine
    path = engine.with_name(engine.name + ".json")
    record = json.loads(path.read_text())
    del record["params"]
    path.write_text(json.dumps(record if params is None else {**record, "params": params}))
    with pytest.raises(CorruptArtifact):
        bench(engine)


def test_a_fixed_batch_and_a_second_dynamic_axis_are_refused_by_name(net: Net) -> None:
    fixed = net("fixed.onnx", (4, 16, 4, 4))
    with pytest.raises(UsageError, match=r"^fixed\.onnx: input image has the fixed batch size 4: use --batch 4$"):
        bench(fixed)
    assert bench(fixed, sizes=(4,))[0].batch_size == 4
    with pytest.raises(
        DataError, match=r"^wide\.onnx: input image .*with a dynamic axis besides the batch: pass --shape"
    ):
        bench(net("wide.onnx", ("batch", 16, "h", 4)))


def _shape(tensor: IOTensor, batch: int, where: str) -> tuple[int, ...]:
    return full_shapes([tensor], batch, {}, where)[tensor.name]


def test_shapes_put_the_batch_on_the_first_axis() -> None:
    tensor = IOTensor("x", (None, 3, 4), "float32")
    assert _shape(tensor, 5, "f") == (5, 3, 4)
    assert _shape(dataclasses.replace(tensor, shape=(5, 3)), 5, "f") == (5, 3)
    with pytest.raises(UsageError, match="fixed batch size 5"):
        _shape(dataclasses.replace(tensor, shape=(5, 3)), 6, "f")
    with pytest.raises(DataError, match="dynamic axis"):
        _shape(dataclasses.replace(tensor, shape=(5, None)), 5, "f")


def test_an_input_without_axes_is_refused_by_name() -> None:
    with pytest.raises(DataError, match="input x has no batch axis"):
        _shape(IOTensor("x", (), "float32"), 1, "f")


def test_inspecting_an_onnx_file_judges_its_values_and_claims_nothing_of_a_builder(net: Net) -> None:
    found = deploy.inspect(net(), "2:4", trust=False)
    assert found.chain is not None
    (layer,) = found.chain.layers
    assert (layer.layer, layer.op, layer.shape, layer.precision) == ("/conv", "Conv", (8, 16, 1, 1), "FP32")
    assert (layer.zeros, layer.pattern_held, layer.shape_rule) == (64, True, True)
    assert (layer.eligible, layer.picked, layer.kernel, layer.sparse_ms) == (None, None, "", None)
    assert layer.reason == "weights are FP32, not INT8"
    strict = deploy.inspect(net(), "1:4", trust=False).chain
    assert strict is not None
    assert (strict.layers[0].pattern_held, strict.layers[0].violations, strict.layers[0].blocks) == (False, 32, 32)
    odd = deploy.inspect(net(), "1:3", trust=False).chain
    assert odd is not None
    assert (odd.layers[0].pattern_held, odd.layers[0].reason) == (False, "C_in 16 is not a multiple of 3")


def test_inspecting_an_engine_shows_its_record_with_the_builders_facts(net: Net, tmp_path: Path) -> None:
    engine = deploy.build(net(), "openvino", None, []).engine
    found = deploy.inspect(engine, "2:4", trust=False)
    assert (found.runtime, found.chain, found.profile) == ("openvino", None, None)
    assert found.record is not None
    assert found.record["params"] == {"precision": "f32"}
    assert "facts" in found.record
    with pytest.raises(DataError, match="no such file"):
        deploy.inspect(tmp_path / "gone.onnx", "2:4", trust=False)


def test_an_engine_is_judged_with_the_file_it_was_built_from_and_with_no_other(net: Net) -> None:
    model = net()
    engine = deploy.build(model, "openvino", None, []).engine
    found = deploy.inspect(engine, "2:4", trust=False, onnx=model, profile=True)
    assert found.chain is not None
    (layer,) = found.chain.layers
    assert (found.chain.runtime, found.chain.batch_size, layer.picked) == ("openvino", 1, False)
    assert layer.sparse_ms is not None
    assert layer.sparse_ms > 0
    assert layer.kernel
    other = net("other.onnx", ("n", 16, 8, 8))
    with pytest.raises(UsageError, match=r"other\.onnx: is not the file that net\.openvino\.xml was built from"):
        deploy.inspect(engine, "2:4", trust=False, onnx=other)
    engine.with_name(engine.name + ".json").unlink()
    with pytest.raises(UsageError, match="no record"):
        deploy.inspect(engine, "2:4", trust=True, onnx=model)
    assert deploy.inspect(engine, "2:4", trust=True, profile=True).profile is not None


def test_the_builders_lists_in_the_record_decide(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsify_deploy.runtimes import _metadata

    model = net()
    engine = deploy.build(model, "openvino", None, []).engine
    said = {"facts": {"sparse_eligible": ["/conv + /relu"], "sparse_picked": ["/conv + /relu"]}}
    record = {**json.loads(engine.with_name(engine.name + ".json").read_text()), **said}
    monkeypatch.setattr(_metadata, "check", lambda path, *, trust: record)
    monkeypatch.setattr(_metadata, "runtime_of", lambda path: "tensorrt")
    found = deploy.inspect(engine, "2:4", trust=False, onnx=model).chain
    assert found is not None
    assert (found.layers[0].eligible, found.layers[0].picked, found.layers[0].reason) == (True, True, "runs sparse")


def test_options_for_engines_are_refused_for_an_onnx_file(net: Net) -> None:
    with pytest.raises(UsageError, match=r"^--profile goes with an engine"):
        deploy.inspect(net(), "2:4", trust=False, profile=True)
    with pytest.raises(UsageError, match=r"^--onnx goes with an engine"):
        deploy.inspect(net(), "2:4", trust=False, onnx=net("b.onnx"))


def test_an_engine_that_cannot_run_here_is_not_profiled_and_says_why(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = deploy.build(net(), "openvino", None, []).engine
    monkeypatch.setattr(menu.entry("runtimes", "openvino"), "cannot_run_reason", lambda: "no device")
    with pytest.raises(RuntimeUnavailable, match="--profile: no device"):
        deploy.inspect(engine, "2:4", trust=False, profile=True)
