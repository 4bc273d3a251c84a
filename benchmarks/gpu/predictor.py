"""What the roofline predicts against what TensorRT did: the sign of each layer's gain, and whole networks.

Reads `engines.json` of a results folder and writes `predictor.json` beside it. Layers are compared by profile, 2:4
INT8 against dense INT8, outside the noise floor of dense INT8's own two profiles; networks by their races.

    PYTHONPATH=.:benchmarks python -m gpu.predictor benchmarks/results/gpu/h100
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from gpu.agreement import Group, Predicted, agreement, groups, noise_floor
from gpu.record import load, now, write
from gpu.targets import DENSE, FP16, SPARSE, compare
from sparsify_deploy.errors import DataError, SparsifyError, UsageError
from sparsify_deploy.graph.workload import Workload
from sparsify_deploy.prediction.gpus import Gpu, chosen, of_device
from sparsify_deploy.prediction.roofline import LABEL, GpuForecast, Layer, forecast
from sparsify_deploy.types import Json

ALL = "all layers"


def compared(whole: Mapping[str, Json], gpu: Gpu) -> dict[str, Json]:
    """A row for each network and batch size that has both INT8 plans, and `ALL`."""
    rows: dict[str, Json] = {}
    every: list[tuple[Group, float]] = []
    for key, row in whole["rows"].items():
        if not {DENSE, SPARSE} <= set(row.get("race", {}).get("labels", ())):
            continue
        predicted = forecast(layers_of(row), gpu, row["batch"])
        found = groups_of(row, predicted)
        noise = noise_floor(found)
        every += [(group, noise) for group in found]
        rows[key] = {
            "noise_of_layers": noise,
            "agreement": asdict(agreement([(group, noise) for group in found])),
            "networks": networks(row, predicted),
            "layers": [{**asdict(each), "gain": each.gain, "predicted_gain": each.predicted_gain} for each in found],
        }
    rows[ALL] = asdict(agreement(every))
    return rows


def layers_of(row: Mapping[str, Json]) -> list[Layer]:
    """The layers as the roofline takes them: INT8 where the file has it, sparse where the 2:4 plan's values are."""
    described = {each["weight"]: each for each in row["variants"][SPARSE]["onnx_layers"]}
    found = []
    for each in row["workloads"]:
        work = Workload(**{**each, "shape": tuple(each["shape"])})
        layer = described.get(work.parameter, {"int8_in": False, "precision": "", "holds_2_4": False})
        int8 = layer["int8_in"] and layer["precision"] == "INT8"
        found.append(Layer(work, int8, int8 and layer["holds_2_4"], "as the measured file has it"))
    return found


def groups_of(row: Mapping[str, Json], predicted: GpuForecast) -> tuple[Group, ...]:
    """The layers with 2:4 weights, measured and predicted, by the names of the ONNX nodes."""
    nodes = {each["weight"]: each["name"] for each in row["variants"][SPARSE]["onnx_layers"]}
    parameters = {each["name"]: each["parameter"] for each in row["workloads"]}
    times = {
        nodes[parameters[layer.name]]: Predicted(
            layer.us / 1e3, layer.us / layer.realistic / 1e3, layer.us / layer.ideal / 1e3
        )
        for layer in predicted.layers
        if layer.eligible
    }
    control = row["control_profile"][DENSE]["profile"]
    dense, sparse = (row["variants"][label]["profile"] for label in (DENSE, SPARSE))
    return groups(dense, control, sparse, times)


def networks(row: Mapping[str, Json], predicted: GpuForecast) -> dict[str, Json]:
    """2:4 INT8 over dense INT8 and over FP16, as raced and as predicted."""
    found = {}
    for label, engine in ((DENSE, "int8"), (FP16, "fp16")):
        raced = compare(row, SPARSE, label)
        found[f"over {label}"] = {
            "measured": None if raced is None else {key: raced[key] for key in ("median", "low", "high", "claim")},
            "realistic": predicted.us[engine] / predicted.us["realistic"],
            "ideal": predicted.us[engine] / predicted.us["ideal"],
        }
    return found


def text(rows: Mapping[str, Json], fingerprint: Mapping[str, Json]) -> str:
    """What was compared, the networks, then the signs."""
    where = "a rehearsal on other hardware" if fingerprint["rehearsal"] else fingerprint["gpu"]
    lines = [f"{LABEL}, for {fingerprint['predicted_for']['title']}; measured: {where}"]
    for key, row in rows.items():
        if key == ALL:
            continue
        for over, each in row["networks"].items():
            raced = each["measured"]
            said = f"{raced['median']:.3f} [{raced['low']:.3f}, {raced['high']:.3f}]" if raced else "not measured"
            predicted = f"predicted {each['realistic']:.3f} (realistic) to {each['ideal']:.3f} (ideal)"
            lines.append(f"{key:<20} 2:4 INT8 {over:<16} {said}, {predicted}")
    for key, row in rows.items():
        found = row if key == ALL else row["agreement"]
        signs = f"sign right in {found['right']} of {found['outside']} layers outside the noise, of {found['groups']}"
        if found["balanced_accuracy"] is None:
            lines.append(f"{key:<20} {signs}; no balanced accuracy: {found['why_none']}")
        else:
            scores = f"balanced accuracy {found['balanced_accuracy']:.3f}, base rate {found['base_rate']:.3f}"
            lines.append(f"{key:<20} {signs}; {scores}")
    return "\n".join(lines)


def run(folder: Path, name: str | None) -> str:
    """Compare, write and describe. Raises DataError without races, UsageError where the GPU is not known."""
    path = folder / "engines.json"
    if not path.is_file():
        raise DataError(f"{path}: no such file; measure with gpu.engines first")
    whole = load(path)
    device = whole["fingerprint"]["gpu"]
    gpu = of_device(device) if name is None else chosen([name])[0]
    if gpu is None:
        raise UsageError(f"no peaks are known of the GPU {device!r}: name one that is alike with --gpu")
    rows = compared(whole, gpu)
    if len(rows) == 1:
        raise DataError(f"{path}: holds no race of dense INT8 and 2:4 INT8; measure with gpu.engines first")
    fingerprint = {**whole["fingerprint"], "kind": "predictor", "created": now(), "predicted_for": asdict(gpu)}
    write(folder / "predictor.json", {"fingerprint": fingerprint, "rows": rows})
    return text(rows, fingerprint)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or that of the error, whose one line goes to standard error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="with engines.json")
    parser.add_argument("--gpu", help="whose peaks to predict with; default: the one that was measured")
    asked = parser.parse_args(arguments)
    try:
        print(run(asked.folder, asked.gpu))
    except SparsifyError as error:
        print(f"gpu.predictor: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
