"""Two ways to a 2:4 INT8 ResNet-20 on CIFAR-10 at the same number of training epochs: which gives the better network?

The short route takes the weights of a dense training to 2:4 and INT8; the others train a sparse network from nothing
and project that. Trainings are those of `methods.py cifar10`, whose store is shared; each is followed by the same
fine-tune in 2:4 and the same quantisation-aware training. All goes through the command line, one thread a run, and the
same command goes on where it was stopped. Accuracies are the report's, over the test split; one seed.

    python benchmarks/methods.py cifar10 --data ../data/cifar10
    python benchmarks/routes.py --data ../data/cifar10 [--work runs/methods-cifar10]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

from harness import cifar10

from sparsify_deploy.artifacts.environment import machine
from sparsify_deploy.types import Json

FINE_TUNE, QAT = 0.75, 0.25
"""Epochs after the training."""

ROUTES: dict[str, tuple[str, dict[str, Json]]] = {
    "short": ("dense training, then 2:4 and INT8", {"train": {"method": "dense"}}),
    "rigl": ("RigL from random ERK at density .107, then 2:4 and INT8", cifar10.SPARSE["rigl"]),
    "gradual": ("gradual magnitude to density .107, then 2:4 and INT8", cifar10.SPARSE["gradual"]),
}

AFTERWARDS: Json = {
    "nm": {"pattern": "2:4", "permute": "channel_swap", "fine_tune": {"epochs": FINE_TUNE, "optimizer": {"lr": 0.01}}},
    "quantize": {"calibration_batches": 16, "qat": {"epochs": QAT, "optimizer": {"lr": 0.001}}},
    # Answers of a network that is trained this little are often close to each other.
    "export": {"min_top1_agreement": 0.97},
    "deploy": [{"runtime": "openvino"}],
    "benchmark": {"batch_sizes": [1, 32]},
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../data/cifar10"), help="the folder with the Parquet files")
    parser.add_argument("--epochs", type=float, default=cifar10.EPOCHS, help="of the trainings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/methods-cifar10"))
    parser.add_argument("--store", type=Path, help="stages; default WORK/store")
    parser.add_argument("--results", type=Path, help="where routes.json goes; default WORK")
    parser.add_argument("--only", choices=ROUTES, action="append", help="run this route; repeatable")
    parser.add_argument("--json", action="store_true", help="print everything measured, not the table")
    return parser.parse_args()


def recipe(asked: argparse.Namespace, name: str) -> Json:
    """The route as a recipe, without a dense twin: the routes are compared with each other."""
    sparsity = {} if name == "short" else {"sparsity": cifar10.SPARSITY}
    common = cifar10.base(asked.data.absolute(), asked.seed, asked.epochs)
    return {**common, **AFTERWARDS, **ROUTES[name][1], **sparsity}


def run(asked: argparse.Namespace, name: str) -> Json:
    """One route through the command line; the models of its report, in order."""
    folder: Path = asked.work / f"route-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(recipe(asked, name), indent=1) + "\n", encoding="utf-8")  # JSON is YAML
    store = asked.store or asked.work / "store"
    command = [sys.executable, "-m", "sparsify_deploy", "run", str(path), "--run-dir", str(folder / "run")]
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        code = subprocess.run([*command, "--store", str(store)], stdout=log, stderr=log, check=False).returncode
    if code:
        raise SystemExit(f"routes: {name} ended with exit code {code}: see {folder / 'log.txt'}")
    report = json.loads((folder / "run" / "report.json").read_text(encoding="utf-8"))
    return [
        {
            "label": row["label"],
            "accuracy": 100 * row["model"]["metrics"]["accuracy"],
            "examples": row["model"]["examples"],
        }
        for row in report["rows"]
    ]


def main() -> int:
    """Run what is asked for, compare the accuracies, write what was found."""
    asked = arguments()
    found = {name: run(asked, name) for name in asked.only or ROUTES}
    settings = {"epochs": asked.epochs, "fine_tune": FINE_TUNE, "qat": QAT, "width": 16, "seed": asked.seed}
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    whole = {"settings": settings, "machine": machine(), "created": created, "routes": found}
    text = json.dumps(whole, indent=1) + "\n"
    folder = asked.results or asked.work
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "routes.json").write_text(text, encoding="utf-8")
    sys.stdout.write(text if asked.json else "\n".join(table(found)) + "\n")
    return 0


def table(found: Json) -> list[str]:
    """Markdown, one line a model."""
    lines = ["| route | model | accuracy, % |", "| --- | --- | --: |"]
    lines += [
        f"| {ROUTES[name][0]} | {row['label']} | {row['accuracy']:.2f} |" for name in found for row in found[name]
    ]
    return lines


if __name__ == "__main__":
    sys.exit(main())
