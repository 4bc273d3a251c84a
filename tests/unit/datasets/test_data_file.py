"""A user's own data: dicts wrapped, data sets checked, failures with the user's line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from sparsify_deploy.datasets import file
from sparsify_deploy.errors import DataError

HEAD = "import numpy as np\nimport torch\n"
GOOD = """
def data(n=6):
    x = np.arange(n * 4, dtype=np.float64).reshape(n, 4)
    part = {"input": x, "target": np.arange(n) % 2}
    return {"train": part, "test": {k: v[:2] for k, v in part.items()}, "classes": ["a", "b"]}
"""


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str) -> Path:
        (tmp_path / "data.py").write_text(HEAD + text, encoding="utf-8")
        return tmp_path / "data.py"

    return _write


def load(path: Path, name: str = "data", **arguments: object):
    return file.open(file.Params.model_validate({"path": path, "object": name, "arguments": arguments}))


def failure(path: Path, name: str = "data", **arguments: object) -> str:
    with pytest.raises(DataError) as caught:
        load(path, name, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


def whole(split) -> dict[str, torch.Tensor]:
    return split.take(torch.arange(len(split)))


def test_a_dict_of_arrays_is_wrapped(write) -> None:
    data = load(write(GOOD), n=8)
    batch = whole(data.split("train"))
    assert torch.equal(batch["input"], torch.arange(32.0).reshape(8, 4))
    assert batch["target"].tolist() == [0, 1] * 4
    assert batch["target"].dtype == torch.int64
    assert len(data.split("test")) == 2
    assert data.inputs == ("input",)
    assert data.classes == ("a", "b")


def test_a_dict_itself_tensors_and_several_inputs(write) -> None:
    text = """
part = {"ids": torch.tensor([[1, 2], [3, 4]], dtype=torch.int32), "mask": torch.ones(2, 2, dtype=torch.bool),
        "side": torch.ones(2, 1, dtype=torch.bfloat16, requires_grad=True), "target": torch.tensor([[0.5], [1.5]])}
data = {"train": part, "test": part}
"""
    data = load(write(text))
    batch = whole(data.split("test"))
    assert data.inputs == ("ids", "mask", "side")
    assert data.classes is None
    assert [batch[n].dtype for n in batch] == [torch.int64, torch.int64, torch.float32, torch.float32]
    assert batch["ids"].tolist() == [[1, 2], [3, 4]]
    assert batch["target"].shape == (2, 1)
    assert not batch["side"].requires_grad


OWN = """
class Split:
    def __len__(self): return LENGTH
    def take(self, indices):
        return {"input": INPUT, "target": indices}
class data:
    inputs = ("input",)
    classes = None
    def split(self, name): return Split()
"""


def own(length: str = "3", given: str = "torch.zeros(len(indices), 5)") -> str:
    return OWN.replace("LENGTH", length).replace("INPUT", given)


def test_a_data_set_passes_as_it_is(write) -> None:
    data = load(write(own()))
    assert data.inputs == ("input",)
    assert whole(data.split("train"))["input"].shape == (3, 5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (own("0"), ": data: the train split is empty"),
        (own(given="torch.zeros(5)"), ": data: for one index, take gives 'input' as (5,), expected a tensor (1, ...)"),
        (own(given="np.zeros((1, 5))"), ": data: for one index, take gives 'input' as ndarray"),
        (own(given="torch.zeros(1, 5).double()"), ": data: take gives 'input' as torch.float64, expected float32"),
        (own(given="1 / 0"), ":7: ZeroDivisionError: division by zero"),
        (
            own().replace('("input",)', '("x",)'),
            ": data: the train split gives the fields ['input', 'target'] and no 'x'",
        ),
        (own().replace('("input",)', '["input"]'), ": data: inputs are ['input'], expected a tuple"),
        (own().replace("classes", "labels"), ": data: gives data without 'classes', expected"),
        ("data = 3\n", ": data: gives int without 'inputs', expected"),
        ("def data():\n    raise OSError('no disk')\n", ":4: OSError: no disk"),
        ("dta = {}\n", ": nothing in it is called 'data'; did you mean 'dta'?"),
    ],
)
def test_objects_that_are_no_data_set(write, text: str, says: str) -> None:
    search = list(sys.path)
    assert failure(write(text)).startswith(says)
    assert sys.path == search


def changed(change: str) -> str:
    return GOOD.replace("    return", f"    part.update({change})\n    return", 1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("data = {}\n", ": data: train is missing, expected {"),
        ("data = {'train': 3}\n", ": data: train is int, expected {"),
        ("data = {'trian': {}}\n", ": data: unknown key 'trian'; did you mean 'train'?"),
        (changed("input=x[:3]"), ": data: the fields of train differ in length: {'input': 3, 'target': 6}"),
        (changed("input=np.zeros((6, 0))"), ": data: train is empty"),
        (changed("input=np.full((6, 2), np.nan)"), ": data: train: input: nan at index (0, 0)"),
        (changed("input=np.zeros((6, 2), np.uint8)"), ": data: train: input is uint8, and nothing is scaled here"),
        (changed("input=np.full(6, 'a')"), ": data: train: input is of type <U1, expected numbers"),
        ("data = {'train': {'input': 3}}\n", ": data: train: input is int, expected an array"),
        (changed("target=np.arange(6) - 1"), ": data: train: target: label -1 at index 0"),
        (GOOD.replace('"target"', '"label"'), ": data: train has the fields ['input', 'label'], expected 'target'"),
        (GOOD.replace('["a", "b"]', '"ab"'), ": data: classes are 'ab', expected a list of names"),
        (GOOD.replace("v[:2] for k", "v[:2].astype('float32') for k"), ": data: train and test are unlike in 'target'"),
        (GOOD.replace("v[:2] for k", "v[:0] for k"), ": data: test is empty"),
    ],
)
def test_dicts_that_do_not_fit(write, text: str, says: str) -> None:
    assert failure(write(text)).startswith(says)


def test_the_path_starts_at_the_recipe_and_is_the_only_file() -> None:
    params = file.Params.model_validate({"path": "d.py"}, context={"folder": "/recipes"})
    assert file.files(params) == {"path": Path("/recipes/d.py")}
