"""So many examples of each class: balanced, from the seed alone, and reading no more than needed."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from sparsify_deploy.errors import DataError
from sparsify_deploy.training.batches import class_batches

CLASSES = ("cat", "dog", "eel")


@dataclass
class Counting:
    """A split that notes which examples were read, and how many at once."""

    fields: dict[str, Tensor]
    read: list[Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.fields["input"])

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        self.read.append(indices)
        return {name: value[indices] for name, value in self.fields.items()}


def split(count: int = 600, classes: int = 3) -> Counting:
    # the input is the example's own number
    return Counting({"input": torch.arange(float(count))[:, None], "target": torch.arange(count) % classes})


def draw(data: Counting, seed: int = 0, per_class: int = 5, batch_size: int = 8, classes: object = CLASSES) -> list:
    return class_batches(data, seed=seed, per_class=per_class, batch_size=batch_size, classes=classes)  # type: ignore[arg-type]


def test_every_class_has_exactly_so_many_distinct_examples() -> None:
    batches = draw(split())
    targets = torch.cat([batch["target"] for batch in batches])
    numbers = torch.cat([batch["input"] for batch in batches]).flatten()
    assert targets.bincount().tolist() == [5, 5, 5]
    assert len(set(numbers.tolist())) == 15
    assert torch.equal(numbers.long() % 3, targets)
    assert [len(batch["target"]) for batch in batches] == [8, 7]
    for batch in batches:
        counts = batch["target"].bincount()
        assert int(counts.max() - counts.min()) <= 1


def test_no_last_batch_of_one_example() -> None:
    assert [len(batch["target"]) for batch in draw(split(), per_class=3)] == [5, 4]


def test_the_seed_decides_and_nothing_else() -> None:
    def numbers(seed: int) -> list[float]:
        return torch.cat([batch["input"] for batch in draw(split(), seed)]).flatten().tolist()

    first = numbers(0)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert numbers(0) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert numbers(1) != first


def test_labels_are_read_a_batch_at_a_time_and_no_longer_than_needed() -> None:
    data = split()
    draw(data)
    assert max(len(indices) for indices in data.read) == 8
    assert sum(len(indices) for indices in data.read) < 100
    unknown = split()
    found = draw(unknown, classes=None)
    assert torch.cat([batch["target"] for batch in found]).bincount().tolist() == [5, 5, 5]
    assert sum(len(indices) for indices in unknown.read) == 600


def test_a_class_with_too_few_is_named() -> None:
    data = split()
    data.fields["target"][data.fields["target"] == 1] = 0
    data.fields["target"][:3] = 1
    with pytest.raises(DataError, match=r"asks for 5 examples, and class 'dog' \(label 1\) has 3"):
        draw(data)
    with pytest.raises(DataError, match=r"and label 1 has 3"):
        draw(data, classes=None)
    with pytest.raises(DataError, match=r"class 'newt' \(label 3\) has 0"):
        draw(split(), classes=(*CLASSES, "newt"))


def test_labels_that_are_none() -> None:
    with pytest.raises(DataError, match="label 2 is not one of the 2 classes"):
        draw(split(), classes=("cat", "dog"))
    regression = Counting({"input": torch.zeros(9, 1), "target": torch.rand(9)})
    with pytest.raises(DataError, match=r"one integer label an example.*torch.float32"):
        draw(regression)
    pixels = Counting({"input": torch.zeros(9, 1), "target": torch.zeros(9, 4, 4, dtype=torch.long)})
    with pytest.raises(DataError, match=r"torch.int64 of shape \(8, 4, 4\)"):
        draw(pixels)
    with pytest.raises(DataError, match="needs a field 'target', the data has input"):
        draw(Counting({"input": torch.zeros(9, 1)}))
    with pytest.raises(DataError, match="no examples"):
        draw(Counting({"input": torch.zeros(0, 1), "target": torch.zeros(0, dtype=torch.long)}), classes=None)
