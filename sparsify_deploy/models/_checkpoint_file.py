"""Reads a checkpoint's file as a state dict. Runs code of the file only where the caller trusts it."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsify_deploy.artifacts.fingerprint import file_digest
from sparsify_deploy.errors import ModelError
from sparsify_deploy.models._pickled import SUFFIXES
from sparsify_deploy.safety import unpickling, usercode

_WRAPPERS = ("state_dict_ema", "state_dict", "model_state_dict", "model")
"""Keys under which training programs keep a state dict; timm's averaged weights go before its last ones."""

_DEEPEST = 4


@dataclass(frozen=True)
class StateDict:
    """What a file holds: tensors by name, the keys they lay `under`, and whether objects were unpickled for them."""

    tensors: dict[str, Tensor]
    under: tuple[str, ...] = ()
    unpickled: bool = False


def read(path: Path, *, trusted: bool = False) -> StateDict:
    """The state dict of a `.safetensors`, or of torch's `.pt`, `.pth`, `.bin`, `.ckpt`, `.tar`.

    Torch's files are read with `weights_only`; one that holds objects besides tensors is unpickled, which runs its
    code, if it is `trusted`. Raises `ModelError`.
    """
    if not path.is_file():
        raise ModelError(f"{path}: {'is a folder, expected a file' if path.is_dir() else 'no such file'}")
    if path.suffix == ".safetensors":
        return _unwrapped(_read_safetensors(path), path, unpickled=False)
    if path.suffix in SUFFIXES:
        return _unwrapped(*_read_torch(path, trusted))
    raise ModelError(f"{path}: cannot tell the format of a checkpoint named so: expected .safetensors, .pt or .pth")


def _read_safetensors(path: Path) -> object:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError) as exc:
        raise ModelError(f"{path}: not a readable safetensors file, damaged or cut short ({_short(exc)})") from exc


def _read_torch(path: Path, trusted: bool) -> tuple[object, Path, bool]:
    try:
        with path.open("rb") as file:
            return unpickling.tensors_only(file), path, False
    except Exception as exc:
        text = str(exc)
        advice = "resave the weights with safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
        if "TorchScript" in text:
            raise ModelError(
                f"{path}: is a TorchScript archive, a program and not its weights alone: {advice}"
            ) from exc
        refused = isinstance(exc, pickle.UnpicklingError) and ("GLOBAL" in text or "Unsupported class" in text)
        if not refused:
            raise ModelError(f"{path}: not a readable torch checkpoint, damaged or cut short ({_short(exc)})") from exc
        if not trusted:
            digest = file_digest(path)
            raise ModelError(
                f"{path}: holds Python objects besides tensors, and reading those could run code: {advice}, or, if you "
                f"trust the file (sha256 {digest}), add --trust-code"
            ) from exc
    content = path.read_bytes()  # once: what is unpickled are the bytes that were looked at
    usercode.check_approved(path, content, ModelError)
    with usercode.running(path, ModelError):  # its classes may lie beside it
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=False), path, True


def _short(exc: Exception) -> str:
    text = " ".join(str(exc).split())
    # torch's own advice is to read it without weights_only, which could run code
    text = text.partition("WeightsUnpickler error: ")[2].partition(" Check the documentation")[0] or text
    return type(exc).__name__ + (f": {text[:120]}" if text else "")


def _unwrapped(found: object, path: Path, unpickled: bool) -> StateDict:
    under: list[str] = []
    while isinstance(found, Mapping) and len(under) < _DEEPEST:  # a mapping may hold itself
        key = next((key for key in _WRAPPERS if isinstance(found.get(key), (Mapping, nn.Module))), None)
        if key is None:
            break
        under.append(key)
        found = found[key]
    if isinstance(found, nn.Module):
        found = found.state_dict()
    if not isinstance(found, Mapping):
        kind = type(found).__name__
        raise ModelError(f"{path}: holds {kind}, expected a mapping of names to tensors (a state_dict)")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            called = repr(name[:200]) if isinstance(name, str) else f"a key of type {type(name).__name__}"
            raise ModelError(
                f"{path}: {called} is {type(value).__name__}, expected names and tensors only, or such a mapping under "
                + " or ".join(_WRAPPERS)
            )
        if value.layout is not torch.strided or value.device.type != "cpu" or value.is_quantized:
            kind = "quantised" if value.is_quantized else f"{value.layout} on {value.device}"
            raise ModelError(f"{path}: {name!r} is {kind}, expected plain tensors: save it from a network in float")
    return StateDict(dict(found), tuple(under), unpickled)
