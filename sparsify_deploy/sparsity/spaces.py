"""Where channels lie in the values and tensors of a network, and which of them share one permutation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(eq=False)
class Space:
    """Channels that are permuted as one. `parent` is set once it has been joined to another space."""

    size: int
    frozen: str = ""
    parent: Space | None = None

    def root(self) -> Space:
        """The space it has been joined to, or itself."""
        space = self
        while space.parent is not None:
            space = space.parent
        return space

    def freeze(self, reason: str) -> None:
        """Forbid to permute it; the first reason stays."""
        root = self.root()
        root.frozen = root.frozen or reason

    def join(self, other: Space) -> None:
        """From now on one permutation for both."""
        a, b = self.root(), other.root()
        if a is not b:
            b.parent = a
            a.frozen = a.frozen or b.frozen


@dataclass(frozen=True, eq=False)
class Segment:
    """All channels of `space`, `width` consecutive entries each."""

    space: Space
    width: int = 1

    @property
    def length(self) -> int:
        """Entries along the axis."""
        return self.space.size * self.width


def freeze(segments: Iterable[Segment], reason: str) -> None:
    """Freeze the space of each segment."""
    for segment in segments:
        segment.space.freeze(reason)


@dataclass(frozen=True, eq=False)
class Layout:
    """What lies along axis `axis` (not negative) of a value: `segments`, one after the other."""

    axis: int
    segments: tuple[Segment, ...]

    @property
    def length(self) -> int:
        """The size of the axis."""
        return sum(segment.length for segment in self.segments)

    def at(self, axis: int) -> Layout:
        """The same along another axis."""
        return Layout(axis, self.segments)


@dataclass(frozen=True, eq=False)
class Axis:
    """Axis `axis` of the parameter or buffer `name`: where a permutation of the spaces in `segments` acts."""

    name: str
    axis: int
    segments: tuple[Segment, ...]


@dataclass(eq=False)
class Channels:
    """All axes of a network that carry channels, and for each layer what its input channels are.

    `reads` maps a conv or linear layer's module name to the segments its weight's axis 1 consists of; `unreadable`
    one that has none to the reason.
    """

    axes: list[Axis] = field(default_factory=list)
    reads: dict[str, tuple[Segment, ...]] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
