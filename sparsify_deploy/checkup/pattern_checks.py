"""Whether the masks, weights and ONNX files in a store hold the N:M pattern that their records say they must.

Which layers must is read off the record of the stage that projected, chose or kept them; the values are read off the
files. Torch-free.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify_deploy.artifacts.store import Record
from sparsify_deploy.errors import DataError
from sparsify_deploy.params import n_and_m

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Held:
    """One file's layers that must hold `pattern`: how many were looked at, and of each broken one why it does not.

    `unread` is the reason where the file or its record could not be read, and then nothing is known.
    """

    record: Record
    file: Path
    what: str
    pattern: str = ""
    layers: int = 0
    broken: tuple[str, ...] = ()
    unread: str = ""


@dataclass(frozen=True)
class _Required:
    """The parameters that must hold a pattern in one mask, and in all that is made with it."""

    pattern: str
    parameters: tuple[str, ...]


def held(records: Sequence[Record], sound: Collection[Path]) -> Iterator[Held]:
    """Every file of `records` that must hold a pattern; only `sound` ones, whose bytes are as committed, are opened."""
    required: dict[str, _Required] = {}
    for record in records:
        if "mask" in record.outputs and record.outputs["mask"] in sound:
            try:
                found = _required(record)
            except DataError as error:
                yield Held(record, record.outputs["mask"], "mask", unread=str(error))
                continue
            if found is not None:
                required[record.digests["mask"]] = found
                yield _read(record, "mask", "mask", found)
    for record in records:
        mask = record.digests.get("mask") or record.parts.get("inputs", {}).get("mask", "")
        wanted = required.get(mask)
        for stage, output in _MASKED:
            if record.stage == stage and wanted is not None and record.outputs[output] in sound:
                yield _read(record, output, "weights", wanted)
        if "onnx" in record.outputs and record.outputs["onnx"] in sound:
            yield from _exported(record, wanted)


_MASKED = (("project_nm", "weights"), ("quantize", "quantized"))
"""The stages that leave weights at zero where a mask has them, and what holds these. Training of scores does not."""


def _read(record: Record, output: str, what: str, required: _Required) -> Held:
    try:
        return _tensors(record, output, what, required)
    except DataError as error:
        return Held(record, record.outputs[output], what, required.pattern, unread=str(error))


def _exported(record: Record, required: _Required | None) -> Iterator[Held]:
    try:
        yield from _file(record, required)
    except (DataError, KeyError, TypeError) as error:
        reason = str(error) if isinstance(error, DataError) else f"its record cannot be read ({error!r})"
        yield Held(record, record.outputs["onnx"], "ONNX initializers", unread=reason)


def _required(record: Record) -> _Required | None:
    """What the mask that a stage left must hold; None where nothing was asked of it."""
    measured, names = record.measured, _names(record.outputs["mask"])
    try:
        if record.stage == "project_nm":
            chosen = [row["layer"] for row in measured["layers"] if row["projected"]]
            return _Required(measured["pattern"], tuple(name for layer in chosen for name in _of(layer, names)))
        if measured.get("init_pattern"):
            return _Required(measured["init_pattern"], tuple(names))
        params = record.parts["settings"].get("fit", {}).get("params") or {}
        if isinstance(params.get("pattern"), str):  # what such a method cannot put on the pattern it leaves dense
            full = _full(record.outputs["mask"])
            return _Required(params["pattern"], tuple(name for name in names if name not in full))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{record.folder}: its record does not say which layers hold a pattern ({error!r})") from error
    return None


def _of(layer: str, names: Sequence[str]) -> list[str]:
    """The mask's tensors of a layer; where it has none, the usual name, which is then missed."""
    return [name for name in names if name.rpartition(".")[0] == layer] or [f"{layer}.weight"]


def _tensors(record: Record, output: str, what: str, required: _Required) -> Held:
    """Count groups with too many non-zeros in the tensors of a safetensors file."""
    from sparsify_deploy.graph.nm import violations

    path, (n, m) = record.outputs[output], n_and_m(required.pattern)
    broken = []
    with _opened(path) as tensors:
        there = set(tensors.keys())
        # a layer that INT8 takes apart has other names there: its values are looked at in the ONNX file
        wanted = [name for name in required.parameters if name in there or output != "quantized"]
        for name in wanted:
            if name not in there:
                broken.append(f"{name} is not in it")
            elif bad := violations(_values(tensors, name, path), n, m):
                broken.append(f"{name} in {bad} groups")
    return Held(record, path, what, required.pattern, len(wanted), tuple(broken))


def _file(record: Record, required: _Required | None) -> Iterator[Held]:
    """The initializers of an exported file, or the layers of one that was given, by the values an engine gets."""
    from sparsify_deploy.graph import file, layers
    from sparsify_deploy.graph.nm import violations

    rows, given = record.measured.get("nm_checked"), record.measured.get("layers_with_2:4")
    wanted = list(
        dict.fromkeys([*(row["parameter"] for row in rows or ()), *(required.parameters if required else ())])
    )
    by = "weight" if given is None else "name"
    wanted = list(given) if given is not None else wanted
    if not wanted:
        return
    pattern = "2:4" if given is not None else required.pattern if required else _asked(record)
    n, m = n_and_m(pattern)
    path = record.outputs["onnx"]
    found = {getattr(layer, by): layer for layer in layers.weight_layers(file.load(path, checked=True))}
    broken = []
    for name in wanted:
        if name not in found:
            broken.append(f"{name} is not in it")
        elif bad := violations(found[name].values, n, m):
            broken.append(f"{name} in {bad} groups")
    yield Held(record, path, "ONNX initializers", pattern, len(wanted), tuple(broken))


def _asked(record: Record) -> str:
    """The pattern in a stage's settings."""
    section: Mapping[str, Any] | None = record.parts["settings"].get("nm")
    if not section:
        raise DataError(f"{record.folder}: its record names layers on a pattern, and no pattern")
    return str(section["pattern"])


# -- safetensors ---------------------------------------------------------------------------------------------------


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, "np")
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: is no safetensors file: {error}") from error


def _names(path: Path) -> list[str]:
    with _opened(path) as tensors:
        return sorted(tensors.keys())


def _values(tensors: Any, name: str, path: Path) -> NDArray[Any]:
    try:
        values: NDArray[Any] = tensors.get_tensor(name)
    except (TypeError, AttributeError) as error:  # numpy has no such type: bfloat16, float8
        raise DataError(f"{path}: {name} cannot be read here: {error}") from error
    if values.ndim < 2:
        raise DataError(f"{path}: {name} has {values.ndim} axes, and a layer's weights have two or more")
    return values


def _full(path: Path) -> set[str]:
    """The tensors of a mask that keep every weight."""
    with _opened(path) as tensors:
        return {name for name in tensors.keys() if bool(tensors.get_tensor(name).all())}  # noqa: SIM118
