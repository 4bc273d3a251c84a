"""Labels of any source are judged in one place: what stops a run, and what a report says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from sparsify_deploy.datasets._labels import Judged, judge
from sparsify_deploy.datasets._memory import MemoryDataSet, MemorySplit
from sparsify_deploy.errors import DataError


def labels(*counts: int) -> list[int]:
    return [label for label, count in enumerate(counts) for _ in range(count)]


def data(
    train: Any,
    test: Any = (0, 1),
    classes: tuple[str, ...] | None = None,
    validation: Any = None,
) -> MemoryDataSet:
    def split(values: Any) -> MemorySplit:
        target = torch.as_tensor(values)
        return MemorySplit({"input": torch.zeros(len(target), 2), "target": target})

    return MemoryDataSet(
        split(train), split(test), classes=classes, validation=split(validation) if validation is not None else None
    )


def test_alike_classes_need_no_words() -> None:
    assert judge(data(labels(10, 9), (0, 1))) == Judged((), (10, 9))


def test_rare_classes_are_counted_and_the_cheap_answer_is_told() -> None:
    found = judge(data(labels(6197, 400, 3), labels(900, 90, 10), ("a", "b", "x")))
    assert found.class_counts == (6197, 400, 3)
    assert found.notes == (
        "data: class 'x' has 3 of 6,600 training examples (0.045 %); also rare: 'b'; to answer 'a' always is right "
        "in 90.0 % of the test split",
    )


def test_the_bound_of_rare_is_a_fifth_of_an_equal_share() -> None:
    assert judge(data(labels(90, 10), (0, 1))).notes == ()
    assert len(judge(data(labels(91, 9), (0, 1))).notes) == 1


def test_a_named_class_without_training_examples_counts_as_none() -> None:
    found = judge(data(labels(10, 10), (0, 1), ("a", "b", "c")))
    assert found.class_counts == (10, 10, 0)
    assert found.notes[0].startswith("data: class 'c' has 0 of 20 training examples (0 %)")


def test_classes_that_only_the_test_split_has() -> None:
    found = judge(data(labels(10, 10), (0, 1, 3, 3), ("a", "b", "c", "d"), validation=(0, 2)))
    assert found.notes[-2:] == (
        "data: 2 of 4 test examples are of classes that no training example has, so they count as wrong unless the "
        "weights know them already: 'd'",
        "data: 1 of 2 validation examples are of classes that no training example has, so they count as wrong unless "
        "the weights know them already: 'c'",
    )


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (data([0, 1], ()), "data: the test split is empty"),
        (data((), (0, 1)), "data: the train split is empty"),
        (data([1] * 6, (1,), ("a", "b")), "data: all 6 training examples are of class 'b': there is nothing to tell"),
        (data([0, 1], (0, -1)), "data: label -1 at index 1 of the test split; labels start at 0"),
        (
            data([0, 5, 1], (0, 1), ("a", "b")),
            "data: label 5 at index 1 of the train split, but 2 classes are named, 0 to 1",
        ),
        (
            data([0, 1], (0, 1), ("a", "b"), validation=(0, 7)),
            "data: label 7 at index 1 of the validation split, but 2 classes are named",
        ),
    ],
)
def test_what_stops_a_run(given: MemoryDataSet, text: str) -> None:
    with pytest.raises(DataError) as caught:
        judge(given)
    assert str(caught.value).startswith(text)
    assert "\n" not in str(caught.value)


def test_values_and_large_numbers_are_no_classes() -> None:
    assert judge(data([0.5, 0.5], (0.5,))) == Judged()
    assert judge(data([[0, 1], [1, 1]], [[0, 1]])) == Judged()
    assert judge(data([10**9, 0], (0,))).class_counts is None


@dataclass(frozen=True)
class Own:
    """A user's split: the labels are to be had or not, and examples never, for they cost too much."""

    target: torch.Tensor | None

    def __len__(self) -> int:
        return 3

    def take(self, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        raise AssertionError("examples are not opened to judge labels")


@pytest.mark.parametrize(("target", "stops"), [(torch.zeros(3, dtype=torch.int64), True), (None, False)])
def test_a_users_split_is_judged_by_its_target_alone(target: torch.Tensor | None, stops: bool) -> None:
    class Data:
        inputs, classes = ("x",), None

        def split(self, name: str) -> Own:
            return Own(target)

    if stops:
        with pytest.raises(DataError, match=r"all 3 training examples are of class 0"):
            judge(Data())
    else:
        assert judge(Data()) == Judged()
