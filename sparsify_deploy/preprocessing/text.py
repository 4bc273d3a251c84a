"""Texts to token numbers by a tokenizer's own file; the only module that knows tokenizers.

What a tokenizer splits a text into lies in `tokenizer.json`, whole; which token fills up a batch may lie in
`tokenizer_config.json` or `special_tokens_map.json` beside it. Reference: https://huggingface.co/docs/tokenizers
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sparsify_deploy.errors import DataError, MissingExtra
from sparsify_deploy.preprocessing.tokenizer_files import BESIDE, FILE, files
from sparsify_deploy.process import native

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparsify_deploy.preprocessing.spec import TextSpec

_AT_A_TIME = 1024


@dataclass(frozen=True)
class Padding:
    """The token that fills up a batch, its number and token type, and the side it goes to."""

    token: str
    id: int
    type_id: int = 0
    side: Literal["left", "right"] = "right"


@dataclass(frozen=True)
class Tokens:
    """The tokens of N texts one after another: text i is `ids[starts[i]:starts[i + 1]]`, `types` likewise.

    `truncated` is how many of the texts had more tokens than were kept.
    """

    ids: NDArray[np.int32]
    types: NDArray[np.uint8]
    starts: NDArray[np.int64]
    truncated: int

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens a text, `(N,)`, special ones included."""
        return np.diff(self.starts)


def padding(folder: Path) -> Padding:
    """What pads a batch: as tokenizer.json has it, else as a file beside it names the token. Raises DataError."""
    found = files(folder)
    tokenizer = _load(found[FILE])
    settings = [_json(found[name]) for name in BESIDE if name in found]
    left = any(each.get("padding_side") == "left" for each in settings)
    if (own := tokenizer.padding) is not None:
        return Padding(own["pad_token"], own["pad_id"], own["pad_type_id"], own["direction"])
    for each in settings:
        token = each.get("pad_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            if (number := tokenizer.token_to_id(token)) is None:
                raise DataError(f"{folder}: the pad token {token!r} is not in the vocabulary of {FILE}")
            return Padding(token, number, 0, "left" if left else "right")
    raise DataError(
        f"{folder}: names no pad token, which a batch of texts needs: set one (tokenizer.pad_token = "
        "tokenizer.eos_token, say) and save the tokenizer again"
    )


@dataclass(frozen=True)
class Encoder:
    """A tokenizer that cuts and pads as a `TextSpec` says."""

    tokenizer: Any
    spec: TextSpec

    @classmethod
    def open(cls, path: Path, spec: TextSpec) -> Encoder:
        """Read tokenizer.json at `path`. Raises DataError, also where `max_length` leaves no token of a text."""
        tokenizer = _load(path)
        made = cls(tokenizer, spec)
        with _explained(str(path)):
            special = made.special
            direction = (tokenizer.truncation or {}).get("direction", "right")
            tokenizer.no_padding()
            if spec.max_length > special:
                tokenizer.enable_truncation(spec.max_length, direction=direction)
        if spec.max_length <= special:
            raise DataError(
                f"{path}: max_length {spec.max_length} leaves no room for text beside {special} special tokens"
            )
        return made

    @property
    def special(self) -> int:
        """Tokens that a text gets besides its own."""
        return int(self.tokenizer.num_special_tokens_to_add(self.spec.pair))

    def __call__(self, texts: Sequence[Any]) -> dict[str, NDArray[np.int64]]:
        """A batch: each of `spec.inputs` `(N, L)`, L being `max_length` or the longest text's tokens."""
        tokens = self.encode(texts)
        return padded(tokens, np.arange(len(texts)), self.spec)

    def encode(self, texts: Sequence[Any]) -> Tokens:
        """Texts, or pairs of texts where `spec.pair`. Raises DataError naming the first that is none."""
        for i, text in enumerate(texts):
            if not _is_text(text, pair=self.spec.pair):
                wanted = "a pair of texts" if self.spec.pair else "a text"
                raise DataError(f"text {i}: expected {wanted} in valid Unicode")
        ids: list[NDArray[np.int32]] = [np.empty(0, np.int32)]
        types: list[NDArray[np.uint8]] = [np.empty(0, np.uint8)]
        truncated = 0
        for start in range(0, len(texts), _AT_A_TIME):
            for encoding in self._encoded(list(texts[start : start + _AT_A_TIME])):
                try:
                    ids.append(np.array(encoding.ids, np.int32))
                    types.append(np.array(encoding.type_ids, np.uint8))
                except OverflowError as error:
                    raise DataError(
                        "the tokenizer numbers a token beyond 31 bits or its type beyond 8: make it again"
                    ) from error
                truncated += bool(encoding.overflowing)
        starts = np.cumsum([len(part) for part in ids], dtype=np.int64)
        return Tokens(np.concatenate(ids), np.concatenate(types), starts, truncated)

    def _encoded(self, texts: list[Any]) -> list[Any]:
        # a pattern of its own may take for ever on some text
        with native.call("splitting texts into tokens"), _explained("the tokenizer"):
            found: list[Any] = self.tokenizer.encode_batch(texts)
        return found


def padded(tokens: Tokens, rows: NDArray[np.int64], spec: TextSpec) -> dict[str, NDArray[np.int64]]:
    """The texts at `rows` `(B,)` as a batch: each of `spec.inputs` int64 `(B, L)`."""
    lengths = tokens.lengths[rows]
    width = spec.max_length if spec.pad == "max_length" else max(int(lengths.max(initial=0)), 1)
    column = np.arange(width)
    if spec.pad_side == "left":
        column = column - (width - lengths)[:, None]
        real = column >= 0
    else:
        column = np.broadcast_to(column, (len(rows), width))
        real = column < lengths[:, None]
    where = (tokens.starts[rows][:, None] + column)[real]
    made: dict[str, NDArray[np.int64]] = {}
    for name in spec.inputs:
        if name == "attention_mask":
            made[name] = real.astype(np.int64)
            continue
        values, fill = (tokens.ids, spec.pad_id) if name == "input_ids" else (tokens.types, spec.pad_type_id)
        made[name] = np.full((len(rows), width), fill, np.int64)
        made[name][real] = values[where]
    return made


def _is_text(text: Any, *, pair: bool) -> bool:
    if pair:
        return isinstance(text, tuple) and len(text) == 2 and all(_is_text(part, pair=False) for part in text)
    return isinstance(text, str) and is_unicode(text)


def is_unicode(text: str) -> bool:
    """False for a text with half a surrogate pair, which JSON can spell and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _load(path: Path) -> Any:
    try:
        from tokenizers import Tokenizer  # type: ignore[import-untyped]
    except ImportError as exc:
        raise MissingExtra("tokenizers", "hf", "text") from exc
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: is no file: copy the tokenizer again")
    with _explained(str(path)):
        return Tokenizer.from_file(str(path))


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """What the package raises, Exception itself or the end of a Rust thread, as one line about the tokenizer."""
    try:
        yield
    except BaseException as exc:
        if not isinstance(exc, Exception) and type(exc).__name__ != "PanicException":
            raise
        text = " ".join(str(exc).split())[:160]
        raise DataError(f"{what}: is no tokenizer, or is damaged ({text})") from exc


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as exc:
        raise DataError(f"{path}: cannot be read as JSON ({type(exc).__name__}): copy the tokenizer again") from exc
    if not isinstance(found, dict):
        raise DataError(f"{path}: holds no JSON object: copy the tokenizer again")
    return found
