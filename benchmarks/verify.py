"""How fast `verify` goes through a finished run directory, beside `sha256sum` on the same files.

A run directory is made whose masks, weights and ONNX file are of a large network, 2:4 along input channels, with true
manifests. In each round `verify`, `sha256sum` one file after the other, and `sha256sum` again as the noise floor read
all of it; files are in the page cache, so this is the speed of hashing and looking, not of a disk.

    python benchmarks/verify.py [--mib 512] [--rounds 5] [--json FILE]

Exit code 1 where less than 0.5 GB/s is verified.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from safetensors.numpy import save_file

from sparsify_deploy.artifacts.store import ArtifactStore
from sparsify_deploy.checkup.verify import OK, verify

LEAST_GB_PER_S = 0.5
_CHANNELS = 1024


@dataclass(frozen=True)
class Speed:
    """Wall times of all rounds, s, and the median's speed; `ratio` to sha256sum's time, median over rounds."""

    what: str
    seconds: tuple[float, ...]
    gb_per_s: float
    ratio: float


def weights(layers: int, generator: np.random.Generator) -> dict[str, np.ndarray[Any, Any]]:
    """Float32 matrices that hold 2:4 along input channels."""
    found = {}
    for index in range(layers):
        values = generator.standard_normal((_CHANNELS, _CHANNELS), dtype=np.float32)
        values.reshape(-1, 4)[:, 2:] = 0.0
        found[f"layer{index}.weight"] = values
    return found


def exported(values: dict[str, np.ndarray[Any, Any]], path: Path) -> None:
    """A chain of Gemms with these weights."""
    nodes, last = [], "input"
    for index, name in enumerate(values):
        nodes.append(onnx.helper.make_node("Gemm", [last, name], [f"x{index}"], f"gemm{index}", transB=1))
        last = f"x{index}"
    tensor = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "network",
        [tensor("input", onnx.TensorProto.FLOAT, ["batch", _CHANNELS])],
        [tensor(last, onnx.TensorProto.FLOAT, ["batch", _CHANNELS])],
        [onnx.numpy_helper.from_array(array, name) for name, array in values.items()],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]), path)


def commit(
    store: ArtifactStore, stage: str, inputs: dict[str, str], facts: dict[str, Any], **files: Any
) -> dict[str, str]:
    """A committed result; the digests of its outputs."""
    parts = {"stage": stage, "inputs": inputs, "settings": {"nm": {"pattern": "2:4"}}}
    out = store.begin(stage, parts)
    for name, write in files.items():
        write(out / name)
    return dict(store.commit(stage, parts, {name: name for name in files}, facts, 0.0).digests)


def make(folder: Path, mib: int) -> None:
    """A run directory of about `mib` MiB: weights before and after a projection, its mask, an exported file."""
    generator = np.random.default_rng(0)
    layers = max(1, mib * 2**20 // (3 * 4 * _CHANNELS**2))
    values = weights(layers, generator)
    store = ArtifactStore(folder / "store")
    with store.lock():
        commit(store, "train", {}, {}, weights=lambda path: save_file(values, path))
        rows = [{"layer": name.removesuffix(".weight"), "projected": True} for name in values]
        made = commit(
            store,
            "project_nm",
            {},
            {"pattern": "2:4", "layers": rows},
            weights=lambda path: save_file(values, path),
            mask=lambda path: save_file({name: array != 0 for name, array in values.items()}, path),
        )
        checked = [{"parameter": name, "violations": 0} for name in values]
        commit(store, "export_onnx", made, {"nm_checked": checked}, onnx=lambda path: exported(values, path))


def timed(work: Callable[[], object]) -> float:
    """Wall time of one call, s."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(folder: Path, rounds: int) -> tuple[list[Speed], float]:
    """The speeds, and the bytes of all files in GB."""
    files = sorted(str(path) for path in (folder / "store").rglob("*") if path.is_file())
    size = sum(os.stat(path).st_size for path in files) / 1e9

    def whole() -> None:
        found = verify(folder)
        assert found.exit_code == 0
        assert sum("2:4" in check.what and check.state == OK for check in found.checks) == 3, found.checks

    def peer() -> None:
        subprocess.run(["sha256sum", *files], check=True, stdout=subprocess.DEVNULL)

    works = {"verify": whole, "sha256sum": peer, "sha256sum, again": peer}
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        timed(work)  # the files are in the page cache from here on, and modules are loaded
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(timed(work))
    return [
        Speed(
            name,
            tuple(round(t, 4) for t in taken),
            size / statistics.median(taken),
            statistics.median(a / b for a, b in zip(taken, times["sha256sum"], strict=True)),
        )
        for name, taken in times.items()
    ], size


def main() -> int:
    """Measure and print; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="verify-"))
    try:
        make(folder, asked.mib)
        speeds, size = measure(folder, asked.rounds)
    finally:
        shutil.rmtree(folder)
    print(f"{size:.2f} GB in the page cache, {len(os.sched_getaffinity(0))} cores, median of {asked.rounds} rounds")
    for speed in speeds:
        print(f"{speed.what:<18} {speed.gb_per_s:5.2f} GB/s  {speed.ratio:5.2f}x the time of sha256sum")
    kept = speeds[0].gb_per_s >= LEAST_GB_PER_S
    verdict = "kept" if kept else "NOT KEPT"
    print(f"verify goes through {speeds[0].gb_per_s:.2f} GB/s, at least {LEAST_GB_PER_S} asked: {verdict}")
    if asked.json is not None:
        load = [round(each, 2) for each in os.getloadavg()]
        found = {"gb": size, "cores": len(os.sched_getaffinity(0)), "load": load, "speeds": [asdict(s) for s in speeds]}
        asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
