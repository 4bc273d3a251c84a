"""The verbs that need no torch: build an engine, time engines, look into a model file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from sparsify_deploy import menu
from sparsify_deploy.artifacts import environment
from sparsify_deploy.artifacts.fingerprint import file_digest
from sparsify_deploy.errors import CorruptArtifact, RuntimeUnavailable, UsageError
from sparsify_deploy.reporting.compare import Compared, compare, existing
from sparsify_deploy.reporting.layer_verdict import Known, chain, file_part
from sparsify_deploy.reporting.triton import described as served_model
from sparsify_deploy.reporting.triton import model_name, unserved
from sparsify_deploy.reporting.triton import write as write_model
from sparsify_deploy.reports import LayerChain, LayerReport
from sparsify_deploy.runtimes import _tensors
from sparsify_deploy.timing import Copies, Race, Surroundings, copies, race, surroundings
from sparsify_deploy.types import BuildNotes, EngineProfile, Json, Progress, Session

if TYPE_CHECKING:
    from sparsify_deploy.types import Arrays

_LARGEST_AXIS = 2**31 - 1
"""Runtimes count the values along an axis in 32 bits."""


@dataclass(frozen=True)
class Built:
    """An engine on disk, and the folder of a Triton model repository that serves it, where one was asked for."""

    engine: Path
    notes: BuildNotes
    triton: Path | None = None


def build(
    model: Path,
    runtime: str,
    output: Path | None,
    sets: Sequence[str],
    triton: Path | None = None,
    *,
    progress: Progress | None = None,
) -> Built:
    """Judge the ONNX file, then build it for `runtime`, which leaves its metadata beside the engine.

    `triton` is a Triton model repository to put the engine in as well.
    """
    from sparsify_deploy.graph import file

    file.load(model)
    chosen = _runtime(runtime)
    params = _params(runtime, sets)
    if triton is not None and (reason := unserved(runtime)) is not None:
        raise UsageError(f"--triton: {reason}")
    engine = output or model.with_name(f"{model.stem}.{runtime}{chosen.SUFFIX}")
    if not engine.name.endswith(chosen.SUFFIX):
        raise UsageError(f"-o {engine}: engines of {runtime} end in {chosen.SUFFIX}")
    if not engine.parent.is_dir():
        raise UsageError(f"-o {engine}: the folder {engine.parent} does not exist")
    if (reason := chosen.unavailable_reason()) is not None:
        raise RuntimeUnavailable(reason)
    notes = chosen.build(model, engine, params, progress=progress)
    return Built(engine, notes, _served(engine, model, runtime, triton) if triton is not None else None)


def _served(engine: Path, onnx: Path, runtime: str, repository: Path) -> Path:
    from sparsify_deploy.runtimes._metadata import check

    record = check(engine, trust=False)
    assert record is not None
    described = served_model(engine, record, onnx, why=f"{onnx.name} for {runtime}, built without a recipe.")
    try:
        return write_model(repository, model_name(onnx.stem, runtime), described)
    except OSError as error:
        raise UsageError(f"--triton {repository}: cannot be written: {error.strerror}") from error


def parse_batches(text: str) -> tuple[int, ...]:
    """`1,8,32` as integers."""
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--batch {text}: expected whole numbers separated by commas, as in 1,32") from None
    if min(sizes) < 1:
        raise UsageError(f"--batch {text}: a batch has at least one example")
    if max(sizes) > _LARGEST_AXIS:
        raise UsageError(f"--batch {text}: {max(sizes)} examples are more than any runtime takes ({_LARGEST_AXIS})")
    if len(set(sizes)) < len(sizes):
        raise UsageError(f"--batch {text}: each size once")
    return sizes


def parse_shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """`image=1x3x224x224` for every input named, as integers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, _, sizes = text.rpartition("=")
        parts = sizes.split("x")
        if not name or name in shapes or not all(part.isascii() and part.isdecimal() and int(part) for part in parts):
            raise UsageError(f"--shape {text}: expected NAME=1x3x224x224, each input once")
        shapes[name] = tuple(int(part) for part in parts)
        if math.prod(shapes[name]) > _LARGEST_AXIS:
            raise UsageError(f"--shape {text}: more than {_LARGEST_AXIS} values, which no runtime takes")
    return shapes


def only_with_compare(**options: object) -> None:
    """Refuse options that say how to compare where nothing is compared."""
    for name, value in options.items():
        if value is not None and value != []:
            raise UsageError(f"--{name}: goes with --compare FILE")


