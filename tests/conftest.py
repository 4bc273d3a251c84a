"""What tests of every folder share."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of the real data sets: SPARSIFY_DATA, or shared/data beside the repository."""
    folder = Path(os.environ.get("SPARSIFY_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data sets at {folder}: set SPARSIFY_DATA to the folder that holds mnist/ and cifar10/")
    return folder


@pytest.fixture(scope="session")
def torchvision() -> ModuleType:
    """torchvision, whose binary from PyPI does not load beside a torch for the CPU alone: it asks for two operators
    of its own by name while it is imported, which are declared here without an implementation where they are missing.
    """
    torch = pytest.importorskip("torch")
    try:
        return pytest.importorskip("torchvision")
    except RuntimeError:
        declared = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(declared)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        return importlib.import_module("torchvision")


_DECLARED: list[object] = []
"""The declarations last as long as the objects do."""
