"""What each rule of INT8 placement brings: layers with INT8 in and out, OpenVINO's latency, agreement with float.

One network, the same weights and calibration, quantised with more and more of the rules: `layers` puts Q/DQ on the
inputs and weights of layers alone, then residual adds, concatenations, pooling and attention join; `all` is what a
recipe gets by default, `+stream` also quantises what layers add to a float residual stream. Latency is OpenVINO's on
one thread, interleaved with its own FP32, by process CPU time, with FP32 opened twice as A/A control. Weights are
random with BatchNorm statistics from data; top-1 agreement of such a network says how far INT8 moves logits that lie
close together, not what accuracy is lost.

    python benchmarks/placement.py [--nets resnet18 mobilenet_v2 bert] [--batch 1 32] [--rounds 15]
                                   [--results FILE] [--json]
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness.ratio import machine
from torch import nn

from sparsify_deploy import timing
from sparsify_deploy.export.onnx import export
from sparsify_deploy.export.parity import compare
from sparsify_deploy.graph import file
from sparsify_deploy.graph.layers import weight_layers
from sparsify_deploy.models._attention import unpack_attention_
from sparsify_deploy.quantization import int8
from sparsify_deploy.quantization.folding import fold_batchnorm
from sparsify_deploy.quantization.int8 import Int8Settings
from sparsify_deploy.runtimes import openvino

_OFF = {"residual": False, "concat": False, "pooling": False, "attention": False}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "layers": _OFF,
    "+residual": {**_OFF, "residual": True},
    "+concat": {**_OFF, "residual": True, "concat": True},
    "+pooling": {**_OFF, "residual": True, "concat": True, "pooling": True},
    "all": {},
    "+stream": {"stream": True},
}
_EXAMPLES = 64


@dataclass(frozen=True)
class Net:
    """How to make a network, and one batch of its input `x`."""

    make: Callable[[], nn.Module]
    batch: Callable[[int, torch.Generator], torch.Tensor]


class Bert(nn.Module):
    """A post-norm encoder of BERT's shape, `width` wide, on `tokens` word numbers."""

    def __init__(
        self, width: int = 384, heads: int = 12, hidden: int = 1536, depth: int = 6, tokens: int = 128
    ) -> None:
        super().__init__()
        self.word, self.position = nn.Embedding(1000, width), nn.Parameter(torch.randn(tokens, width) * 0.1)
        layer = nn.TransformerEncoderLayer(width, heads, hidden, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(B, tokens)` word numbers to logits `(B, 10)`."""
        return self.head(self.encoder(self.word(x) + self.position)[:, 0])  # type: ignore[no-any-return]


def images(side: int) -> Callable[[int, torch.Generator], torch.Tensor]:
    """Smooth random images `(n, 3, side, side)`."""

    def batch(count: int, generator: torch.Generator) -> torch.Tensor:
        coarse = torch.randn(count, 3, 8, 8, generator=generator)
        return nn.functional.interpolate(coarse, (side, side), mode="bilinear") + 0.1 * torch.randn(
            count, 3, side, side, generator=generator
        )

    return batch


def words(count: int, generator: torch.Generator) -> torch.Tensor:
    """Random word numbers `(n, 128)`."""
    return torch.randint(0, 1000, (count, 128), generator=generator)


def nets(torchvision: Any) -> dict[str, Net]:
    """The networks by name; timm is imported by the one that needs it."""
    models = torchvision.models

    def lite() -> nn.Module:
        import timm

        return timm.create_model("tf_efficientnet_lite0")

    return {
        "resnet18": Net(models.resnet18, images(224)),
        "resnet50": Net(models.resnet50, images(224)),
        "mobilenet_v2": Net(models.mobilenet_v2, images(224)),
        "efficientnet_lite0": Net(lite, images(224)),
        "googlenet": Net(lambda: models.googlenet(aux_logits=False, init_weights=False), images(224)),
        "vit": Net(lambda: models.VisionTransformer(224, 16, 12, 6, 384, 1536), images(224)),
        "bert": Net(Bert, words),
    }


def load_torchvision() -> Any:
    """torchvision, with the operators declared that its build for CUDA asks for by name beside a CPU torch."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        return importlib.import_module("torchvision")


_KEPT: list[object] = []


@torch.no_grad()
def enliven_(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Set BatchNorm statistics from data, without which the activations of a random network die out or explode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
    model.train()
    model(x)
    return model.eval()


def one(name: str, net: Net, folder: Path, batches: list[int], rounds: int) -> dict[str, Any]:
    """Every placement of one network: counts, agreement, and latency against FP32."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = enliven_(unpack_attention_(net.make()), net.batch(16, generator))
    calibration = [{"x": net.batch(8, generator)} for _ in range(2)]
    test = net.batch(_EXAMPLES, generator)
    float_path = folder / f"{name}.onnx"
    export(fold_batchnorm(model), {"x": test[:1]}, ("x",), float_path)
    with torch.no_grad():
        expected = {"output": model(test).numpy()}
    files: dict[str, Path] = {"FP32": float_path}
    placements: dict[str, Any] = {}
    texts: dict[bytes, str] = {}
    for label, settings in PLACEMENTS.items():
        quantized = int8.prepare(model, Int8Settings(**settings))
        int8.calibrate_(quantized, calibration, ("x",))
        path = folder / f"{name}.{label.strip('+')}.onnx"
        export(quantized.module, {"x": test[:1]}, ("x",), path)
        text = path.read_bytes()
        if text in texts:
            placements[label] = {"same_as": texts[text]}
            continue
        texts[text] = label
        layers = weight_layers(file.load(path))
        with torch.no_grad():
            parity = compare(expected, {"output": quantized.module(test).numpy()})
        placements[label] = {
            "layers": len(layers),
            "int8_in": sum(layer.int8_in for layer in layers),
            "int8_in_and_out": sum(layer.int8_in and layer.int8_out for layer in layers),
            "float_out": {la.name: la.float_reader for la in layers if not (la.int8_in and la.int8_out)},
            "top1_agreement_with_float": parity.top1_agreement,
            "largest_relative_difference": parity.max_relative,
        }
        files[label] = path
    for size in batches:
        for label, row in speed(files, net.batch(size, generator).numpy(), folder, rounds).items():
            placements.setdefault(label, {})[f"openvino_batch_{size}"] = row
    return placements


def speed(files: Mapping[str, Path], x: Any, folder: Path, rounds: int) -> dict[str, Any]:
    """How many times faster than FP32 each file runs in OpenVINO, with the A/A control under `FP32`."""
    params = openvino.Params()
    with ExitStack() as stack:
        sessions = {}
        for label, path in [*files.items(), ("A/A", files["FP32"])]:
            engine = folder / f"{path.stem}.xml"
            if not engine.exists():
                openvino.build(path, engine, params)
            session = stack.enter_context(openvino.open(engine, params, threads=1, shapes={"x": x.shape}))
            session.bind({"x": x})
            sessions[label] = session
        control = sessions.pop("A/A")
        found = timing.race(sessions, control=control, rounds=rounds, batch_size=len(x))
    rows = {}
    for label in files:
        against = found.control if label == "FP32" else found.compare(label, "FP32")
        rows[label] = {
            "times_faster_than_fp32": against.median,
            "interval": [against.low, against.high],
            "claim": against.claim,
            "cpu_ms": found.cpu_latencies[label].p50_ms,
        }
    return rows


def show(result: Mapping[str, Any]) -> None:
    """The table."""
    for name, placements in result["nets"].items():
        for label, row in placements.items():
            if "same_as" in row:
                print(f"{name:19} {label:10} the same file as {row['same_as']!r}")
                continue
            counts = f"{row['int8_in_and_out']:3} of {row['layers']:3} in+out" if "layers" in row else " " * 17
            agree = f"top-1 {row['top1_agreement_with_float']:6.1%}" if "layers" in row else " " * 12
            times = "  ".join(
                f"{key.removeprefix('openvino_')}: {value['times_faster_than_fp32']:.2f}x "
                f"[{value['interval'][0]:.2f}, {value['interval'][1]:.2f}]"
                for key, value in row.items()
                if key.startswith("openvino_")
            )
            print(f"{name:19} {label:10} {counts}  {agree}  {times}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=["resnet18", "mobilenet_v2", "bert"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--results", type=Path, help="write the JSON here, after every network")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    known = nets(load_torchvision())
    if unknown := sorted(set(asked.nets) - set(known)):
        sys.exit(f"no network {unknown[0]!r}: there are {', '.join(known)}")
    result: dict[str, Any] = {
        **machine(),
        "openvino": openvino.version(),
        "clock": "process CPU time, one thread, interleaved with FP32; the row FP32 is the A/A control",
        "weights": "random, BatchNorm statistics from data",
        "load_average": os.getloadavg()[0],
        "nets": {},
    }
    for name in asked.nets:
        with tempfile.TemporaryDirectory() as folder:
            result["nets"][name] = one(name, known[name], Path(folder), asked.batch, asked.rounds)
        if asked.results is not None:
            asked.results.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if asked.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
