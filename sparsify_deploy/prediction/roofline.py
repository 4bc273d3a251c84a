"""How long each layer takes on a GPU, by a roofline from its shapes: predicted, never measured.

A layer takes the longer of its arithmetic at 70 % of the peak and its bytes at 85 % of the bandwidth, and 2 us for its
launch. Layers without INT8 compute and move FP16 in an INT8 engine; INT8 layers read and write INT8. A 2:4 layer keeps
0.625 bytes a weight, metadata included, and its arithmetic is 1.3 times as fast (`realistic`) or twice (`ideal`).
Caches, tiling and kernels that a builder does not have are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from sparsify_deploy.graph.workload import Workload
from sparsify_deploy.prediction.gpus import Gpu

Engine = Literal["fp32", "fp16", "int8", "realistic", "ideal"]
"""An engine in one precision; the last two are INT8 with 2:4."""

LABEL = "predicted, roofline from shapes"

PEAK_SHARE = 0.70
BANDWIDTH_SHARE = 0.85
LAUNCH_US = 2.0
SPARSE_ARITHMETIC: Mapping[Engine, float] = {"realistic": 1.3, "ideal": 2.0}
SPARSE_INT8_BYTES = 0.625
"""Half the values at a byte, and two bits of metadata for each of them."""


@dataclass(frozen=True)
class Layer:
    """A workload, whether the final engine has it in INT8 and in 2:4, and why or why not."""

    work: Workload
    int8: bool
    sparse: bool
    reason: str


@dataclass(frozen=True)
class Cost:
    """A layer's time in us, and what bounds it: "maths", "bytes" or "launch", whichever is the longest."""

    us: float
    bound: str


@dataclass(frozen=True)
class LayerForecast:
    """One layer of the dense INT8 engine; `share` is of its time, the gains are what 2:4 does to this layer."""

    name: str
    op: str
    shape: tuple[int, ...]
    eligible: bool
    reason: str
    bound: str
    us: float
    share: float
    realistic: float
    ideal: float


@dataclass(frozen=True)
class GpuForecast:
    """What a network would gain on one GPU at one batch size.

    `us` holds the time of each engine; FP32 is missing where the GPU has no TF32 peak. `eligible` of `weighted` layers
    would be 2:4; `share` is theirs of the dense INT8 engine's time.
    """

    gpu: str
    batch_size: int
    eligible: int
    weighted: int
    share: float
    bytes_bound: float
    us: dict[str, float]
    layers: tuple[LayerForecast, ...] = field(repr=False)

    def gain(self, engine: Engine, over: Engine = "int8") -> float:
        """How many times as fast one engine is as the other."""
        return self.us[over] / self.us[engine]


def skips_zeros(n: int, m: int) -> bool:
    """Whether every mask of N:M is one of 2:4 as well."""
    return (n <= 2 and m % 4 == 0) or (n == 1 and m == 2)


def cost(layer: Layer, gpu: Gpu, batch_size: int, engine: Engine) -> Cost:
    """The predicted time of one layer in one engine; `ValueError` for FP32 on a GPU without a TF32 peak."""
    work = layer.work
    int8 = layer.int8 and engine not in ("fp32", "fp16")
    width = 1.0 if int8 else 4.0 if engine == "fp32" else 2.0
    peak = gpu.int8_tops if int8 else gpu.tf32_tflops if engine == "fp32" else gpu.fp16_tflops
    if peak is None:
        raise ValueError(f"{gpu.name} has no TF32 peak")
    weight_bytes = width
    if int8 and layer.sparse and engine in SPARSE_ARITHMETIC:
        peak *= SPARSE_ARITHMETIC[engine] if engine != "ideal" else gpu.int8_sparse_tops / gpu.int8_tops
        weight_bytes = SPARSE_INT8_BYTES
    maths_us = 2.0 * work.macs * batch_size / (PEAK_SHARE * peak * 1e6)
    moved = (work.read + work.written) * batch_size * width + work.weights * weight_bytes
    bytes_us = moved / (BANDWIDTH_SHARE * gpu.bandwidth_gb_s * 1e3)
    times = {"maths": maths_us, "bytes": bytes_us, "launch": LAUNCH_US}
    return Cost(max(maths_us, bytes_us) + LAUNCH_US, max(times, key=lambda name: times[name]))


def forecast(layers: Sequence[Layer], gpu: Gpu, batch_size: int) -> GpuForecast:
    """The times of all engines on one GPU, and what 2:4 does to each layer; `ValueError` without layers."""
    if not layers:
        raise ValueError("no layers to predict")
    engines: list[Engine] = ["fp16", "int8", "realistic", "ideal"]
    if gpu.tf32_tflops is not None:
        engines.append("fp32")
    costs = {engine: [cost(layer, gpu, batch_size, engine) for layer in layers] for engine in engines}
    us: dict[str, float] = {engine: sum(one.us for one in costs[engine]) for engine in engines}
    rows = tuple(
        LayerForecast(
            name=layer.work.name,
            op=layer.work.op,
            shape=layer.work.shape,
            eligible=layer.sparse,
            reason=layer.reason,
            bound=dense.bound,
            us=dense.us,
            share=dense.us / us["int8"],
            realistic=dense.us / realistic.us,
            ideal=dense.us / ideal.us,
        )
        for layer, dense, realistic, ideal in zip(
            layers, costs["int8"], costs["realistic"], costs["ideal"], strict=True
        )
    )
    return GpuForecast(
        gpu=gpu.name,
        batch_size=batch_size,
        eligible=sum(row.eligible for row in rows),
        weighted=sum(bool(row.shape) for row in rows),
        share=sum(row.share for row in rows if row.eligible),
        bytes_bound=sum(row.share for row in rows if row.eligible and row.bound != "maths"),
        us=us,
        layers=rows,
    )
