"""A network that only torch.export can follow is compared with its graph at the sizes that the data have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparsify_deploy.errors import ModelError
from sparsify_deploy.recipe import Recipe
from sparsify_deploy.stages.subject import Subject
from sparsify_deploy.stages.training_checks import check_training
from sparsify_deploy.training.settings import Training

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(50, 8), nn.Linear(8, 3)

    def forward(self, ids):
        length = int(ids.size(1))
        x = self.table(ids)
        if LONG:
            x = torch.tanh(x)
        return self.out(x.mean(1))
"""

DATA = """
import torch
from sparsify_deploy.types import AxisSizes

class Split:
    def __len__(self):
        return 12

    def take(self, indices):
        ids = (indices[:, None] * 7 + torch.arange(LENGTH)) % 50
        return {"ids": ids, "target": indices % 3}

class Data:
    inputs, classes = ("ids",), ("a", "b", "c")
    dynamic_axes = {"ids": {1: "length"}}
    SIZES

    def split(self, name):
        return Split()

data = Data()
"""


@pytest.fixture
def opened(tmp_path: Path):
    def make(long: str, sizes: str = "", length: int = 8) -> Subject:
        (tmp_path / "net.py").write_text(NET.replace("LONG", long), encoding="utf-8")
        text = DATA.replace("SIZES", sizes and f"axis_sizes = {{'length': AxisSizes({sizes})}}")
        (tmp_path / "data.py").write_text(text.replace("LENGTH", str(length)), encoding="utf-8")
        given = {
            "version": 1,
            "model": {"source": "file", "params": {"path": "net.py", "object": "Net"}},
            "data": {"source": "file", "params": {"path": "data.py"}},
        }
        recipe = Recipe.model_validate(given, context={"folder": tmp_path})
        assert recipe.data is not None
        return Subject(recipe.model, recipe.data, recipe.task, recipe.seed)

    return make


@pytest.mark.parametrize(
    ("long", "sizes"), [("length > 1", "2, 8, 16"), ("length > 0", ""), ("length < 17", "1, 8, 16")]
)
def test_a_network_that_is_one_graph_at_every_size_is_followed(opened, long, sizes) -> None:
    subject = opened(long, sizes)
    graph = subject.check_traceable()
    for length in (2, 5, 16):
        ids = torch.arange(3 * length).view(3, length) % 50
        assert torch.allclose(graph(ids), subject.network().eval()(ids), atol=1e-6)


@pytest.mark.parametrize(
    ("long", "sizes"), [("length > 6", "2, 8, 16"), ("length < 12", "2, 8, 16"), ("length > 7", "")]
)
def test_a_branch_on_a_size_that_the_data_reach_is_not_fixed_in_silence(opened, long, sizes) -> None:
    with pytest.raises(ModelError, match="Net cannot be traced"):
        opened(long, sizes).check_traceable()


def test_an_example_of_size_one_is_tried_at_two(opened) -> None:
    with pytest.raises(ModelError, match="Net cannot be traced"):
        opened("length > 1", length=1).check_traceable()


def test_code_for_one_shape_is_refused_before_the_ninth_length_of_a_batch(opened) -> None:
    subject = opened("length > 0", "2, 8, 16")
    with pytest.raises(ModelError, match="one shape of batch, and the length of this data differs"):
        check_training(subject, Training(steps=1, compile=True), subject.network())
    check_training(subject, Training(steps=1), subject.network())
