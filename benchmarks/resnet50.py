"""Time and memory of each stage of torchvision's ResNet-50: plan, 2:4 projection, INT8, ONNX, engines.

Random weights and random images at 224 x 224: what is measured does not depend on them. Each stage runs in a process of
its own, after the network was built and run once there, so that the figures are the stage's. Its memory is the peak of
the resident set over what was resident when it began (Linux: VmHWM after it was reset through clear_refs); where it
works in a child process, that one's whole peak is named beside it. The parameters are 97.5 MiB. A projection that needs
more than three times that fails the benchmark.

    python benchmarks/resnet50.py [--work runs/resnet50] [--json]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from sparsify_deploy import pipeline
from sparsify_deploy.artifacts.environment import machine
from sparsify_deploy.types import Context, Json
from sparsify_deploy.workspace import open_run

PARAMETERS = 25_557_032
LIMIT = 3.0
"""Largest memory of the projection, times the bytes of the parameters."""

RECIPE = """\
version: 1
threads: 1
dense_branch: false
model: {source: torchvision, params: {name: resnet50}}
data: {source: npz, params: {path: images.npz}}
training: {steps: 1, batch_size: 8}
nm: {pattern: "2:4", fill: false}
quantize: {calibration_batches: 2}
export: {parity_examples: 8, min_top1_agreement: 0.0}
deploy:
  - runtime: openvino
  - runtime: tensorrt_rtx
    params: {targets: [sm86]}
benchmark: {batch_sizes: [1], rounds: 5}
"""


@dataclass(frozen=True)
class Cost:
    """What one stage took; `peak_mib` is over what was resident before it began, `resident_mib`.

    `child_peak_mib` is the whole peak of its largest child process, 0 where it had none; `cpu_s` counts those too.
    """

    stage: str
    wall_s: float
    cpu_s: float
    peak_mib: float
    resident_mib: float
    child_peak_mib: float

    @property
    def over_parameters(self) -> float:
        """The peak, times the bytes of the FP32 parameters."""
        return self.peak_mib * 2**20 / (4 * PARAMETERS)


def status_mib(field: str) -> float:
    """`VmRSS` or `VmHWM` of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"resnet50: /proc/self/status has no {field}: this benchmark needs Linux")


def measured(name: str, work: Callable[[], object]) -> Cost:
    """Run `work` and take its time and its peak of memory."""
    before = status_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts anew
    wall, cpu = time.monotonic(), cpu_s()
    work()
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return Cost(name, time.monotonic() - wall, cpu_s() - cpu, status_mib("VmHWM") - before, before, children)


def cpu_s() -> float:
    """CPU seconds of this process and of its children that have ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def stage(recipe: Path, step: str) -> Cost:
    """One step of the recipe, those before it being done; in a process that has built and run the network."""
    workspace = open_run(recipe, run_dir=recipe.parent, store=recipe.parent / "store")
    plan = workspace.plan
    if step == "plan":
        return measured(step, lambda: [one.stage.estimate() for one in plan.steps])
    plan.subject.check_network()
    number = [one.id for one in plan.steps].index(step)
    plan = dataclasses.replace(plan, steps=plan.steps[: number + 1])  # `until` would go on to the report
    with workspace.store.lock():
        return measured(step, lambda: pipeline.run(plan, workspace.store, Context(threads=1)))


def images(path: Path) -> None:
    """16 + 8 random images."""
    rng = np.random.default_rng(0)
    arrays = {f"x_{split}": rng.integers(0, 256, (count, 224, 224, 3), np.uint8) for split, count in SIZES.items()}
    labels = {f"y_{split}": rng.integers(0, 1000, count) for split, count in SIZES.items()}
    np.savez(path, **arrays, **labels)  # type: ignore[arg-type]  # numpy types the names of the arrays as its options


SIZES = {"train": 16, "test": 8}


def main() -> int:
    """Run each step that is missing; 1 where the projection takes more memory than it may."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("runs/resnet50"), help="a new or empty folder")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    if (asked.work / "store").exists():
        parser.error(f"--work {asked.work}: holds a store already; its stages would be cached, and nothing measured")
    images(asked.work / "images.npz")
    recipe = asked.work / "resnet50.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    fresh = multiprocessing.get_context("spawn")
    steps = [s.id for s in open_run(recipe, run_dir=asked.work).plan.steps]
    costs = []
    for step in ["plan", *steps]:
        with fresh.Pool(1) as pool:
            costs.append(pool.apply(stage, (recipe.absolute(), step)))
        sys.stderr.write(f"{step}: {costs[-1].wall_s:.1f} s, {costs[-1].peak_mib:.0f} MiB\n")
    show(costs, as_json=asked.json)
    return int(any(cost.stage.endswith("project_nm") and cost.over_parameters > LIMIT for cost in costs))


def show(costs: list[Cost], *, as_json: bool) -> None:
    """One line a stage, or everything."""
    if as_json:
        rows: list[Json] = [{**cost.__dict__, "over_parameters": cost.over_parameters} for cost in costs]
        created = datetime.now(timezone.utc).isoformat(timespec="seconds")
        whole = {"parameters": PARAMETERS, "limit": LIMIT, "machine": machine(), "created": created, "stages": rows}
        sys.stdout.write(json.dumps(whole, indent=1) + "\n")
        return
    sys.stdout.write(
        "| stage | wall, s | CPU, s | peak memory, MiB | times the parameters | child's, MiB |\n| --- |" + " --: |" * 5
    )
    for cost in costs:
        seconds, memory = f"{cost.wall_s:.1f} | {cost.cpu_s:.1f}", f"{cost.peak_mib:.0f} | {cost.over_parameters:.2f}"
        sys.stdout.write(f"\n| {cost.stage} | {seconds} | {memory} | {cost.child_peak_mib:.0f} |")
    sys.stdout.write("\n")


if __name__ == "__main__":
    sys.exit(main())
