"""Typed reports, to JSON and back.

A number in a report was measured in the way its field says, or is marked as computed from shapes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from sparsify_deploy.errors import CorruptArtifact
from sparsify_deploy.timing import Latency, Race
from sparsify_deploy.types import Json

T = TypeVar("T")


@dataclass(frozen=True)
class LayerReport:
    """One layer with constant weights, as the ONNX file holds it. `shape` is `(K, C / groups, *kernel)`.

    `pattern_held` is about the recipe's N:M, `usable` about 2:4, the only pattern that hardware skips.
    """

    name: str
    weight: str
    op: str
    shape: tuple[int, ...]
    groups: int
    precision: str
    int8_in: bool
    int8_out: bool
    weights: int
    zeros: int
    pattern_possible: bool
    pattern_held: bool
    usable: bool
    rule_of_thumb: bool
    reason: str
    bytes_stored: int
    bytes_compressed: int


@dataclass(frozen=True)
class ModelReport:
    """A model as it stands after a step. Latencies are wall times of one model alone in `runtime`."""

    metrics: dict[str, float]
    examples: int
    sparsity_asked: float | None
    precision: str
    layers: tuple[LayerReport, ...]
    onnx_bytes: int
    latency: tuple[Latency, ...]
    runtime: str | None

    @property
    def weights(self) -> int:
        """Weights of the layers."""
        return sum(layer.weights for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Measured: zeros over weights of all layers with constant weights."""
        return sum(layer.zeros for layer in self.layers) / self.weights if self.weights else 0.0

    @property
    def usable_sparsity(self) -> float:
        """The part of it that 2:4 hardware can skip: half of each layer whose final values hold 2:4."""
        usable = sum(layer.weights for layer in self.layers if layer.usable)
        return 0.5 * usable / self.weights if self.weights else 0.0

    @property
    def bytes_stored(self) -> int:
        """Computed: the layers' weights at their precision, every weight stored."""
        return sum(layer.bytes_stored for layer in self.layers)

    @property
    def bytes_compressed(self) -> int:
        """Computed: the same with the 2:4 layers compressed, metadata included."""
        return sum(layer.bytes_compressed for layer in self.layers)


@dataclass(frozen=True)
class BenchmarkReport:
    """The races of one runtime, one a batch size; none and a reason where it cannot run here."""

    runtime: str
    threads: int
    not_run: str | None
    races: tuple[Race, ...]


@dataclass(frozen=True)
class Row:
    """One row of the waterfall. `flops` is training FLOPs relative to training the same steps dense."""

    label: str
    step: str
    model: ModelReport
    optimizer_steps: int | None = None
    flops: float | None = None
    train_s: float | None = None


@dataclass(frozen=True)
class EngineRow:
    """One engine: its file in the run directory, its size, its accuracy where it can run here."""

    branch: str
    runtime: str
    file: str
    bytes: int
    version: str
    metrics: dict[str, float] | None
    label: str
    not_run: str | None


@dataclass(frozen=True)
class Gate:
    """A limit of the recipe beside what was measured; `met` is None where it could not be measured."""

    name: str
    limit: float
    value: float | None
    met: bool | None
    how: str


@dataclass(frozen=True)
class StepRow:
    """What happened to one step of the plan."""

    id: str
    state: str
    seconds: float
    fingerprint: str
    why: str


@dataclass(frozen=True)
class RunReport:
    """Everything a run found out."""

    recipe: str
    created: str
    machine: dict[str, Json]
    metric: str
    direction: str
    rows: tuple[Row, ...]
    engines: tuple[EngineRow, ...]
    benchmarks: tuple[BenchmarkReport, ...]
    gates: tuple[Gate, ...]
    notes: tuple[str, ...]
    verdict: str
    steps: tuple[StepRow, ...] = field(default=())

    def row(self, label: str) -> Row | None:
        """The row of that label."""
        return next((row for row in self.rows if row.label == label), None)


def dump(report: Any) -> str:
    """A report as indented JSON with sorted keys."""
    return json.dumps(to_json(report), indent=1, sort_keys=True, allow_nan=False) + "\n"


def load(kind: type[T], path: Path) -> T:
    """Read a report of that kind; `CorruptArtifact` where the file is none."""
    from pydantic import ValidationError

    try:
        found: T = _adapter(kind).validate_json(path.read_bytes())  # type: ignore[arg-type]
    except ValidationError as error:
        raise CorruptArtifact(f"{path}: not a {kind.__name__}: {error.error_count()} fields differ") from error
    return found


@cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def to_json(report: Any) -> Json:
    """A report as plain JSON values, with the derived figures of each model beside the stored ones."""
    values = asdict(report)
    for row, source in zip(values.get("rows", ()), getattr(report, "rows", ()), strict=True):
        model = source.model
        row["model"] |= {
            "sparsity": model.sparsity,
            "usable_sparsity": model.usable_sparsity,
            "bytes_stored": model.bytes_stored,
            "bytes_compressed": model.bytes_compressed,
        }
    return values
