"""The verbs that need no torch: build an engine, time engines, look into a model file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from sparsify_deploy import menu
from sparsify_deploy.errors import CorruptArtifact, DataError, RuntimeUnavailable, UsageError
from sparsify_deploy.timing import Race, race
from sparsify_deploy.types import BuildNotes, IOTensor, Json, Progress, Session

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Built:
    """An engine on disk."""

    engine: Path
    notes: BuildNotes


def build(model: Path, runtime: str, output: Path | None, sets: Sequence[str]) -> Built:
    """Judge the ONNX file, then build it for `runtime`, which leaves its metadata beside the engine."""
    from sparsify_deploy.graph import file

    file.load(model)
    chosen = _runtime(runtime)
    params = _params(runtime, sets)
    engine = output or model.with_name(f"{model.stem}.{runtime}{chosen.SUFFIX}")
    if not engine.name.endswith(chosen.SUFFIX):
        raise UsageError(f"-o {engine}: engines of {runtime} end in {chosen.SUFFIX}")
    if not engine.parent.is_dir():
        raise UsageError(f"-o {engine}: the folder {engine.parent} does not exist")
    if (reason := chosen.unavailable_reason()) is not None:
        raise RuntimeUnavailable(reason)
    notes = chosen.build(model, engine, params)
    return Built(engine, notes)


def parse_batches(text: str) -> tuple[int, ...]:
    """`1,8,32` as integers."""
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--batch {text}: expected whole numbers separated by commas, as in 1,32") from None
    if min(sizes) < 1:
        raise UsageError(f"--batch {text}: a batch has at least one example")
    return sizes


def bench(
    models: Sequence[Path],
    *,
    runtime: str,
    batch_sizes: Sequence[int],
    threads: int,
    rounds: int,
    round_ms: float,
    trust: bool,
    progress: Progress,
) -> tuple[Race, ...]:
    """Race files against the first one on standard-normal inputs; ONNX files run in `runtime` as they are."""
    if len({str(path) for path in models}) < len(models):
        raise UsageError("each file once: an A/A control of the first is measured anyway")
    short = {path.name for path in models}
    labels = [path.name if len(short) == len(models) else str(path) for path in models]
    with TemporaryDirectory(prefix="sparsify-deploy-") as scratch:
        files = [
            _openable(path, label, runtime, trust, Path(scratch) / str(i))
            for i, (path, label) in enumerate(zip(models, labels, strict=True))
        ]
        races = []
        for done, size in enumerate(batch_sizes):
            progress.update("bench", done, len(batch_sizes), f"batch {size}")
            with ExitStack() as stack:
                opened = [stack.enter_context(_ready(file, size, threads)) for file in (*files, files[0])]
                races.append(
                    race(
                        dict(zip((file.label for file in files), opened, strict=False)),
                        control=opened[-1],
                        batch_size=size,
                        threads=threads,
                        rounds=rounds,
                        round_ms=round_ms,
                        warmup_ms=200.0,
                        seed=0,
                    )
                )
    return tuple(races)


def inspect(model: Path, pattern: str, *, trust: bool) -> Json:
    """What a file is, and for an ONNX file a row a layer: shape, precision, pattern, eligibility, reason."""
    from sparsify_deploy.graph import eligibility, file, layers
    from sparsify_deploy.graph.nm import violations
    from sparsify_deploy.runtimes._metadata import check, runtime_of

    n, m = _pattern(pattern)
    if not model.is_file():
        raise DataError(f"{model}: no such file")
    if model.suffix != ".onnx":
        return {"file": str(model), "runtime": runtime_of(model), "metadata": check(model, trust=trust), "layers": None}
    rows = []
    for layer in layers.weight_layers(file.load(model)):
        possible = eligibility.pattern_possible(layer.shape, layer.groups, m)
        rule = eligibility.rule_of_thumb(layer.shape, layer.groups, m)
        rows.append(
            {
                "layer": layer.name,
                "op": layer.op,
                "shape": list(layer.shape),
                "groups": layer.groups,
                "precision": layer.precision,
                "int8_in": layer.int8_in,
                "int8_out": layer.int8_out,
                "sparsity": float((layer.values == 0).mean()),
                "pattern_possible": possible.ok,
                "pattern_held": possible.ok and violations(layer.values, n, m) == 0,
                "rule_of_thumb": rule.ok,
                "reason": eligibility.explained(layer.shape, layer.groups, m),
            }
        )
    return {"file": str(model), "runtime": None, "metadata": None, "pattern": pattern, "layers": rows}


def _pattern(text: str) -> tuple[int, int]:
    n, _, m = text.partition(":")
    if not (n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m) <= 16):
        raise UsageError(f"--pattern {text}: expected N:M with N below M and M at most 16, as in 2:4")
    return int(n), int(m)


def _runtime(name: str) -> Any:
    if name not in menu.names("runtimes"):
        raise UsageError(f"--runtime {name}: unknown runtime{menu.did_you_mean(name, menu.names('runtimes'))}")
    return menu.entry("runtimes", name)


def _params(runtime: str, sets: Sequence[str]) -> BaseModel:
    """The runtime's parameters from `key=value` texts; a value is JSON where it parses as such, else text."""
    params: type[BaseModel] = _runtime(runtime).Params
    values: dict[str, Json] = {}
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set {text}: expected KEY=VALUE")
        try:
            values[key] = json.loads(value)
        except json.JSONDecodeError:
            values[key] = value
    try:
        return params.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        hint = menu.did_you_mean(key, params.model_fields) if key not in params.model_fields else ""
        raise UsageError(f"--set {key}: {first['msg']}{hint}") from None


