"""Step checkpoints: written whole or not at all, and read back only if every byte is as written.

A file is one line `sparsify-deploy checkpoint 2 <digest>` followed by what `torch.save` writes, whose digest that is;
torch by itself does not notice a flipped bit in a tensor. The checkpoint before the last one stays beside it, under a
name that ends in `.before`: what the last one is worth is known only when it is read.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsify_deploy.artifacts import durable, seal
from sparsify_deploy.artifacts.hashing import ContentHash, bytes_digest
from sparsify_deploy.errors import CorruptArtifact, EnvironmentProblem, OutOfResources, UsageError, is_out_of_memory
from sparsify_deploy.safety import regular, unpickling

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


def before(path: Path) -> Path:
    """Where the checkpoint that came before `path` lies."""
    return path.with_name(f"{path.name}.before")


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Replace `path` in one step, once what was written could be read back from the disk; the file it replaces stays
    as `before(path)`. After a crash at least one of the two is there and whole.

    `OutOfResources` if the disk is full, `EnvironmentProblem` if the folder cannot be written or the disk gives other
    bytes back.
    """
    payload = io.BytesIO()
    torch.save(dict(content), payload)
    data = payload.getbuffer()
    header = seal.line(bytes_digest(data, "blake3"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with durable.replacing(path) as fresh:
            with fresh.open("wb") as file:
                file.write(header)
                file.write(data)
                durable.flush(file)
            if not _is_on_disk(fresh, header):
                raise EnvironmentProblem(f"{fresh}: the disk gave back other bytes than were written: check the disk")
            if path.exists():
                os.replace(path, before(path))
        durable.sync(path.parent)
    except OSError as error:
        what = f"cannot write the checkpoint {path}: {error.strerror or error}"
        if error.errno in _FULL:
            raise OutOfResources(
                f"{what}; free some space, the same command goes on from the last checkpoint"
            ) from error
        raise EnvironmentProblem(what) from error


def _is_on_disk(path: Path, header: bytes) -> bool:
    """Whether a file has this header and what it promises; read from the disk, not from this machine's memory of it."""
    found = ContentHash("blake3")
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if file.read(len(header)) != header:
            return False
        while block := file.read(1 << 20):
            found.update(block)
    return header == seal.line(found.text())


def delete(path: Path) -> None:
    """Delete a checkpoint and the one before it, so that no crash brings the older one back."""
    for each in (before(path), path):
        each.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any] | None:
    """The content of `path`, or of `before(path)` where there is no such file, with tensors on the CPU; None where
    there is neither.

    A damaged file is `CorruptArtifact`: it was written in one step, so no crash of ours explains it.
    """
    older = before(path)
    if not os.path.lexists(path):
        return _read(older, "its training starts over") if os.path.lexists(older) else None
    resumes = os.path.lexists(older)
    return _read(path, f"it goes on from {older.name}" if resumes else "its training starts over")


def _read(path: Path, then: str) -> dict[str, Any]:
    """`then` says what the same command does without this file."""
    advice = f"delete that file and run the same command again: {then}"
    try:
        data = regular.read(path)
    except PermissionError as error:
        raise EnvironmentProblem(f"cannot read the checkpoint {path}: {error.strerror}") from error
    except OSError as error:
        raise CorruptArtifact(f"the checkpoint {path} cannot be read ({error.strerror or error}): {advice}") from error
    if (payload := seal.payload(data)) is None:
        raise CorruptArtifact(f"the checkpoint {path} is damaged ({len(data)} bytes, checksum differs): {advice}")
    try:
        content = unpickling.tensors_only(io.BytesIO(payload))
    except Exception as error:  # torch raises many kinds
        if is_out_of_memory(error):
            raise
        raise CorruptArtifact(
            f"the checkpoint {path} is none that training writes ({type(error).__name__}): {advice}"
        ) from error
    if not isinstance(content, dict):
        raise CorruptArtifact(f"the checkpoint {path} is none that training writes: {advice}")
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
