"""Time by layer of a TensorRT engine, with the kernel of each and the ONNX nodes fused into it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sparsify_deploy.graph.engine_names import nodes_in
from sparsify_deploy.types import EngineProfile, Json, LayerTime

RUNS = 30
_PRECISIONS = (
    ("int8", "INT8"),
    ("fp8", "FP8"),
    ("float8", "FP8"),
    ("bf16", "BF16"),
    ("bfloat16", "BF16"),
    ("fp16", "FP16"),
    ("float16", "FP16"),
    ("half", "FP16"),
    ("fp32", "FP32"),
    ("float", "FP32"),
)
"""Parts of a data type in the inspector's words, and the type; the first that fits."""


def is_sparse_tactic(kernel: str) -> bool:
    """Whether a tactic's name is that of a 2:4 kernel, as in `sm80_xmma_fprop_sparse_conv_...`."""
    return "sparse" in kernel.lower()


def described(information: str) -> dict[str, Mapping[str, Json]]:
    """The inspector's layers by name. Where the engine was built without details they are bare names."""
    layers = json.loads(information).get("Layers", [])
    return {
        layer["Name"] if isinstance(layer, dict) else str(layer): layer if isinstance(layer, dict) else {}
        for layer in layers
    }


def precision_of(layer: Mapping[str, Json]) -> str:
    """The type of a layer's first input, which is what it multiplies in; "" where the inspector does not say.

    8.6 and 10 write `Inputs: [{"Format/Datatype": ...}]`, 11 splits that into `Format` and `Datatype`.
    """
    for tensor in _inputs(layer):
        said = str(tensor.get("Datatype") or tensor.get("Format/Datatype") or "").lower()
        return next((known for part, known in _PRECISIONS if part in said), "")
    return ""


def _inputs(layer: Mapping[str, Json]) -> Sequence[Mapping[str, Json]]:
    if "Inputs" in layer:
        return [each for each in layer["Inputs"] if isinstance(each, dict)]
    tensors = layer.get("I/O Tensors", ())
    listed = tensors.get("Inputs", ()) if isinstance(tensors, dict) else tensors
    return [each for each in listed if isinstance(each, dict) and each.get("IOMode", "Input").lower() == "input"]


def profile(session: Any, runs: int = RUNS) -> EngineProfile:
    """Run a bound `CudaSession` under TensorRT's own profiler, without a CUDA graph."""
    taken = session.layer_times(runs)
    layers = described(session.information())
    rows = []
    for name, ms in taken.items():
        said = layers.get(name, {})
        rows.append(
            LayerTime(
                name=name,
                nodes=nodes_in(name, str(said.get("Metadata", ""))),
                kernel=str(said.get("TacticName", "")),
                ms=ms / runs,
                precision=precision_of(said),
            )
        )
    note = "" if rows else "TensorRT's profiler reported no layer"
    return EngineProfile(tuple(rows), runs, note)
