"""A recipe that starts from an ONNX file: taken in, built, raced against itself and judged, with data and without."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsify_deploy import workspace
from sparsify_deploy.errors import RecipeError, SparsifyError, UsageError
from sparsify_deploy.types import Silent

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

BENCHMARK = "benchmark: {rounds: 5, round_ms: 2.0, warmup_ms: 2.0}\n"
OPENVINO = "deploy: [{runtime: openvino}]\n"
LOOSE = "export: {min_top1_agreement: 0.9}\n"


# -- files -----------------------------------------------------------------------------------------------------------


def pruned(weight: np.ndarray) -> np.ndarray:
    """2:4 along axis 1."""
    groups = np.moveaxis(weight, 1, -1).reshape(-1, 4)
    order = np.argsort(np.abs(groups), axis=1)
    np.put_along_axis(groups, order[:, :2], 0, axis=1)
    moved = groups.reshape(np.moveaxis(weight, 1, -1).shape)
    return np.ascontiguousarray(np.moveaxis(moved, -1, 1))


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Train and test images `(N, 1, 8, 8)` with their labels, as the data set gives them."""
    import torch

    from sparsify_deploy import menu

    source = menu.entry("datasets", "digits")
    data = source.open(source.Params())
    parts: list[np.ndarray] = []
    for name in ("train", "test"):
        split = data.split(name)
        batch = split.take(torch.arange(len(split)))
        parts += [batch[data.inputs[0]].numpy(), batch["target"].numpy()]
    return parts[0], parts[1], parts[2], parts[3]


