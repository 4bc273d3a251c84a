"""The seams: what a task, a data set, a criterion, a training method and a runtime look like to the others.

Nothing here imports torch or numpy at run time. Every seam carries mappings from name to array, never one
positional tensor, so that models with several inputs or outputs are no special case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    Batch: TypeAlias = Mapping[str, Tensor]
    Outputs: TypeAlias = Mapping[str, Tensor]
    Arrays: TypeAlias = Mapping[str, NDArray[np.generic]]
    Scores: TypeAlias = Mapping[str, Tensor]
    LossFn: TypeAlias = Callable[[nn.Module, Batch], Tensor]

Json: TypeAlias = Any
"""A value `json.dumps` writes: dict with str keys, list, str, int, float, bool, None."""

Facts: TypeAlias = Mapping[str, Json]
"""What a stage measured or decided, as JSON, for its manifest and the reports."""

Direction: TypeAlias = Literal["higher", "lower"]

SOFT_TARGET = "soft_target"
"""The field of a training batch that holds, where labels were mixed, each class's share `(N, classes)`; `target` keeps
the labels of the unmixed examples. A task whose loss reads it says so by `SOFT_TARGETS = True` in its module."""


class Progress(Protocol):
    """Where long work tells how far it is. Calls are cheap; the receiver throttles."""

    def update(self, label: str, done: int, total: int, note: str = "") -> None:
        """`done` of `total` units of `label` are finished; `note` is a short free text such as a loss."""
        ...

    def say(self, message: str) -> None:
        """One line a person should see: a fallback, a layer left out, a resumed checkpoint."""
        ...


@dataclass(frozen=True)
class Silent:
    """A `Progress` that tells nobody."""

    def update(self, label: str, done: int, total: int, note: str = "") -> None:
        pass

    def say(self, message: str) -> None:
        pass


@dataclass(frozen=True)
class Context:
    """What a stage may use while it runs and what never changes its result."""

    progress: Progress = field(default_factory=Silent)
    checkpoint_every_s: float = 30.0
    threads: int | None = None
    device: str = "auto"
    stop_requested: Callable[[], bool] = lambda: False


class Split(Protocol):
    """One part of a data set: examples by index."""

    def __len__(self) -> int: ...

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        """The examples at int64 `indices` `(B,)`, each field batched along axis 0, on the CPU, floats as float32."""
        ...


@dataclass(frozen=True)
class AxisSizes:
    """The sizes of an axis that differs between batches: the least, the typical one that is timed, the largest."""

    least: int
    typical: int
    largest: int


class DataSet(Protocol):
    """Named splits of examples with named fields.

    It may also have `notes`, lines a reader of a report must know; `preprocessing`, how a raw example becomes the
    inputs (a spec of `preprocessing.spec`), with `raw`, a few examples of the test split in that form by index, and
    `preprocessing_files`, what the spec needs beside it by name; `dynamic_axes`, the axes besides the batch whose size
    differs between batches, as field -> axis -> name; and `axis_sizes`, name -> `AxisSizes`, which exported files carry
    for builders, timing and predictions.
    `splits` names its splits; a data set without it has `train` and `test`.
    """

    @property
    def inputs(self) -> tuple[str, ...]:
        """The fields a model takes, in the order of its `forward` arguments."""
        ...

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names by label, or None where there are none."""
        ...

    def split(self, name: Literal["train", "test", "validation"]) -> Split:
        """`train` for training, calibration and scoring; `test` for every number in a report.

        `validation` for choosing, such as when to stop; where there is none, DataError that says how to get one.
        """
        ...