def compare_files(
    reference: Path,
    other: Path,
    *,
    onnx: Path | None,
    inputs: Path | None,
    tolerance: float | None,
    shapes: Sequence[str],
    trust: bool,
) -> Compared:
    """`compare.compare` with `--shape` as text."""
    if inputs is not None and shapes:
        raise UsageError("--shape: the arrays of --inputs have shapes of their own")
    given = parse_shapes(shapes)
    return compare(reference, other, onnx=onnx, inputs=inputs, shapes=given, tolerance=tolerance, trust=trust)


def parse_range(text: str) -> tuple[int, int]:
    """`0:30521` as the least and the largest integer."""
    low, _, high = text.partition(":")
    try:
        found = int(low), int(high)
    except ValueError:
        raise UsageError(f"--int-range {text}: expected LOW:HIGH, both included, as in 0:30521") from None
    if found[0] > found[1]:
        raise UsageError(f"--int-range {text}: {found[0]} is above {found[1]}")
    return found


@dataclass(frozen=True)
class Benched:
    """Races by batch size, copies left out of them, and what they were run on: files by sha256, machine, state."""

    races: tuple[Race, ...]
    copies: tuple[Copies, ...]
    sha256: Mapping[str, str]
    inputs: str
    machine: Mapping[str, Json]
    before: Surroundings
    after: Surroundings


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
    sets: Sequence[str] = (),
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    integers: tuple[int, int] = (0, 1),
) -> Benched:
    """Race files against the first one on random inputs; ONNX files run in `runtime`, with the parameters `sets`.

    `shapes` fixes an input's axes, its batch included; `integers` bounds integer inputs.
    """
    if len({str(path) for path in models}) < len(models):
        raise UsageError("each file once: an A/A control of the first is measured anyway")
    fixed = {shape[0] for shape in (shapes or {}).values()}
    if fixed and fixed != set(batch_sizes):
        raise UsageError(f"--shape names batch {', '.join(map(str, sorted(fixed)))}: pass the same one with --batch")
    if sets and not any(path.suffix == ".onnx" for path in models):
        raise UsageError(f"--set {sets[0]}: goes with ONNX files; an engine keeps the parameters it was built with")
    short = {path.name for path in models}
    labels = [path.name if len(short) == len(models) else str(path) for path in models]
    from sparsify_deploy.runtimes._metadata import typical_shapes

    before = surroundings()
    races, copied = [], []
    free: dict[str, tuple[int, ...]] = {}
    with TemporaryDirectory(prefix="sparsify-deploy-") as scratch:
        files = [
            _openable(path, label, runtime, trust=trust, scratch=Path(scratch) / str(i), sets=sets)
            for i, (path, label) in enumerate(zip(models, labels, strict=True))
        ]
        for done, size in enumerate(batch_sizes):
            progress.update("bench", done, len(batch_sizes), f"batch {size}")
            with ExitStack() as stack:
                opened = [
                    stack.enter_context(_ready(file, size, threads, shapes or {}, integers))
                    for file in (*files, files[0])
                ]
                free |= typical_shapes(files[0].engine, opened[0][0].inputs, size)  # as they are fed by now
                sessions = {file.label: session for file, (session, _) in zip(files, opened, strict=False)}
                found = race(
                    sessions,
                    control=opened[-1][0],
                    batch_size=size,
                    threads=threads,
                    rounds=rounds,
                    round_ms=round_ms,
                    warmup_ms=200.0,
                    seed=0,
                )
                races.append(found)
                copied += [
                    copies(session, fed, file.label, size) for file, (session, fed) in zip(files, opened, strict=False)
                ]
    return Benched(
        races=tuple(races),
        copies=tuple(copied),
        sha256={label: file_digest(path) for label, path in zip(labels, models, strict=True)},
        inputs=f"random: standard normal floats, integers from {integers[0]} to {integers[1]}"
        + "".join(f", {name} {_tensors.shape_text(shape[1:])} an example" for name, shape in free.items()),
        machine=environment.machine(),
        before=before,
        after=surroundings(),
    )


@dataclass(frozen=True)
class Inspected:
    """What a file is. `record` stands beside an engine; `chain` is None for an engine without its ONNX file.

    `profile` is an engine's own, where it was asked for.
    """

    file: Path
    runtime: str
    pattern: str
    record: Mapping[str, Json] | None
    chain: LayerChain | None
    profile: EngineProfile | None


