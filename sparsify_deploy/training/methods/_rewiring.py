"""What the methods that move a mask share: when to move it, how many weights, the record of it, and saving."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from sparsify_deploy.errors import Diverged, UsageError
from sparsify_deploy.params import NMPattern, n_and_m
from sparsify_deploy.params import Params as Base

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparsify_deploy.sparsity.mask import Mask
    from sparsify_deploy.training.loop import Trainer
    from sparsify_deploy.training.updater import HoldMask, Update


class Rewired(Base):
    """When and how much a mask is rewired."""

    update_every: int = Field(100, ge=1, description="optimizer steps from one rewiring to the next (ΔT)")
    drop_fraction: float = Field(
        0.3,
        gt=0.0,
        lt=1.0,
        description="share of each layer's weights replaced at first (alpha); falls as a cosine to 0",
    )
    end_fraction: float = Field(
        0.75, gt=0.0, le=1.0, description="part of training after which the mask no longer moves (T_end)"
    )


class RewiredInGroups(Rewired):
    """As `Rewired`, and whether an N:M pattern is kept."""

    pattern: NMPattern | None = Field(
        None,
        description="drop and grow inside the groups of N:M, which every layer of the starting mask that is not "
        "dense must hold (init.pattern)",
    )


@dataclass(frozen=True)
class Clock:
    """Rewiring every `every` optimizer steps, before `end` of `total`; the share falls as a cosine from `alpha`."""

    every: int
    end: int
    total: int
    alpha: float

    @classmethod
    def of(cls, params: Rewired, total: int) -> Clock:
        """The clock of `params` over a run of `total` optimizer steps."""
        return cls(params.update_every, round(params.end_fraction * total), total, params.drop_fraction)

    def due(self, done: int) -> bool:
        """Whether the mask moves when `done` optimizer steps are done."""
        return 0 < done < self.end and done % self.every == 0

    def fraction(self, done: int) -> float:
        """The share of a layer's weights to drop then."""
        from sparsify_deploy.sparsity.schedules import cosine_drop_fraction

        return cosine_drop_fraction(done, self.end, self.alpha)

    def notes(self, method: str) -> tuple[str, ...]:
        """One line where the mask never moves."""
        if self.every < self.end:
            return ()
        return (
            f"{method}: the mask never moves: update_every {self.every} does not come before step {self.end}, where "
            f"rewiring ends (end_fraction {self.end / self.total:g} of {self.total} steps); "
            "lower train.params.update_every or train longer",
        )


class Moving:
    """Base of the updaters that move a mask: holds it in between, records each move, saves both.

    A method overrides `after_backward` or `after_step`, and calls `_move` there.
    """

    name: str

    def __init__(self, held: HoldMask, notes: Sequence[str] = ()) -> None:
        self._held = held
        self._updates: list[Update] = []
        self._notes = tuple(notes)
        self.dense_gradient_every: int | None = None

    @property
    def mask(self) -> Mask:
        return self._held.mask

    @property
    def updates(self) -> Sequence[Update]:
        return self._updates

    @property
    def notes(self) -> Sequence[str]:
        return (*self._notes, *self._held.notes)

    def before_forward(self, step: int) -> None:
        self._held.before_forward(step)

    def after_backward(self, step: int) -> bool:
        return self._held.after_backward(step)

    def after_step(self, step: int) -> None:
        self._held.after_step(step)

    def finish(self) -> None:
        self._held.finish()

    def state_dict(self) -> dict[str, Any]:
        return {**self._held.state_dict(), "updates": [dataclasses.asdict(update) for update in self._updates]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        from sparsify_deploy.training.updater import Update

        self._held.load_state_dict(state)
        self._updates = [Update(**update) for update in state["updates"]]

    def _trained(self) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """Name, weight and mask of the layers that got a gradient in this step; frozen ones never move."""
        for name, mask in self.mask.items():
            weight = self._held.parameters[name]
            if weight.grad is not None:
                yield name, weight, mask

    def _sparse(self) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """As `_trained`, without the dense layers, in which there is nothing to rewire."""
        from sparsify_deploy.training.methods._selection import kept

        return (layer for layer in self._trained() if kept(layer[2]) < layer[2].numel())

    def _move(self, done: int, fraction: float, layers: Mapping[str, Tensor]) -> None:
        """Hold `layers` from now on, and record it."""
        from sparsify_deploy.training.updater import Update

        new = self._held.rewire_to(self.mask.with_(layers))
        self._updates.append(Update(done, fraction, new, self.mask.densities()))


class Trading(Moving):
    """Base of those that keep the number of weights, so that training could end with the network of any step."""

    def restore(self, mask: Mask, step: int) -> None:
        """Hold the mask of an earlier step; the record keeps what really happened, and that as its last entry."""
        from sparsify_deploy.training.updater import Update

        new = sum(int((mask[name] & ~old).sum()) for name, old in self.mask.items())
        if mask != self.mask:
            self._updates.append(Update(step, 0.0, new, mask.densities()))
        self._held.restore(mask, step)


def replaced(weight: Tensor, mask: Tensor, score: Tensor, fraction: float, pattern: str | None) -> Tensor:
    """`mask` with the floor(fraction * active) weights of smallest |weight| dropped and as many grown by |score|.

    Weights just dropped may come back. With `pattern`, each group grows as many as it lost. CPU tensors out.
    """
    from sparsify_deploy.training.methods._selection import drop, grow_, grow_in_groups, kept

    count = math.floor(fraction * kept(mask))
    left = drop(weight, mask, count)
    return grow_(left, score, count) if pattern is None else grow_in_groups(left, score, *n_and_m(pattern))


def check_finite(method: str, what: str, tensor: Tensor, done: int) -> None:
    """`Diverged` where `tensor` has an entry that is not finite."""
    from sparsify_deploy.training.methods._selection import finite

    if not finite(tensor):
        raise Diverged(f"{method}: the {what} is not finite at step {done}: lower optimizer.lr")


def check_pattern(method: str, mask: Mask, pattern: str | None) -> None:
    """`UsageError` unless every layer of `mask` is dense or has exactly N of M in every group."""
    from sparsify_deploy.sparsity.nm import is_nm

    if pattern is None:
        return
    n, m = n_and_m(pattern)
    for name, kept in mask.items():
        if bool(kept.all()):
            continue
        groups = kept.ndim > 1 and kept.shape[1] % m == 0
        if not groups or not is_nm(kept, n, m) or not is_nm(~kept, m - n, m):
            raise UsageError(
                f"train.params.pattern: {method} keeps {pattern} only where the starting mask has it, and {name} is "
                f"neither dense nor exactly {pattern}: start from init.pattern {pattern}"
            )


def starting_mask(method: str, mask: Mask | None, advice: str) -> Mask:
    """`mask`; `UsageError` where there is none."""
    if mask is None:
        raise UsageError(f"train.method {method} needs a starting mask: add an init section ({advice})")
    return mask


def fit(trainer: Trainer, updater: Moving) -> Mask:
    """One fit; the updater's notes are said, each once. The mask it ends with."""
    said = set(updater.notes)
    for note in updater.notes:
        trainer.context.progress.say(note)
    trainer.fit(updater)
    for note in updater.notes:
        if note not in said:
            trainer.context.progress.say(note)
    return updater.mask
