"""YAML text to a tree of values that remember where they stand, with every mistake collected.

The rules are stricter than YAML's: one document of YAML 1.2, text keys, no tags, no duplicate keys, finite numbers.
The text is read event by event, so that neither depth nor aliases cost more than the limits below allow.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    DocumentStartEvent,
    Event,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceStartEvent,
)
from ruamel.yaml.reader import ReaderError

from sparsify_deploy.safety.printable import one_line

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_VALUES = 20_000
"""Values in a recipe, each alias counted as what it stands for."""

_LONGEST = 600
"""Characters of a message: a name quoted in it may be as long as the file."""

Scalar: TypeAlias = "str | int | float | bool | None"


@dataclass(frozen=True)
class Place:
    """Where something was written: line and column from 1 of a file, or a whole `--set` where `line` is 0."""

    source: str
    line: int
    column: int
    order: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source

    @property
    def sort_key(self) -> tuple[int, int, int]:
        return (self.order, self.line, self.column)


@dataclass(frozen=True)
class Leaf:
    """A scalar."""

    place: Place
    value: Scalar
    size: int = 1


@dataclass(frozen=True)
class Listing:
    """A sequence."""

    place: Place
    items: tuple[Node, ...]
    size: int = 1


@dataclass(frozen=True)
class Section:
    """A mapping; `keys` holds the place of each key."""

    place: Place
    entries: Mapping[str, Node]
    keys: Mapping[str, Place]
    size: int = 1
    flow: bool = False


Node: TypeAlias = "Leaf | Listing | Section"


@dataclass(frozen=True)
class Mistake:
    """What is wrong, and where."""

    place: Place
    text: str
    path: tuple[str | int, ...] = ()

    def __str__(self) -> str:
        dotted = ".".join(short(str(piece)) for piece in self.path)
        text = one_line(short(f"{dotted}: {self.text}" if dotted else self.text, _LONGEST))
        return f"{one_line(str(self.place))}: {text}"


class Unreadable(Exception):
    """The text is not YAML as allowed here; reading stopped at this mistake."""

    def __init__(self, mistake: Mistake) -> None:
        super().__init__(str(mistake))
        self.mistake = mistake


def read(text: str, source: str, *, whole: Place | None = None) -> tuple[Node | None, list[Mistake]]:
    """Compose one document; None stands for an empty one. `whole` replaces every place (for `--set`)."""
    composer = _Composer(source, whole)
    try:
        parser = YAML(typ="safe", pure=True).parse(text)
        return composer.document(parser), composer.mistakes
    except Unreadable as stop:
        return None, [*composer.mistakes, stop.mistake]
    except ReaderError as error:
        before = text[: error.position]
        place = whole or Place(source, before.count("\n") + 1, error.position - (before.rfind("\n") + 1) + 1)
        code = error.character if isinstance(error.character, int) else ord(error.character)
        return None, [*composer.mistakes, Mistake(place, f"character U+{code:04X} is not allowed in YAML: remove it")]
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = whole or (Place(source, mark.line + 1, mark.column + 1) if mark else Place(source, 1, 1))
        context = f" {error.context}" if error.context else ""
        said = " ".join(f"{error.problem or 'syntax error'}{context}".split())
        advice = "; indent with spaces" if "\\t" in said else ""
        return None, [*composer.mistakes, Mistake(place, f"not valid YAML: {said}{advice}")]
    except (YAMLError, RecursionError, ValueError) as error:
        first = str(error).partition("\n")[0] or type(error).__name__
        return None, [*composer.mistakes, Mistake(whole or Place(source, 1, 1), f"not valid YAML: {first}")]


@dataclass
class _Composer:
    source: str
    whole: Place | None
    mistakes: list[Mistake] = field(default_factory=list)
    anchors: dict[str, Node | None] = field(default_factory=dict)  # None: still open
    read: int = 0

    def document(self, events: Iterator[Event]) -> Node | None:
        node: Node | None = None
        documents = 0
        for event in events:
            if isinstance(event, DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise Unreadable(Mistake(self.at(event), "a second document starts here: keep one"))
                if event.version not in (None, (1, 2)):
                    self.mistakes.append(Mistake(self.at(event), "recipes are YAML 1.2: remove the %YAML line"))
            elif isinstance(event, NodeEvent):
                node = self.node(event, events, 0)
        return node

    def at(self, event: Event) -> Place:
        return self.whole or Place(self.source, event.start_mark.line + 1, event.start_mark.column + 1)

    def node(self, event: NodeEvent, events: Iterator[Event], depth: int) -> Node:
        place = self.at(event)
        self.read += 1
        if self.read > MAX_VALUES:
            raise Unreadable(Mistake(place, f"more than {MAX_VALUES} values: shorten it"))
        if depth > MAX_DEPTH:
            raise Unreadable(Mistake(place, f"nested more than {MAX_DEPTH} deep: flatten it"))
        if isinstance(event, AliasEvent):
            return self.alias(event, place)
        if (tag := getattr(event, "tag", None)) is not None:
            self.mistakes.append(Mistake(place, f"tags such as {tag} are not allowed: remove it"))
        name = event.anchor
        if name is not None:
            self.anchors[name] = None
        node: Node
        if isinstance(event, MappingStartEvent):
            node = self.section(event, events, place, depth)
        elif isinstance(event, SequenceStartEvent):
            node = self.listing(events, place, depth)
        else:
            node = Leaf(place, self.scalar(event, place))
        if node.size > MAX_VALUES:
            raise Unreadable(Mistake(place, f"more than {MAX_VALUES} values, aliases included: shorten it"))
        if name is not None:
            self.anchors[name] = node
        return node

    def alias(self, event: AliasEvent, place: Place) -> Node:
        if event.anchor not in self.anchors:
            raise Unreadable(Mistake(place, f"*{event.anchor} has no anchor &{event.anchor} before it"))
        node = self.anchors[event.anchor]
        if node is None:
            raise Unreadable(Mistake(place, f"*{event.anchor} stands inside its own anchor: remove it"))
        return node

    def listing(self, events: Iterator[Event], place: Place, depth: int) -> Listing:
        items = []
        size = 1
        for event in events:
            if isinstance(event, CollectionEndEvent):
                break
            assert isinstance(event, NodeEvent)
            items.append(self.node(event, events, depth + 1))
            size += items[-1].size
        return Listing(place, tuple(items), size)

    def section(self, start: MappingStartEvent, events: Iterator[Event], place: Place, depth: int) -> Section:
        entries: dict[str, Node] = {}
        keys: dict[str, Place] = {}
        size = 1
        for event in events:
            if isinstance(event, CollectionEndEvent):
                break
            assert isinstance(event, NodeEvent)
            at = self.at(event)
            key = self.node(event, events, depth + 1)
            following = next(events)
            assert isinstance(following, NodeEvent)
            value = self.node(following, events, depth + 1)
            size += key.size + value.size
            if not isinstance(key, Leaf) or not isinstance(key.value, str):
                self.mistakes.append(Mistake(at, f"a key must be text, found {describe(key)}: quote or rename it"))
            elif key.value in entries:
                self.mistakes.append(
                    Mistake(at, f"key {key.value!r} is given twice, first at {keys[key.value]}: remove one")
                )
            else:
                entries[key.value], keys[key.value] = value, at
        return Section(place, entries, keys, size, bool(start.flow_style))

    def scalar(self, event: NodeEvent, place: Place) -> Scalar:
        assert isinstance(event, ScalarEvent)
        if (found := _NO_TEXT.search(event.value)) is not None:  # written as an escape, such as "\\0"
            code = f"U+{ord(found.group()):04X}"
            self.mistakes.append(Mistake(place, f"character {code} is not allowed in text: remove it"))
            return _NO_TEXT.sub("", event.value)
        if event.style is not None:  # quoted, or a block of text
            return str(event.value)
        value = plain(event.value)
        if isinstance(value, float) and not math.isfinite(value):
            self.mistakes.append(Mistake(place, f"{short(event.value)} is not a finite number: give one"))
            return 0.0
        if isinstance(value, int) and abs(value) >= 2**63:
            self.mistakes.append(Mistake(place, f"{short(event.value)} is too large: at most 64 bits"))
            return 0
        return value


_NO_TEXT = re.compile("[\x00\ud800-\udfff]")
"""What no path and no UTF-8 file can hold."""

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


def plain(text: str) -> Scalar:
    """The value of an unquoted scalar by YAML 1.2's core schema: `1e2` is a number, `yes` and `1_000` are text."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        if len(text) > 40:  # int() refuses thousands of digits; any value too large is the same mistake
            return 2**64
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if _FLOAT.fullmatch(text):
        return float(text)
    if _NOT_FINITE.fullmatch(text):
        return math.nan
    return text


def describe(node: Node) -> str:
    """What was found, for a message."""
    if isinstance(node, Section):
        return "a mapping"
    if isinstance(node, Listing):
        return f"a list of {len(node.items)}"
    if node.value is None:
        return "nothing"
    if isinstance(node.value, bool):
        return str(node.value).lower()
    return f"text {short(node.value)!r}" if isinstance(node.value, str) else short(str(node.value))


def short(text: str, limit: int = 40) -> str:
    """`text` on one line and not longer than `limit`."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
