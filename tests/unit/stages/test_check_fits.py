"""Network, data and task that do not fit one another are one line before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparsify_deploy.artifacts.fingerprint import file_digest
from sparsify_deploy.errors import DataError, ModelError, SparsifyError
from sparsify_deploy.recipe import Recipe
from sparsify_deploy.safety import usercode
from sparsify_deploy.stages.subject import Subject, TrustedSubject
from sparsify_deploy.stages.training_checks import check_training
from sparsify_deploy.training.settings import Training

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.fc = nn.Linear(4, 8)
        self.out = nn.Linear(8, classes)

    def forward(self, x):
        y = self.out(torch.relu(self.fc(x)))
        return y
"""

TASK = """
class task:
    metrics = {"error": "lower"}

    def loss(self, outputs, batch):
        return outputs["output"].mean()

    def evaluate(self, outputs, batch):
        return {"error": len(batch["target"])}
"""


@pytest.fixture
def subject(tmp_path: Path):
    def make(
        net: str = NET, *, labels: int = 3, task: Any = None, kind: type[Subject] = Subject, **model: Any
    ) -> Subject:
        (tmp_path / "net.py").write_text(net, encoding="utf-8")
        target = np.arange(30) % labels
        features = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
        np.savez(
            tmp_path / "d.npz", x_train=features[:20], y_train=target[:20], x_test=features[20:], y_test=target[20:]
        )
        recipe = Recipe.model_validate(
            {
                "version": 1,
                "model": {"source": "file", "params": {"path": "net.py", "object": "Net"}, **model},
                "data": {"source": "npz", "params": {"path": "d.npz"}},
                **({"task": task} if task else {}),
            },
            context={"folder": tmp_path},
        )
        assert recipe.data is not None
        return kind(recipe.model, recipe.data, recipe.task, recipe.seed)

    return make


def line(error: pytest.ExceptionInfo[SparsifyError], folder: Path) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert error.value.exit_code == 5
    return message.replace(str(folder) + "/", "")


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ("3.5", "model file gives float as 'output': its forward must return a tensor, or a tuple or dict of tensors"),
        ("None", "model file gives NoneType as 'output': its forward must"),
        ("(y, None)", "model file gives NoneType as 'output_1': its forward must"),
        ("{'logits': y, 'text': 'a'}", "model file gives str as 'text': its forward must"),
        ("{}", "model file gives nothing: its forward must return"),
        ("y.sum()", "model file gives 'output' of shape () for 1 examples: each output needs the axis of the examples"),
        ("y.t()", "model file gives 'output' of shape (3, 1) for 1 examples: each output needs"),
        ("y.view(99)", "model file does not fit the data (input (1, 4)): net.py:13: RuntimeError: shape '[99]' is"),
        ("self.nothing(y)", "model file does not fit the data (input (1, 4)): net.py:13: AttributeError: 'Net' object"),
        ("1 / 0", "model file does not fit the data (input (1, 4)): net.py:13: ZeroDivisionError"),
    ],
)
def test_what_a_forward_gives(subject, tmp_path, returned, says) -> None:
    with pytest.raises(ModelError) as caught:
        subject(NET.replace("return y", f"return {returned}")).check_network()
    assert line(caught, tmp_path).startswith(says)


def test_a_network_of_other_inputs(subject, tmp_path) -> None:
    with pytest.raises(ModelError) as caught:
        subject(NET.replace("Linear(4, 8)", "Linear(5, 8)")).check_network()
    assert line(caught, tmp_path).startswith(
        "model file does not fit the data (input (1, 4)): net.py:12: RuntimeError: mat1 and mat2 shapes cannot be"
    )
    assert line(caught, tmp_path).endswith("; change model.params or data.params")


def test_a_label_the_model_has_no_class_for(subject, tmp_path) -> None:
    with pytest.raises(DataError) as caught:
        subject(labels=7).check_network()
    assert line(caught, tmp_path) == (
        "label 6 is not one of the model's 3 classes, 0 to 2: correct the label, or give the model more classes"
    )


@pytest.mark.parametrize("split", ["train", "test"])
def test_one_such_label_anywhere_is_found_before_training(subject, tmp_path, split) -> None:
    made = subject()
    arrays = dict(np.load(tmp_path / "d.npz"))
    arrays[f"y_{split}"][7] = 3
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError, match="label 3 is not one of the model's 3 classes"):
        made.check_network()


def test_a_factory_of_another_signature(subject, tmp_path) -> None:
    with pytest.raises(ModelError) as caught:
        subject(NET.replace("classes=3", "classes")).check_network()
    assert line(caught, tmp_path).startswith(
        "net.py:6: Net(classes) cannot be called with the arguments given (none): "
    )


def test_a_network_that_cannot_be_traced(subject, tmp_path) -> None:
    own = NET.replace("return y", "return y if y.sum() > 0 else -y")
    made = subject(own)
    made.check_network()
    with pytest.raises(ModelError) as caught:
        made.check_traceable()
    said = line(caught, tmp_path)
    assert said.startswith("net.py:13: Net cannot be traced: symbolically traced variables")
    assert "; nor can torch.export follow it: Net cannot be exported by torch.export: " in said


