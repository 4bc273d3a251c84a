"""Step checkpoints: written whole or not at all, and read back only if every byte is as written.

A file is one line `sparsify-deploy checkpoint 1 <sha256>` followed by what `torch.save` writes, whose digest that is;
torch by itself does not notice a flipped bit in a tensor.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify_deploy.errors import CorruptArtifact, EnvironmentProblem, OutOfResources, UsageError

_MAGIC = b"sparsify-deploy checkpoint 1 "
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def environment(device: torch.device) -> dict[str, Any]:
    """What byte-identity of two runs is promised for."""
    return {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "cpu instruction set": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with the entries of each nested mapping as `part.key`, so that a difference names one of them."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, Mapping) else {name: value}
    return found


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`name: old -> new` for each entry that is not the same."""
    keys = [*then, *(key for key in now if key not in then)]
    return [f"{key}: {then.get(key)} -> {now.get(key)}" for key in keys if then.get(key) != now.get(key)]


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Replace `path` in one step; after a crash the old file or the new one is there, never a part of one.

    `OutOfResources` if the disk is full, `EnvironmentProblem` if the folder cannot be written.
    """
    payload = io.BytesIO()
    torch.save(dict(content), payload)
    data = payload.getbuffer()
    header = _MAGIC + hashlib.sha256(data).hexdigest().encode() + b"\n"
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(header)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):  # the folder itself may be what is wrong
            temporary.unlink()
        what = f"cannot write the checkpoint {path}: {error.strerror or error}"
        if error.errno in _FULL:
            raise OutOfResources(
                f"{what}; free some space, the same command goes on from the last checkpoint"
            ) from error
        raise EnvironmentProblem(what) from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path) -> dict[str, Any] | None:
    """The content of `path` with tensors on the CPU, or None where there is no file.

    A damaged file is `CorruptArtifact`: it was written in one step, so no crash of ours explains it.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise EnvironmentProblem(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    header, _, payload = data.partition(b"\n")
    if header != _MAGIC + hashlib.sha256(payload).hexdigest().encode():
        raise CorruptArtifact(
            f"the checkpoint {path} is damaged ({len(data)} bytes, checksum differs): delete that file and run "
            "the same command again, its training starts over"
        )
    content: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    return content


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, buffers that `state_dict` leaves out included."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def load_tensors_(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy `tensors` into the model; `UsageError` where `path` belongs to another network."""
    own = tensors_of(model)
    for name in sorted({*own, *tensors}):
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape:
            raise foreign(path, f"the model's {name} differs")
    put_(model, tensors)


@torch.no_grad()
def put_(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors`, named as `tensors_of` names them, into the model."""
    own = tensors_of(model)
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def foreign(path: Path, what: str) -> UsageError:
    """The error for a checkpoint of another run."""
    return UsageError(f"the checkpoint {path} belongs to another run ({what}): use another folder, or delete that file")
