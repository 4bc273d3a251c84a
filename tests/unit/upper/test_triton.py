"""The configuration is parsed by Triton's own protobuf schema, and held against the ONNX file it speaks of."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from sparsify_deploy.errors import UsageError
from sparsify_deploy.preprocessing.spec import TextSpec, from_json
from sparsify_deploy.reporting import triton

Values = Sequence[tuple[str, int, Sequence[int | str]]]
IMAGE: tuple[Values, Values] = ([("x", TensorProto.FLOAT, ["N", 3, 8, 8])], [("y", TensorProto.FLOAT, ["N", 10])])
TOKENS: tuple[Values, Values] = (
    [("ids", TensorProto.INT64, ["N", 16]), ("mask", TensorProto.BOOL, ["N", 16])],
    [("logits", TensorProto.FLOAT, ["N", 2]), ("length", TensorProto.INT64, ["N"])],
)
TYPES = {
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.FLOAT16: "TYPE_FP16",
    TensorProto.INT64: "TYPE_INT64",
    TensorProto.BOOL: "TYPE_BOOL",
}
VERSIONS = {"openvino": "2026.4.1", "onnxruntime": "1.24.4", "tensorrt": "10.3.0.26"}


@pytest.fixture
def schema() -> Any:
    """Triton's own message types."""
    return pytest.importorskip("tritonclient.grpc.model_config_pb2")


