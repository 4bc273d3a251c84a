"""What 2:4 would gain by the times of a dense engine that ran, in place of a roofline (Amdahl's law).

The layers that would be 2:4 take 1.3 (`realistic`) or 2 (`ideal`) times less, the rest what they took. The ideal leaves
out what bytes and launches bound, so it is above the roofline's where the batch is small.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from sparsify_deploy.types import EngineProfile

REALISTIC, IDEAL = 1.3, 2.0


@dataclass(frozen=True)
class Weighed:
    """The eligible layers' share of the measured time, and the gain over the engine that was measured."""

    share: float
    realistic: float
    ideal: float


def weigh(profile: EngineProfile, eligible: Collection[str]) -> Weighed | None:
    """The gain where the ONNX nodes `eligible` become 2:4; None where the profile has no time or does not name
    one of them, say in a compiled part, so that its share is not known.

    An engine layer that holds several of them counts once.
    """
    total = sum(layer.ms for layer in profile.layers)
    wanted = frozenset(eligible)
    found = [layer for layer in profile.layers if wanted.intersection(layer.nodes)]
    if total <= 0 or not wanted.issubset(node for layer in found for node in layer.nodes):
        return None
    share = sum(layer.ms for layer in found) / total

    def gain(factor: float) -> float:
        return 1 / (1 - share + share / factor)

    return Weighed(share, gain(REALISTIC), gain(IDEAL))
