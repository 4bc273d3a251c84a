"""A user's own task: what is taken, and what is refused with which line of the user's file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sparsify_deploy.errors import DataError
from sparsify_deploy.tasks import file

TASK = """
class Error:
    metrics = {"error": "lower", "hits": "higher"}

    def __init__(self, power: float = 1.0):
        self.power = power

    def loss(self, outputs, batch):
        return ((outputs["output"] - batch["target"]).abs() ** self.power).mean()

    def evaluate(self, outputs, batch):
        error = abs(outputs["output"] - batch["target"])
        return {"error": error.mean(), "hits": int((error < 1).sum())}

def task(power=1.0):
    return Error(power)

ready = Error()
nothing = 3
"""

OUTPUTS = {"output": torch.tensor([[1.0], [3.0], [0.5], [2.0]])}
BATCH = {"target": torch.tensor([[1.0], [1.0], [0.0], [0.0]])}
PLAIN = ({k: v.numpy() for k, v in OUTPUTS.items()}, {k: v.numpy() for k, v in BATCH.items()})


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str) -> Path:
        path = tmp_path / "own.py"
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def create(path: Path, name: str = "task", **arguments: object):
    return file.create(file.Params.model_validate({"path": path, "object": name, "arguments": arguments}))


def refused(path: Path, name: str = "task", **arguments: object) -> str:
    """What is said once the task is made, or asked once."""
    with pytest.raises(DataError) as caught:
        create(path, name, **arguments).check(OUTPUTS, BATCH)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(str(path))


@pytest.mark.parametrize(
    ("name", "arguments", "loss"), [("task", {}, 4.5 / 4), ("Error", {"power": 2.0}, 8.25 / 4), ("ready", {}, 4.5 / 4)]
)
def test_a_function_a_class_or_an_object(write, name, arguments, loss):
    made = create(write(TASK), name, **arguments)
    made.check(OUTPUTS, BATCH)
    assert made.metrics == {"error": "lower", "hits": "higher"}
    assert made.loss(OUTPUTS, BATCH).item() == pytest.approx(loss)
    found = made.evaluate(*PLAIN)
    assert found == {"error": pytest.approx(4.5 / 4), "hits": 2.0, "loss": pytest.approx(loss)}
    assert {type(value) for value in found.values()} == {float}
    assert made.example_inputs is None


def test_a_loss_that_evaluate_gives_is_the_one_reported(write):
    own = TASK.replace('"hits": int', '"loss": 9, "hits": int')
    assert create(write(own)).evaluate(*PLAIN)["loss"] == 9.0


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("return Error(power)", "return 3", ": task gives int without 'metrics', expected loss, metrics and evaluate"),
        ("def evaluate(self", "def rate(self", ": task gives Error without 'evaluate', expected"),
        ('{"error": "lower", "hits": "higher"}', '["error"]', ": task: metrics is ['error'], expected a mapping"),
        ('{"error": "lower", "hits": "higher"}', "{}", ": task: metrics is empty, expected a mapping"),
        ('"hits": "higher"}', '"hits": "up"}', ": task: metrics['hits'] is 'up', expected \"higher\" or \"lower\""),
        ('"hits": "higher"}', '"hits": "higher", 3: "lower"}', ": task: metrics names 3, expected text"),
        ('"hits": "higher"}', '"hits": "higher", "loss": "higher"}', ': task: metrics["loss"] is "higher"'),
        ("def loss(self, outputs, batch)", "def loss(self, outputs)", ":8: loss cannot be called as loss(outputs,"),
        (").mean()\n\n", ")\n\n", ":8: loss gives a torch.float32 tensor of shape (4, 1), expected a scalar"),
        (").mean()\n\n", ").mean().item()\n\n", ":8: loss gives float, expected a scalar tensor"),
        (").mean()\n\n", ").mean().detach()\n\n", ":8: loss does not depend on the model's outputs"),
        (").mean()\n\n", ").mean() / 0\n\n", ":8: loss gives inf for a batch of the data"),
        ('outputs["output"] - batch["target"]).abs', 'outputs["logits"] - 1).abs', ":9: KeyError: 'logits'"),
        ('"error": error.mean(), ', "", ":11: evaluate gives no 'error', which metrics declares (it gives hits)"),
        ('"error": error.mean(), ', '"error": "1", ', ":11: evaluate gives error as str, expected a number"),
        ('"error": error.mean(), ', '"error": error, ', ":11: evaluate gives error as ndarray, expected a number"),
        ('"error": error.mean(), ', '"error": 1, "f": 1, ', ":11: evaluate gives 'f', which metrics does not declare"),
        ('return {"error"', 'return [] and {"error"', ":11: evaluate gives list, expected a mapping"),
        ("abs(outputs", "abs(torch.tensor(outputs", None),
        ("def task(power=1.0)", "def task(power)", ":15: task(power) cannot be called with the arguments given (none)"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_it_is_one_line_with_its_place(write, old, new, says):
    assert TASK.count(old) == 1
    path = write(TASK.replace(old, new))
    message = refused(path)
    if says is None:
        assert message.startswith(":12: ")
    else:
        assert message.startswith(says)


def test_a_number_that_is_none_shows_in_a_report_and_not_in_a_trial(write):
    made = create(
        write(TASK.replace("error.mean()", "np.float64('nan')").replace("\nclass", "import numpy as np\nclass", 1))
    )
    made.check(OUTPUTS, BATCH)
    with pytest.raises(DataError, match=r":11: evaluate gives error as nan, expected a finite number"):
        made.evaluate(*PLAIN)


def test_memory_that_runs_out_is_not_the_users_mistake(write):
    path = write(
        TASK.replace("return ((", 'raise RuntimeError("CUDA out of memory: can\'t allocate memory"); return ((')
    )
    with pytest.raises(RuntimeError, match="out of memory"):
        create(path).loss(OUTPUTS, BATCH)


def test_example_inputs_replace_fields(write):
    own = TASK.replace(
        "def task",
        "    def example_inputs(self, batch):\n        return {'target': batch['target'] * 0 + VALUE}\n\ndef task",
    )
    made = create(write(own.replace("VALUE", "7")))
    assert made.example_inputs(BATCH)["target"].unique().tolist() == [7.0]
    for bad, says in (
        ("{'other': 1}", "gives 'other', the data has target"),
        ("3", "gives int, expected a mapping"),
        (
            "{'target': batch['target'][:1]}",
            "as torch.float32 (1, 1), expected a tensor of torch.float32 of 4 examples",
        ),
    ):
        text = own.replace("{'target': batch['target'] * 0 + VALUE}", bad)
        with pytest.raises(DataError, match=r"own\.py:15: example_inputs ") as caught:
            create(write(text)).example_inputs(BATCH)
        assert says in str(caught.value)


def test_answers_are_names_of_outputs(write):
    own = TASK.replace("def task", "    def answers(self, outputs):\n        return VALUE\n\ndef task")
    assert create(write(TASK)).answers is None
    assert create(write(own.replace("VALUE", "list(outputs)"))).answers(OUTPUTS) == ("output",)
    assert create(write(own.replace("VALUE", "()"))).answers(OUTPUTS) == ()
    for bad, says in (
        ("'output'", ":15: answers gives str, expected a list of names of outputs"),
        ("['scores']", ":15: answers gives 'scores', the model has output"),
        ("1 / 0", ":16: ZeroDivisionError"),
    ):
        assert refused(write(own.replace("VALUE", bad))).startswith(says)
    assert ": answers cannot be called as answers(outputs)" in refused(
        write(own.replace("answers(self, outputs)", "answers(self)"))
    )


def test_nothing_is_run_by_the_parameters_alone(write, tmp_path):
    path = write(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n" + TASK)
    params = file.Params.model_validate({"path": "own.py"}, context={"folder": tmp_path})
    assert file.files(params) == {"path": path}
    assert not (tmp_path / "ran").exists()
    create(path)
    assert (tmp_path / "ran").exists()


def test_outputs_in_numpy_become_tensors_for_the_loss(write):
    assert isinstance(PLAIN[0]["output"], np.ndarray)
    assert create(write(TASK)).evaluate(*PLAIN)["loss"] == pytest.approx(4.5 / 4)