def save(path: Path, inputs: Values, outputs: Values) -> Path:
    """An ONNX file of that interface; what it computes is a constant a output."""
    nodes = [
        helper.make_node(
            "ConstantOfShape",
            ["shape"],
            [name],
            value=helper.make_tensor("v", kind, [1], [0]),
        )
        for name, kind, _ in outputs
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in inputs],
        [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in outputs],
        [helper.make_tensor("shape", TensorProto.INT64, [2], [1, 1])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture
def written(tmp_path: Path, schema: Any) -> Callable[..., tuple[Any, Path]]:
    """Write a repository for an interface; returns its parsed configuration and its folder."""

    def make(
        inputs: Values, outputs: Values, runtime: str = "onnxruntime", name: str = "m", **changes: Any
    ) -> tuple[Any, Path]:
        from google.protobuf import text_format

        model = save(tmp_path / "model.onnx", inputs, outputs)
        files = {"openvino": ["model.xml", "model.bin"], "tensorrt": ["model.engine"], "onnxruntime": ["model.onnx"]}
        for file in files[runtime]:
            if file != "model.onnx":
                (tmp_path / file).write_bytes(file.encode())
        params = changes.pop("params", {})
        version = changes.pop("version", VERSIONS[runtime])
        record = {"runtime": runtime, "version": version, "params": params, "files": dict.fromkeys(files[runtime], "")}
        changes.setdefault("why", "a test")
        described = triton.described(tmp_path / files[runtime][0], record, model, **changes)
        folder = triton.write(tmp_path / "repository", name, described)
        text = (folder / "config.pbtxt").read_text(encoding="ascii")
        return text_format.Parse(text, schema.ModelConfig()), folder

    return make


def check_rules(config: Any, folder: Path, inputs: Values, outputs: Values) -> None:
    """What Triton asks of a configuration beyond its schema."""
    batched = config.max_batch_size > 0
    assert config.name == folder.name
    assert (folder / "1" / config.default_model_filename).is_file()
    for found, asked in ((config.input, inputs), (config.output, outputs)):
        assert [tensor.name for tensor in found] == [name for name, _, _ in asked]
        for tensor, (_, kind, shape) in zip(found, asked, strict=True):
            kinds = type(config).DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_name
            assert tensor.data_type == kinds[TYPES[kind]].number
            own = list(tensor.reshape.shape) if tensor.HasField("reshape") else list(tensor.dims)
            full = [-1, *own] if batched else own
            assert full == [-1 if isinstance(axis, str) else axis for axis in shape]
            assert len(tensor.dims) >= 1, "Triton has no empty shape"
            if tensor.HasField("reshape"):
                assert np.prod(list(tensor.dims)) == np.prod(own)
    assert config.HasField("dynamic_batching") == (config.max_batch_size > 1)
    assert len(config.instance_group) == 1
    for warm_up in config.model_warmup:
        assert 1 <= warm_up.batch_size <= max(1, config.max_batch_size)
        assert set(warm_up.inputs) == {tensor.name for tensor in config.input}
        for tensor in config.input:
            own_input = warm_up.inputs[tensor.name]
            assert own_input.data_type == tensor.data_type
            assert len(own_input.dims) == len(tensor.dims)
            assert all(axis > 0 for axis in own_input.dims)
            assert all(b in (-1, a) for a, b in zip(own_input.dims, tensor.dims, strict=True))
            assert own_input.WhichOneof("input_data_type") in ("random_data", "zero_data")


def fixed(values: Values, size: int) -> Values:
    return [(name, kind, [size if axis == "N" else axis for axis in shape]) for name, kind, shape in values]


@pytest.mark.parametrize("interface", [IMAGE, TOKENS], ids=["image", "tokens"])
@pytest.mark.parametrize("batch", ["N", 4], ids=["dynamic", "fixed"])
@pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt", "openvino"])
def test_a_configuration_fits_the_schema_and_the_model(
    written: Callable[..., tuple[Any, Path]], interface: tuple[Values, Values], batch: str | int, runtime: str
) -> None:
    inputs, outputs = interface if batch == "N" else (fixed(interface[0], 4), fixed(interface[1], 4))
    params = {"max_batch": 16} if runtime == "tensorrt" else {}
    config, folder = written(inputs, outputs, runtime, params=params)
    check_rules(config, folder, inputs, outputs)
    assert config.backend == runtime
    assert config.default_model_filename == {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}.get(
        runtime, "model.xml"
    )
    largest = {"onnxruntime": 32, "tensorrt": 16, "openvino": 0}[runtime]
    assert config.max_batch_size == (largest if batch == "N" else 0)
    group = type(config.instance_group[0])
    assert config.instance_group[0].kind == (group.KIND_GPU if runtime == "tensorrt" else group.KIND_CPU)


def test_warm_up_sends_one_example_and_the_largest_batch(written: Callable[..., tuple[Any, Path]]) -> None:
    config, _ = written(*TOKENS)
    assert [w.batch_size for w in config.model_warmup] == [1, 32]
    assert config.model_warmup[0].inputs["ids"].zero_data, "a random index may lie outside the vocabulary"
    config, _ = written(*IMAGE)
    assert config.model_warmup[0].inputs["x"].random_data
    # its backend takes no batches from Triton, so the batch is in the dims
    config, _ = written(*IMAGE, "openvino")
    assert [(w.batch_size, list(w.inputs["x"].dims)) for w in config.model_warmup] == [
        (1, [1, 3, 8, 8]),
        (1, [32, 3, 8, 8]),
    ]
    config, _ = written(fixed(IMAGE[0], 4), fixed(IMAGE[1], 4))
    assert [list(w.inputs["x"].dims) for w in config.model_warmup] == [[4, 3, 8, 8]]


def test_a_free_axis_besides_the_batch_stays_free(written: Callable[..., tuple[Any, Path]]) -> None:
    inputs: Values = [("ids", TensorProto.INT64, ["N", "T"])]
    outputs: Values = [("states", TensorProto.FLOAT16, ["N", "T", 384])]
    config, folder = written(inputs, outputs)
    check_rules(config, folder, inputs, outputs)
    assert list(config.output[0].dims) == [-1, 384]


def test_a_batch_that_an_output_has_not_is_none(written: Callable[..., tuple[Any, Path]]) -> None:
    outputs: Values = [("y", TensorProto.FLOAT, ["N", 2]), ("total", TensorProto.FLOAT, [1])]
    config, folder = written(IMAGE[0], outputs)
    assert config.max_batch_size == 0
    check_rules(config, folder, IMAGE[0], outputs)


def test_tensorrt_before_10_serves_int64_as_int32(written: Callable[..., tuple[Any, Path]], schema: Any) -> None:
    old, _ = written(*TOKENS, "tensorrt", version="8.6.1", params={"max_batch": 8})
    new, _ = written(*TOKENS, "tensorrt", version="10.3.0.26", params={"max_batch": 8})
    assert (old.input[0].data_type, new.input[0].data_type) == (schema.TYPE_INT32, schema.TYPE_INT64)


def test_labels_stand_at_the_output_with_a_value_a_class(written: Callable[..., tuple[Any, Path]]) -> None:
    config, folder = written(*IMAGE, labels=[f"digit {i}" for i in range(9)] + ["a\nb"])
    assert config.output[0].label_filename == "labels.txt"
    assert (folder / "labels.txt").read_text().splitlines() == [*(f"digit {i}" for i in range(9)), "a b"]
    config, folder = written(*IMAGE, labels=["too", "few"])
    assert config.output[0].label_filename == ""
    assert not (folder / "labels.txt").exists()


def test_hostile_names_are_escaped(written: Callable[..., tuple[Any, Path]]) -> None:
    name = 'in"put\\ \N{GREEK SMALL LETTER ALPHA}'
    inputs: Values = [(name, TensorProto.FLOAT, ["N", 3])]
    config, folder = written(inputs, IMAGE[1], why='a"\nbackend: "python"')
    check_rules(config, folder, inputs, IMAGE[1])
    assert config.backend == "onnxruntime"


def test_parameters_of_the_engine_reach_the_backend(written: Callable[..., tuple[Any, Path]]) -> None:
    config, _ = written(*IMAGE, "openvino", params={"precision": "bf16"})
    assert config.parameters["HINT_BF16"].string_value == "YES"
    config, _ = written(*IMAGE, params={"provider": "CUDA"})
    assert config.instance_group[0].kind == type(config.instance_group[0]).KIND_GPU


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_clients_are_told_how_raw_examples_become_inputs(
    written: Callable[..., tuple[Any, Path]], tmp_path: Path, runtime: str
) -> None:
    spec = TextSpec(16, classes=('say "hi"', "back\\slash", "\N{GREEK SMALL LETTER ALPHA}\n}"))
    files = {"preprocessing.json": tmp_path / "p.json", "tokenizer.json": tmp_path / "t.json"}
    files["preprocessing.json"].write_text(spec.to_text())
    files["tokenizer.json"].write_text("its words")
    config, folder = written(*TOKENS, runtime, preprocessing=files, params={"precision": "bf16"})
    check_rules(config, folder, *TOKENS)
    told = config.parameters["preprocessing"].string_value
    assert from_json(json.loads(told)) == spec
    assert (folder / "preprocessing.json").read_bytes() == files["preprocessing.json"].read_bytes()
    assert (folder / "tokenizer.json").read_text() == "its words"
    config, again = written(*TOKENS, runtime)
    assert "preprocessing" not in config.parameters
    assert not (again / "preprocessing.json").exists()


@pytest.mark.parametrize(
    ("runtime", "version", "said"),
    [
        ("tensorrt", "10.3.0.26", "container nvcr.io/nvidia/tritonserver:24.08-py3; "),
        ("tensorrt", "8.6.3", "tritonserver:24.02-py3 to nvcr.io/nvidia/tritonserver:24.03-py3"),
        ("tensorrt", "8.6.0", "which container has it is not known to this program"),
        ("onnxruntime", "1.24.4", "container nvcr.io/nvidia/tritonserver:26.04-py3 to"),
        ("onnxruntime", "1.32.0", "no container is known to have it (up to 26.08: 1.28.0)"),
        ("openvino", "2026.4.1", "which container has it is not known"),
    ],
)
def test_the_container_is_named_or_said_to_be_unknown(
    written: Callable[..., tuple[Any, Path]], runtime: str, version: str, said: str
) -> None:
    _, folder = written(*IMAGE, runtime, version=version)
    (line,) = [s for s in (folder / "config.pbtxt").read_text().splitlines() if s.startswith("# Needs:")]
    assert said in line


def test_a_name_is_fit_for_a_folder_and_holds_the_runtime() -> None:
    assert triton.model_name("my net/v1.2", "openvino") == "my_net_v1.2_openvino"
    assert triton.model_name("../..", "tensorrt") == "model_tensorrt"


def test_what_was_there_is_replaced_whole(written: Callable[..., tuple[Any, Path]]) -> None:
    _, folder = written(*IMAGE, labels=[str(i) for i in range(10)])
    (folder / "1" / "stale").write_text("x")
    _, again = written(*IMAGE)
    assert sorted(str(p.relative_to(again)) for p in again.rglob("*") if p.is_file()) == [
        "1/model.onnx",
        "config.pbtxt",
    ]
    assert [p.name for p in again.parent.iterdir()] == [again.name]


def test_engines_of_tensorrt_rtx_are_refused(tmp_path: Path) -> None:
    record = {"runtime": "tensorrt_rtx", "version": "1.7", "params": {}, "files": {}}
    with pytest.raises(UsageError, match="only TensorRT-RTX runs them"):
        triton.described(tmp_path / "e", record, tmp_path / "m.onnx", why="x")


def test_build_writes_a_repository_without_a_recipe(tmp_path: Path, schema: Any) -> None:
    from google.protobuf import text_format

    from sparsify_deploy import deploy

    pytest.importorskip("onnxruntime")
    model = save(tmp_path / "net.onnx", *IMAGE)
    built = deploy.build(model, "onnxruntime", tmp_path / "out.onnx", (), tmp_path / "models")
    assert built.triton == tmp_path / "models" / "net_onnxruntime"
    config = text_format.Parse((built.triton / "config.pbtxt").read_text(), schema.ModelConfig())
    check_rules(config, built.triton, *IMAGE)
    assert (built.triton / "1" / "model.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()
    with pytest.raises(UsageError, match="--triton: Triton cannot serve tensorrt_rtx"):
        deploy.build(model, "tensorrt_rtx", None, (), tmp_path / "models")


def test_a_recipe_that_serves_tensorrt_rtx_is_told(recipe: Callable[..., Any]) -> None:
    from sparsify_deploy.recipe_checks import mistakes

    found = mistakes(
        recipe(deploy=[{"runtime": "openvino", "triton": True}, {"runtime": "tensorrt_rtx", "triton": True}])
    )
    assert [path for path, _ in found] == [("deploy", 1, "triton")]
