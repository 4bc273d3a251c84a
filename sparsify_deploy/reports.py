"""Typed reports, to JSON and back.

A number in a report was measured in the way its field says, or is marked as computed from shapes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from sparsify_deploy.errors import CorruptArtifact, DataError
from sparsify_deploy.timing import Latency, Race
from sparsify_deploy.types import EngineProfile, Json

T = TypeVar("T")


@dataclass(frozen=True)
class LayerReport:
    """One layer with constant weights, as the ONNX file holds it. `shape` is `(K, C / groups, *kernel)`.

    `pattern_held` is about the recipe's N:M, `usable` about 2:4, the only pattern that hardware skips. `violations` of
    the `blocks` groups of M input channels break N:M. `float_reader` reads its tensor `output` other than in INT8.
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
    violations: int = 0
    blocks: int = 0
    float_reader: str = ""
    output: str = ""


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


REPORT_FORMAT = 1
"""Raised when a report would mean something else. One without a number is of 1."""

SAME_GRAPH = "same graph, dense weights"
"""The label of the final sparse file with its zeros replaced: a twin for latency, whose accuracy is unknown."""

AS_GIVEN = "as given"
"""The label of an ONNX file that a recipe starts from, as it is."""

IN_FLOAT = "same graph without Q/DQ"
"""The label of a quantised file that was given, computed in float."""


@dataclass(frozen=True)
class BenchmarkReport:
    """The races of one runtime, one a batch size; none and a reason where it cannot run here.

    `metrics` holds those of engines that were built for the race alone, over all test examples, by label, `left_out`
    the variants that could not be raced, with the reason. `profiles` are those of the final engines and their twin, at
    the first batch size.
    """

    runtime: str
    threads: int
    not_run: str | None
    races: tuple[Race, ...]
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    profiles: dict[str, EngineProfile] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerVerdict:
    """One weighted layer, from the file to the kernel that ran. `shape` is `(K, C / groups, *kernel)`.

    `violations` of `blocks` groups of M input channels break the pattern. `eligible` and `picked` are the builder's own
    word, None where it gives none; `picked` is False too where the runtime has no sparse kernels. `kernel` is the one
    that ran. The times are wall times with the profiler on, None where that cannot tell. `reason` is the first obstacle
    in this order, or what speaks for the layer; `advice` is what could be done, "" for nothing.
    """

    layer: str
    weight: str
    op: str
    shape: tuple[int, ...]
    groups: int
    precision: str
    weights: int
    zeros: int
    blocks: int
    violations: int
    pattern_held: bool
    shape_rule: bool
    int8_in: bool
    int8_out: bool
    eligible: bool | None
    picked: bool | None
    kernel: str
    dense_ms: float | None
    sparse_ms: float | None
    reason: str
    advice: str


@dataclass(frozen=True)
class LayerChain:
    """What ran sparse, layer by layer, of one model in one runtime; `runtime` "" where only its file was looked at.

    `twin` is the dense engine whose layer times stand beside, `batch_size` that of both profiles.
    """

    model: str
    runtime: str
    pattern: str
    layers: tuple[LayerVerdict, ...]
    twin: str = ""
    batch_size: int | None = None
    profiled_runs: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shipped:
    """The model that `deploy/` of the run directory holds; `value` is its metric by `how`, None: unknown."""

    model: str
    runtime: str
    files: tuple[str, ...]
    value: float | None
    how: str
    preprocessing: str = ""


@dataclass(frozen=True)
class Row:
    """One row of the waterfall. `flops` is training FLOPs relative to one dense training, `train_s` seconds of it."""

    label: str
    step: str
    model: ModelReport
    optimizer_steps: int | None = None
    flops: float | None = None
    train_s: float | None = None


@dataclass(frozen=True)
class EngineRow:
    """One engine: its file in the run directory, its size, its accuracy where it can run here.

    `flavour` is where Q/DQ stand in the ONNX file it was built from, "none" where it has none.
    """

    branch: str
    runtime: str
    file: str
    bytes: int
    version: str
    metrics: dict[str, float] | None
    label: str
    not_run: str | None
    flavour: str = "none"


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
class Level:
    """One fit of a step that trains several times: a lottery ticket's level, or a looser pattern on the way.

    `name` is the level's number, or the pattern. `density` is that of the masked layers while it trained, `metrics`
    are those on the test split after it, and `start` is the step of the schedule it began at.
    """

    step: str
    name: str
    density: float
    metrics: dict[str, float]
    start: int
    optimizer_steps: int
    train_s: float


@dataclass(frozen=True)
class Score:
    """A network with one change, against the same one without it. `drop` is in the metric's unit, positive: worse."""

    metric: float
    drop: float
    loss_increase: float


@dataclass(frozen=True)
class LayerSensitivity:
    """One prunable layer: what is lost when it alone is projected, and when it alone is INT8; None: not tried.

    `rank` 1 is the projected layer with the largest drop; ties by the increase of the loss, then by module order.
    """

    layer: str
    parameter: str
    shape: tuple[int, ...]
    projected: Score | None
    rank: int | None
    reason: str
    quantized: Score | None
    quantized_reason: str


