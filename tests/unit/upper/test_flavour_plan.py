"""Which flavour of Q/DQ each engine is built from."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sparsify_deploy.plan import Plan, Ref, plan
from sparsify_deploy.recipe import Recipe

Make = Callable[..., Recipe]
OPENVINO, ONNXRUNTIME = {"runtime": "openvino"}, {"runtime": "onnxruntime"}


def sources(found: Plan) -> dict[str, str]:
    """The step whose file each engine of the dense branch is built from."""
    wired = {step.id: step.inputs.get("onnx") for step in found.steps if step.id.startswith("dense/build_engine")}
    return {name.removeprefix("dense/build_engine."): ref.step for name, ref in wired.items() if ref is not None}


def exports(found: Plan) -> list[str]:
    return [step.id for step in found.steps if step.id.startswith("dense/export_onnx")]


def test_each_runtime_gets_the_flavour_it_likes_and_the_second_is_made_from_the_first(recipe: Make) -> None:
    found = plan(recipe(deploy=[ONNXRUNTIME, OPENVINO]))
    assert exports(found) == ["dense/export_onnx", "dense/export_onnx.onnxruntime"]
    assert sources(found) == {"openvino": "dense/export_onnx", "onnxruntime": "dense/export_onnx.onnxruntime"}
    (rewritten,) = [step for step in found.steps if step.id == "dense/export_onnx.onnxruntime"]
    assert rewritten.inputs["onnx"] == Ref("dense/export_onnx", "onnx")
    assert rewritten.inputs["quantized"] == Ref("dense/quantize", "quantized")


@pytest.mark.parametrize(
    ("openvino", "onnxruntime"), [("onnxruntime", "tensorrt"), ("tensorrt", "tensorrt"), ("onnxruntime", "onnxruntime")]
)
def test_a_target_may_ask_for_another(recipe: Make, openvino: str, onnxruntime: str) -> None:
    asked = [{**OPENVINO, "flavour": openvino}, {**ONNXRUNTIME, "flavour": onnxruntime}]
    step = {"tensorrt": "dense/export_onnx", "onnxruntime": "dense/export_onnx.onnxruntime"}
    found = plan(recipe(deploy=asked))
    assert sources(found) == {"openvino": step[openvino], "onnxruntime": step[onnxruntime]}
    assert len(exports(found)) == 1 + ("onnxruntime" in (openvino, onnxruntime))


def test_a_recipe_for_openvino_alone_has_one_file(recipe: Make) -> None:
    assert exports(plan(recipe())) == ["dense/export_onnx"]


def test_without_quantisation_there_is_one_file_whatever_is_asked(recipe: Make) -> None:
    found = plan(recipe(quantize=None, deploy=[{**OPENVINO, "flavour": "onnxruntime"}, ONNXRUNTIME]))
    assert exports(found) == ["dense/export_onnx"]
    assert sources(found) == {"openvino": "dense/export_onnx", "onnxruntime": "dense/export_onnx"}
