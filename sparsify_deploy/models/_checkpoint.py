"""Weights from a file into a network, by name or by order, refused with one line where they do not fit."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from sparsify_deploy.errors import ModelError
from sparsify_deploy.models._attention import packed
from sparsify_deploy.models._checkpoint_file import read
from sparsify_deploy.types import Facts

_SHOWN = 3
_PARTS = {"weight", "bias", "running_mean", "running_var"}
_COMPILED = "_orig_mod."
_UNUSED = "num_batches_tracked"
"""Counts batches in BatchNorm; nothing here uses it."""


@dataclass(frozen=True)
class Loaded:
    """What became of a checkpoint: `tensors` of the network's `of` are from it, `share` of its parameters.

    `missing` and `misshaped` were left at their initialisation, `unexpected` left in the file. `under` are the keys
    that the tensors lay under, `dropped` what was taken off their names.
    """

    file: str
    match: Literal["names", "order"]
    tensors: int
    of: int
    share: float
    missing: tuple[str, ...] = ()
    misshaped: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    under: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    unpickled: bool = False

    @property
    def facts(self) -> Facts:
        """As JSON, with every name."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @property
    def line(self) -> str:
        """For a person, with a few names."""
        text = f"model.checkpoint {self.file}: {self.tensors} of {self.of} tensors loaded by {self._how()}"
        left = [*self.missing, *self.misshaped]
        if left:
            text += f", {self.share:.1%} of the parameters; left as initialised: " + "; ".join(
                part
                for part in (_counted("missing", self.missing), _counted("of another shape", self.misshaped))
                if part
            )
        return text + (f"; not used: {_counted('unexpected', self.unexpected)}" if self.unexpected else "")

    def _how(self) -> str:
        how = "name" if self.match == "names" else "order, whatever their names, so look at the accuracy first"
        if self.under:
            how += f", from {'.'.join(self.under)}"
        if self.dropped:
            how += f", without {' and '.join(map(repr, self.dropped))} in the names"
        return how + (", unpickled with its code" if self.unpickled else "")


def load_checkpoint(
    model: nn.Module,
    path: Path,
    *,
    partial: bool = False,
    match: Literal["names", "order"] = "names",
    trusted: bool = False,
    advise: bool = True,
) -> Loaded:
    """Copy the weights and buffers of `path` into `model`, and say what was loaded; on an error nothing is changed.

    All of them, unless `partial`: then what the file lacks or has in another shape stays as it is. By names, a prefix
    in front of them all is taken off, as is torch.compile's `_orig_mod.` anywhere, and attention that a run took apart
    is packed; a missing `num_batches_tracked` and the second name of a shared tensor may be absent. By order, which
    torch's own files alone have, the k-th tensor of the file is the k-th of the network, whatever its name, but a
    weight is no bias, and `partial` leaves out no more than the last module. `trusted` files may run code: see `read`.
    `advise` adds to an error which setting of the recipe would load the file.

    Raises `ModelError`.
    """
    own, found = model.state_dict(), read(path, trusted=trusted)
    dropped: tuple[str, ...] = ()
    ordered = path.suffix != ".safetensors"
    if match == "order" and not ordered:
        raise ModelError(
            f"{path}: a .safetensors file holds its tensors sorted by name, not in the order of the network that made "
            "them: load it by names, or save its state_dict as a .pt"
        )
    if match == "order":
        given = _in_order(found.tensors, own, path, new_head=partial)
    else:
        given, dropped = _unprefixed(found.tensors, own)
        given = packed(given, own)
    misfit = _compared(given, own)
    if misfit and not partial:
        advice = _advice(found.tensors, own, misfit, ordered=ordered) if advise else ""
        raise ModelError(f"{path}: does not fit the model: {misfit.text}{advice}")
    fitting = {name: value for name, value in given.items() if name in own and name not in misfit.misshaped}
    if not any(_real(value) for value in fitting.values()):
        raise ModelError(f"{path}: nothing in it fits the model, it is of another network: {misfit.text}")
    broken = [name for name, value in fitting.items() if _real(value) and not bool(value.isfinite().all())]
    if broken:
        raise ModelError(f"{path}: {_counted('with NaN or infinity', broken)}; the training that made it diverged")
    model.load_state_dict(fitting, strict=False)
    left = {*misfit.missing, *misfit.misshaped}
    sizes = {name: value.numel() for name, value in model.named_parameters()}
    return Loaded(
        file=path.name,
        match=match,
        tensors=len(fitting),
        of=len(fitting) + len(left),
        share=1.0 - sum(sizes.get(name, 0) for name in left) / max(1, sum(sizes.values())),
        missing=misfit.missing,
        misshaped=tuple(misfit.misshaped.values()),
        unexpected=misfit.unexpected,
        under=found.under,
        dropped=dropped,
        unpickled=found.unpickled,
    )


