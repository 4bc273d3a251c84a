"""A trained classifier whose classes stand in another order than the data's is not judged in silence."""

from __future__ import annotations

import pytest

from sparsify_deploy.stages.measure import other_order


def test_another_order_is_said() -> None:
    (line,) = other_order(("World", "Sports", "Business"), ("business", "sports", "world"))
    assert line.startswith(
        "data: the model's config.json has the classes World, Sports, Business and the data business"
    )
    assert line.endswith("count as wrong; number the labels as the model does")


@pytest.mark.parametrize(
    ("model", "data"),
    [((), ("a", "b")), (("A", "b"), ("a", "B")), (("LABEL_0", "LABEL_1"), ("b", "a")), (("a", "b"), ())],
)
def test_the_same_order_and_other_classes_are_not(model: tuple[str, ...], data: tuple[str, ...]) -> None:
    assert other_order(model, data) == []
