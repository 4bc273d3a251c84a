"""The grid of ResNet-20 on CIFAR-10: five ways to train it at a tenth of its weights, beside what was published."""

from __future__ import annotations

from pathlib import Path

from harness.grid import DENSE, Grid, Row, Run, level_column
from sparsify_deploy.types import Json

EPOCHS = 8.0
LEVEL = 10
SPARSITY = 0.8926  # 1 - 0.8^10, rounded

ROWS = (
    Row("dense", "dense"),
    Row("gradual", "gradual magnitude"),
    Row("rigl", "RigL, from random ERK"),
    Row("synflow", "SynFlow at init, static"),
    Row("static", "random ERK at init, static"),
)

ERK: Json = {"criterion": "random", "allocation": "erk"}
SPARSE: dict[str, dict[str, Json]] = {
    "rigl": {"init": ERK, "train": {"method": "rigl"}},
    "synflow": {"init": {"criterion": "synflow"}, "train": {"method": "static"}},
    "static": {"init": ERK, "train": {"method": "static"}},
    "gradual": {"train": {"method": "gradual"}},
}

PUBLISHED = """\
Published for ResNet-20 on CIFAR-10, test accuracy in %, with 182 epochs and lossless images:

| source | 1 | .51 | .21 | .107 |
| --- | --: | --: | --: | --: |
| Renda 2020: dense | 91.71 ± .23 | | | |
| Renda 2020: IMP, weight rewinding | | 92.2 | 91.8 | 90.9 |
| Renda 2020: IMP, learning-rate rewinding | | 92.1 | 92.0 | 91.2 |
| Renda 2020: IMP, fine-tuning | | 91.8 | 90.6 | 88.6 |

The article this project grew from gives 91.2 dense, and winning tickets of 91.0, 90.5 and 89.2 at density .50, .20
and .05."""


def grid(data: Path, seeds: int, epochs: float, precision: str = "fp32") -> Grid:
    """Every run; all share one store, so that one image set and one store serve them one after another."""
    chosen = tuple(range(seeds))
    label = f"{epochs:g} epochs where published results take 160 and more. " if epochs < 160 else f"{epochs:g} epochs. "
    return Grid(
        name="methods-cifar10",
        title="ResNet-20 on CIFAR-10",
        how=(
            f"{label}Test accuracy in % at the end of training, mean ± sd (seeds), by density of the prunable weights. "
            "The images were stored as JPEG, so all numbers are a little below those of the lossless set. Width 16, "
            "batch 128, SGD 0.1, momentum 0.9, weight decay 5e-4, cosine after 5 % warm-up, crops and flips, "
            f"{precision}. FLOPs (2 x MACs) of training, relative to dense training."
        ),
        rows=ROWS,
        columns=(level_column(0), level_column(LEVEL)),
        runs=tuple(run for seed in chosen for run in _of_seed(data, seed, epochs, precision)),
        settings={"epochs": epochs, "seeds": list(chosen), "batch_size": 128, "precision": precision},
        published=PUBLISHED,
        seeds=chosen,
    )


def base(data: Path, seed: int, epochs: float, precision: str = "fp32") -> dict[str, Json]:
    """What all recipes have in common."""
    return {
        "version": 1,
        "seed": seed,
        "threads": 1,
        "dense_branch": False,
        "model": {"source": "builtin", "params": {"name": "resnet20", "width": 16}},
        "data": {
            "source": "parquet",
            "params": {"path": str(data), "image": "image", "label": "label"},
            "augment": ["crop", "flip"],
        },
        "training": {
            "epochs": epochs,
            "batch_size": 128,
            "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
            "schedule": {"name": "cosine", "warmup_fraction": 0.05},
            "precision": precision,
        },
    }


def _of_seed(data: Path, seed: int, epochs: float, precision: str) -> list[Run]:
    common = base(data, seed, epochs, precision)
    dense = Run("dense", DENSE, seed, "", {**common, "train": {"method": "dense"}})
    sparse = [Run(row, f"n{LEVEL}", seed, "", {**common, "sparsity": SPARSITY, **p}) for row, p in SPARSE.items()]
    return [dense, *sparse]
