"""Metrics beside scikit-learn's, training-only terms, and what is measured for how many classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F

from sparsify_deploy.errors import DataError
from sparsify_deploy.tasks import classification, regression
from sparsify_deploy.types import SOFT_TARGET


def task(**params):
    return classification.create(classification.Params(**params))


def drawn(seed, count, classes, *, labels=None):
    random = np.random.default_rng(seed)
    logits = random.standard_normal((count, classes)).astype(np.float32)
    target = random.integers(0, labels or classes, count)
    logits[np.arange(count), target] += 1.0
    return logits, target


@pytest.mark.parametrize(
    ("count", "classes", "labels"),
    [(200, 10, None), (50, 3, None), (40, 2, None), (30, 8, 4), (1, 3, None), (7, 100, None)],
)
def test_classification_is_as_scikit_learn_has_it(count, classes, labels):
    logits, target = drawn(count, count, classes, labels=labels)
    found = task(top_k=(2,)).evaluate({"o": logits}, {"target": target}) if classes > 2 else {}
    found |= task().evaluate({"o": logits}, {"target": target})
    answers = logits.argmax(1)
    seen = sorted({*target})
    recall = sklearn_metrics.recall_score(target, answers, labels=seen, average="macro", zero_division=0)
    expected = {
        "accuracy": sklearn_metrics.accuracy_score(target, answers),
        "balanced_accuracy": recall,
        "f1_macro": sklearn_metrics.f1_score(target, answers, average="macro", zero_division=0),
        "loss": F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(target)).item(),
    }
    every = list(range(classes))
    if classes > 2:
        expected["top2"] = sklearn_metrics.top_k_accuracy_score(target, logits, k=2, labels=every)
    if classes >= 6:
        expected["top5"] = sklearn_metrics.top_k_accuracy_score(target, logits, k=5, labels=every)
    if classes == 2:
        expected["f1_binary"] = sklearn_metrics.f1_score(target, answers, pos_label=1)
    assert found == pytest.approx(expected, rel=1e-5)
    if len(seen) == classes:
        assert recall == pytest.approx(sklearn_metrics.balanced_accuracy_score(target, answers))


def test_the_f1_of_a_named_class():
    logits, target = drawn(3, 60, 4)
    found = task(positive=2).evaluate({"o": logits}, {"target": target})
    per_class = sklearn_metrics.f1_score(target, logits.argmax(1), average=None)
    assert found["f1_binary"] == pytest.approx(per_class[2])


def test_equal_logits_rank_by_label():
    logits = np.zeros((4, 7), dtype=np.float32)
    found = task(top_k=(2, 5)).evaluate({"o": logits}, {"target": np.array([0, 1, 2, 6])})
    assert (found["accuracy"], found["top2"], found["top5"]) == (0.25, 0.5, 0.75)


@pytest.mark.parametrize(
    ("params", "certain", "also"),
    [
        ({}, ["accuracy", "balanced_accuracy", "f1_macro"], ["top5", "f1_binary"]),
        ({"top_k": (3,)}, ["accuracy", "balanced_accuracy", "f1_macro", "top3"], ["f1_binary"]),
        ({"top_k": ()}, ["accuracy", "balanced_accuracy", "f1_macro"], ["f1_binary"]),
        ({"positive": 0}, ["accuracy", "balanced_accuracy", "f1_macro", "f1_binary"], ["top5"]),
    ],
)
def test_what_is_asked_for_is_always_measured(params, certain, also):
    made = task(**params)
    assert (list(made.metrics), list(made.also_measured)) == (certain, also)
    assert {*made.metrics.values(), *made.also_measured.values()} == {"higher"}
    for classes in (4, 5, 6, 9):
        logits, target = drawn(0, 30, classes)
        found = made.evaluate({"o": logits}, {"target": target})
        assert {*certain} <= {*found} <= {*certain, *also, "loss"}
        assert ("top5" in found) is (classes >= 6 and "top_k" not in params)


def test_what_cannot_be_measured_is_refused():
    logits, target = drawn(0, 9, 5)
    with pytest.raises(DataError, match=r"task.params.top_k: top5 of 5 classes is always 1"):
        task(top_k=(2, 5)).evaluate({"o": logits}, {"target": target})
    with pytest.raises(DataError, match=r"task.params.positive: label 5 is not one of the model's 5 classes"):
        task(positive=5).evaluate({"o": logits}, {"target": target})


def test_balanced_weights_are_scikit_learns_and_for_training_alone():
    logits, target = drawn(1, 400, 3)
    target[target == 2] = np.where(np.arange((target == 2).sum()) % 9, 0, 2)
    counts = tuple(np.bincount(target).tolist())
    made = task(class_weights="balanced").counting(lambda: counts)
    weights = torch.from_numpy(compute_class_weight("balanced", classes=np.arange(3), y=target)).float()
    outputs, batch = {"o": torch.from_numpy(logits)}, {"target": torch.from_numpy(target)}
    plain = F.cross_entropy(outputs["o"], batch["target"])
    weighed = F.cross_entropy(outputs["o"], batch["target"], weights)
    assert made.loss(outputs, batch).item() == pytest.approx(weighed.item(), rel=1e-6)
    assert abs(weighed - plain) > 1e-3
    assert made.evaluate({"o": logits}, {"target": target})["loss"] == pytest.approx(plain.item(), rel=1e-6)


def test_a_label_that_training_never_has_weighs_as_if_it_were_there_once():
    made = task(class_weights="balanced").counting(lambda: (6, 2))
    outputs = {"o": torch.randn(4, 4, requires_grad=True)}
    assert made.loss(outputs, {"target": torch.tensor([3, 3, 0, 1])}).isfinite()
    lone = made.loss(outputs, {"target": torch.tensor([3, 3, 3, 3])})
    assert torch.allclose(lone, F.cross_entropy(outputs["o"], torch.tensor([3] * 4)))


def test_weights_without_counts_are_refused():
    made = task(class_weights="balanced").counting(lambda: None)
    with pytest.raises(DataError, match=r"^task.params.class_weights balanced needs integer labels .* set it none"):
        made.loss({"o": torch.zeros(1, 2)}, {"target": torch.tensor([0])})


@pytest.mark.parametrize(
    "params", [{}, {"label_smoothing": 0.2}, {"class_weights": "balanced", "label_smoothing": 0.1}]
)
def test_a_label_as_a_distribution_has_the_same_loss(params):
    assert classification.SOFT_TARGETS
    made = task(**params).counting(lambda: (5, 9, 2))
    logits, target = drawn(4, 20, 3)
    outputs, batch = {"o": torch.from_numpy(logits)}, {"target": torch.from_numpy(target)}
    one_hot = F.one_hot(batch["target"], 3).float()
    assert torch.allclose(made.loss(outputs, {**batch, SOFT_TARGET: one_hot}), made.loss(outputs, batch))
    half = 0.5 * one_hot + 0.5 * one_hot.roll(1, 0)
    mixed = made.loss(outputs, {**batch, SOFT_TARGET: half})
    if not params:
        other = made.loss(outputs, {"target": batch["target"].roll(1, 0)})
        assert torch.allclose(mixed, 0.5 * made.loss(outputs, batch) + 0.5 * other)
    assert not torch.allclose(mixed, made.loss(outputs, batch))


@pytest.mark.parametrize("shape", [(50,), (50, 1), (50, 3), (10, 2, 4)])
def test_regression_is_as_scikit_learn_has_it(shape):
    random = np.random.default_rng(2)
    target = random.standard_normal(shape) * 3 + 5
    values = target + random.standard_normal(shape)
    found = regression.create(regression.Params()).evaluate({"o": values}, {"target": target})
    flat = [array.reshape(len(array), -1) for array in (target, values)]
    assert found == pytest.approx(
        {
            "rmse": sklearn_metrics.root_mean_squared_error(target.ravel(), values.ravel()),
            "mae": sklearn_metrics.mean_absolute_error(target.ravel(), values.ravel()),
            "r2": sklearn_metrics.r2_score(*flat),
            "loss": sklearn_metrics.mean_squared_error(target.ravel(), values.ravel()),
        }
    )


@pytest.mark.parametrize(("values", "expected"), [([0.1] * 3, 1.0), ([0.1, 0.1, 0.2], 0.0)])
def test_a_target_that_never_varies(values, expected):
    target = np.full(3, 0.1)
    found = regression.create(regression.Params()).evaluate({"o": np.array(values)}, {"target": target})
    assert found["r2"] == expected == sklearn_metrics.r2_score([1.0] * 3, [1 + v - 0.1 for v in values])
