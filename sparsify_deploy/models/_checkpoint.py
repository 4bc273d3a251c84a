"""Weights from a file into a network, refused with one line where they do not fit. Never runs code of the file."""

from __future__ import annotations

import difflib
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsify_deploy.errors import ModelError
from sparsify_deploy.models._attention import packed

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_SHOWN = 3


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Copy the weights and buffers of `path` into `model`, all of them or none.

    `.safetensors`, or `.pt` / `.pth` / `.bin` read with `weights_only`. `{"state_dict": ...}`, `{"model": ...}` and a
    `module.` in front of every name are unwrapped, and attention that a run took apart is packed. A missing
    `num_batches_tracked`, which nothing uses, and the second name of a shared tensor may be absent.

    Raises `ModelError`.
    """
    own = model.state_dict()
    given = packed(_unprefixed(_unwrapped(_read(path), path), own), own)
    _check_fits(given, own, path)
    model.load_state_dict(given, strict=False)


def _read(path: Path) -> object:
    if not path.is_file():
        raise ModelError(f"{path}: {'is a folder, expected a file' if path.is_dir() else 'no such file'}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in {".pt", ".pth", ".bin"}:
        return _read_torch(path)
    raise ModelError(f"{path}: cannot tell the format of a checkpoint named so: expected .safetensors, .pt or .pth")


def _read_safetensors(path: Path) -> object:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError) as exc:
        raise ModelError(f"{path}: not a readable safetensors file, damaged or cut short ({_short(exc)})") from exc


def _read_torch(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as exc:
        text = str(exc)
        refused = isinstance(exc, pickle.UnpicklingError) and ("GLOBAL" in text or "Unsupported class" in text)
        if refused or "TorchScript" in text:
            raise ModelError(
                f"{path}: holds Python objects besides tensors, and reading those could run code: resave the weights "
                "with safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
            ) from exc
        raise ModelError(f"{path}: not a readable torch checkpoint, damaged or cut short ({_short(exc)})") from exc


def _short(exc: Exception) -> str:
    text = " ".join(str(exc).split())
    # torch's own advice is to read it without weights_only, which could run code
    text = text.partition("WeightsUnpickler error: ")[2].partition(" Check the documentation")[0] or text
    return type(exc).__name__ + (f": {text[:120]}" if text else "")


def _unwrapped(read: object, path: Path) -> dict[str, Tensor]:
    for key in _WRAPPERS:
        if isinstance(read, Mapping) and isinstance(read.get(key), Mapping):
            read = read[key]
            break
    if not isinstance(read, Mapping):
        raise ModelError(f"{path}: holds {type(read).__name__}, expected a mapping of names to tensors (a state_dict)")
    for name, value in read.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ModelError(
                f"{path}: {name!r} is {type(value).__name__}, expected names and tensors only, or such a mapping under "
                + " or ".join(_WRAPPERS)
            )
    return dict(read)


def _unprefixed(given: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = "module."
    wrapped = bool(given) and all(name.startswith(prefix) for name in given)
    if not wrapped or all(name.startswith(prefix) for name in own):
        return given
    return {name[len(prefix) :]: value for name, value in given.items()}


def _check_fits(given: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path) -> None:
    shared = {_storage(own[name]) for name in given if name in own}
    missing = [
        name
        for name, value in own.items()
        if name not in given and not name.endswith("num_batches_tracked") and _storage(value) not in shared
    ]
    unexpected = [name for name in given if name not in own]
    misshaped = [
        f"{name} {tuple(value.shape)}, the model has {tuple(own[name].shape)}"
        for name, value in given.items()
        if name in own and own[name].shape != value.shape
    ]
    problems = [
        _counted("missing", missing),
        _counted("unexpected", unexpected) + _renamed(unexpected, missing),
        _counted("of another shape", misshaped),
    ]
    if any(problems):
        raise ModelError(f"{path}: does not fit the model: {'; '.join(p for p in problems if p)}")
    broken = [n for n, value in given.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if broken:
        raise ModelError(f"{path}: {_counted('with NaN or infinity', broken)}; the training that made it diverged")


def _storage(value: Tensor) -> tuple[int, torch.Size]:
    """Equal for two names of one tensor."""
    return (value.data_ptr(), value.shape)


def _counted(what: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{more})"


def _renamed(unexpected: Sequence[str], missing: Sequence[str]) -> str:
    close = difflib.get_close_matches(unexpected[0], missing, n=1, cutoff=0.6) if unexpected else []
    return f", did you mean {close[0]!r} by {unexpected[0]!r}?" if close else ""
