"""The chain of the sparsity verdict: the first obstacle wins, and nothing is guessed where nobody tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sparsify_deploy.graph.layers import WeightLayer
from sparsify_deploy.reporting.layer_verdict import Known, chain, file_part, judge, times_of
from sparsify_deploy.reports import LayerReport, LayerVerdict
from sparsify_deploy.types import EngineProfile, LayerTime

Layer = Callable[..., WeightLayer]


@pytest.fixture
def layer() -> Layer:
    """A layer `conv` that holds 2:4, INT8 in and out; keywords change it."""

    def make(shape: tuple[int, ...] = (64, 64, 3, 3), *, dense: bool = False, **changes: Any) -> WeightLayer:
        values = np.ones(shape, np.int8)
        if not dense:
            values[:, 1::2] = 0
        fields: dict[str, Any] = {
            "name": "conv",
            "op": "Conv",
            "weight": "conv.weight",
            "groups": 1,
            "precision": "INT8",
            "int8_in": True,
            "int8_out": True,
            "values": values,
        }
        return WeightLayer(**{**fields, "shape": shape, **changes})

    return make


def verdict(layer: WeightLayer, **known: Any) -> LayerVerdict:
    (row,) = judge(file_part([layer]), Known(**known))
    return row


def profile(name: str = "conv", kernel: str = "k", ms: float = 0.5, nodes: tuple[str, ...] = ()) -> EngineProfile:
    return EngineProfile((LayerTime(name, nodes, kernel, ms),), 20)


SILENT = {"sparse_eligible": None, "sparse_picked": None}
DENSE = {"sparse_eligible": ["conv + relu"], "sparse_picked": []}


@pytest.mark.parametrize(
    ("shape", "changes", "reason", "advice"),
    [
        ((64, 64, 3, 3), {"groups": 64}, "grouped convolution (64 groups)", "leave it dense"),
        ((64, 3, 3, 3), {}, "C_in 3 is not a multiple of 4", "32 would hold 2:4"),
        ((64, 64, 3, 3), {"dense": True, "precision": "FP32"}, "9216 of 9216 groups break 2:4", "project it"),
        ((10, 64), {"dense": True}, "160 of 160 groups break 2:4", "C_out 10 is not a multiple of 8"),
        ((64, 64, 3, 3), {"precision": "FP32", "int8_in": False}, "weights are FP32, not INT8", "quantise it"),
        ((10, 64), {"int8_in": False}, "C_out 10 is not a multiple of 8", "16 may let INT8 kernels run sparse"),
        ((64, 48, 3, 3), {"int8_in": False}, "C_in 48 is not a multiple of 32", "64 may let INT8 kernels run sparse"),
        ((64, 64, 3, 3), {"int8_in": False, "int8_out": False}, "input is not quantised", "put Q/DQ in front"),
        (
            (64, 64, 3, 3),
            {"int8_out": False, "float_reader": "Add /layer1/add"},
            "output is not quantised: residual Add /layer1/add reads FP16 or FP32",
            "quantize.residual",
        ),
        (
            (64, 64, 3, 3),
            {"int8_out": False, "float_reader": "the output of the network"},
            "output is not quantised: it is the output of the network",
            "leave it",
        ),
        (
            (64, 64, 3, 3),
            {"int8_out": False, "float_reader": "Softmax /sm"},
            "output is not quantised: Softmax /sm reads FP16 or FP32",
            "put Q/DQ behind it",
        ),
    ],
)
def test_the_first_obstacle_of_the_chain_is_the_reason(
    layer: Layer, shape: tuple[int, ...], changes: dict[str, Any], reason: str, advice: str
) -> None:
    for known in ({}, {"runtime": "openvino"}, {"runtime": "tensorrt", "facts": SILENT}):
        row = verdict(layer(shape, **changes), **known)
        assert row.reason.startswith(reason)
        assert advice in row.advice
    refused = verdict(layer(shape, **changes), runtime="tensorrt", facts=DENSE)
    assert refused.reason.startswith(f"eligible, not picked: {reason}")


def test_violations_are_counted_among_the_groups(layer: Layer) -> None:
    one = layer((64, 144, 1, 1))
    one.values[0, 1] = one.values[5, 7] = one.values[63, 143] = 1
    row = verdict(one)
    assert row.reason == "3 of 2304 groups break 2:4"
    assert (row.violations, row.blocks, row.pattern_held, row.zeros) == (3, 2304, False, 64 * 72 - 3)


@pytest.mark.parametrize(
    ("known", "told", "reason"),
    [
        ({}, (None, None), "what a builder picks is not known from the file"),
        ({"runtime": "openvino"}, (None, False), "OpenVINO has no sparse kernels: zeros make nothing faster here"),
        ({"runtime": "onnxruntime"}, (None, False), "ONNX Runtime has no sparse kernels"),
        ({"runtime": "tensorrt", "facts": SILENT}, (None, None), "TensorRT did not tell whether it picked"),
        ({"runtime": "tensorrt", "facts": {"sparse_eligible": ["conv"], "sparse_picked": ["x", "conv"]}},
         (True, True), "runs sparse"),
        ({"runtime": "tensorrt", "facts": DENSE}, (True, False), "the builder found no sparse kernel faster"),
        ({"runtime": "tensorrt", "facts": {"sparse_eligible": ["other"], "sparse_picked": []}},
         (False, False), "not eligible by the builder's word, though nothing in the file is against it"),
        ({"runtime": "tensorrt", "facts": {"sparse_eligible": ["{ForeignNode[a...b]}"], "sparse_picked": []}},
         (None, False), "a dense kernel ran, though"),
        ({"runtime": "tensorrt", "facts": SILENT, "sparse": profile(kernel="sm80_xmma_sparse_i8")},
         (True, True), "runs sparse: sm80_xmma_sparse_i8"),
        ({"runtime": "tensorrt", "facts": SILENT, "sparse": profile(kernel="sm80_xmma_i8")},
         (None, False), "a dense kernel ran, though"),
        ({"runtime": "tensorrt", "facts": SILENT, "sparse": profile(kernel="")}, (None, None), "did not tell"),
        (
            {"runtime": "tensorrt_rtx", "facts": {**DENSE, "sparse_verdict": "none"},
             "sparse": profile(kernel="sm86_sparse")},
            (None, None),
            "TensorRT-RTX does not tell which kernels are sparse",
        ),
    ],
)  # fmt: skip
def test_the_builders_word_or_that_there_is_none(
    layer: Layer, known: dict[str, Any], told: tuple[bool | None, bool | None], reason: str
) -> None:
    row = verdict(layer(), **known)
    assert (row.eligible, row.picked) == told
    assert reason in row.reason


def test_what_runs_sparse_has_no_obstacle_whatever_the_file_says(layer: Layer) -> None:
    known = {"runtime": "tensorrt", "facts": {"sparse_eligible": [], "sparse_picked": ["conv"]}}
    row = verdict(layer((64, 48, 3, 3), int8_out=False), **known)
    assert (row.eligible, row.picked, row.reason, row.advice) == (True, True, "runs sparse", "")


@pytest.mark.parametrize(
    ("shape", "batch", "bound"),
    [((64, 64, 1, 1), 1, "(1x1 at batch 1 is likely bound by bytes)"), ((64, 64), 8, "(a matrix product at batch 8 is"),
     ((64, 64, 1, 1), 32, ""), ((64, 64, 3, 3), 1, ""), ((64, 64, 1, 1), None, "")],
)  # fmt: skip
def test_small_batches_without_a_kernel_are_bound_by_bytes(
    layer: Layer, shape: tuple[int, ...], batch: int | None, bound: str
) -> None:
    row = verdict(layer(shape), runtime="tensorrt", facts=DENSE, batch_size=batch)
    assert ("likely bound by bytes" in row.reason) == bool(bound)
    assert bound in row.reason


def test_a_node_is_found_by_its_whole_name_and_never_by_a_part_of_it() -> None:
    times = EngineProfile(
        (
            LayerTime("conv10", (), "k10", 10.0),
            LayerTime("conv1/WithoutBiases", ("conv1", "/relu"), "k1", 1.0),
            LayerTime("Reformatting CopyNode for Input Tensor 0 to conv1", (), "copy", 5.0),
            LayerTime("x.conv1", (), "kx", 7.0),
        ),
        20,
    )
    assert [time.kernel for time in times_of("conv1", times)] == ["k1"]
    assert times_of("conv", times) == ()
    assert [time.kernel for time in times_of("nameless", times, "/relu")] == ["k1"]
    assert [time.kernel for time in times_of("conv10", times, "/relu")] == ["k10"]
    assert times_of("conv1", None) == ()


def test_times_of_both_engines_stand_beside_the_layer_and_its_parts_are_summed(layer: Layer) -> None:
    parts = (LayerTime("conv_clone_0", (), "small", 0.25), LayerTime("conv_clone_1", (), "large", 0.5))
    row = verdict(layer(), dense=profile(ms=1.5, nodes=("conv",)), sparse=EngineProfile(parts, 20))
    assert (row.dense_ms, row.sparse_ms, row.kernel) == (1.5, 0.75, "large")
    without = verdict(layer(), dense=profile("other"), sparse=None)
    assert (without.dense_ms, without.sparse_ms, without.kernel) == (None, None, "")


def test_a_weight_that_layers_share_counts_once_at_the_first(layer: Layer) -> None:
    rows = file_part([layer(), layer(name="again"), layer(name="other", weight="other.weight")])
    assert [(row.name, row.weight) for row in rows] == [("conv", "conv.weight"), ("other", "other.weight")]
    assert isinstance(rows[0], LayerReport)


def test_the_file_is_judged_on_the_pattern_asked_for_and_usable_is_always_two_of_four(layer: Layer) -> None:
    (row,) = file_part([layer()], 1, 4)
    assert (row.pattern_held, row.usable) == (False, True)
    (strict,) = judge((row,), Known(pattern="1:4"))
    assert strict.reason == "9216 of 9216 groups break 1:4"


def test_a_chain_says_how_often_and_how_it_was_timed_only_where_it_was(layer: Layer) -> None:
    rows = file_part([layer()])
    timed = EngineProfile((LayerTime("conv", (), "k", 1.0),), 60, "how")
    found = chain("m", rows, Known(runtime="openvino", dense=timed, sparse=timed, batch_size=8), "twin")
    assert (found.batch_size, found.profiled_runs, found.notes, found.twin) == (8, 60, ("how",), "twin")
    blind = EngineProfile((), 0, "no profiler")
    found = chain("m", rows, Known(runtime="tensorrt", sparse=blind, batch_size=8, facts={"sparse_verdict": "none"}))
    assert (found.batch_size, found.profiled_runs, found.notes) == (None, 0, ("no profiler", "none"))


def test_the_name_of_a_compiled_kernel_does_not_tell_whether_it_is_sparse(layer: Layer) -> None:
    compiled = profile(kernel="__myl_FcAdd_0x1f")
    assert verdict(layer(), runtime="tensorrt", sparse=compiled).picked is None
    assert verdict(layer(), runtime="tensorrt", sparse=profile(kernel="sm90_xmma_gemm_i8")).picked is False


@pytest.mark.parametrize(
    ("op", "kind"), [("ConvTranspose", "a transposed convolution"), ("LSTM", "a recurrent layer"), ("GRU", "recurrent")]
)
def test_what_nothing_here_prunes_is_counted_and_told(layer: Layer, op: str, kind: str) -> None:
    (row,) = file_part([layer((128, 32), op=op, precision="FP32")])
    assert (row.weights, row.zeros, row.bytes_stored, row.bytes_compressed) == (4096, 2048, 16384, 16384)
    assert (row.pattern_possible, row.pattern_held, row.usable, row.rule_of_thumb) == (False,) * 4
    (found,) = judge((row,), Known(runtime="tensorrt"))
    assert found.reason.endswith("nothing here projects or quantises it")
    assert kind in found.reason
    assert found.advice == "leave it: its weights stay as they are"


MODULE = "make it an nn.Linear or nn.Conv: a weight outside a module is not projected"


@pytest.mark.parametrize("shape", [(64, 64), (10, 128)])
def test_a_weight_outside_a_module_is_not_told_to_be_projected(layer: Layer, shape: tuple[int, int]) -> None:
    outside = layer(shape, dense=True, weight="w1", precision="FP32")
    known = verdict(outside, projectable=frozenset({"conv.weight"}))
    assert "break 2:4" in known.reason
    assert known.advice == MODULE
    assert verdict(outside).advice == MODULE.replace("make it an", "project it if it is of an")
    module = layer(shape, dense=True)
    for found in (verdict(module), verdict(module, projectable=frozenset({"conv.weight"}))):
        assert found.advice.startswith(("project it: nm.keep_dense", "the rule of thumb leaves it out"))


def test_a_weight_outside_a_module_is_not_told_to_be_quantised(layer: Layer) -> None:
    found = verdict(layer(weight="w1", precision="FP32"), projectable=frozenset())
    assert (found.reason, found.advice) == ("weights are FP32, not INT8", MODULE)
