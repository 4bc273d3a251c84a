"""Recipes that are nearly right: mutations of the committed ones, the same for one seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[3]
SEEDS = sorted((ROOT / "recipes").rglob("*.yaml"))

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400, 0.0, -0.0, 1e308, 0.1, 1e-320),
    *("", " ", "~", "null", "yes", "2:4", "4:2", "0:0", "99:99", "1:2:3", "a" * 300, "a" * 100_000, "..", "/", "~/x"),
    *(
        "~nobody-here/x",
        "\x1b[31mred",
        "[red]x[/red]",
        "</script>",
        "a|b",
        "a\nb",
        "é漢字🙂",
        "\u202egnp",
        "\ufeff",
        "$(id)",
    ),
    *("{{ 7*7 }}", "%s%n", "../../../etc/passwd", "file.yaml:1:1: x", "'", '"', "\\", "#", "&a", "*a", "!!x", "|", ">"),
    *([], {}, [[]], [{}], {"": 1}, [None] * 50, {"a": {"b": {"c": {}}}}, [[[[[[1]]]]]], {"version": 1}, ["x", 1, None]),
)
SCALARS = (
    *("1e999", "-1e999", ".inf", "-.Inf", ".nan", "1_000", "0x1F", "0o17", "017", "1e2", "1.", ".5", "+1", "12e03"),
    *("1:30", "190:20:30", "2001-12-14", "2001-12-14t21:59:43.10-05:00", "0b1010", "1" * 50, "1" * 5000, "9" * 19),
    *("0x" + "f" * 100, "yes", "No", "on", "~", "<<", "=", "- ", "?", ": ", "@a", "`a", "%a", "\\x41", "1e", "--1"),
    *("&a x", "*a", "*missing", "!!python/object:os.system [id]", "!!python/object/apply:os.system ['id']", "!t x"),
    *("!<tag:yaml.org,2002:int> 3", "!!binary aGk=", "!!set {a, b}", "!!omap [a: 1]", "!!timestamp 2001-01-01"),
    *("[", "]", "{", "}", "{a: 1, a: 2}", "[*a, *a]", "&b [*b]", "{<<: *a}", "{? [a]: b}", "{1: 2}", "{~: 1}"),
    *("'unended", '"unended', '"\\x00"', '"\\ud800"', '"\\u0007"', '"\\U00110000"', '"\\q"', "|\n  text\n", ">-\n x\n"),
    *(
        "a: b: c",
        "a #b",
        "\ta",
        "a\t: b",
        "\u2028",
        "\u0085",
        "\ufeffa",
        "[" * 40 + "]" * 40,
        "{a: " * 40 + "1" + "}" * 40,
    ),
)
LINES = (
    *("---", "...", "--- again", "%YAML 1.1", "%YAML 1.2", "%TAG ! x:", "# only a comment", "\t", "  ", "version: 1"),
    *("version: 2", "<<: {seed: 1}", "? key", ": value", "- item", "&anchor", "*anchor", "a: &a {b: 1}", "b: *a"),
    *("model: *model", "!!map", "x: !!python/name:os.system", "? [a, b]\n: c", '"quoted key": 1', "seed: [1", "}"),
    *("bomb: &a [1,1,1,1,1,1,1,1,1]", "b: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]", "long: " + "x" * 60_000, "\x00", "\x07"),
    *(
        "data: {" * 50,
        "merge: {<<: [*a, *b]}",
        "k" * 3000 + ": 1",
        "é: 1",
        "🙂: 1",
        "'': 1",
        "null: 1",
        "1: 1",
        "true: 1",
    ),
)
RAW = (
    b"\x00",
    b"\xff",
    b"\xfe\xff",
    b"\xef\xbb\xbf",
    b"\xc3",
    b"\xed\xa0\x80",
    b"\r\n",
    b"\r",
    b"\t",
    b"\x1b[2J",
    b"\x85",
    b"\x7f",
)


@pytest.fixture(scope="session")
def fuzzed() -> Callable[[int, int], Iterator[bytes]]:
    """`fuzzed(first, count)`: recipe number `first` and those that follow."""
    texts = [path.read_bytes() for path in SEEDS]
    trees = [YAML(typ="safe", pure=True).load(text) for text in texts]

    def make(first: int, count: int) -> Iterator[bytes]:
        for number in range(first, first + count):
            chance = random.Random(number)
            which = chance.randrange(len(texts))
            if chance.random() < 0.5:
                yield _of_tree(chance, trees[which])
            else:
                yield _of_text(chance, texts[which])

    return make


def _of_tree(chance: random.Random, tree: Any) -> bytes:
    """Other values, keys and shapes at some places of a recipe, written as YAML or JSON."""
    tree = json.loads(json.dumps(tree))
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        _change_(chance, tree)
    if chance.random() < 0.15:
        return json.dumps(tree, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
    text = "\n".join(_block(chance, tree, 0))
    return text.encode("utf-8", "surrogatepass")


def _change_(chance: random.Random, tree: dict[str, Any]) -> None:
    node: Any = tree
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = chance.choice(keys)
        if isinstance(node[key], (dict, list)) and node[key] and chance.random() < 0.7:
            node = node[key]
            continue
        break
    kind = chance.randrange(6)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[str(chance.choice(VALUES))[:4000] + chance.choice(("", "_", key))] = node.pop(key)
    elif kind == 2 and isinstance(node, dict):
        node[key + chance.choice("sx_ .é")] = node[key]
    elif kind == 3:
        node[key] = [node[key]] if chance.random() < 0.5 else {str(key): node[key]}
    elif kind == 4:
        deep: Any = chance.choice(VALUES)
        for _ in range(chance.choice((3, 31, 34, 200))):
            deep = [deep] if chance.random() < 0.5 else {"a": deep}
        node[key] = deep
    else:
        node[key] = chance.choice(VALUES)


def _block(chance: random.Random, value: Any, indent: int) -> Iterator[str]:
    """A mapping as block YAML; now and then a scalar of `SCALARS` stands in the place of a value."""
    pad = " " * indent
    for key, inner in value.items():
        name = key if key.isidentifier() else json.dumps(key)
        if isinstance(inner, dict) and inner and indent < 60:
            yield f"{pad}{name}:"
            yield from _block(chance, inner, indent + chance.choice((2, 2, 2, 3)))
        elif chance.random() < 0.01:
            yield f"{pad}{name}: {chance.choice(SCALARS)}"
        else:
            yield f"{pad}{name}: {json.dumps(inner)}"


def _of_text(chance: random.Random, content: bytes) -> bytes:
    """Other bytes, lines and scalars at some places of a text."""
    for _ in range(chance.choice((1, 1, 2, 5))):
        kind = chance.randrange(10)
        at = chance.randrange(len(content) + 1) if content else 0
        if kind == 0:
            content = content[:at] + bytes([chance.randrange(256)]) + content[at + 1 :]
        elif kind == 1:
            content = content[:at] + chance.choice(RAW) + content[at:]
        elif kind == 2:
            content = content[: at if chance.random() < 0.8 else 0]
        elif kind == 3:
            end = min(len(content), at + chance.randrange(200))
            content = content[:end] + content[at:end] * chance.choice((1, 2, 50)) + content[end:]
        elif kind == 4:
            content = content[:at] + content[at + chance.randrange(200) :]
        elif kind == 5:
            content = content.replace(b"\n", chance.choice((b"\r\n", b"\r", b"\n\n", b"\n ", b"\n\t", b"\n#")))
        elif kind == 6:
            content = chance.choice((b"\xef\xbb\xbf", b"\xff\xfe", b" ", b"\t", b"--- ", b"%YAML 1.1\n---\n")) + content
        else:
            content = _other_line(chance, content, replaced=kind == 9)
    return content


def _other_line(chance: random.Random, content: bytes, *, replaced: bool) -> bytes:
    lines = content.split(b"\n")
    at = chance.randrange(len(lines))
    if replaced and b": " in lines[at]:
        name = lines[at].partition(b": ")[0]
        lines[at] = name + b": " + chance.choice(SCALARS).encode("utf-8", "surrogatepass")
    else:
        indent = b" " * chance.choice((0, 0, 2, 4, 5))
        lines.insert(at, indent + chance.choice(LINES).encode("utf-8", "surrogatepass"))
    return b"\n".join(lines)
