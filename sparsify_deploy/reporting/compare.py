"""Two files of one network on the same inputs: how far apart their answers are, and the first layer that differs.

An ONNX file runs in ONNX Runtime, an engine in its own runtime. For the layers, float tensors inside the network become
outputs: of the ONNX file itself, and of an engine built again, with the parameters of its record, from the file it was
built from. More outputs keep a builder from fusing some nodes, so a fault in such a fusion may vanish: the outputs are
those of the engine as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from sparsify_deploy import menu
from sparsify_deploy.artifacts.fingerprint import file_digest
from sparsify_deploy.errors import CorruptArtifact, DataError, RuntimeUnavailable, UsageError
from sparsify_deploy.process import native
from sparsify_deploy.types import IOTensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Named = Mapping[str, NDArray[Any]]

FLOAT_TOLERANCE = 1e-4
ROUNDED_TOLERANCE = 0.1
"""Relative L2 distance: of FP32 files, and where INT8 or a lower float precision rounds."""


@dataclass(frozen=True)
class OutputDifference:
    """One output. `max_relative` is `max_absolute` over the largest magnitude of the reference, `relative` the L2 norm
    of the difference over that of the reference, `top1_agreement` for outputs of two axes."""

    name: str
    max_absolute: float
    max_relative: float
    relative: float
    cosine: float
    top1_agreement: float | None


@dataclass(frozen=True)
class LayerDifference:
    """One layer: the L2 norm of the difference over that of the reference; inf where a value is not finite."""

    layer: str
    op: str
    relative: float


@dataclass(frozen=True)
class Compared:
    """`other` against `reference`; `first` is the first layer in graph order beyond `tolerance`, None: no layer is."""

    reference: str
    other: str
    inputs: str
    tolerance: float
    outputs: tuple[OutputDifference, ...]
    layers: tuple[LayerDifference, ...]
    first: str | None

    @property
    def differ(self) -> bool:
        """Whether an output or a layer is beyond the tolerance."""
        return self.first is not None or any(not output.relative <= self.tolerance for output in self.outputs)


@dataclass(frozen=True)
class _Side:
    """A file, the ONNX file behind it, and what runs both."""

    path: Path
    onnx: Path
    runtime: str
    params: BaseModel

    @property
    def rounds(self) -> bool:
        """Whether it computes some of it in less than FP32."""
        from sparsify_deploy.graph import file, taps

        precision = getattr(self.params, "precision", "f32")
        return taps.is_quantised(file.load(self.onnx)) or precision not in ("f32", "fp32")


def compare(
    reference: Path,
    other: Path,
    *,
    onnx: Path | None = None,
    inputs: Path | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    batch: int = 8,
    tolerance: float | None = None,
    trust: bool = False,
    layers: bool = True,
) -> Compared:
    """Run both files and compare outputs, then `layers`.

    `onnx` is the file an engine was built from, where it is not the other one of the two. `inputs` is an .npz with an
    array an input; without it they are random at `batch` examples, and `shapes` fixes free axes.

    Raises:
        UsageError: an engine's ONNX file is not given, or an option is wrong.
        DataError: the two take other inputs, or have other outputs.
    """
    if tolerance is not None and not 0 < tolerance < float("inf"):
        raise UsageError(f"--tolerance {tolerance:g}: must be a number above 0")
    if onnx is not None:
        existing(onnx, "--onnx ")
    sides = [_side(path, [onnx, reference, other], trust) for path in (reference, other)]
    allowed = tolerance or (ROUNDED_TOLERANCE if any(side.rounds for side in sides) else FLOAT_TOLERANCE)
    fed, how = _inputs(sides, inputs, shapes or {}, batch)
    outputs = _outputs([_run(side.path, side, fed) for side in sides])
    inside = _layers(sides, fed) if layers else ()
    first = next((layer.layer for layer in inside if not layer.relative <= allowed), None)
    return Compared(str(reference), str(other), how, allowed, outputs, inside, first)


def existing(path: Path, option: str = "") -> None:
    """Raise DataError unless `path` is a file; `option` is what named it on the command line."""
    if not path.is_file():
        raise DataError(f"{option}{path}: " + ("is not a file" if path.exists() else "no such file"))


def _side(path: Path, sources: Sequence[Path | None], trust: bool) -> _Side:
    from sparsify_deploy.graph import file
    from sparsify_deploy.runtimes._metadata import check, check_own, runtime_of

    existing(path)
    if path.suffix == ".onnx":
        file.load(path)
        chosen = menu.entry("runtimes", "onnxruntime")
        side = _Side(path, path, "onnxruntime", chosen.Params())
    else:
        side = _engine(path, runtime_of(path), check(path, trust=trust), sources)
        check_own(path, trust=trust)
    runtime = menu.entry("runtimes", side.runtime)
    if (reason := runtime.unavailable_reason() or runtime.cannot_run_reason()) is not None:
        raise RuntimeUnavailable(f"{path}: {reason}")
    return side


def _engine(path: Path, runtime: str, record: Mapping[str, Any] | None, sources: Sequence[Path | None]) -> _Side:
    """An engine with the ONNX file it was built from: the one of `sources` whose sha256 its record holds."""
    if record is None:
        raise UsageError(f"{path}: has no record beside it that says which ONNX file it was built from: build it again")
    candidates = [source for source in sources if source is not None and source.suffix == ".onnx" and source.is_file()]
    onnx = next((source for source in candidates if file_digest(source) == record.get("onnx_sha256")), None)
    if onnx is None:
        raise UsageError(
            f"{path}: none of the ONNX files given is the one it was built from, by its sha256: pass that with --onnx"
        )
    try:
        params = menu.entry("runtimes", runtime).Params.model_validate(record["params"], strict=False)
    except (KeyError, ValidationError):
        raise CorruptArtifact(f"{path}: the record beside it names no parameters: build the engine again") from None
    return _Side(path, onnx, runtime, params)


def _inputs(
    sides: Sequence[_Side], given: Path | None, shapes: Mapping[str, tuple[int, ...]], batch: int
) -> tuple[Named, str]:
    """What both are fed, and how a report calls that."""
    from sparsify_deploy.graph import axis_sizes, file
    from sparsify_deploy.runtimes import _tensors

    models = [file.load(side.onnx) for side in sides]
    first, second = map(file.inputs, models)
    if {(t.name, t.dtype) for t in first} != {(t.name, t.dtype) for t in second}:
        raise DataError(
            f"{sides[1].path}: takes {_names(second)}, and {sides[0].path} takes {_names(first)}: they cannot be fed "
            "the same"
        )
    if given is not None:
        arrays = read_inputs(given)
        if set(arrays) != {tensor.name for tensor in first}:
            raise DataError(
                f"--inputs {given}: holds {', '.join(arrays) or 'nothing'}, and {sides[0].path} takes {_names(first)}: "
                "one array for each input, by its name"
            )
        return arrays, f"{given}"
    wanted = {tensor.name: tensor for tensor in (*first, *second)}
    for tensor in first:  # a fixed axis of either file fixes it
        both = zip(tensor.shape, wanted[tensor.name].shape, strict=False)
        wanted[tensor.name] = IOTensor(tensor.name, tuple(a if a is not None else b for a, b in both), tensor.dtype)
    tensors = tuple(wanted.values())
    fixed = next((t.shape[0] for t in tensors if t.shape and t.shape[0] is not None and t.name not in shapes), None)
    typical = _tensors.typical_shapes(tensors, fixed or batch, axis_sizes.plain(models[0]))
    full = _tensors.full_shapes(tensors, fixed or batch, {**typical, **shapes}, str(sides[0].path))
    return _tensors.random_inputs(tensors, full), f"random, {_tensors.RANDOM_INPUTS}, batch {fixed or batch}"


def read_inputs(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file by name. Raises DataError where it is none, or holds Python objects."""
    from sparsify_deploy.preprocessing.arrays import Archive, UnreadableArray, array, is_archive

    existing(path, "--inputs ")
    try:
        with path.open("rb") as opened:
            if not is_archive(opened):
                array(opened)
                raise DataError(f"--inputs {path}: holds one array without a name; write it with numpy.savez")
            loaded = Archive(opened)
            return {name: loaded.read(name) for name in loaded.names}
    except UnreadableArray as error:
        raise DataError(
            f"--inputs {path}: is no .npz file of plain arrays ({error}); write it with numpy.savez"
        ) from None
    except OSError as error:
        raise DataError(f"--inputs {path}: cannot be read: {error.strerror or error}") from None


