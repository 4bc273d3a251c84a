"""What TensorRT's names of engine layers tell of the ONNX nodes in them. Nothing here imports onnx."""

from __future__ import annotations

import re
from collections.abc import Iterator

_COPY = re.compile(r"_clone_\d+$")
_KIND = re.compile(r"^\[\w+\] ")
_METADATA = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_OPAQUE = ("ForeignNode", "__myl", "__mye")


def hides_nodes(name: str) -> bool:
    """Whether a name is that of a compiled subgraph, which does not list its nodes: `{ForeignNode[a...b]}`."""
    return any(word in name for word in _OPAQUE)


def nodes_in(name: str, metadata: str = "") -> tuple[str, ...]:
    """The ONNX nodes in an engine's layer: by its metadata (`[ONNX Layer: a]...`) where it has one, else by its name.

    A name lists nodes as `a + b` (fused) or `a || b` (side by side), wraps pointwise ones as `PWN(a, b)` and numbers
    copies, `a_clone_0`. Copies between formats and layers of the builder's own hold no node. Of a compiled subgraph
    the name gives two ends at most; to hold it for either's would charge one node with the work of all.
    """
    if found := _METADATA.findall(metadata):
        return tuple(dict.fromkeys(found))
    if name.startswith("Reformatting CopyNode") or "(Unnamed Layer" in name or hides_nodes(name):
        return ()
    parts = (_plain(part) for part in re.split(r"\s\+\s|\s\|\|\s|,\s", name))
    return tuple(dict.fromkeys(part for part in parts if part))


def _plain(part: str) -> str:
    part = _KIND.sub("", part.strip())
    while part.startswith("PWN("):
        part = part.removeprefix("PWN(")
    surplus = part.count(")") - part.count("(")
    if surplus > 0 and part.endswith(")" * surplus):
        part = part[:-surplus]
    return _COPY.sub("", part)


def listed(text: str) -> Iterator[str]:
    """The engine layers in a comma-separated list of the builder's log; a comma inside of brackets parts nothing."""
    depth, name = 0, ""
    for letter in [*text, ","]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth <= 0:
            if name.strip():
                yield name.strip()
            name = ""
        else:
            name += letter
