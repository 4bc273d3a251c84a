"""What torch.save wrote, read as data: a file is judged before torch unpacks it, and nothing in it is executed."""

from __future__ import annotations

import os
import warnings
import zipfile
from typing import IO

_ZIP = b"PK\x03\x04"
"""By its first bytes, as torch tells: a file may also end like an archive and be none."""


def is_archive(file: IO[bytes]) -> bool:
    """Whether torch takes a file for an archive; its position is 0 afterwards."""
    file.seek(0)
    start = file.read(len(_ZIP))
    file.seek(0)
    return start == _ZIP


def objection(file: IO[bytes]) -> str | None:
    """Why an archive is not to be unpacked, None for one that is harmless and for what is no archive.

    torch stores tensors uncompressed, so that an archive which grows when it is unpacked was made by something else.
    """
    if not is_archive(file):
        return None
    try:
        size = file.seek(0, os.SEEK_END)
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(info.file_size for info in archive.infolist())
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, NotImplementedError, IndexError) as error:
        return f"damaged or cut short ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    finally:
        file.seek(0)
    if unpacked > size:
        return f"its {size:,} bytes would be unpacked to {unpacked:,}, which torch.save never does: save it again"
    return None


def tensors_only(file: IO[bytes]) -> object:
    """What torch.save put into an open file, tensors on the CPU. Whatever torch raises comes through.

    Raises ValueError with `objection(file)`.
    """
    import torch

    if (reason := objection(file)) is not None:
        raise ValueError(reason)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kinds of tensors that are on their way out of torch
        return torch.load(file, map_location="cpu", weights_only=True)
