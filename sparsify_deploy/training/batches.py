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
    left over waits for another epoch. A split smaller than one batch is a batch by itself.
    """

    def __init__(self, split: Split, *, seed: int, batch_size: int, augment: Sequence[str] = ()) -> None:
        if len(split) == 0:
            raise DataError("the training split holds no examples")
        self.split = split
        self.seed = seed
        self.batch_size = min(batch_size, len(split))
        self.per_epoch = len(split) // self.batch_size
        self.augment = tuple(augment)
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
        """Batch `k` on the CPU, augmented by a generator of its own."""
        batch = self.split.take(self.indices(k))
        if not self.augment:
            return batch
        return augmented(batch, self.augment, generator("augment", self.seed, k))


def training_batches(
    split: Split, *, seed: int, batch_size: int, count: int, augment: Sequence[str] = ()
) -> list[Batch]:
    """The first `count` training batches of `seed`."""
    batches = Batches(split, seed=seed, batch_size=batch_size, augment=augment)
    return [batches.batch(k) for k in range(count)]
