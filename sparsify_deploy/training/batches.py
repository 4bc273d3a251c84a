"""Batch k of a run, which depends on the seed and k alone: that is what makes resuming exact."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify_deploy.errors import DataError
from sparsify_deploy.training.augment import augmented

if TYPE_CHECKING:
    from sparsify_deploy.training.image_settings import Augment
    from sparsify_deploy.training.vision import Mixing, Pixels
    from sparsify_deploy.types import Batch, Split


def derived_seed(purpose: str, seed: int, index: int) -> int:
    """A seed below 2**63 for the `index`-th use of `seed` for `purpose`; unrelated for different arguments."""
    digest = hashlib.sha256(f"{purpose}:{seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(purpose: str, seed: int, index: int) -> torch.Generator:
    """A CPU generator seeded by `derived_seed`."""
    return torch.Generator().manual_seed(derived_seed(purpose, seed, index))


class Batches:
    """Whole batches of shuffled epochs, by number.

    An epoch is a permutation drawn from (seed, epoch), cut into `floor(len(split) / batch_size)` batches; what is
    left over waits for another epoch. A split smaller than one batch is a batch by itself. `pixels` is what some of
    `augment` need to know of the images.
    """

    def __init__(
        self,
        split: Split,
        *,
        seed: int,
        batch_size: int,
        augment: Sequence[Augment | str] = (),
        pixels: Pixels | None = None,
        mixing: Mixing | None = None,
    ) -> None:
        if len(split) == 0:
            raise DataError("the training split holds no examples")
        self.split = split
        self.seed = seed
        self.batch_size = min(batch_size, len(split))
        self.per_epoch = len(split) // self.batch_size
        self.augment = tuple(augment)
        self._pixels, self._mixing = pixels, mixing
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def indices(self, k: int) -> Tensor:
        """The int64 example indices `(batch_size,)` of batch `k`, counted from 0 over all epochs."""
        epoch, position = divmod(k, self.per_epoch)
        if epoch != self._epoch:
            self._order = torch.randperm(len(self.split), generator=generator("epoch", self.seed, epoch))
            self._epoch = epoch
        return self._order[position * self.batch_size : (position + 1) * self.batch_size]

    def batch(self, k: int) -> Batch:
        """Batch `k` on the CPU, augmented and then mixed by generators of its own."""
        batch: Batch = self.split.take(self.indices(k))
        if self.augment:
            batch = augmented(batch, self.augment, generator("augment", self.seed, k), self._pixels)
        if self._mixing is not None:
            batch = self._mixing(batch, generator("mix", self.seed, k))
        return batch


def training_batches(
    split: Split, *, seed: int, batch_size: int, count: int, augment: Sequence[str] = ()
) -> list[Batch]:
    """The first `count` training batches of `seed`."""
    batches = Batches(split, seed=seed, batch_size=batch_size, augment=augment)
    return [batches.batch(k) for k in range(count)]


def class_batches(
    split: Split, *, seed: int, per_class: int, batch_size: int, classes: Sequence[str] | None, field: str = "target"
) -> list[Batch]:
    """Exactly `per_class` examples of each class, without augmentation, in batches as equal as possible.

    Examples are read in an order drawn from `seed`, a batch at a time, until every class has enough; with `classes`
    None (the classes are then the labels found) to the end of the split. Batches deal the classes out in turn, the
    label being in the integer `field` `(B,)`. DataError where the field is missing or holds no labels, where a label
    is not one of `classes`, and where a class has too few examples.
    """
    found: dict[int, list[tuple[int, Batch]]] = {label: [] for label in range(len(classes or ()))}
    order = torch.randperm(len(split), generator=generator("samples_per_class", seed, 0))
    for indices in torch.split(order, batch_size):
        batch = split.take(indices)
        for row, label in enumerate(_labels(batch, field)):
            if classes is not None and label not in found:
                raise DataError(f"label {label} is not one of the {len(classes)} classes, 0 to {len(classes) - 1}")
            if len(have := found.setdefault(label, [])) < per_class:
                have.append((int(indices[row]), {name: value[row].clone() for name, value in batch.items()}))
        if classes is not None and all(len(have) == per_class for have in found.values()):
            break
    for label, have in sorted(found.items()):
        if len(have) < per_class:
            name = f"class {classes[label]!r} (label {label})" if classes is not None else f"label {label}"
            raise DataError(f"samples_per_class asks for {per_class} examples, and {name} has {len(have)} in the split")
    dealt = [found[label][turn] for turn in range(per_class) for label in sorted(found)]
    if not dealt:
        raise DataError("the training split holds no examples")
    parts = torch.arange(len(dealt)).tensor_split(-(-len(dealt) // batch_size))
    return [_together(split, [dealt[i] for i in part.tolist()]) for part in parts]


def _together(split: Split, examples: Sequence[tuple[int, Batch]]) -> Batch:
    """Examples by index as one batch: taken once more where they differ in length, for it is the split that pads."""
    shapes = {tuple(value.shape for value in each.values()) for _, each in examples}
    if len(shapes) > 1:
        return split.take(torch.tensor([index for index, _ in examples]))
    return {name: torch.stack([each[name] for _, each in examples]) for name in examples[0][1]}


def _labels(batch: Batch, field: str) -> list[int]:
    labels = batch.get(field)
    if labels is None:
        raise DataError(f"samples_per_class needs a field {field!r}, the data has {', '.join(batch) or 'none'}")
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(
            f"samples_per_class needs one integer label an example in {field!r}, the data gives {labels.dtype} of "
            f"shape {tuple(labels.shape)}: it is for classification, use batches"
        )
    numbers: list[int] = labels.tolist()
    return numbers
