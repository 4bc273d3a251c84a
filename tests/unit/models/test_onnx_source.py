"""The source `onnx`: which files a model consists of, found without the onnx package, and that it is no network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsify_deploy import menu
from sparsify_deploy.errors import ModelError
from sparsify_deploy.models._external_data import _KEY, locations

SOURCE = menu.entry("models", "onnx")


def write(path: Path, location: str | None, names: tuple[str, ...] = ("w",)) -> None:
    weights = [numpy_helper.from_array(np.full((64, 64), i, np.float32), name) for i, name in enumerate(names)]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 64])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path, save_as_external_data=location is not None, location=location, size_threshold=0)


def params(path: Path) -> object:
    return SOURCE.Params.model_validate({"path": str(path)})


def test_a_file_of_its_own_has_no_others(tmp_path: Path) -> None:
    write(tmp_path / "model.onnx", None)
    assert SOURCE.files(params(tmp_path / "model.onnx")) == {"path": tmp_path / "model.onnx"}


@pytest.mark.parametrize("name", ["model.data", "weights-of-ä.bin", "x" * 200])
def test_its_external_data_are_files_of_the_model(tmp_path: Path, name: str) -> None:
    write(tmp_path / "model.onnx", name)
    assert SOURCE.files(params(tmp_path / "model.onnx")) == {
        "path": tmp_path / "model.onnx",
        f"path[{name}]": tmp_path / name,
    }


def test_several_are_found_each_once(tmp_path: Path) -> None:
    write(tmp_path / "model.onnx", "one.data", ("w", "b"))
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    for entry in model.graph.initializer[1].external_data:
        if entry.key == "location":
            entry.value = "two.data"
    (tmp_path / "two.data").write_bytes(b"")
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    assert locations(tmp_path / "model.onnx") == ("one.data", "two.data")


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "gone.data", ""])
def test_what_lies_elsewhere_or_is_gone_is_left_to_the_reader(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    inside = tmp_path / "folder"
    inside.mkdir()
    (inside / "model.onnx").write_bytes(b"before" + _KEY + bytes([len(name)]) + name.encode() + b"after")
    assert locations(inside / "model.onnx") == ()


@pytest.mark.parametrize("content", [b"", _KEY, _KEY + b"\xff", _KEY + b"\xff\xff", _KEY + b"\x80\x80\x01", b"abc"])
def test_cut_off_and_foreign_bytes_do_no_harm(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    assert locations(tmp_path / "model.onnx") == ()
    assert locations(tmp_path / "missing.onnx") == ()
    assert locations(tmp_path) == ()


def test_it_is_found_without_onnx_numpy_or_torch(tmp_path: Path) -> None:
    write(tmp_path / "model.onnx", "model.data")
    program = (
        "import sys\n"
        "for name in ('onnx', 'numpy', 'torch'): sys.modules[name] = None\n"
        "from sparsify_deploy import menu\n"
        "source = menu.entry('models', 'onnx')\n"
        "print(sorted(source.files(source.Params.model_validate({'path': sys.argv[1]}))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "model.onnx")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "['path', 'path[model.data]']"), done.stderr


def test_it_has_no_torch_network(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^model.source onnx has no torch network: net.onnx can be built and raced"):
        SOURCE.build(params(tmp_path / "net.onnx"))
