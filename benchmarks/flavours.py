"""CPU time of ResNet-18 in both flavours of Q/DQ, each runtime over its own FP32, one thread.

torchvision's ResNet-18 at 224 x 224, random weights (its BatchNorm has seen random images), INT8 calibrated on random
images, exported once; the `onnxruntime` flavour is made from that file. Each runtime races its FP32 file against both
INT8 ones, interleaved, and its FP32 engine opened a second time (the A/A control, whose ratio shows the noise). Ratios
are medians over rounds of process CPU time, with a bootstrap interval.

All files must compute the same thing: largest difference over the largest output against FP32, and between the two
INT8 files, on images of which none was calibrated on. Agreement of answers is printed too; with random weights all
outputs are close to each other, so that it says little.

    python benchmarks/flavours.py [--rounds 20] [--batch 1,32] [--json]
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
import torch

from sparsify_deploy import menu
from sparsify_deploy.artifacts import environment
from sparsify_deploy.export.onnx import export
from sparsify_deploy.export.parity import compare
from sparsify_deploy.graph import file
from sparsify_deploy.graph.int8_weights import store_int8_weights_
from sparsify_deploy.quantization import int8
from sparsify_deploy.quantization.folding import fold_batchnorm
from sparsify_deploy.stages.flavours import write_onnxruntime
from sparsify_deploy.timing import Race, race

RUNTIMES = ("openvino", "onnxruntime")
TARGETS = {("openvino", "tensorrt"): 3.0, ("onnxruntime", "onnxruntime"): 2.0}
"""Least speed-up over the runtime's own FP32, by runtime and flavour."""

LARGEST_DIFFERENCE = 0.1
"""Of the largest output: more is no rounding."""

_SIZE = 224


def images(count: int, seed: int) -> torch.Tensor:
    """Standard-normal images."""
    return torch.randn(count, 3, _SIZE, _SIZE, generator=torch.Generator().manual_seed(seed))


def torchvision_models() -> Any:
    """torchvision's models, also beside a torch for the CPU alone, where two operators of its own are missing."""
    try:
        return importlib.import_module("torchvision.models")
    except RuntimeError:
        library: Any = torch.library.Library
        declared = library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        models: Any = importlib.import_module("torchvision.models")
        models.declared = declared  # it lasts as long as the object does
        return models


def write_files(folder: Path) -> dict[str, Path]:
    """The three ONNX files by flavour, `fp32` among them."""
    torch.manual_seed(0)
    model = torchvision_models().resnet18(weights=None)
    with torch.no_grad():
        for seed in (1, 2):
            model(images(8, seed))
    model.eval()
    files = {name: folder / f"{name}.onnx" for name in ("fp32", "tensorrt", "onnxruntime")}
    calibration = {"image": images(8, 3)}
    quantized = int8.prepare(model, int8.Int8Settings())
    int8.calibrate_(quantized, [calibration], ["image"])
    export(fold_batchnorm(model).eval(), {"image": images(1, 3)}, ["image"], files["fp32"])
    export(quantized.module.eval(), {"image": images(1, 3)}, ["image"], files["tensorrt"])
    written = file.load(files["tensorrt"])
    store_int8_weights_(written)
    file.save(written, files["tensorrt"])
    write_onnxruntime(files["tensorrt"], files["onnxruntime"], [{"image": calibration["image"].numpy()}])
    return files


def raced(runtime_name: str, engines: dict[str, Path], batch: int, rounds: int) -> tuple[Race, dict[str, Any]]:
    """One runtime's race at one batch size, and the outputs by flavour."""
    runtime = menu.entry("runtimes", runtime_name)
    fed = {"image": images(batch, 4).numpy()}
    shapes = {name: values.shape for name, values in fed.items()}
    with ExitStack() as stack:
        opened = []
        for engine in (*engines.values(), engines["fp32"]):
            opened.append(stack.enter_context(runtime.open(engine, runtime.Params(), threads=1, shapes=shapes)))
            opened[-1].bind(fed)
        sessions = dict(zip(engines, opened, strict=False))
        found = race(sessions, control=opened[-1], rounds=rounds, round_ms=100.0, batch_size=batch, threads=1)
        outputs = {name: session.fetch() for name, session in sessions.items()}
    return found, outputs


