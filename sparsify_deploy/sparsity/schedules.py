"""How a density or a drop fraction moves over steps or rounds; pure functions of the clock they are given."""

from __future__ import annotations

import math


def cosine_drop_fraction(step: int, end_step: int, alpha: float) -> float:
    """RigL's share of active weights to replace: α/2 · (1 + cos(π · step / end_step)), 0 from `end_step` on."""
    if step >= end_step:
        return 0.0
    return alpha / 2 * (1 + math.cos(math.pi * step / end_step))


def exponential_density(final: float, round: int, rounds: int) -> float:
    """SynFlow's density after `round` (0-based) of `rounds`: final ** ((round + 1) / rounds)."""
    if not 0 <= round < rounds:
        raise ValueError(f"round {round} is not one of {rounds}")
    return float(final ** ((round + 1) / rounds))


def cubic_sparsity(step: int, *, begin: int, end: int, initial: float, final: float) -> float:
    """Gradual magnitude pruning (Zhu & Gupta 2017): final + (initial − final) · (1 − (step − begin)/(end − begin))³.

    `initial` before `begin`, `final` from `end` on.
    """
    if step >= end:
        return final
    if step <= begin:
        return initial
    return final + (initial - final) * (1 - (step - begin) / (end - begin)) ** 3
