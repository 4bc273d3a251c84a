"""The grid of LeNet-300-100 on MNIST: every method at the densities of iterative magnitude pruning."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from harness.grid import DENSE, TWO_OF_FOUR, Claim, Column, Grid, Row, Run, density_of, level_column
from sparsify_deploy.types import Json

EPOCHS = 10.0
LEVELS = (7, 10, 13, 18, 21)
IMP_MODES = ("weight_rewind", "learning_rate_rewind", "finetune")

ROWS = (
    Row("dense", "dense"),
    Row("imp-weight_rewind", "IMP, weight rewinding to step 0"),
    Row("imp-learning_rate_rewind", "IMP, learning-rate rewinding"),
    Row("imp-finetune", "IMP, fine-tuning"),
    Row("gradual", "gradual magnitude, uniform"),
    Row("gradual-global", "gradual magnitude, one threshold"),
    Row("ste", "straight-through scores, uniform"),
    Row("ste-global", "straight-through scores, one threshold"),
    Row("rigl", "RigL, from random ERK"),
    Row("set", "SET, from random ERK"),
    Row("snfs", "SNFS, from random ERK"),
    Row("synflow", "SynFlow at init, static"),
    Row("snip", "SNIP at init, static"),
    Row("grasp", "GraSP at init, static"),
    Row("magnitude", "magnitude at init, static"),
    Row("static", "random ERK at init, static"),
    Row("random", "random uniform at init, static"),
    Row("nm-refill", "dense, then 2:4 with refill and fine-tuning"),
    Row("rigl-nm", "RigL inside 2:4 groups"),
    Row("sr_ste", "SR-STE at 2:4"),
)

ERK: Json = {"criterion": "random", "allocation": "erk"}
GLOBAL: Json = {"allocation": "global"}
AT_DENSITY: dict[str, dict[str, Json]] = {
    "static": {"init": ERK, "train": {"method": "static"}},
    "synflow": {"init": {"criterion": "synflow"}, "train": {"method": "static"}},
    "rigl": {"init": ERK, "train": {"method": "rigl"}},
    "set": {"init": ERK, "train": {"method": "set"}},
    "snip": {"init": {"criterion": "snip"}, "train": {"method": "static"}},
    "grasp": {"init": {"criterion": "grasp", "samples_per_class": 10}, "train": {"method": "static"}},
    "magnitude": {"init": {"criterion": "magnitude"}, "train": {"method": "static"}},
    "random": {"init": {"criterion": "random", "allocation": "uniform"}, "train": {"method": "static"}},
    "snfs": {"init": ERK, "train": {"method": "snfs"}},
    "ste": {"train": {"method": "ste"}},
    "ste-global": {"train": {"method": "ste", "params": GLOBAL}},
    "gradual": {"train": {"method": "gradual"}},
    "gradual-global": {"train": {"method": "gradual", "params": GLOBAL}},
}
"""What a recipe needs besides its sparsity, in the order of the queue."""


def grid(data: Path, seeds: int, epochs: float) -> Grid:
    """Every run, the seeds one after another, so that a table of one seed is there first."""
    chosen = tuple(range(seeds))
    return Grid(
        name="methods-mnist",
        title="LeNet-300-100 on MNIST",
        how=(
            "Test accuracy in % at the end of training, mean ± sd (seeds), by density of the prunable weights; biases "
            f"are not pruned, no layer is kept dense. Glorot-normal weights, biases 0; {epochs:g} epochs, batch 128, "
            "SGD 0.1, momentum 0.9, no weight decay, cosine, no warm-up, one thread. The seed sets initial weights, "
            "batches and random masks. IMP drops 20 % of what is left 21 times, with as many epochs a level. "
            "FLOPs (2 x MACs) of training, relative to one dense training, by density; finding a mask at init is not "
            "counted. CPU s: median of a run's training, of IMP's 22 together."
        ),
        rows=ROWS,
        columns=(level_column(0), Column(TWO_OF_FOUR, TWO_OF_FOUR), *map(level_column, LEVELS)),
        runs=tuple(run for seed in chosen for run in _of_seed(data, seed, epochs)),
        settings={"epochs": epochs, "seeds": list(chosen), "batch_size": 128, "levels": list(LEVELS)},
        claims=_claims(),
        seeds=chosen,
    )


def base(data: Path, seed: int, epochs: float) -> dict[str, Json]:
    """What all recipes have in common."""
    return {
        "version": 1,
        "seed": seed,
        "threads": 1,
        "dense_branch": False,
        "model": {"source": "builtin", "params": {"name": "lenet-300-100"}},
        "data": {"source": "npz", "params": {"path": str(data)}},
        "training": {
            "epochs": epochs,
            "batch_size": 128,
            "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0},
            "schedule": {"name": "cosine", "warmup_fraction": 0.0},
        },
    }


def _of_seed(data: Path, seed: int, epochs: float) -> Iterator[Run]:
    common = base(data, seed, epochs)
    dense = f"s{seed}-dense"
    yield Run("dense", DENSE, seed, dense, {**common, "train": {"method": "dense"}})
    for level in reversed(LEVELS):  # the sparsest tell the methods apart
        for row, parts in AT_DENSITY.items():
            sparsity = 1.0 - density_of(level)
            yield Run(row, f"n{level}", seed, f"s{seed}-n{level}", {**common, "sparsity": sparsity, **parts})
    fine_tune = {"epochs": 0.3 * epochs, "optimizer": {"lr": 0.01}}
    projection = {"pattern": "2:4", "layers": "pattern_possible", "fine_tune": fine_tune}
    yield Run("nm-refill", TWO_OF_FOUR, seed, dense, {**common, "train": {"method": "dense"}, "nm": projection})
    inside = {
        "init": {"criterion": "random", "pattern": "2:4"},
        "train": {"method": "rigl", "params": {"pattern": "2:4"}},
    }
    yield Run("rigl-nm", TWO_OF_FOUR, seed, f"s{seed}-rigl-nm", {**common, **inside})
    yield Run("sr_ste", TWO_OF_FOUR, seed, f"s{seed}-sr_ste", {**common, "train": {"method": "sr_ste"}})
    for mode in IMP_MODES:
        last = LEVELS[-1]
        train = {"method": "imp", "params": {"retrain": mode}}
        recipe = {**common, "sparsity": 1.0 - density_of(last), "train": train}
        on_the_way = (DENSE, *(f"n{level}" for level in LEVELS[:-1]))
        yield Run(f"imp-{mode}", f"n{last}", seed, f"s{seed}-imp-{mode}", recipe, on_the_way)


def _claims() -> tuple[Claim, ...]:
    label = {row.key: row.label for row in ROWS}

    def over(better: str, worse: str, level: int, margin: float = 0.0) -> Claim:
        column = level_column(level)
        how = f" less {-margin:g} points" if margin else ""
        text = f"{label[better]} >= {label[worse]}{how}, density {column.head}"
        return Claim(text, (better, column.key), (worse, column.key), margin)

    found = [
        over(better, worse, level)
        for level in (18, 21)
        for better in ("synflow", "snip", "grasp")
        for worse in ("random", "static")
    ]
    found += [over(b, w, level) for level in (13, 18, 21) for b, w in (("rigl", "set"), ("set", "static"))]
    found += [
        Claim(f"{label[f'imp-{mode}']} within 0.3 points of dense, density .11", (f"imp-{mode}", "n10"), dense, -0.3)
        for mode in ("weight_rewind", "learning_rate_rewind")
        for dense in [("dense", DENSE)]
    ]
    found.append(over("imp-learning_rate_rewind", "imp-finetune", 10))
    text = "2:4 with refill and fine-tuning within 0.5 points of dense"
    found.append(Claim(text, ("nm-refill", TWO_OF_FOUR), ("dense", DENSE), -0.5))
    return tuple(found)
