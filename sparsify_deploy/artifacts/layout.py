"""The number of the way a store is laid out, so that an older program refuses a newer store in place of misreading it.

1 is that of release 0.1.0, whose stores hold no number; 2 seals the JSON files, keeps the step checkpoint before the
last and names files by BLAKE3. What reads 2 reads 1.
"""

from __future__ import annotations

import os
from pathlib import Path

from sparsify_deploy.artifacts import durable
from sparsify_deploy.errors import CorruptArtifact, DataError

FILE = "layout.json"
LAYOUT = 2
"""Raised when a file in a store would mean something else to the program before."""


def check(store: Path) -> None:
    """Raises `DataError` where a newer program laid out `store`, `CorruptArtifact` where its number cannot be read."""
    found = _number(store)
    if found > LAYOUT:
        raise DataError(
            f"{store}: has layout {found}, and this program knows those up to {LAYOUT}: use the release that made it, "
            "or choose another place with --run-dir or --store"
        )


def mark(store: Path) -> None:
    """Note in `store`, which exists, that this program writes into it. Raises as `check`."""
    check(store)
    if _number(store) != LAYOUT or not os.path.lexists(store / FILE):
        durable.write_json(store / FILE, {"layout": LAYOUT})


def _number(store: Path) -> int:
    path = store / FILE
    try:
        found = durable.read_json(path)["layout"]
    except (FileNotFoundError, NotADirectoryError):
        return 1
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CorruptArtifact(f"{path} cannot be read ({error!r}): {_REMEDY}") from error
    except CorruptArtifact as error:
        raise CorruptArtifact(f"{error}: {_REMEDY}") from None
    if not isinstance(found, int) or found < 1:
        raise CorruptArtifact(f"{path} names no layout: {_REMEDY}")
    return found


_REMEDY = "delete that file if no newer release of this program has worked in the folder"
