"""The GPUs a prediction knows: peaks and bandwidths from NVIDIA's data sheets, in `gpus.json`, each with its source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sparsify_deploy.errors import DataError, UsageError
from sparsify_deploy.menu import did_you_mean
from sparsify_deploy.safety import regular

_BUNDLED = Path(__file__).with_name("gpus.json")


@dataclass(frozen=True)
class Gpu:
    """One GPU: peaks of its tensor cores in 10^12 operations a second, a multiply-add being two, and bytes in GB/s.

    `tf32_tflops` is what FP32 networks run at by default; None where the maker gives no figure. `device_names` are
    those the driver reports.
    """

    name: str
    title: str
    sm: str
    int8_tops: float
    int8_sparse_tops: float
    fp16_tflops: float
    fp16_sparse_tflops: float
    tf32_tflops: float | None
    bandwidth_gb_s: float
    device_names: tuple[str, ...]
    source: str


def load(path: Path) -> dict[str, Gpu]:
    """The GPUs of a JSON file like `gpus.json`, by name.

    Raises:
        DataError: the file is missing or no JSON, a field is missing, unknown or of another type, a peak is not
            positive, or a sparse peak lies outside 1.9 to 2.1 times the dense one.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        # Lax about int for float and list for tuple alone, as JSON has them.
        rows = TypeAdapter(dict[str, dict[str, object]]).validate_json(regular.read(path))
        found = TypeAdapter(dict[str, Gpu]).validate_python({name: row | {"name": name} for name, row in rows.items()})
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise DataError(f"{path}: {where}: {first['msg']}; write it like the package's prediction/gpus.json") from error
    known = {"title", "sm", *_PEAKS, "tf32_tflops", "device_names", "source"}
    for gpu in found.values():
        if unknown := rows[gpu.name].keys() - known:
            raise DataError(f"{path}: {gpu.name}: unknown field {min(unknown)!r}{did_you_mean(min(unknown), known)}")
        _check(gpu, path)
    return found


_PEAKS = ("int8_tops", "int8_sparse_tops", "fp16_tflops", "fp16_sparse_tflops", "bandwidth_gb_s")


def _check(gpu: Gpu, path: Path) -> None:
    peaks = [(name, getattr(gpu, name)) for name in _PEAKS]
    for name, value in [*peaks, ("tf32_tflops", 1.0 if gpu.tf32_tflops is None else gpu.tf32_tflops)]:
        if not 0 < value < float("inf"):
            raise DataError(f"{path}: {gpu.name}: {name} {value:g} is not a positive number")
    for kind, sparse, dense in (
        ("int8", gpu.int8_sparse_tops, gpu.int8_tops),
        ("fp16", gpu.fp16_sparse_tflops, gpu.fp16_tflops),
    ):
        # A data sheet's headline is often the sparse figure: taken for the dense one, all gains would be wrong.
        if not 1.9 <= sparse / dense <= 2.1:
            raise DataError(f"{path}: {gpu.name}: the sparse {kind} peak {sparse:g} is not twice the dense {dense:g}")
    if not gpu.source:
        raise DataError(f"{path}: {gpu.name}: source is empty: say where the figures are from")


@cache
def known() -> Mapping[str, Gpu]:
    """The GPUs the package brings, by name."""
    return load(_BUNDLED)


def unknown_name(name: str) -> str | None:
    """None for a GPU the package knows, else one line on which there are."""
    if name in known():
        return None
    return f"unknown GPU {name!r}{did_you_mean(name, known()) or f': {chr(44).join(known())}'}"


def chosen(names: Sequence[str]) -> tuple[Gpu, ...]:
    """The GPUs of that name, each once; a name that ends in `.json` is a file of more, all of which are taken.

    Raises:
        UsageError: there is no GPU of that name.
        DataError: a file is none of GPUs.
    """
    found: dict[str, Gpu] = {}
    for name in names:
        if name.endswith(".json"):
            found |= load(Path(name))
        elif (mistake := unknown_name(name)) is not None:
            raise UsageError(f"{mistake}; or a .json file like the package's prediction/gpus.json")
        else:
            found[name] = known()[name]
    return tuple(found.values())


def of_device(device: str) -> Gpu | None:
    """The GPU behind a driver's `name sm90`, None where none or several are known by it."""
    name = device.rpartition(" sm")[0]
    return next((gpu for gpu in known().values() if name in gpu.device_names), None)