class Task(Protocol):
    """What a model is for: its loss and its metrics.

    It may also have `also_measured`, name to direction of metrics that `evaluate` gives only where they mean something;
    `counting`, the task once it is told how to learn the training examples of each label; `check`, which tries the task
    on a batch and the outputs for it; `example_inputs`, a batch as a network is traced and exported with it; and
    `answers`, which of some outputs hold an answer as their largest value, over the last axis or, of maps
    `(N, classes, H, W)`, over axis 1.
    """

    @property
    def metrics(self) -> Mapping[str, Direction]:
        """Metric name to the direction of better; the first is the one gates use unless they name another."""
        ...

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        """The scalar training loss of one batch (mean over examples)."""
        ...

    def evaluate(self, outputs: Arrays, batch: Arrays) -> dict[str, float]:
        """Every metric, and `loss` without training-only terms, over all examples at once; numpy only."""
        ...


@dataclass(frozen=True)
class BuildNotes:
    """What a runtime says of an engine it built."""

    runtime: str
    version: str
    files: tuple[str, ...]
    seconds: float
    options: Facts
    runs_here: bool
    label: str = ""
    warnings: tuple[str, ...] = ()
    facts: Facts = field(default_factory=dict)


@dataclass(frozen=True)
class IOTensor:
    """Name, shape (None for a dynamic axis) and numpy dtype name of an engine's input or output."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str


@dataclass(frozen=True)
class LayerTime:
    """One layer of an engine as its runtime calls it: the ONNX nodes fused into it, the kernel that ran, and its time.

    `ms` is the mean of a run of the whole engine; `kernel` is the runtime's own word (TensorRT's tactic, OpenVINO's
    primitive) and `precision` is what it says it computed in, each "" where it does not say.
    """

    name: str
    nodes: tuple[str, ...]
    kernel: str
    ms: float
    precision: str = ""


@dataclass(frozen=True)
class EngineProfile:
    """Where an engine spends its time. Profiling slows it down, so shares are to be trusted and sums are not.

    `layers` is empty and `note` says why where the runtime cannot tell.
    """

    layers: tuple[LayerTime, ...]
    runs: int
    note: str = ""


class Session(Protocol):
    """An opened engine. `bind` copies inputs in, `execute` is the timed part, `fetch` copies outputs out."""

    @property
    def inputs(self) -> Sequence[IOTensor]: ...

    @property
    def outputs(self) -> Sequence[IOTensor]: ...

    def bind(self, inputs: Arrays) -> None: ...

    def execute(self) -> None: ...

    def fetch(self) -> dict[str, NDArray[Any]]: ...


class Runtime(Protocol):
    """A menu module of `runtimes/` meets this with plain functions."""

    SUFFIX: str
    """File suffix of its engines, with the dot."""

    FLAVOUR: str
    """Where it wants Q/DQ in an INT8 file: "tensorrt" or "onnxruntime"."""

    def unavailable_reason(self) -> str | None:
        """None where it can build here, else one line: what to install or which device is missing."""
        ...

    def cannot_run_reason(self) -> str | None:
        """None where it can execute engines here, else one line."""
        ...

    def build(self, onnx: Path, engine: Path, params: Any, /, *, progress: Progress | None = None) -> BuildNotes:
        """Build an engine file and the record beside it; `progress` hears what the builder tells while it works."""
        ...

    def open(
        self,
        engine: Path,
        params: Any,
        /,
        *,
        threads: int = 1,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> AbstractContextManager[Session]:
        """Open an engine with `threads` CPU threads; `shapes` fixes dynamic axes, None keeps them."""
        ...

    def profile(self, engine: Path, params: Any, inputs: Arrays, /, *, threads: int = 1) -> EngineProfile:
        """Time every layer of an engine on `inputs`, by the runtime's own profiler."""
        ...


Batches: TypeAlias = "Iterable[Batch]"


def outputs_of(model: nn.Module, batch: Batch, inputs: Sequence[str]) -> dict[str, Tensor]:
    """Call `model` on the fields `inputs` of `batch`, in that order, and name what comes back.

    A single tensor becomes `output`, a tuple or list `output_0`, `output_1`..., a mapping keeps its names.
    """
    result = model(*(batch[name] for name in inputs))
    if isinstance(result, Mapping):
        return dict(result)
    if isinstance(result, (tuple, list)):
        return {f"output_{i}": value for i, value in enumerate(result)}
    return {"output": result}