class Net:
    """Two random convolutions, the second 2:4 or dense, under a linear readout that was fitted to the digits."""

    def __init__(self, *, sparse: bool, int8: bool, name: str = "input", classes: int = 10, batch: Any = "n") -> None:
        random = np.random.default_rng(0)
        self.first = random.standard_normal((16, 1, 3, 3)).astype(np.float32) / 3
        second = random.standard_normal((32, 16, 3, 3)).astype(np.float32) / 12
        self.second = pruned(second) if sparse else second
        self.int8, self.name, self.classes, self.batch = int8, name, classes, batch

    def model(self, readout: np.ndarray | None = None, kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
        """The network, or without a readout what it is fitted to."""
        float_type = helper.tensor_dtype_to_np_dtype(kind)
        values: dict[str, np.ndarray] = {"first": self.first.astype(float_type)}
        nodes = [
            helper.make_node("Conv", [self.name, "first"], ["a"], "conv1", pads=[1] * 4),
            helper.make_node("Relu", ["a"], ["b"], "relu1"),
        ]
        if self.int8:
            step = np.abs(self.second).max(axis=(1, 2, 3)) / 127
            values |= {
                "second": np.rint(self.second / step[:, None, None, None]).astype(np.int8),
                "second_scale": step.astype(np.float32),
                "second_zero": np.zeros(32, np.int8),
                "scale": np.float32(0.03),
                "zero": np.int8(0),
            }
            nodes += [
                helper.make_node("QuantizeLinear", ["b", "scale", "zero"], ["bq"], "bq"),
                helper.make_node("DequantizeLinear", ["bq", "scale", "zero"], ["bd"], "bd"),
                helper.make_node("DequantizeLinear", ["second", "second_scale", "second_zero"], ["w"], "w", axis=0),
            ]
        else:
            values["second"] = self.second.astype(float_type)
        nodes += [
            helper.make_node("Conv", ["bd", "w"] if self.int8 else ["b", "second"], ["c"], "conv2", pads=[1] * 4),
            helper.make_node("Relu", ["c"], ["d"], "relu2"),
            helper.make_node("MaxPool", ["d"], ["p"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
            helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        ]
        if readout is not None:
            values |= {"fc": readout[:-1].astype(float_type), "bias": readout[-1].astype(float_type)}
            nodes.append(helper.make_node("Gemm", ["f", "fc", "bias"], ["logits"], "fc"))
        last, width = ("logits", self.classes) if readout is not None else ("f", 512)
        graph = helper.make_graph(
            nodes,
            "net",
            [helper.make_tensor_value_info(self.name, kind, [self.batch, 1, 8, 8])],
            [helper.make_tensor_value_info(last, kind, [self.batch, width])],
            [numpy_helper.from_array(np.asarray(value), key) for key, value in values.items()],
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(made, full_check=True)
        return made


def answers(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    """What ONNX Runtime makes of all images, without this package."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images})
    return np.asarray(found)


@pytest.fixture(scope="session")
def readout() -> np.ndarray:
    """`(513, 10)`, least squares on the features of the float network with 2:4."""
    images, labels, _, _ = digits()
    features = answers(Net(sparse=True, int8=False).model(), images)
    whole = np.concatenate([features, np.ones((len(features), 1), np.float32)], axis=1).astype(np.float64)
    wanted = np.eye(10)[labels]
    solved = np.linalg.solve(whole.T @ whole + 0.1 * np.eye(whole.shape[1]), whole.T @ wanted)
    return np.asarray(solved, np.float32)


@pytest.fixture(scope="session")
def nets(tmp_path_factory: pytest.TempPathFactory, readout: np.ndarray) -> Path:
    """A folder with `int8.onnx` (2:4), `float.onnx` (dense), `sparse.onnx` (2:4 in float) and `half.onnx` (FP16)."""
    folder = tmp_path_factory.mktemp("nets")
    onnx.save(Net(sparse=True, int8=True).model(readout), folder / "int8.onnx")
    onnx.save(Net(sparse=False, int8=False).model(readout), folder / "float.onnx")
    onnx.save(Net(sparse=True, int8=False).model(readout), folder / "sparse.onnx")
    onnx.save(Net(sparse=True, int8=False, name="pixels").model(readout, TensorProto.FLOAT16), folder / "half.onnx")
    return folder


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, nets: Path) -> Write:
    """Write a recipe for one of the nets, or another file, in `tmp_path`."""

    def make(net: str, rest: str = "", *, data: str = "data: {source: digits}\n", more: str = "") -> Path:
        if (nets / net).is_file():
            shutil.copy(nets / net, tmp_path)
        path = tmp_path / "given.yaml"
        path.write_text(f"version: 1\nmodel: {{source: onnx, params: {{path: {net}{more}}}}}\n{data}{rest}")
        return path

    return make


def run(path: Path, *sets: str) -> Any:
    """Run a recipe in this process; its report as JSON."""
    opened = workspace.open_run(path, sets, path.parent / "run", trust_code=False)
    opened.run(Silent(), device="cpu", checkpoint_every_s=30.0)
    return json.loads((path.parent / "run" / "report.json").read_text())


# -- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, nets: Path) -> Path:
    """A folder with a finished run of `int8.onnx` in OpenVINO and ONNX Runtime; copy it to change it."""
    folder = tmp_path_factory.mktemp("given")
    shutil.copy(nets / "int8.onnx", folder)
    text = "version: 1\nmodel: {source: onnx, params: {path: int8.onnx}}\ndata: {source: digits}\n"
    text += "deploy: [{runtime: openvino}, {runtime: onnxruntime}]\n" + LOOSE
    text += "benchmark: {rounds: 5, round_ms: 2.0, warmup_ms: 2.0, batch_sizes: [1, 4]}\ngates: {max_drop: 0.05}\n"
    (folder / "given.yaml").write_text(text)
    run(folder / "given.yaml")
    return folder


def report_of(folder: Path) -> Any:
    return json.loads((folder / "run" / "report.json").read_text())


def test_the_report_has_one_row_the_file_as_given_and_its_accuracy_is_what_the_file_answers(finished: Path) -> None:
    report = report_of(finished)
    _, _, images, labels = digits()
    right = float((answers(onnx.load(finished / "int8.onnx"), images).argmax(1) == labels).mean())
    assert right > 0.8
    (row,) = report["rows"]
    assert (row["label"], row["step"], row["model"]["precision"]) == ("as given", "given/import_onnx", "INT8")
    assert row["model"]["metrics"]["accuracy"] == pytest.approx(right, abs=1e-9)
    assert row["model"]["examples"] == len(labels)
    held = {layer["name"]: layer["usable"] for layer in row["model"]["layers"]}
    assert held == {"conv1": False, "conv2": True, "fc": False}


def test_it_is_raced_against_its_own_float_form_and_its_own_graph_with_dense_weights(finished: Path) -> None:
    for benchmark in report_of(finished)["benchmarks"]:
        assert [race["batch_size"] for race in benchmark["races"]] == [1, 4]
        assert benchmark["races"][0]["labels"] == [
            "same graph without Q/DQ",
            "as given",
            "same graph, dense weights",
        ]
        assert set(benchmark["metrics"]) == {"same graph without Q/DQ"}
        assert benchmark["metrics"]["same graph without Q/DQ"]["accuracy"] > 0.8
        assert benchmark["left_out"] == {}


def test_both_engines_were_evaluated_and_the_verdict_speaks_of_the_file(finished: Path) -> None:
    report = report_of(finished)
    assert [engine["runtime"] for engine in report["engines"]] == ["openvino", "onnxruntime"]
    assert all(engine["metrics"]["accuracy"] > 0.8 for engine in report["engines"])
    assert {engine["flavour"] for engine in report["engines"]} == {"as given"}
    verdict = report["verdict"]
    assert verdict.startswith("Verdict: ship ")
    assert "as given against same graph without Q/DQ is " in verdict
    assert "against the same graph, dense weights (its accuracy is unknown)" in verdict
    assert "1 of 3 layers hold 2:4" in verdict
    assert "dense FP32" not in json.dumps(report)
    (gate,) = report["gates"]
    assert (gate["name"], gate["met"]) == ("max_drop", True)
    value = report["rows"][0]["model"]["metrics"]["accuracy"] - report["engines"][0]["metrics"]["accuracy"]
    assert gate["value"] == pytest.approx(value, abs=1e-9)


def test_the_texts_and_what_is_deployed(finished: Path) -> None:
    folder, report = finished / "run", report_of(finished)
    text = (folder / "report.md").read_text()
    assert "## The file as given" in text
    assert "| as given (INT8) |" in text
    assert "FLOPs" not in text
    assert report["verdict"] in text
    assert "as given" in (folder / "report.html").read_text()
    assert (folder / "onnx" / "given" / "model.onnx").read_bytes() == (finished / "int8.onnx").read_bytes()
    shipped = report["shipped"]
    if shipped["model"] == "as given":
        assert (folder / "deploy" / "model.onnx").read_bytes() == (finished / "int8.onnx").read_bytes()
    assert (folder / "deploy" / "model.xml").is_file()
    assert json.loads((folder / "deploy" / "deploy.json").read_text())["accuracy"]["value"] == shipped["value"]
    assert [chain["model"] for chain in report["chains"]] == ["as given", "as given"]
    assert any(row["target"] == "a100" for row in report["predictions"])


@pytest.fixture
def again(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished folder."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_a_second_run_does_nothing_and_imports_no_torch(again: Path) -> None:
    before = {path: path.read_bytes() for path in (again / "run").glob("report.*")}
    program = (
        "import sys; from sparsify_deploy.__main__ import main\n"
        "code = main(['run', 'given.yaml', '--run-dir', 'run', '--json'])\n"
        "assert not {'torch', 'onnx', 'openvino', 'onnxruntime'} & set(sys.modules)\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=again, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {step["state"] for step in json.loads(done.stdout)["steps"]} == {"cached"}
    assert {path: path.read_bytes() for path in (again / "run").glob("report.*")} == before


def test_another_file_under_the_same_name_is_taken_in_anew(again: Path, nets: Path) -> None:
    shutil.copy(nets / "sparse.onnx", again / "int8.onnx")
    opened = workspace.open_run(again / "given.yaml", (), again / "run")
    states = {status.step.id: (status.state, status.why) for status in opened.status()}
    assert states["given/import_onnx"] == ("to run", "files.model.path: content changed") or states[
        "given/import_onnx"
    ][1].startswith("files.model.path")
    assert states["benchmark/openvino"][0] == "follows"


@pytest.mark.parametrize(
    ("change", "first"),
    [
        ("benchmark.rounds=6", "benchmark/openvino"),
        ("export.parity_examples=64", "given/build_engine.openvino"),
        ("seed=5", "given/import_onnx"),
    ],
)
def test_a_changed_field_repeats_no_more_than_it_must(again: Path, change: str, first: str) -> None:
    found = workspace.open_run(again / "given.yaml", (change,), again / "run").status()
    assert next(status.step.id for status in found if status.state != "cached") == first


def test_plan_and_explain_tell_of_the_file(again: Path) -> None:
    opened = workspace.open_run(again / "given.yaml", (), again / "run")
    forecast = opened.forecast()
    assert next(step.step.id for step, _ in forecast.steps) == "given/import_onnx"
    assert forecast.missing == ()
    assert (forecast.predicted[0].eligible, forecast.predicted[0].weighted) == (1, 3)
    assert {status.state for status in opened.status()} == {"cached"}
    with pytest.raises(UsageError, match=r"model\.source onnx has none"):
        opened.sensitivity(Silent(), device="cpu")


def test_a_run_that_was_killed_goes_on_after_the_import(write: Write, start: Any, cli: Any, tmp_path: Path) -> None:
    path = write("int8.onnx", OPENVINO + LOOSE + "benchmark: {rounds: 400, round_ms: 50.0}\n")
    child = start("run", path.name, "--run-dir", "run")
    deadline = time.monotonic() + 120
    while "benchmark/openvino: first time" not in (tmp_path / "log").read_text() and time.monotonic() < deadline:
        assert child.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait(timeout=30)
    path.write_text(path.read_text().replace("rounds: 400, round_ms: 50.0", "rounds: 5, round_ms: 2.0"))
    done = cli("run", path.name, "--run-dir", "run", "--json")
    assert done.returncode == 0, done.stderr
    states = {step["id"]: step["state"] for step in json.loads(done.stdout)["steps"]}
    assert states == {
        "given/import_onnx": "cached",
        "given/build_engine.openvino": "cached",
        "benchmark/openvino": "ran",
    }


# -- other files -----------------------------------------------------------------------------------------------------


def test_a_dense_float_file_is_its_own_baseline_and_no_twin_is_made_up(write: Write) -> None:
    report = run(write("float.onnx", OPENVINO + BENCHMARK))
    labels = report["benchmarks"][0]["races"][0]["labels"]
    assert labels[0] == "as given"
    assert set(labels) <= {"as given", "as given, in BF16"}
    assert ("as given, in BF16" in labels) != ("as given, in BF16" in report["benchmarks"][0]["left_out"])
    assert report["rows"][0]["model"]["precision"] == "FP32"
    assert "0 of 3 layers hold 2:4, so no hardware can skip its zeros" in report["verdict"]
    assert report["verdict"].startswith("Verdict: ship ")
    assert report["engines"][0]["flavour"] == "none"


def test_half_precision_under_another_name_gets_the_data_cast_and_renamed(write: Write) -> None:
    report = run(write("half.onnx", OPENVINO + LOOSE + BENCHMARK))
    assert report["rows"][0]["model"]["precision"] == "FP16"
    assert report["rows"][0]["model"]["metrics"]["accuracy"] > 0.8
    assert any("input pixels is turned into float16" in note for note in report["notes"])


def test_another_name_for_the_one_input_keeps_the_preprocessing(tmp_path: Path, write: Write, readout: Any) -> None:
    onnx.save(Net(sparse=True, int8=False, name="pixels").model(readout), tmp_path / "named.onnx")
    report = run(write("named.onnx", OPENVINO + BENCHMARK))
    assert report["rows"][0]["model"]["metrics"]["accuracy"] > 0.8
    assert report["notes"] == [] or not any("turned into" in note for note in report["notes"])


def test_a_fixed_batch_is_taken_as_it_is_and_other_sizes_are_refused_before_anything_runs(
    tmp_path: Path, write: Write, readout: Any
) -> None:
    onnx.save(Net(sparse=True, int8=False, batch=7).model(readout), tmp_path / "seven.onnx")
    path = write("seven.onnx", OPENVINO + BENCHMARK)
    with pytest.raises(
        SparsifyError, match=r"^benchmark.batch_sizes: seven.onnx is written for batches of 7: give \[7\]$"
    ):
        run(path)
    report = run(path, "benchmark.batch_sizes=[7]")
    assert report["rows"][0]["model"]["metrics"]["accuracy"] > 0.8
    assert report["rows"][0]["model"]["examples"] % 7
    bare = write("seven.onnx", OPENVINO + BENCHMARK.replace("rounds", "batch_sizes: [7], rounds"), data="")
    assert run(bare)["rows"][0]["model"]["metrics"] == {}


def test_external_data_come_into_one_file_and_a_change_in_them_is_seen(
    tmp_path: Path, write: Write, nets: Path
) -> None:
    model = onnx.load(nets / "sparse.onnx")
    onnx.save(model, tmp_path / "big.onnx", save_as_external_data=True, location="big.data", size_threshold=0)
    path = write("big.onnx", OPENVINO + BENCHMARK)
    report = run(path)
    taken = tmp_path / "run" / "onnx" / "given" / "model.onnx"
    assert taken.stat().st_size > (tmp_path / "big.onnx").stat().st_size
    np.testing.assert_array_equal(
        numpy_helper.to_array(onnx.load(taken).graph.initializer[0]),
        numpy_helper.to_array(onnx.load(nets / "sparse.onnx").graph.initializer[0]),
    )
    assert any("external data were taken into one file" in note for note in report["notes"])
    content = bytearray((tmp_path / "big.data").read_bytes())
    content[0] ^= 1
    (tmp_path / "big.data").write_bytes(content)
    first, *_ = workspace.open_run(path, (), tmp_path / "run").status()
    assert (first.state, "big.data" in first.why) == ("to run", True)


def test_a_flavour_for_onnx_runtime_is_made_of_the_file(write: Write) -> None:
    text = "deploy: [{runtime: onnxruntime, flavour: onnxruntime}]\n" + LOOSE + BENCHMARK
    report = run(write("int8.onnx", text))
    (engine,) = report["engines"]
    assert (engine["flavour"], engine["runtime"]) == ("onnxruntime", "onnxruntime")
    assert engine["metrics"]["accuracy"] > 0.8
    assert any(step["id"] == "given/export_onnx.onnxruntime" for step in report["steps"])
    with pytest.raises(SparsifyError, match="has no Q/DQ to place for ONNX Runtime"):
        run(write("float.onnx", text))


# -- without data ----------------------------------------------------------------------------------------------------


def test_without_data_it_runs_without_torch_and_says_that_no_accuracy_is_known(write: Write, tmp_path: Path) -> None:
    write("int8.onnx", "deploy: [{runtime: openvino}, {runtime: onnxruntime}]\n" + BENCHMARK, data="")
    program = (
        "import sys\n"
        "for name in ('torch', 'modelopt', 'torchvision'): sys.modules[name] = None\n"
        "from sparsify_deploy.__main__ import main\n"
        "sys.exit(main(['run', 'given.yaml', '--run-dir', 'run', '-q']))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = report_of(tmp_path)
    assert report["verdict"].startswith("Verdict: ship the file as given (INT8); ")
    assert report["verdict"].endswith("accuracy was not measured, for the recipe has no data.")
    assert (report["rows"][0]["model"]["metrics"], report["rows"][0]["model"]["examples"]) == ({}, 0)
    assert all(engine["metrics"] is None for engine in report["engines"])
    assert all(benchmark["metrics"] == {} for benchmark in report["benchmarks"])
    assert report["shipped"]["value"] is None
    assert (tmp_path / "run" / "deploy" / "model.onnx").read_bytes() == (tmp_path / "int8.onnx").read_bytes()
    assert "not measured, the recipe has no data" in (tmp_path / "run" / "report.md").read_text()
    assert (tmp_path / "run" / "report.html").is_file()


def test_free_axes_without_data_need_shapes(write: Write, tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["tokens"], ["y"], "mean", axes=[1], keepdims=1)],
        "g",
        [helper.make_tensor_value_info("tokens", TensorProto.FLOAT, ["n", "length"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "t.onnx")
    with pytest.raises(SparsifyError, match=r"add a data section, or model.params.shapes \{tokens: \[\?\]\}$"):
        run(write("t.onnx", OPENVINO + BENCHMARK, data=""))
    report = run(write("t.onnx", OPENVINO + BENCHMARK, data="", more=", shapes: {tokens: [12]}"))
    assert report["benchmarks"][0]["races"]
    for wrong, said in (("{tokens: [3, 3]}", "does not fit"), ("{words: [3]}", "has no input 'words'")):
        with pytest.raises(SparsifyError, match=said):
            run(write("t.onnx", OPENVINO + BENCHMARK, data="", more=f", shapes: {wrong}"))


# -- what is refused -------------------------------------------------------------------------------------------------


def broken(kind: str, nets: Path, folder: Path, readout: np.ndarray) -> None:
    """Put a bad `bad.onnx` into a folder."""
    path, whole = folder / "bad.onnx", (nets / "int8.onnx").read_bytes()
    plain = Net(sparse=False, int8=False)
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut off":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "text":
        path.write_text("this is no model\n")
    elif kind == "folder":
        path.mkdir()
    elif kind == "outside":
        onnx.save(
            onnx.load(nets / "sparse.onnx"), path, save_as_external_data=True, location="w.data", size_threshold=0
        )
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = "../w.data"
        path.write_bytes(model.SerializeToString())
    elif kind == "shapes disagree":
        model = onnx.load(nets / "float.onnx")
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 11
        onnx.save(model, path)
    elif kind == "names":
        model = onnx.load(nets / "float.onnx")
        model.graph.input.append(helper.make_tensor_value_info("second_input", TensorProto.FLOAT, ["n", 1]))
        onnx.save(model, path)
    elif kind == "classes":
        onnx.save(Net(sparse=False, int8=False, classes=9).model(readout[:, :9]), path)
    elif kind == "type":
        model = plain.model(readout)
        model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT32
        model.graph.node[0].input[0] = "cast"
        model.graph.node.insert(0, helper.make_node("Cast", ["input"], ["cast"], "cast", to=TensorProto.FLOAT))
        onnx.save(model, path)
    elif kind == "image size":
        model = plain.model(readout)
        del model.graph.value_info[:]
        for axis in (2, 3):
            model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = 9
        onnx.save(model, path)
    elif kind == "operator":
        model = plain.model(readout)
        model.graph.node[1].op_type, model.graph.node[1].domain = "MyRelu", "my.own"
        model.opset_import.append(helper.make_opsetid("my.own", 1))
        onnx.save(model, path)


BAD = {
    "missing": (5, r"model\.path: .*bad\.onnx does not exist; correct the path in the recipe"),
    "empty": (5, r"bad\.onnx: is empty"),
    "cut off": (5, r"bad\.onnx: (is no ONNX file|is not valid ONNX|.* holds|is damaged|its graph)"),
    "text": (5, r"bad\.onnx: is no ONNX file"),
    "folder": (5, r"bad\.onnx: not a file"),
    "outside": (5, r"lie outside the file's folder, at '\.\./w\.data'"),
    "shapes disagree": (5, r"bad\.onnx: is not valid ONNX"),
    "names": (5, r"bad\.onnx takes 'input', 'second_input' and data\.source digits gives 'input'"),
    "classes": (5, r"its output gives 9 classes and data\.source digits has 10"),
    "type": (5, r"input 'input' takes int32 and the data gives float32"),
    "image size": (5, r"input 'input' takes \(\?, 1, 9, 9\) and the data gives \(\?, 1, 8, 8\)"),
    "operator": (5, r"ONNX Runtime cannot load it: .*MyRelu"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_one_line_with_the_reason(
    write: Write, nets: Path, tmp_path: Path, readout: np.ndarray, kind: str
) -> None:
    code, said = BAD[kind]
    broken(kind, nets, tmp_path, readout)
    with pytest.raises(SparsifyError, match=said) as caught:
        run(write("bad.onnx", OPENVINO + BENCHMARK))
    assert caught.value.exit_code == code
    assert len(caught.value.lines) == 1
    assert not list((tmp_path / "run" / "store").glob("*/manifest.json"))


def test_an_operator_that_one_runtime_lacks_is_named(write: Write, tmp_path: Path) -> None:
    """ONNX Runtime has Inverse of its own; OpenVINO converts none."""
    graph = helper.make_graph(
        [helper.make_node("Inverse", ["x"], ["y"], "inverse", domain="com.microsoft")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3, 3])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "inverse.onnx")
    with pytest.raises(SparsifyError, match=r"OpenVINO cannot (convert|compile) it: .*") as caught:
        run(write("inverse.onnx", OPENVINO + BENCHMARK, data=""))
    assert len(caught.value.lines) == 1


def test_sections_for_a_network_are_mistakes_with_their_place(write: Write) -> None:
    rest = (
        "sparsity: 0.5\ndense_branch: true\ntraining: {steps: 3}\ninit: {}\ntrain: {}\nnm: {}\nquantize: {}\n"
        "distillation: {phases: [qat]}\nexport: {opset: 18, int8_weights: false, dynamic_batch: false}\n"
        "deploy: [{runtime: openvino, flavour: tensorrt}]\n"
    )
    with pytest.raises(RecipeError) as caught:
        run(write("int8.onnx", rest))
    named = [line.split(": ")[1] for line in caught.value.lines]
    assert named == [
        *("sparsity", "dense_branch", "training", "init", "train", "nm", "quantize", "distillation"),
        *("export.opset", "export.int8_weights", "export.dynamic_batch", "deploy.0.flavour"),
    ]
    assert "needs a torch network, and model.source onnx has none: remove it" in caught.value.lines[2]


@pytest.mark.parametrize(
    ("rest", "data", "more", "said"),
    [
        ("task: {name: regression}\n", "", "", "task: has no effect without a data section"),
        ("gates: {max_drop: 0.1}\n", "", "", "gates.max_drop: needs examples to measure a metric on"),
        ("deploy: [{runtime: openvino, flavour: onnxruntime}]\n", "", "", "measures ranges on examples"),
        ("", "data: {source: digits}\n", ", shapes: {input: [1]}", "has no effect beside a data section"),
        ("", "data: {source: digits, augment: [flip]}\n", "", "data.augment: is for training"),
    ],
)
def test_settings_without_effect_are_mistakes(write: Write, rest: str, data: str, more: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        run(write("int8.onnx", rest, data=data, more=more))


def test_other_sources_still_need_data(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("version: 1\nmodel: {params: {name: resnet8}}\n")
    with pytest.raises(RecipeError, match=r"r\.yaml:1:1: data: is required: add it"):
        run(tmp_path / "r.yaml")


# -- init ------------------------------------------------------------------------------------------------------------


def test_init_looks_into_the_file_and_writes_a_recipe_that_plans_at_once(nets: Path, tmp_path: Path) -> None:
    from sparsify_deploy.starter import start

    shutil.copy(nets / "int8.onnx", tmp_path)
    given = {"checkpoint": None, "trust_code": False, "force": False}
    found = start(f"onnx:{tmp_path / 'int8.onnx'}", "digits", tmp_path / "r.yaml", **given)
    assert [(layer.name, layer.projected) for layer in found.layers] == [
        ("conv1", False),
        ("conv2", True),
        ("fc", False),
    ]
    text = (tmp_path / "r.yaml").read_text()
    assert "1 of 3 layers hold 2:4" in text
    opened = workspace.open_run(tmp_path / "r.yaml", (), tmp_path / "run")
    assert opened.forecast().missing == ()
    bare = start(f"onnx:{tmp_path / 'int8.onnx'}", None, tmp_path / "bare.yaml", **given)
    assert bare.examples == 0
    assert workspace.open_run(tmp_path / "bare.yaml", (), tmp_path / "run").recipe.data is None
    with pytest.raises(UsageError, match="--data: is needed for --model builtin:resnet8"):
        start("builtin:resnet8", None, tmp_path / "b.yaml", **given)
    with pytest.raises(UsageError, match="--checkpoint"):
        start("onnx:x.onnx", None, tmp_path / "b.yaml", **{**given, "checkpoint": tmp_path / "w.safetensors"})
    with pytest.raises(SparsifyError, match=r"gone\.onnx: no such file"):
        start("onnx:gone.onnx", None, tmp_path / "b.yaml", **given)
    assert not (tmp_path / "b.yaml").exists()