def _names(tensors: Sequence[IOTensor]) -> str:
    return ", ".join(f"{tensor.name} ({tensor.dtype})" for tensor in tensors)


def _run(engine: Path, side: _Side, fed: Named) -> dict[str, NDArray[Any]]:
    runtime = menu.entry("runtimes", side.runtime)
    shapes = {name: tuple(values.shape) for name, values in fed.items()}
    with runtime.open(engine, side.params, shapes=shapes) as session:
        return native.answer(session, fed)


def _outputs(found: Sequence[Named]) -> tuple[OutputDifference, ...]:
    reference, other = found
    if set(reference) == set(other):
        pairs = [(name, name) for name in reference]
    elif len(reference) == len(other):
        pairs = list(zip(reference, other, strict=True))
    else:
        raise DataError(f"the files have other outputs: {', '.join(reference)} against {', '.join(other)}")
    return tuple(_output(name, reference[name], other[twin]) for name, twin in pairs)


def _output(name: str, reference: NDArray[Any], other: NDArray[Any]) -> OutputDifference:
    import numpy as np

    if reference.shape != other.shape:
        raise DataError(f"output {name!r} has shape {other.shape}, and the reference {reference.shape}")
    a, b = reference.astype(np.float64), other.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return OutputDifference(name, np.inf, np.inf, np.inf, 0.0, None)
    largest = float(np.abs(a).max(initial=0.0))
    absolute = float(np.abs(a - b).max(initial=0.0))
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return OutputDifference(
        name=name,
        max_absolute=absolute,
        max_relative=absolute / largest if largest else (np.inf if absolute else 0.0),
        relative=_relative(a, b),
        cosine=float((a * b).sum()) / norms if norms else float(np.array_equal(a, b)),
        top1_agreement=float((a.argmax(1) == b.argmax(1)).mean()) if a.ndim == 2 and a.shape[1] > 1 else None,
    )