def test_outputs_that_training_alone_has(subject, tmp_path) -> None:
    made = subject(NET.replace("return y", "return (y, y) if self.training else y"))
    with pytest.raises(ModelError) as caught:
        check_training(made, Training(steps=1), made.check_network())
    assert line(caught, tmp_path).startswith(
        "model file gives output_0, output_1 in training and output in evaluation: turn off what it adds in training"
    )
    check_training(made, None, made.check_network())


def test_more_outputs_in_training_that_the_task_can_judge(subject) -> None:
    made = subject(NET.replace("return y", "return {**({'aux': y} if self.training else {}), 'logits': y}"))
    check_training(made, Training(steps=1), made.check_network())


def test_a_forward_that_fails_in_train_mode_alone(subject, tmp_path) -> None:
    made = subject(NET.replace("return y", "return 1 / 0 if self.training else y"))
    with pytest.raises(ModelError) as caught:
        check_training(made, Training(steps=1), made.check_network())
    assert line(caught, tmp_path).startswith(
        "model file does not fit the data (input (4, 4)) in train mode: net.py:13: ZeroDivisionError"
    )


def test_a_network_of_half_precision_is_told_what_it_needs(subject, tmp_path) -> None:
    with pytest.raises(ModelError) as caught:
        subject(
            NET + "\ndef half():\n    return Net().half()\n", params={"path": "net.py", "object": "half"}
        ).check_network()
    assert line(caught, tmp_path).endswith(
        "; its weights are float16, and float32 is needed: call .float() on it (training.precision is for speed)"
    )


def test_memory_that_runs_out_is_left_to_the_program(subject) -> None:
    own = NET.replace("return y", 'raise RuntimeError("[enforce fail] DefaultCPUAllocator: can\'t allocate memory")')
    with pytest.raises(RuntimeError, match="can't allocate"):
        subject(own).check_network()


def test_a_task_of_ones_own_is_tried_on_a_real_batch(subject, tmp_path) -> None:
    (tmp_path / "own.py").write_text(TASK, encoding="utf-8")
    given = {"name": "file", "params": {"path": "own.py"}}
    subject(task=given).check_network()
    (tmp_path / "own.py").write_text(TASK.replace('"error": len', '"errors": len'), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        subject(task=given).check_network()
    assert line(caught, tmp_path).startswith("own.py:8: evaluate gives no 'error'")
    (tmp_path / "own.py").write_text(TASK.replace('return {"', 'assert len(batch["target"]) < 8\n        return {"'))
    with pytest.raises(DataError, match=r"own\.py:9: AssertionError"):
        subject(task=given).check_network()
    assert subject(task=given).files()["task.path"] == tmp_path / "own.py"


def test_a_task_may_change_the_example_that_is_traced(subject, tmp_path) -> None:
    own = TASK + "\n    def example_inputs(self, batch):\n        return {'input': batch['input'] * 0}\n"
    (tmp_path / "own.py").write_text(own, encoding="utf-8")
    made = subject(task={"name": "file", "params": {"path": "own.py"}})
    assert made.example(3)["input"].abs().sum() == 0
    assert len(made.example(3)["target"]) == 3


def test_class_weights_are_those_of_the_training_split(subject) -> None:
    made = subject(labels=3, task={"name": "classification", "params": {"class_weights": "balanced"}})
    outputs = {"output": torch.randn(4, 3)}
    batch = {"target": torch.tensor([0, 1, 2, 2])}
    weights = 20 / 3 / torch.bincount(torch.arange(20) % 3).float()
    expected = torch.nn.functional.cross_entropy(outputs["output"], batch["target"], weights)
    assert torch.allclose(made.opened_task.loss(outputs, batch), expected)


def test_a_checkpoint_is_loaded_as_the_recipe_says(subject, tmp_path) -> None:
    other = {"fc.weight": torch.ones(8, 4), "fc.bias": torch.zeros(8), "out.weight": torch.ones(9, 8)}
    torch.save(other, tmp_path / "w.pt")
    with pytest.raises(ModelError) as caught:
        subject(checkpoint="w.pt").network()
    assert "w.pt: does not fit the model: 1 missing (out.bias); 1 of another shape" in line(caught, tmp_path)
    made = subject(checkpoint="w.pt", checkpoint_partial=True)
    assert made.network().fc.weight.unique().tolist() == [1.0]
    assert made.loaded is not None
    assert made.loaded.missing == ("out.bias",)
    assert subject().loaded is None
    state = {f"x{i}": value for i, value in enumerate(subject().network().state_dict().values())}
    torch.save(state, tmp_path / "w.pt")
    assert subject(checkpoint="w.pt", checkpoint_match="order").loaded.match == "order"


def test_a_pickle_is_loaded_for_those_who_trust_it(subject, tmp_path) -> None:
    torch.save({"state_dict": subject().network().state_dict(), "when": Path("x")}, tmp_path / "w.pt")
    with pytest.raises(ModelError) as caught:
        subject(checkpoint="w.pt").check_network()
    assert line(caught, tmp_path).endswith("add --trust-code")
    with pytest.raises(ModelError, match="add --trust-code"):  # trusted, and nobody was shown this file
        subject(checkpoint="w.pt", kind=TrustedSubject).check_network()
    usercode.approve(tmp_path / "w.pt", file_digest(tmp_path / "w.pt"))
    assert subject(checkpoint="w.pt", kind=TrustedSubject).loaded.unpickled
