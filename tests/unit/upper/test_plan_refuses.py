"""`plan` refuses what `run` would, in the same line, and never as an internal error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sparsify_deploy.errors import ModelError
from sparsify_deploy.workspace import open_run

NETS = """
import torch
from torch import nn


class Narrow(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(10, 4)

    def forward(self, x):
        return self.layer(x)


class Text(Narrow):
    def forward(self, x):
        return "hello"


class Two(Narrow):
    def forward(self, x, y):
        return self.layer(x + y)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else self.layer(-x)
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Narrow", r"net.py:12: RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        ("Text", r"model file gives str as 'output': its forward must return a tensor"),
        ("Two", r"TypeError: Two.forward\(\) missing 1 required positional argument: 'y'"),
        ("Branching", r"^\S*net.py:31: Branching cannot be traced"),
    ],
)
def test_a_network_that_does_not_fit_is_one_line(
    tmp_path: Path, name: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "net.py").write_text(NETS)
    x, y = np.ones((12, 6), dtype=np.float32), np.arange(12) % 4
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    (tmp_path / "r.yaml").write_text(
        f"version: 1\nmodel: {{source: file, params: {{path: net.py, object: {name}}}}}\n"
        "data: {source: npz, params: {path: d.npz}}\ntraining: {epochs: 1}\nnm: {fine_tune: {}}\n"
    )
    with pytest.raises(ModelError, match=said) as caught:
        open_run(tmp_path / "r.yaml", run_dir=tmp_path / "run", trust_code=True).forecast()
    assert len(caught.value.lines) == 1
    assert capfd.readouterr() == ("", "")
