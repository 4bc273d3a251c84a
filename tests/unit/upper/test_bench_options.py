"""What `bench` says besides times, and the options for inputs it cannot guess."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsify_deploy import cli, deploy
from sparsify_deploy.deploy import parse_range, parse_shapes
from sparsify_deploy.errors import DataError, UsageError
from sparsify_deploy.runtimes._tensors import full_shapes, random_inputs
from sparsify_deploy.timing import Copies, copies
from sparsify_deploy.types import IOTensor, Silent

pytest.importorskip("onnxruntime")
Bench = Callable[..., Any]


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """An embedding of five words, for a batch and a length that are free."""
    table = np.arange(10, dtype=np.float32).reshape(5, 2)
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "ids"], ["embedded"], name="embed")],
        "words",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ("batch", "length"))],
        [helper.make_tensor_value_info("embedded", TensorProto.FLOAT, ("batch", "length", 2))],
        [numpy_helper.from_array(table, "table")],
    )
    path = tmp_path / "words.onnx"
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


@pytest.fixture
def bench(words: Path) -> Bench:
    def run(**changes: Any) -> Any:
        settings = {"runtime": "onnxruntime", "batch_sizes": (1,), "threads": 1, "rounds": 5, "round_ms": 1.0}
        return deploy.bench([words], **{**settings, "trust": False, "progress": Silent(), **changes})

    return run


def test_a_free_axis_besides_the_batch_needs_a_shape(bench: Bench, words: Path) -> None:
    with pytest.raises(DataError, match=r"dynamic axis besides the batch: pass --shape ids=NxN"):
        bench()
    found = bench(shapes={"ids": (2, 7)}, batch_sizes=(2,))
    assert [race.batch_size for race in found.races] == [2]
    assert found.sha256 == {"words.onnx": hashlib.sha256(words.read_bytes()).hexdigest()}
    assert [(c.label, c.batch_size) for c in found.copies] == [("words.onnx", 2)]
    assert found.copies[0].bind_ms > 0
    assert found.copies[0].fetch_ms > 0
    assert {"cpu", "gpu", "driver", "packages"} <= set(found.machine)
    assert found.before.load is not None


def test_integers_stay_in_their_range(bench: Bench) -> None:
    shapes = {"ids": (1, 4)}
    assert bench(shapes=shapes, integers=(0, 4)).inputs.endswith("integers from 0 to 4")
    with pytest.raises(Exception, match="indices"):
        bench(shapes=shapes, integers=(900, 900))


def test_shapes_must_fit_the_batch_and_the_input(bench: Bench) -> None:
    with pytest.raises(UsageError, match="--shape names batch 2"):
        bench(shapes={"ids": (2, 7)})
    with pytest.raises(UsageError, match=r"--shape idx: words\.onnx has no such input; it takes ids"):
        bench(shapes={"idx": (1, 7)})
    with pytest.raises(UsageError, match=r"--shape ids: \(1, 7, 7\) does not fit \(\?, \?\)"):
        bench(shapes={"ids": (1, 7, 7)})


def test_parameters_without_an_onnx_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--set precision=bf16: goes with ONNX files"):
        cli.call(["bench", str(tmp_path / "model.xml"), "--set", "precision=bf16"])


def test_what_is_no_file_is_named_as_such(words: Path) -> None:
    words.with_name("folder.onnx").mkdir()
    for verb in ("bench", "inspect"):
        with pytest.raises(DataError, match=r"folder\.onnx: is not a file"):
            cli.call([verb, str(words.with_name("folder.onnx"))])


def test_parameters_reach_the_runtime_of_onnx_files(bench: Bench) -> None:
    with pytest.raises(UsageError, match="--set provider"):
        bench(shapes={"ids": (1, 7)}, sets=["provider=TPU"])
    with pytest.raises(Exception, match="ONNX Runtime was asked for CUDA"):
        bench(shapes={"ids": (1, 7)}, sets=["provider=CUDA"])


def test_shapes_and_ranges_are_read() -> None:
    assert parse_shapes(["image=1x3x224x224", "a=b=4"]) == {"image": (1, 3, 224, 224), "a=b": (4,)}
    assert parse_shapes([]) == {}
    assert (parse_range("0:30521"), parse_range("-3:-3")) == ((0, 30521), (-3, -3))


@pytest.mark.parametrize("text", ["", "image", "image=", "=1x2", "image=1x", "image=1x-2", "image=1x0", "image=axb"])
def test_shapes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--shape .*expected NAME=1x3x224x224") as caught:
        parse_shapes([text])
    assert len(caught.value.lines) == 1


def test_sizes_beyond_every_runtime_are_refused() -> None:
    with pytest.raises(UsageError, match="more than any runtime takes"):
        deploy.parse_batches("1,99999999999999999999")
    with pytest.raises(UsageError, match="which no runtime takes"):
        parse_shapes(["ids=2147483647x2147483647x9"])


def test_a_batch_size_given_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="each size once"):
        deploy.parse_batches("1,8,1")


def test_a_shape_given_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="each input once"):
        parse_shapes(["a=1", "a=2"])


@pytest.mark.parametrize("text", ["", "1", "1:", ":1", "a:b", "1:2:3", "0.5:1", "2:1"])
def test_ranges_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--int-range "):
        parse_range(text)


def test_random_inputs_cover_their_range_and_their_types() -> None:
    tensors = [IOTensor("ids", (None, 4), "int64"), IOTensor("x", (None,), "float16"), IOTensor("on", (None,), "bool")]
    shapes = full_shapes(tensors, 100, {}, "net")
    assert shapes == {"ids": (100, 4), "x": (100,), "on": (100,)}
    found = random_inputs(tensors, shapes, (-2, 3))
    assert set(np.unique(found["ids"])) == {-2, -1, 0, 1, 2, 3}
    assert set(np.unique(random_inputs(tensors, shapes)["ids"])) == {0, 1}
    assert [found[name].dtype.name for name in ("ids", "x", "on")] == ["int64", "float16", "bool"]
    assert set(np.unique(found["on"])) == {False, True}
    again = random_inputs(tensors, shapes, (-2, 3))
    assert all(np.array_equal(found[name], again[name]) for name in found)
    with pytest.raises(UsageError, match="--int-range 0:300: input small is int8"):
        random_inputs([IOTensor("small", (2,), "int8")], {"small": (2,)}, (0, 300))


def test_copies_time_binding_and_fetching_and_not_executing() -> None:
    now = 0

    class Slow:
        inputs = outputs = ()

        def bind(self, inputs: object) -> None:
            nonlocal now
            now += 2_000_000

        def execute(self) -> None:
            nonlocal now
            now += 900_000_000

        def fetch(self) -> dict[str, Any]:
            nonlocal now
            now += 5_000_000
            return {}

    assert copies(Slow(), {}, "net", 4, wall=lambda: now) == Copies("net", 4, 2.0, 5.0, 10)


def test_the_verb_prints_what_it_ran_on(words: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["bench", str(words), "--runtime", "onnxruntime", "--rounds", "5", "--round-ms", "1", "-q"]
    assert cli.call([*asked, "--shape", "ids=1x3", "--int-range", "0:4"]) == 0
    told = capsys.readouterr().out
    digest = hashlib.sha256(words.read_bytes()).hexdigest()
    for part in ("machine: ", "load average", "copies, not in the times above", f"sha256 {digest}  words.onnx"):
        assert part in told
    assert cli.call([*asked, "--shape", "ids=1x3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"races", "copies", "sha256", "inputs", "machine", "before", "after"}
    assert {"p50_ms", "p99_ms", "cv", "steady", "throughput_per_s"} <= set(found["races"][0]["latencies"]["words.onnx"])