@dataclass(frozen=True)
class _File:
    """A file to time: its label, the engine it is or was built into, and what opens that."""

    label: str
    engine: Path
    runtime: str
    params: BaseModel


def _openable(path: Path, label: str, runtime: str, trust: bool, scratch: Path) -> _File:
    """Judge the file, then the environment; an ONNX file is built for `runtime` in the folder `scratch`."""
    from sparsify_deploy.graph import file
    from sparsify_deploy.runtimes._metadata import check, runtime_of

    if not path.is_file():
        raise DataError(f"{path}: no such file")
    is_onnx = path.suffix == ".onnx"
    metadata = None
    if is_onnx:
        file.load(path)
    else:
        runtime = runtime_of(path)
        metadata = check(path, trust=trust)
    chosen = _runtime(runtime)
    params = _recorded(path, chosen, metadata) if metadata is not None else chosen.Params()
    if (reason := chosen.unavailable_reason() or chosen.cannot_run_reason()) is not None:
        raise RuntimeUnavailable(reason)
    if is_onnx:
        scratch.mkdir()
        engine = scratch / f"model{chosen.SUFFIX}"
        chosen.build(path, engine, params)
        return _File(label, engine, runtime, params)
    return _File(label, path, runtime, params)


def _recorded(engine: Path, runtime: Any, metadata: Mapping[str, Json]) -> BaseModel:
    """The parameters an engine was built with, from the record beside it."""
    try:
        found: BaseModel = runtime.Params.model_validate(metadata["params"], strict=False)
    except (KeyError, ValidationError):
        raise CorruptArtifact(f"{engine}: the record beside it names no parameters: build the engine again") from None
    return found


@contextmanager
def _ready(file: _File, batch: int, threads: int) -> Iterator[Session]:
    """The file opened at a batch size, with standard-normal inputs bound."""
    chosen = menu.entry("runtimes", file.runtime)
    with chosen.open(file.engine, file.params) as probe:
        tensors = probe.inputs
    shapes = {t.name: _shape(t, batch, file.label) for t in tensors}
    with chosen.open(file.engine, file.params, threads=threads, shapes=shapes) as session:
        session.bind(_random_inputs(tensors, shapes))
        yield session


def _shape(tensor: IOTensor, batch: int, path: str) -> tuple[int, ...]:
    """The tensor's shape with the batch on axis 0; every other axis must be fixed."""
    if not tensor.shape:
        raise DataError(f"{path}: input {tensor.name} has no batch axis, which timing needs")
    first, *rest = tensor.shape
    if None in rest:
        raise DataError(f"{path}: input {tensor.name} has a dynamic axis besides the batch: fix it in the export")
    if first is not None and first != batch:
        raise UsageError(f"{path}: input {tensor.name} has the fixed batch size {first}: use --batch {first}")
    return (batch, *(int(axis) for axis in rest if axis is not None))


def _random_inputs(tensors: Sequence[IOTensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, NDArray[Any]]:
    import numpy as np

    generator = np.random.default_rng(0)
    inputs: dict[str, NDArray[Any]] = {}
    for tensor in tensors:
        kind = np.dtype(tensor.dtype)
        values = generator.standard_normal(shapes[tensor.name])
        inputs[tensor.name] = values.astype(kind) if kind.kind == "f" else np.zeros(shapes[tensor.name], kind)
    return inputs
