"""What the GPU figures have to show, checked over committed result files: met, not met or not measured, with values.

    PYTHONPATH=.:benchmarks python -m gpu.targets benchmarks/results/gpu/h100

Rehearsals count as not measured. Exit code 1 where a target is not met.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu.record import load
from sparsify_deploy.errors import SparsifyError
from sparsify_deploy.types import Json

FP32, FP16, DENSE, SPARSE = "FP32", "FP16", "dense INT8", "2:4 INT8"
"""As in `gpu.variants`, which needs more packages than this."""

SPEEDUPS = (
    ("resnet50/b32", FP16, 1.6),
    ("bert/b32", FP16, 1.8),
    ("resnet50/b32", DENSE, 1.03),
    ("bert/b32", DENSE, 1.10),
)
"""Row, what 2:4 INT8 is raced against, and how many times faster it has to be."""

SHIPPED, BALANCED = 0.99, 0.9


@dataclass(frozen=True)
class Checked:
    """A target beside what was measured; `value` None is not measured."""

    name: str
    limit: float
    value: float | None
    detail: str

    @property
    def word(self) -> str:
        if self.value is None:
            return "not measured"
        return "met" if self.value >= self.limit else "not met"


def check(folder: Path) -> tuple[Checked, ...]:
    """Every target over `engines.json` and `predictor.json` of `folder`."""
    rows = _rows(folder / "engines.json")
    found = [_speedup(rows, key, against, limit) for key, against, limit in SPEEDUPS]
    return (*found, _shipped(rows), _predictor(_rows(folder / "predictor.json")))


def _rows(path: Path) -> Mapping[str, Json]:
    """Rows that were measured on a GPU: none of a missing file or of a rehearsal."""
    if not path.is_file():
        return {}
    kept = load(path)
    return {} if kept["fingerprint"]["rehearsal"] else kept["rows"]


def _speedup(rows: Mapping[str, Json], key: str, against: str, limit: float) -> Checked:
    name = f"{SPARSE} over {against}, {key}"
    found = compare(rows.get(key, {}), SPARSE, against)
    if found is None:
        return Checked(name, limit, None, "no such race")
    return Checked(name, limit, found["median"], f"[{found['low']:.3f}, {found['high']:.3f}], {found['claim']}")


def compare(row: Mapping[str, Json], label: str, baseline: str) -> Mapping[str, Json] | None:
    """How one plan did against another in the race of a row; None where they did not meet."""
    for found in row.get("race", {}).get("comparisons", ()):
        if (found["label"], found["baseline"]) == (label, baseline):
            return dict(found)
    return None


def shipped(race: Mapping[str, Json]) -> str:
    """The plan that the package would ship by latency alone: the simplest that no later one beats beyond the noise."""
    chosen: str | None = None
    for label in (FP32, FP16, DENSE, SPARSE):
        if label not in race["labels"]:
            continue
        better = chosen is not None and compare({"race": race}, label, chosen)
        if chosen is None or (better and better["claim"] == "faster"):
            chosen = label
    if chosen is None:
        raise SparsifyError("a race has none of the four plans in it: measure again")
    return chosen


def _shipped(rows: Mapping[str, Json]) -> Checked:
    """The worst race: the plan that is shipped against the fastest other one."""
    worst: tuple[float, str] | None = None
    for key, row in rows.items():
        if "race" not in row:
            continue
        plan = shipped(row["race"])
        for other in row["race"]["labels"]:
            found = compare(row, plan, other)
            if found is not None and (worst is None or found["median"] < worst[0]):
                worst = found["median"], f"{key}: {plan} over {other}"
    name = "shipped plan over its best twin"
    if worst is None:
        return Checked(name, SHIPPED, None, "no race")
    return Checked(name, SHIPPED, worst[0], f"the worst of {sum('race' in r for r in rows.values())} races, {worst[1]}")


def _predictor(rows: Mapping[str, Json]) -> Checked:
    name = "predictor's sign, balanced accuracy"
    whole = rows.get("all layers")
    if whole is None or whole["balanced_accuracy"] is None:
        why = "no comparison of measured layers" if whole is None else whole["why_none"]
        return Checked(name, BALANCED, None, why)
    where = f"{whole['outside']} of {whole['groups']} layers outside the noise"
    detail = f"{where}, base rate {whole['base_rate']:.3f}"
    return Checked(name, BALANCED, whole["balanced_accuracy"], detail)


def lines(checked: Sequence[Checked]) -> Iterator[str]:
    """A line a target."""
    width = max(len(each.name) for each in checked)
    for each in checked:
        value = "-" if each.value is None else f"{each.value:.3f}"
        yield f"{each.word:<12}  {each.name:<{width}}  {value} (at least {each.limit})  {each.detail}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the targets."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="with engines.json and predictor.json")
    try:
        checked = check(parser.parse_args(arguments).folder)
    except SparsifyError as error:
        print(f"gpu.targets: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join(lines(checked)))
    return 1 if any(each.word == "not met" for each in checked) else 0


if __name__ == "__main__":
    sys.exit(main())
