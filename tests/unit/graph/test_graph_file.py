"""A file is judged before anything reads it."""

from __future__ import annotations

import os

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsify_deploy.errors import ModelError
from sparsify_deploy.graph import file
from sparsify_deploy.graph.layers import weight_layers
from sparsify_deploy.types import IOTensor


def small(opset=17, **external):
    weight = numpy_helper.from_array(np.arange(12, dtype=np.float32).reshape(3, 4), "w")
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w"], ["y"], name="g"), helper.make_node("Relu", ["y"], ["z"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 4])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def test_a_good_file(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(small(), path)
    model = file.load(path)
    assert file.operators(model) == {"Gemm": 1, "Relu": 1}
    assert file.inputs(model) == (IOTensor("x", (None, 3), "float32"),)
    assert file.outputs(model) == (IOTensor("z", (None, 4), "float32"),)
    assert file.opset(model) == 17
    file.check(model, path)


CONTENTS = {
    "empty": (b"", "is empty"),
    "text": (b"hello, this is no model at all\n" * 20, "is no ONNX file"),
    "random": (np.random.default_rng(0).bytes(4096), "is no ONNX file"),
    "zeros": (bytes(64), "is no ONNX file"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(range(200)), "is no ONNX file"),
    "half": (small().SerializeToString()[:-40], "cut off"),
    "no graph": (onnx.ModelProto(ir_version=8).SerializeToString(), "no graph"),
    "too new": (small(opset=999).SerializeToString(), "opset 999 is newer than"),
    "no opset": (small(opset=0).SerializeToString(), "names no ONNX opset"),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_bad_files_are_one_line(kind, tmp_path):
    content, message = CONTENTS[kind]
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        file.load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_missing_folder_and_no_nodes(tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        file.load(tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="not a file"):
        file.load(tmp_path)
    model = small()
    del model.graph.node[:]
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="has no nodes"):
        file.load(tmp_path / "m.onnx")


def with_external(folder, location, content):
    model = small()
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    folder.mkdir(exist_ok=True)
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    if content is not None:
        (folder / location).write_bytes(content)
    return path


WEIGHT = np.arange(12, dtype=np.float32).tobytes()


def test_external_data_beside_the_file(tmp_path):
    model = file.load(with_external(tmp_path / "in", "w.bin", WEIGHT))
    assert numpy_helper.to_array(model.graph.initializer[0]).tolist() == np.arange(12.0).reshape(3, 4).tolist()


def test_external_data_outside_missing_or_linked(tmp_path):
    secret = tmp_path / "secret.bin"
    secret.write_bytes(WEIGHT)
    for location in ("../secret.bin", str(secret)):
        with pytest.raises(ModelError, match="outside the file's folder"):
            file.load(with_external(tmp_path / "in", location, None))
    with pytest.raises(ModelError, match=r"'w\.bin' is missing"):
        file.load(with_external(tmp_path / "in", "w.bin", None))
    os.symlink(secret, tmp_path / "in" / "link.bin")
    with pytest.raises(ModelError, match="outside the file's folder"):
        file.load(with_external(tmp_path / "in", "link.bin", None))


def test_external_data_too_short(tmp_path):
    with pytest.raises(ModelError, match="'w' holds 0 bytes, its shape needs 48"):
        file.load(with_external(tmp_path / "in", "w.bin", b""))


def test_check_names_the_objection(tmp_path):
    model = small()
    model.graph.node[0].input[1] = "nowhere"
    with pytest.raises(ModelError, match="is not valid ONNX"):
        file.check(model, tmp_path / "m.onnx")
    model = small()
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 5
    with pytest.raises(ModelError, match="is not valid ONNX"):
        file.check(model, tmp_path / "m.onnx")


def test_save_is_byte_for_byte_the_same(tmp_path):
    file.save(small(), tmp_path / "a")
    file.save(file.load(tmp_path / "a"), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_damaged_bytes_never_end_in_anything_but_one_line(tmp_path):
    """Cut and overwritten copies of a good file, seeded."""
    content, rng, path = small().SerializeToString(), np.random.default_rng(3), tmp_path / "m.onnx"
    refusals = []
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(len(damaged))] = rng.integers(256)
        path.write_bytes(damaged[: rng.integers(1, len(damaged))] if rng.random() < 0.3 else damaged)
        try:
            model = file.load(path)
            file.check(model, path)
            weight_layers(model)
            file.inputs(model), file.outputs(model), file.operators(model)
        except ModelError as error:
            refusals.append(str(error))
    assert len(refusals) > 100
    assert not any("\n" in line for line in refusals)


def test_operators_of_other_domains_are_accepted(tmp_path):
    model = small()
    model.graph.node[1].domain = "com.microsoft"
    model.graph.node[1].op_type = "FastGelu"
    model.opset_import.add(domain="com.microsoft", version=1)
    onnx.save(model, tmp_path / "m.onnx")
    assert file.operators(file.load(tmp_path / "m.onnx")) == {"Gemm": 1, "com.microsoft::FastGelu": 1}