def _unprefixed(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """`given` without what wrappers put into its names, and what was taken off.

    One rule for all wrappers (`module.`, `model.`, ...): the prefix behind which the most names of the network are
    found, if that is half of them or more, and more than are found without it.
    """
    dropped: tuple[str, ...] = ()
    if any(_COMPILED in name for name in given) and not any(_COMPILED in name for name in own):
        given = {name.replace(_COMPILED, ""): value for name, value in given.items()}
        dropped = (_COMPILED,)
    found = Counter(
        name[:start]
        for name in given
        for start in (0, *(at + 1 for at, letter in enumerate(name) if letter == "."))
        if name[start:] in own
    )
    prefix = max(found, key=lambda p: (found[p], -len(p)), default="")
    if not prefix or found[prefix] <= found[""] or 2 * found[prefix] < len(own):
        return dict(given), dropped
    inside = {name[len(prefix) :]: value for name, value in given.items() if name.startswith(prefix)}
    outside = {name: value for name, value in given.items() if not name.startswith(prefix) and name not in inside}
    return {**outside, **inside}, (*dropped, prefix)


def _in_order(
    given: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path, *, new_head: bool
) -> dict[str, Tensor]:
    """`given` under the names of `own`, the k-th under the k-th name. Raises ModelError at the first misfit.

    With `new_head` the tensors of the last module may be of another shape, and of no other: order has no other anchor.
    """
    ours, theirs = _ordered(own), _ordered(given)
    head = ours[-1].rpartition(".")[0] if ours else ""
    for k, (mine, other) in enumerate(zip(ours, theirs, strict=False), 1):
        parts = {mine.rpartition(".")[2], other.rpartition(".")[2]}
        swapped = len(parts) == 2 and parts <= _PARTS  # a norm's four vectors have one shape
        reshaped = own[mine].shape != given[other].shape and not (new_head and mine.rpartition(".")[0] == head)
        if swapped or reshaped or _real(own[mine]) != _real(given[other]):
            raise ModelError(
                f"{path}: does not fit the model by order: tensor {k} is {other} {tuple(given[other].shape)}, the "
                f"model has {mine} {tuple(own[mine].shape)} there"
            )
    if len(ours) != len(theirs):
        raise ModelError(
            f"{path}: does not fit the model by order: it holds {len(theirs)} tensors, the model has {len(ours)}"
        )
    return {mine: given[other] for mine, other in zip(ours, theirs, strict=True)}


def _ordered(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name in tensors if not name.endswith(_UNUSED)]


def _real(value: Tensor) -> bool:
    return value.is_floating_point()


@dataclass(frozen=True)
class _Misfit:
    """What keeps tensors from being a network's: names, those of another shape with both shapes in words."""

    missing: tuple[str, ...]
    misshaped: Mapping[str, str]
    unexpected: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.missing or self.misshaped or self.unexpected)

    @property
    def text(self) -> str:
        close = difflib.get_close_matches(self.unexpected[0], self.missing, n=1, cutoff=0.6) if self.unexpected else []
        renamed = f", did you mean {close[0]!r} by {self.unexpected[0]!r}?" if close else ""
        problems = (
            _counted("missing", self.missing),
            _counted("unexpected", self.unexpected) + renamed,
            _counted("of another shape", tuple(self.misshaped.values())),
        )
        return "; ".join(problem for problem in problems if problem)


def _compared(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> _Misfit:
    shared = {_storage(own[name]) for name in given if name in own}
    return _Misfit(
        missing=tuple(
            name
            for name, value in own.items()
            if name not in given and not name.endswith(_UNUSED) and _storage(value) not in shared
        ),
        misshaped={
            name: f"{name} {tuple(value.shape)}, the model has {tuple(own[name].shape)}"
            for name, value in given.items()
            if name in own and own[name].shape != value.shape
        },
        unexpected=tuple(name for name in given if name not in own),
    )


def _advice(given: Mapping[str, Tensor], own: Mapping[str, Tensor], misfit: _Misfit, *, ordered: bool) -> str:
    """`; what would load it`, where something would."""
    pairs = list(zip(_ordered(given), _ordered(own), strict=False))
    unlike = {b.rpartition(".")[0] for a, b in pairs if given[a].shape != own[b].shape}
    if ordered and misfit.missing and pairs and len(_ordered(given)) == len(_ordered(own)):
        if not unlike:
            return "; its shapes are the model's in order: model.checkpoint_match: order loads it so"
        if unlike == {pairs[-1][1].rpartition(".")[0]} and 2 * len(misfit.missing) >= len(own):
            return (
                "; its shapes are the model's in order but for the last module: model.checkpoint_match: order with "
                "model.checkpoint_partial: true loads it so"
            )
    if 2 * (len(misfit.missing) + len(misfit.misshaped)) < len(own):
        return "; model.checkpoint_partial: true loads what fits and leaves the rest as initialised"
    return ""


def _storage(value: Tensor) -> tuple[int, torch.Size]:
    """Equal for two names of one tensor."""
    return (value.data_ptr(), value.shape)


def _counted(what: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{more})"