@dataclass(frozen=True)
class SensitivityReport:
    """What each layer alone costs, on `examples` examples of `split`.

    `baseline` is the network before projection; `baseline_float` the same with BatchNorm folded, which INT8 is
    compared with; `int8_all` has every layer and residual add in INT8. `not_quantized` says why there is no INT8.
    """

    metric: str
    direction: str
    split: str
    examples: int
    pattern: str
    baseline: float
    baseline_loss: float
    baseline_float: float | None
    int8_all: Score | None
    not_quantized: str
    layers: tuple[LayerSensitivity, ...]

    @property
    def worst_first(self) -> tuple[LayerSensitivity, ...]:
        """The projected layers by rank, then the others in module order."""
        return tuple(sorted(self.layers, key=lambda row: row.rank if row.rank is not None else len(self.layers) + 1))


@dataclass(frozen=True)
class Prediction:
    """What 2:4 was predicted to gain over dense INT8, and over dense FP16, on `target` at one batch size.

    `eligible` of `weighted` layers hold 2:4 in INT8; `share` is theirs of the dense INT8 engine's predicted time. None
    where that was not predicted. `measured` is the median of a race on that very target, with its 95 % interval.
    """

    target: str
    batch_size: int
    realistic: float
    ideal: float
    how: str
    eligible: int | None = None
    weighted: int | None = None
    share: float | None = None
    realistic_over_fp16: float | None = None
    ideal_over_fp16: float | None = None
    measured: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Curve:
    """The training loss of a step: (optimizer step, mean loss over the steps since the one before) pairs.

    `measured` are the same pairs for the `metric` on the validation split, where the training was measured there.
    """

    step: str
    losses: tuple[tuple[int, float], ...]
    metric: str = ""
    measured: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class RunReport:
    """Everything a run found out. `metrics` are all of the task, with the direction of better; `metric` is the one that
    gates and the verdict speak of."""

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
    sensitivity: SensitivityReport | None = None
    levels: tuple[Level, ...] = ()
    chains: tuple[LayerChain, ...] = ()
    shipped: Shipped | None = None
    curves: tuple[Curve, ...] = ()
    predictions: tuple[Prediction, ...] = ()
    metrics: dict[str, str] = field(default_factory=dict)
    format: int = REPORT_FORMAT

    def row(self, label: str) -> Row | None:
        """The row of that label."""
        return next((row for row in self.rows if row.label == label), None)


def dump(report: Any) -> str:
    """A report as indented JSON with sorted keys."""
    return json.dumps(to_json(report), indent=1, sort_keys=True, allow_nan=False) + "\n"


REPORTS = ("report.json", "report.md", "report.html")
"""The files of a run's report, in the run directory."""

SUMS = "report.sha256"
"""Their sums, as `sha256sum --check` reads them."""


def is_report_whole(folder: Path) -> bool:
    """Whether all files of a run's report are there as they were written. Raises `OSError` where one cannot be read."""
    listed = (folder / SUMS).read_bytes() if (folder / SUMS).is_file() else b""
    return listed == sums(folder).encode()


def sums(folder: Path) -> str:
    """What the file of sums says of the files as they are. Raises `OSError`."""
    return "".join(f"{_sum(folder / name)}  {name}\n" for name in REPORTS)


def read_report(folder: Path) -> RunReport:
    """The report of a run directory; `CorruptArtifact` where it is not the one that was written, `DataError` where
    there is none. One of a release that left no sums is taken as it is."""
    path, listed = folder / REPORTS[0], folder / SUMS
    if listed.is_file() and not path.is_file():
        raise CorruptArtifact(f"{path} is gone, though {listed.name} lists it: `run` writes it again")
    if not path.is_file():
        raise DataError(f"{path}: no report: name a run directory in which `run` has finished")
    if listed.is_file() and f"{_sum(path)}  {path.name}\n".encode() not in listed.read_bytes():
        raise CorruptArtifact(f"{path} is not what {listed.name} lists: it is damaged, and `run` writes it again")
    _check_format(path)
    return load(RunReport, path)


def _check_format(path: Path) -> None:
    """`DataError` where a newer program wrote the report."""
    try:
        found = json.loads(path.read_bytes()).get("format", REPORT_FORMAT)
    except (ValueError, RecursionError, AttributeError):  # `load` says what is wrong with it
        return
    if isinstance(found, int) and found > REPORT_FORMAT:
        raise DataError(
            f"{path}: is of format {found}, and this program reads {REPORT_FORMAT}: use the release that wrote it, or "
            "`run`, which writes it again"
        )


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load(kind: type[T], path: Path) -> T:
    """Read a report of that kind; `CorruptArtifact` where the file is none."""
    from pydantic import ValidationError

    try:
        found: T = _adapter(kind).validate_json(path.read_bytes())  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first["loc"] else first["msg"]
        raise CorruptArtifact(f"{path}: cannot be read ({what}): `run` writes it again") from error
    return found


def from_json(kind: Any, values: Json) -> Any:
    """A report's part of that kind from plain JSON values, as a manifest holds them."""
    return _adapter(kind).validate_python(values)


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
