"""What tests of every folder share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of the real data sets: SPARSIFY_DATA, or shared/data beside the repository."""
    folder = Path(os.environ.get("SPARSIFY_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data sets at {folder}: set SPARSIFY_DATA to the folder that holds mnist/ and cifar10/")
    return folder
