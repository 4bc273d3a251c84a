"""Why RigL and SET meet on MNIST at density .055: both with one setting of rewiring changed at a time."""

from __future__ import annotations

from pathlib import Path

from harness.grid import Claim, Column, Grid, Row, Run, density_of
from harness.mnist import ERK, base
from sparsify_deploy.types import Json

LEVEL = 13
EPOCHS = 10.0
METHODS = (Column("set", "SET"), Column("rigl", "RigL"))

VARIANTS: dict[str, tuple[str, dict[str, Json]]] = {
    "paper": ("as the papers: every 100 steps, 0.3 of the weights, until 0.75", {}),
    "every-25": ("every 25 steps", {"update_every": 25}),
    "every-50": ("every 50 steps", {"update_every": 50}),
    "every-400": ("every 400 steps", {"update_every": 400}),
    "drop-0.1": ("0.1 of the weights", {"drop_fraction": 0.1}),
    "drop-0.5": ("0.5 of the weights", {"drop_fraction": 0.5}),
    "until-0.5": ("until half of training", {"end_fraction": 0.5}),
    "until-0.95": ("until 0.95 of training", {"end_fraction": 0.95}),
}
SHORT = Row("short", "as the papers, a fifth of the epochs")
ROWS = (*(Row(key, label) for key, (label, _) in VARIANTS.items()), SHORT)


def grid(data: Path, seeds: int, epochs: float) -> Grid:
    """Every setting with both methods."""
    chosen = tuple(range(seeds))
    return Grid(
        name="methods-rewiring",
        title="RigL against SET, LeNet-300-100 on MNIST at density .055, from random ERK",
        how=(
            "Test accuracy in % at the end of training, mean ± sd (seeds). One setting of rewiring is changed at a "
            f"time; all else is that of the table of methods on MNIST, with {epochs:g} epochs."
        ),
        rows=ROWS,
        columns=METHODS,
        runs=tuple(run for seed in chosen for run in _of_seed(data, seed, epochs)),
        settings={"epochs": epochs, "seeds": list(chosen), "batch_size": 128, "level": LEVEL},
        claims=tuple(Claim(f"RigL >= SET, {row.label}", (row.key, "rigl"), (row.key, "set")) for row in ROWS),
        seeds=chosen,
    )


def _of_seed(data: Path, seed: int, epochs: float) -> list[Run]:
    sparsity = 1.0 - density_of(LEVEL)
    settings = [(key, params, epochs) for key, (_, params) in VARIANTS.items()] + [(SHORT.key, {}, epochs / 5)]
    return [
        Run(
            key,
            method.key,
            seed,
            f"s{seed}-{method.key}-{key}",
            {
                **base(data, seed, length),
                "sparsity": sparsity,
                "init": ERK,
                "train": {"method": method.key, "params": params},
            },
        )
        for key, params, length in settings
        for method in METHODS
    ]
