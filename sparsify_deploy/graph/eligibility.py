"""Which layers hardware could run 2:4 sparse: three questions that are never mixed. The rules stand here alone.

Shapes are `(K, C / groups, *kernel)`. The fourth word, what the builder picked, is the engine's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_RECURRENT = "a recurrent layer: nothing here projects or quantises it"
UNPRUNED: Mapping[str, str] = {
    "ConvTranspose": "a transposed convolution: nothing here projects or quantises it",
    "LSTM": _RECURRENT,
    "GRU": _RECURRENT,
    "RNN": _RECURRENT,
}
"""ONNX operators whose weights are counted and stay as they are, with the reason."""


@dataclass(frozen=True)
class Answer:
    """Yes or no, and one line saying why, with the numbers."""

    ok: bool
    reason: str


def pattern_possible(shape: Sequence[int], groups: int, m: int) -> Answer:
    """TensorRT's documented need: ungrouped, and the input channels divide into groups of `m`."""
    channels = shape[1]
    if groups != 1:
        return Answer(False, f"grouped convolution ({groups} groups): sparse kernels take ungrouped ones only")
    if channels % m:
        return Answer(False, f"C_in {channels} is not a multiple of {m}")
    return Answer(True, f"C_in {channels} is a multiple of {m}")


def rule_of_thumb(shape: Sequence[int], groups: int, m: int) -> Answer:
    """The pattern is possible, K % 8 == 0 and C % 16 == 0, as NVIDIA's ASP and modelopt choose layers."""
    possible = pattern_possible(shape, groups, m)
    if not possible.ok:
        return possible
    outputs, channels = shape[0], shape[1]
    if outputs % 8:
        return Answer(False, f"C_out {outputs} is not a multiple of 8")
    if channels % 16:
        return Answer(False, f"C_in {channels} is not a multiple of 16")
    return Answer(True, f"C_out {outputs} is a multiple of 8 and C_in {channels} of 16")


def next_multiple(count: int, m: int) -> int:
    """The smallest multiple of `m` that is not below `count`."""
    return -(-count // m) * m


def int8_advice(shape: Sequence[int]) -> Answer:
    """Whether C fills the 32-channel halves of the sparse INT8 MMA (k = 64): our inference, hence "may"."""
    channels = shape[1]
    if channels % 32:
        return Answer(False, f"C_in {channels} is not a multiple of 32: the sparse INT8 kernel may not be picked")
    return Answer(True, f"C_in {channels} is a multiple of 32")


def explained(shape: Sequence[int], groups: int, m: int) -> str:
    """One line on all three questions: the first "no" with its numbers, or what speaks for the layer."""
    possible, rule, advice = pattern_possible(shape, groups, m), rule_of_thumb(shape, groups, m), int8_advice(shape)
    if not possible.ok:
        return possible.reason
    if not rule.ok:
        return f"possible, not by rule of thumb: {rule.reason}"
    return rule.reason if advice.ok else f"{rule.reason}; {advice.reason}"
