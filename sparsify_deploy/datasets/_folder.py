"""The files of an image folder as splits of encoded images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sparsify_deploy.datasets._encoded import Encoded, batched
from sparsify_deploy.errors import DataError


def classes_of(found: Mapping[str, Sequence[Path]], where: Path) -> tuple[str, ...]:
    """The classes by the names of their folders in the train split. Raises DataError where another split has more."""
    classes = tuple(folder.name for folder in found["train"])
    for split, folders in found.items():
        if strange := sorted({folder.name for folder in folders} - set(classes)):
            raise DataError(f"{where}: the {split} split has the class {strange[0]!r}, which the train split has not")
    return classes


def stored(labelled: Sequence[tuple[Path, int]], *, labels: bool = True) -> Encoded:
    """One split of image files with their classes."""
    paths = [path for path, _ in labelled]
    return Encoded(
        len(paths),
        np.array([label for _, label in labelled], dtype=np.int64) if labels else None,
        lambda: batched(paths),
        lambda row: str(paths[row]),
    )