def fused(path: Path, folder: Path) -> dict[str, int]:
    """Operators of the file as ONNX Runtime optimised it."""
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that the written file fits this machine alone
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return dict(Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node))


def row(found: Race, runtime: str, flavour: str, outputs: dict[str, Any]) -> dict[str, Any]:
    """One line of the result."""
    ratio = found.compare(flavour, "fp32")
    target = TARGETS.get((runtime, flavour))
    return {
        "runtime": runtime,
        "flavour": flavour,
        "batch": found.batch_size,
        "clock": found.clock,
        "fp32_ms": found.cpu_latencies["fp32"].p50_ms,
        "int8_ms": found.cpu_latencies[flavour].p50_ms,
        "speedup": {"median": ratio.median, "low": ratio.low, "high": ratio.high},
        "control": {"median": found.control.median, "low": found.control.low, "high": found.control.high},
        "target": target,
        "reached": None if target is None else ratio.low >= target,
        "against_fp32": asdict(compare(outputs["fp32"], outputs[flavour])),
        "between_flavours": asdict(compare(outputs["tensorrt"], outputs["onnxruntime"])),
    }


def measured(batches: list[int], rounds: int) -> dict[str, Any]:
    """The whole report."""
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_files(folder)
        operators = {flavour: fused(path, folder) for flavour, path in files.items()}
        for runtime_name in RUNTIMES:
            runtime = menu.entry("runtimes", runtime_name)
            engines = {flavour: folder / f"{runtime_name}-{flavour}{runtime.SUFFIX}" for flavour in files}
            for flavour, engine in engines.items():
                runtime.build(files[flavour], engine, runtime.Params())
            for batch in batches:
                found, outputs = raced(runtime_name, engines, batch, rounds)
                rows += [row(found, runtime_name, flavour, outputs) for flavour in ("tensorrt", "onnxruntime")]
    return {
        "model": f"torchvision ResNet-18, {_SIZE} x {_SIZE}, random weights",
        "rounds": rounds,
        "threads": 1,
        "rows": rows,
        "onnxruntime_operators": operators,
        "machine": environment.machine(),
    }


def main() -> int:
    """Run the benchmark and print it; 1 where a target is missed or the files differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", default="1,32")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    report = measured([int(size) for size in asked.batch.split(",")], asked.rounds)
    if asked.json:
        print(json.dumps(report, indent=2))
    else:
        print("runtime      flavour      batch  FP32 ms  INT8 ms  times faster         A/A                  difference")
        for line in report["rows"]:
            ratio, aa = (
                f"{line[key]['median']:.2f} [{line[key]['low']:.2f}, {line[key]['high']:.2f}]"
                for key in ("speedup", "control")
            )
            aim = "" if line["target"] is None else f"  target {line['target']:g}: {line['reached']}"
            print(
                f"{line['runtime']:<12} {line['flavour']:<12} {line['batch']:>5}  {line['fp32_ms']:>7.1f}  "
                f"{line['int8_ms']:>7.1f}  {ratio:<19}  {aa:<19}  {line['against_fp32']['max_relative']:.3f}{aim}"
            )
        print(f"between flavours  {max(line['between_flavours']['max_relative'] for line in report['rows']):.3f}")
        print(f"ONNX Runtime runs {report['onnxruntime_operators']['onnxruntime']}")
    same = all(line["against_fp32"]["max_relative"] <= LARGEST_DIFFERENCE for line in report["rows"])
    return 0 if same and all(line["reached"] is not False for line in report["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
