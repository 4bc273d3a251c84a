"""Predicted gains beside measured ones: which engine layers belong together, the noise floor, whose sign is right.

A builder fuses layers, and not the same ones in every plan: three Linears on one input may become one product. So
network layers that share an engine layer in any of the profiles are compared as one group, by the sum of their times.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sparsify_deploy.timing import LEAST_NOISE
from sparsify_deploy.types import Json

Times = Mapping[str, float]


@dataclass(frozen=True)
class Predicted:
    """One network layer's times by the roofline, ms: dense INT8, and 2:4 INT8 by the realistic and the ideal gain."""

    dense_ms: float
    realistic_ms: float
    ideal_ms: float


@dataclass(frozen=True)
class Group:
    """Network layers that an engine runs together: measured dense (twice) and sparse, and predicted, ms."""

    layers: tuple[str, ...]
    dense_ms: float
    again_ms: float
    sparse_ms: float
    predicted: Predicted

    @property
    def gain(self) -> float:
        """How many times faster 2:4 is, the two dense profiles averaged."""
        return (self.dense_ms + self.again_ms) / 2 / self.sparse_ms

    @property
    def predicted_gain(self) -> float:
        """The same by the realistic prediction."""
        return self.predicted.dense_ms / self.predicted.realistic_ms


@dataclass(frozen=True)
class Agreement:
    """Over the groups whose measured gain is outside the noise floor: how often the sign was right.

    `base_rate` is the share of the commoner sign, what a constant answer would score; `balanced_accuracy` is the mean
    of the shares right among the faster and among the slower ones, None with `why_none` where one of them is empty.
    """

    groups: int
    outside: int
    noise: float
    right: int
    faster: int
    base_rate: float | None
    accuracy: float | None
    balanced_accuracy: float | None
    why_none: str


def groups(dense: Json, again: Json, sparse: Json, predicted: Mapping[str, Predicted]) -> tuple[Group, ...]:
    """Pair three profiles (as `EngineProfile` in JSON) and the predictions, which name the layers of interest.

    A group is left out where a profile has no time for it: a runtime that does not name its layers' nodes has none.
    """
    profiles = [_layers(profile, predicted) for profile in (dense, again, sparse)]
    found = []
    for members in _joined(each for profile in profiles for each, _ in profile):
        times = [sum(ms for layers, ms in profile if set(layers) & members) for profile in profiles]
        if min(times) <= 0:
            continue
        names = tuple(name for name in predicted if name in members)
        each = [predicted[name] for name in names]
        total = Predicted(*(sum(getattr(p, f) for p in each) for f in ("dense_ms", "realistic_ms", "ideal_ms")))
        found.append(Group(names, times[0], times[1], times[2], total))
    return tuple(found)


def noise_floor(found: Sequence[Group]) -> float:
    """The 95th percentile of how far the two dense profiles are apart, at least what no race claims either."""
    if not found:
        return LEAST_NOISE
    apart = sorted(abs(group.dense_ms / group.again_ms - 1) for group in found)
    return max(LEAST_NOISE, apart[min(len(apart) - 1, int(0.95 * len(apart)))])


def agreement(found: Sequence[tuple[Group, float]]) -> Agreement:
    """Signs of predicted and measured gains, of groups each with its noise floor.

    A prediction says "faster" where its gain is beyond what a race may claim, else "not faster".
    """
    outside = [group for group, noise in found if abs(group.gain - 1) > noise]
    said = [(group.gain > 1, group.predicted_gain > 1 + LEAST_NOISE) for group in outside]
    shares = {sign: [real == guess for real, guess in said if real is sign] for sign in (True, False)}
    right, faster = sum(real == guess for real, guess in said), len(shares[True])
    balanced, why = None, ""
    if not said:
        why = "no layer is outside the noise floor"
    elif not all(shares.values()):
        why = f"all {len(said)} layers outside the noise floor are {'faster' if faster else 'slower'}"
    else:
        balanced = statistics.fmean(sum(each) / len(each) for each in shares.values())
    return Agreement(
        groups=len(found),
        outside=len(outside),
        noise=statistics.median(noise for _, noise in found) if found else LEAST_NOISE,
        right=right,
        faster=faster,
        base_rate=max(faster, len(said) - faster) / len(said) if said else None,
        accuracy=right / len(said) if said else None,
        balanced_accuracy=balanced,
        why_none=why,
    )


def _layers(profile: Json, wanted: Mapping[str, Predicted]) -> list[tuple[tuple[str, ...], float]]:
    """The engine layers that run any of the wanted network layers, and their time."""
    named = [(tuple(n for n in each["nodes"] if n in wanted), float(each["ms"])) for each in profile["layers"]]
    return [(layers, ms) for layers, ms in named if layers]


def _joined(sets: Iterable[tuple[str, ...]]) -> list[set[str]]:
    """Sets that share a member become one."""
    joined: list[set[str]] = []
    for each in sets:
        touching = [members for members in joined if members & set(each)]
        joined = [members for members in joined if members not in touching]
        joined.append(set(each).union(*touching))
    return joined