def _layers(sides: Sequence[_Side], fed: Named) -> tuple[LayerDifference, ...]:
    """Every tensor that both files hold, in the order of the reference."""
    from sparsify_deploy.graph import file, taps

    pairs = taps.matched(*(taps.taps(file.load(side.onnx)) for side in sides))
    names = [tuple(pair[i].tensor for pair in pairs) for i in range(2)]
    with TemporaryDirectory(prefix="sparsify-deploy-") as folder:
        inside = [_inside(side, fed, names[i], Path(folder, str(i))) for i, side in enumerate(sides)]
    rows = []
    for a, b in pairs:
        found = [inside[0][a.tensor], inside[1][b.tensor]]
        rows.append(LayerDifference(a.layer, a.op, _relative(*found)))
    return tuple(rows)


def _inside(side: _Side, fed: Named, names: tuple[str, ...], folder: Path) -> dict[str, NDArray[Any]]:
    """The tensors `names`, computed by the file with these as further outputs."""
    from sparsify_deploy.graph import file, taps

    folder.mkdir()
    tapped = folder / "tapped.onnx"
    file.save(taps.with_outputs(file.load(side.onnx), names), tapped)
    runtime = menu.entry("runtimes", side.runtime)
    engine = folder / f"model{runtime.SUFFIX}"
    runtime.build(tapped, engine, side.params)
    return _run(engine, side, fed)


def _relative(reference: NDArray[Any], other: NDArray[Any]) -> float:
    import numpy as np

    a, b = reference.astype(np.float64), other.astype(np.float64)
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    norm, distance = float(np.linalg.norm(a)), float(np.linalg.norm(a - b))
    return distance / norm if norm else (float("inf") if distance else 0.0)
