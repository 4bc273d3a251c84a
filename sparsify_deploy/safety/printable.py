"""Text of others made fit to be shown: a name in a file may hold what a terminal or a reader takes for a command."""

from __future__ import annotations

import re

_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, of which the terminal's escape sequences are made
    "\u061c\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069"  # what turns the direction of a line, or breaks it
    "\ufeff\ud800-\udfff\ufff9-\ufffb\U000e0000-\U000e007f]"  # what no one sees, and halves of a surrogate pair
)


def printable(text: str) -> str:
    r"""`text` with characters that a terminal obeys or that no one sees as `\x1b`; line breaks and tabs stay."""
    return _UNSEEN.sub(lambda found: found.group().encode("unicode_escape", "surrogatepass").decode("ascii"), text)


def one_line(text: str) -> str:
    r"""The same with line breaks and tabs as `\n` and `\t`."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")
