"""Every entry of the datasets menu meets the menu's contract, on a Python without torch and numpy."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sparsify_deploy import menu

ENTRIES = menu.names("datasets")

LOAD_BARE = """
import json, sys
for blocked in ("torch", "numpy", "pyarrow", "PIL", "onnx", "datasets", "torchvision"):
    sys.modules[blocked] = None
import importlib
m = importlib.import_module("sparsify_deploy.datasets." + sys.argv[1])
from sparsify_deploy.params import Params
given = {"digits": {}, "npz": {"path": "d.npz"}, "file": {"path": "d.py"}, "parquet": {"path": "."},
         "text": {"path": ".", "tokenizer": "tokenizer"}, "folder": {"path": "."},
         "huggingface": {"path": "train"}, "torchvision": {"name": "MNIST", "path": "."}}[sys.argv[1]]
params = m.Params.model_validate(given, context={"folder": sys.argv[2]})
files = {k: str(v) for k, v in m.files(params).items()}
print(json.dumps({
    "version": m.VERSION, "user": m.RUNS_USER_CODE, "params": issubclass(m.Params, Params),
    "open": callable(m.open), "files": files, "sklearn": "sklearn" in sys.modules,
}))
"""


@pytest.mark.parametrize("name", ENTRIES)
def test_data_entry_loads_bare_and_lists_its_files(name: str, tmp_path: Path) -> None:
    (tmp_path / "train-0.parquet").write_bytes(b"")
    (tmp_path / "test-0.parquet").write_bytes(b"")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    (tmp_path / "MNIST" / "raw" / "x").write_bytes(b"")
    (tmp_path / "tokenizer" / "tokenizer.json").write_bytes(b"")
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "a" / "x.png").write_bytes(b"")
    command = [sys.executable, "-c", LOAD_BARE, name, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["version"] == (2 if name in ("folder", "huggingface", "parquet", "torchvision") else 1)
    assert facts["params"]
    assert facts["open"]
    assert facts["user"] is (name == "file")
    assert not facts["sklearn"]
    expected = {
        "npz": {"path": f"{tmp_path}/d.npz"},
        "file": {"path": f"{tmp_path}/d.py"},
        "parquet": {f"{s}/{s}-0.parquet": f"{tmp_path}/{s}-0.parquet" for s in ("train", "test")},
        "text": {
            "tokenizer/tokenizer.json": f"{tmp_path}/tokenizer/tokenizer.json",
            **{f"{s}/{s}-0.parquet": f"{tmp_path}/{s}-0.parquet" for s in ("train", "test")},
        },
        "folder": {f"{s}/a/x.png": f"{tmp_path}/{s}/a/x.png" for s in ("train", "test")},
        "huggingface": {"a/x.png": f"{tmp_path}/train/a/x.png"},
        "torchvision": {"MNIST/raw/x": f"{tmp_path}/MNIST/raw/x"},
    }
    if name == "digits":
        assert Path(facts["files"]["digits"]).is_file()
    else:
        assert facts["files"] == expected[name]


@pytest.mark.parametrize("name", ENTRIES)
def test_data_entry_has_a_summary_and_the_common_signatures(name: str) -> None:
    summary = menu.summary("datasets", name)
    assert summary.endswith(".")
    assert len(summary) < 110
    entry = menu.entry("datasets", name)
    assert list(inspect.signature(entry.open).parameters) == ["params"]
    assert list(inspect.signature(entry.files).parameters) == ["params"]


def test_the_datasets_menu_lists_what_there_is() -> None:
    assert {"digits", "npz", "parquet", "file"} <= set(ENTRIES)
