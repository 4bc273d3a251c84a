"""Where the real data sets lie, if they do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder named by SPARSIFY_DATA, else `../shared/data` beside the repository; skips where there is none."""
    repository = Path(__file__).resolve().parents[3]
    folder = Path(os.environ.get("SPARSIFY_DATA") or repository.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(
            f"no real data at {folder}; set SPARSIFY_DATA to a folder with mnist/mnist.npz and cifar10/*.parquet"
        )
    return folder