def inspect(
    model: Path, pattern: str, *, trust: bool, onnx: Path | None = None, profile: bool = False, threads: int = 1
) -> Inspected:
    """The sparsity verdict of a file, layer by layer.

    Of an ONNX file the part that it tells alone; of an engine what its record says, with the rows if `onnx` is the
    file it was built from, and with times if `profile` runs it here, at batch 1 on random inputs.
    """
    from sparsify_deploy.runtimes._metadata import check, check_own, runtime_of

    n, m = _pattern(pattern)
    existing(model)
    if onnx is not None:
        existing(onnx, "--onnx ")
    if model.suffix == ".onnx":
        if onnx is not None or profile:
            option = "--onnx" if onnx is not None else "--profile"
            raise UsageError(f"{option} goes with an engine: {model} is an ONNX file, build it first")
        return Inspected(model, "", pattern, None, chain(model.name, _layers(model, n, m), Known(pattern)), None)
    runtime, record = runtime_of(model), check(model, trust=trust)
    if onnx is not None and record is None:
        raise UsageError(f"--onnx {onnx}: the engine has no record beside it that says which file it was built from")
    if onnx is not None and record is not None and file_digest(onnx) != record.get("onnx_sha256"):
        raise UsageError(f"--onnx {onnx}: is not the file that {model.name} was built from: their sha256 differ")
    if profile:
        check_own(model, trust=trust)
    times = _profiled(model, runtime, record, threads) if profile else None
    rows = None
    if onnx is not None and record is not None:
        known = Known(pattern, runtime, record.get("facts", {}), None, times, 1 if times else None)
        rows = chain(model.name, _layers(onnx, n, m), known)
    return Inspected(model, runtime, pattern, record, rows, times)


def _layers(model: Path, n: int, m: int) -> tuple[LayerReport, ...]:
    from sparsify_deploy.graph import file
    from sparsify_deploy.graph.layers import all_layers

    return file_part(all_layers(file.load(model)), n, m)


def _profiled(engine: Path, runtime: str, record: Mapping[str, Json] | None, threads: int) -> EngineProfile:
    from sparsify_deploy.runtimes._metadata import typical_shapes

    chosen = _runtime(runtime)
    params = _recorded(engine, chosen, record) if record is not None else chosen.Params()
    if (reason := chosen.cannot_run_reason()) is not None:
        raise RuntimeUnavailable(f"--profile: {reason}")
    with chosen.open(engine, params) as session:
        tensors = session.inputs
    batch = tensors[0].shape[0] if tensors and tensors[0].shape else None
    shapes = _tensors.full_shapes(tensors, batch or 1, typical_shapes(engine, tensors, batch or 1), engine.name)
    found: EngineProfile = chosen.profile(engine, params, _tensors.random_inputs(tensors, shapes), threads=threads)
    return found


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


def _openable(path: Path, label: str, runtime: str, *, trust: bool, scratch: Path, sets: Sequence[str]) -> _File:
    """Judge the file, then the environment; an ONNX file is built for `runtime` in the folder `scratch`."""
    from sparsify_deploy.graph import file
    from sparsify_deploy.runtimes._metadata import check, check_own, runtime_of

    existing(path)
    is_onnx = path.suffix == ".onnx"
    metadata = None
    if is_onnx:
        file.load(path)
    else:
        runtime = runtime_of(path)
        metadata = check(path, trust=trust)
        check_own(path, trust=trust)
    chosen = _runtime(runtime)
    params = (
        _recorded(path, chosen, metadata) if metadata is not None else _params(runtime, () if not is_onnx else sets)
    )
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
def _ready(
    file: _File, batch: int, threads: int, given: Mapping[str, tuple[int, ...]], integers: tuple[int, int]
) -> Iterator[tuple[Session, Arrays]]:
    """The file opened at a batch size, with random inputs bound, and these."""
    from sparsify_deploy.runtimes._metadata import typical_shapes

    chosen = menu.entry("runtimes", file.runtime)
    with chosen.open(file.engine, file.params) as probe:
        tensors = probe.inputs
    typical = typical_shapes(file.engine, tensors, batch)
    shapes = _tensors.full_shapes(tensors, batch, {**typical, **given}, file.label)
    fed = _tensors.random_inputs(tensors, shapes, integers)
    with chosen.open(file.engine, file.params, threads=threads, shapes=shapes) as session:
        session.bind(fed)
        yield session, fed
