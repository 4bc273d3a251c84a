"""How a raw example becomes what a network takes, as data: written beside an engine, read by whoever runs it.

A raw example is what a user has: the bytes of an image file, a text, or an array. `prepare.py` does what a spec says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from sparsify_deploy.errors import DataError
from sparsify_deploy.safety import regular
from sparsify_deploy.types import Json

if TYPE_CHECKING:
    from numpy.typing import NDArray

FILE = "preprocessing.json"
FORMAT = 1
"""Raised when the same file would mean something else."""

RAW_EXAMPLES = 8
"""How many test examples a data set keeps in their raw form, for the check of an engine."""

Raw: TypeAlias = "bytes | str | tuple[str, str] | NDArray[Any] | Mapping[str, NDArray[Any]]"
"""An encoded image, a text or a pair of texts, or an array (several by name where a network takes several)."""

_STRICT: dict[str, Any] = {"extra": "forbid", "strict": True, "allow_inf_nan": False}


class _Written:
    """What every kind of spec can do."""

    def to_json(self) -> Json:
        """Plain JSON values, with the number of the format."""
        values: dict[str, Json] = json.loads(json.dumps(asdict(self)))  # type: ignore[call-overload]
        return {"format": FORMAT, **values}

    def to_text(self) -> str:
        """The text of `preprocessing.json`; the same spec gives the same bytes."""
        return json.dumps(self.to_json(), indent=1, sort_keys=True) + "\n"


@dataclass(frozen=True)
class ImageSpec(_Written):
    """An encoded image to `(C, H, W)`: decoded to `mode`, resized by `size` and `fit` as `images.Decoder` does it.

    Then `(x - shift) / divisor` on bytes 0..255, one number a channel or one for all.
    """

    mode: Literal["RGB", "L"]
    size: int | None
    fit: Literal["stretch", "crop"]
    shift: tuple[float, ...]
    divisor: tuple[float, ...]
    input: str = "input"
    layout: Literal["NCHW"] = "NCHW"
    dtype: Literal["float32"] = "float32"
    classes: tuple[str, ...] | None = None
    kind: Literal["image"] = "image"

    __pydantic_config__: ClassVar[Any] = _STRICT

    def __post_init__(self) -> None:
        _check_affine(self.shift, self.divisor, self.input)
        channels = 1 if self.mode == "L" else 3
        if max(len(self.shift), len(self.divisor)) not in (1, channels):
            raise ValueError(f"shift and divisor have one number or {channels}, for mode {self.mode}")
        if self.size is not None and self.size < 1:
            raise ValueError(f"size is {self.size}, at least 1 pixel is needed")


@dataclass(frozen=True)
class TextSpec(_Written):
    """A text to token numbers int64 `(L,)`, by the tokenizer in the file `tokenizer` beside this one.

    Texts are cut at `max_length` tokens and padded with `pad_id` (of token type `pad_type_id`), to `max_length` or to
    the longest of a batch. `inputs` are among input_ids, attention_mask and token_type_ids.
    """

    max_length: int
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    tokenizer: str = "tokenizer.json"
    pad: Literal["max_length", "longest"] = "longest"
    pad_id: int = 0
    pad_token: str = "[PAD]"  # noqa: S105
    pad_type_id: int = 0
    pad_side: Literal["left", "right"] = "right"
    pair: bool = False
    dtype: Literal["int64"] = "int64"
    classes: tuple[str, ...] | None = None
    kind: Literal["text"] = "text"

    __pydantic_config__: ClassVar[Any] = _STRICT

    def __post_init__(self) -> None:
        if Path(self.tokenizer).name != self.tokenizer or self.tokenizer in ("", ".", ".."):
            raise ValueError(f"tokenizer is {self.tokenizer!r}, expected the name of a file beside this one")
        if self.max_length < 1:
            raise ValueError(f"max_length is {self.max_length}, at least 1 token is needed")
        if not self.inputs or not {*self.inputs} <= {"input_ids", "attention_mask", "token_type_ids"}:
            raise ValueError(f"inputs are {self.inputs}, expected input_ids, attention_mask or token_type_ids")


@dataclass(frozen=True)
class ArrayInput:
    """One array, as a user has it, to one input: its axes put into `layout`'s order, then `(x - shift) / divisor`.

    `dtype` is the raw array's; uint8 and float32 become float32. `shape` is the raw example's, None for a free axis.
    `layout` says what its axes are: HW gets an axis of one channel, HWC becomes CHW, any else stays. `shift` and
    `divisor` are one number, one for each entry of the first axis after that, or none.
    """

    name: str
    dtype: Literal["uint8", "float32", "int64"]
    shape: tuple[int | None, ...]
    layout: Literal["HW", "HWC", "CHW", "any"] = "any"
    shift: tuple[float, ...] = ()
    divisor: tuple[float, ...] = ()

    __pydantic_config__: ClassVar[Any] = _STRICT

    def __post_init__(self) -> None:
        if bool(self.shift) != bool(self.divisor):
            raise ValueError(f"{self.name}: shift and divisor go together")
        if self.shift:
            _check_affine(self.shift, self.divisor, self.name)


@dataclass(frozen=True)
class ArraySpec(_Written):
    """Arrays by the name of the input they become; `example` says in words what they hold."""

    inputs: tuple[ArrayInput, ...]
    example: str = ""
    classes: tuple[str, ...] | None = None
    kind: Literal["array"] = "array"

    __pydantic_config__: ClassVar[Any] = _STRICT

    def __post_init__(self) -> None:
        names = [each.name for each in self.inputs]
        if not names or len({*names}) < len(names):
            raise ValueError(f"inputs are {names}, expected one or more, each name once")


Spec: TypeAlias = ImageSpec | TextSpec | ArraySpec


def read(path: Path) -> Spec:
    """The spec in a file. Raises DataError."""
    try:
        text = regular.read(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    return from_json(text, str(path))


def from_json(source: Json | bytes, where: str = FILE) -> Spec:
    """The spec that `to_json` made, from values or from the bytes of a file; `where` begins every error.

    Raises DataError for another format, an unknown field, or a value that makes no sense.
    """
    from pydantic import ValidationError

    try:
        values = json.loads(source) if isinstance(source, bytes) else dict(source)
        given = dict(values).pop("format")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{where}: does not say how raw examples become inputs ({type(error).__name__})") from error
    if given != FORMAT:
        raise DataError(f"{where}: format {given!r}, this program reads {FORMAT}: use the version that wrote it")
    kinds: dict[str, Any] = {"image": ImageSpec, "text": TextSpec, "array": ArraySpec}
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise DataError(f"{where}: kind {kind!r}, expected one of {', '.join(kinds)}")
    del values["format"]
    try:
        found: Spec = _adapter(kinds[kind]).validate_json(json.dumps(values))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{where}: {f'{place}: ' if place else ''}{first['msg']}") from None
    return found


@cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def samples(total: int) -> list[int]:
    """Which of `total` test examples a data set keeps raw: up to `RAW_EXAMPLES`, spread over all of them."""
    count = min(RAW_EXAMPLES, total)
    return [i * total // count for i in range(count)]


def _check_affine(shift: Sequence[float], divisor: Sequence[float], name: str) -> None:
    import numpy as np  # not for reading a plan

    if not shift or not divisor:
        raise ValueError(f"{name}: shift and divisor have one number a channel, or one for all")
    if len({len(shift), len(divisor)} - {1}) > 1:
        raise ValueError(f"{name}: {len(shift)} shifts and {len(divisor)} divisors")
    if not all(np.float32(number) != 0 for number in divisor):
        raise ValueError(f"{name}: a divisor is 0")
