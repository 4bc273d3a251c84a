from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sparsify_deploy.errors import DataError
from sparsify_deploy.tasks import classification, regression

CLASSES = classification.create(classification.Params())
VALUES = regression.create(regression.Params())


def logits_and_labels(count=50, classes=4):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, classes, generator=generator) * 3
    return logits, torch.randint(classes, (count,), generator=generator)


def test_classification_loss_is_cross_entropy_with_smoothing():
    logits, target = logits_and_labels()
    log = torch.log_softmax(logits, 1)
    plain = -log[torch.arange(50), target].mean()
    assert torch.allclose(CLASSES.loss({"output": logits}, {"target": target}), plain)
    smooth = classification.create(classification.Params(label_smoothing=0.2))
    expected = 0.8 * plain - 0.2 * log.mean()
    assert torch.allclose(smooth.loss({"output": logits}, {"target": target.int()}), expected)


def test_classification_metrics():
    logits, target = logits_and_labels()
    measured = classification.create(classification.Params(label_smoothing=0.2)).evaluate(
        {"output": logits.numpy()}, {"target": target.numpy()}
    )
    assert list(measured) == ["accuracy", "balanced_accuracy", "f1_macro", "loss"]
    assert measured["accuracy"] == pytest.approx((logits.argmax(1) == target).float().mean().item())
    assert measured["loss"] == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-6)


def test_huge_logits_do_not_overflow_the_loss():
    logits = np.array([[1e4, 0.0], [0.0, 1e4]], dtype=np.float32)
    measured = CLASSES.evaluate({"output": logits}, {"target": np.array([0, 0])})
    assert (measured["accuracy"], measured["loss"]) == (0.5, pytest.approx(5e3))


def test_ties_go_to_the_lower_class():
    zeros = np.zeros((3, 2), dtype=np.float32)
    assert CLASSES.evaluate({"output": zeros}, {"target": np.array([0, 1, 0])})["accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        (torch.zeros(3, 4), torch.tensor([0, 1, 4]), "label 4 is not one of the model's 4 classes"),
        (torch.zeros(3, 4), torch.tensor([0, -1, 3]), "label -1 is not one"),
        (torch.zeros(3, 4), torch.zeros(3), "integer labels"),
        (torch.zeros(3, 4), torch.zeros(3).bool(), "integer labels"),
        (torch.zeros(3, 4), torch.zeros(3, 1).long(), r"target of shape \(3,\), the data gives \(3, 1\)"),
        (torch.zeros(3, 4), torch.zeros(2).long(), r"target of shape \(3,\)"),
        (torch.zeros(3, 4, 5), torch.zeros(3).long(), r"logits of shape \(N, classes\), the model gives \(3, 4, 5\)"),
    ],
)
def test_wrong_labels_and_shapes_are_data_errors(logits, target, message):
    with pytest.raises(DataError, match=message) as training:
        CLASSES.loss({"output": logits}, {"target": target})
    with pytest.raises(DataError, match=message) as testing:
        CLASSES.evaluate({"output": logits.numpy()}, {"target": target.numpy()})
    assert "\n" not in str(training.value) + str(testing.value)


def test_regression_loss_and_metrics():
    values, target = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1.0, 0.0, 3.0])
    assert VALUES.loss({"output": values}, {"target": target}).item() == pytest.approx(5 / 3)
    measured = VALUES.evaluate({"output": values.numpy()}, {"target": target.numpy()})
    assert measured == {
        "rmse": pytest.approx(math.sqrt(5 / 3)),
        "mae": pytest.approx(1.0),
        "r2": pytest.approx(1 - 5 / (14 / 3)),
        "loss": pytest.approx(5 / 3),
    }
    assert list(VALUES.metrics.items()) == [("rmse", "lower"), ("mae", "lower"), ("r2", "higher")]


@pytest.mark.parametrize(
    ("output", "target"), [((6,), (6, 1)), ((6, 1), (6,)), ((6, 2), (6, 2)), ((2, 3, 4), (2, 3, 4))]
)
def test_a_column_fits_a_vector(output, target):
    size = math.prod(output)
    values, wanted = torch.randn(output), torch.randn(target)
    loss = VALUES.loss({"output": values}, {"target": wanted})
    assert loss.item() == pytest.approx(((values.flatten() - wanted.flatten()) ** 2).sum().item() / size, rel=1e-5)
    VALUES.evaluate({"output": values.numpy()}, {"target": wanted.numpy()})


@pytest.mark.parametrize(
    ("output", "target"), [((6, 2), (6,)), ((6,), (5,)), ((6, 1), (1, 6)), ((6, 1, 1), (6,)), ((2, 2), (2,))]
)
def test_shapes_that_would_broadcast_are_refused(output, target):
    with pytest.raises(DataError, match="the output's shape"):
        VALUES.loss({"output": torch.zeros(output)}, {"target": torch.zeros(target)})
    with pytest.raises(DataError, match="the output's shape"):
        VALUES.evaluate({"output": np.zeros(output)}, {"target": np.zeros(target)})


def test_regression_on_integers_is_refused():
    with pytest.raises(DataError, match="floating-point target"):
        VALUES.loss({"output": torch.zeros(3)}, {"target": torch.zeros(3).long()})


@pytest.mark.parametrize("task", [CLASSES, VALUES])
def test_nothing_and_nonsense_are_not_measured(task):
    target = np.zeros(2, dtype=np.int64) if task is CLASSES else np.zeros((2, 3), dtype=np.float32)
    with pytest.raises(DataError, match="finite"):
        task.evaluate({"output": np.full((2, 3), np.nan, dtype=np.float32)}, {"target": target})
    with pytest.raises(DataError, match="no examples"):
        task.evaluate({"output": np.zeros((0, 3), dtype=np.float32)}, {"target": target[:0]})
    with pytest.raises(DataError, match="no field 'target'"):
        task.evaluate({"output": np.zeros((2, 3), dtype=np.float32)}, {"label": target})


@pytest.mark.parametrize("entry", [classification, regression])
def test_the_output_is_the_only_one_the_logits_or_the_one_named(entry):
    right, wrong = torch.tensor([[0.0, 9.0]]), torch.zeros(3, 3)
    target = torch.tensor([1]) if entry is classification else torch.tensor([[0.0, 9.0]])
    batch = {"target": target}
    default, named = entry.create(entry.Params()), entry.create(entry.Params(output="b"))
    for task, outputs in [
        (default, {"x": right}),
        (default, {"hidden": wrong, "logits": right}),
        (named, {"a": wrong, "b": right}),
    ]:
        assert task.loss(outputs, batch).item() < 1e-3
    with pytest.raises(DataError, match=r"no output 'logits' \(it has a, b\)"):
        default.loss({"a": wrong, "b": right}, batch)
    with pytest.raises(DataError, match=r"no output 'b' \(it has x\)"):
        named.loss({"x": right}, batch)
