"""Run a whole set of examples through an opened engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparsify_deploy.errors import ModelError
from sparsify_deploy.process import native

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparsify_deploy.stages.subject import Subject
    from sparsify_deploy.types import Arrays, Session


def run_all(
    session: Session, inputs: Mapping[str, NDArray[Any]], batch_size: int, *, fixed: bool = False
) -> dict[str, NDArray[Any]]:
    """Outputs for all examples, in batches of `batch_size` along axis 0.

    With `fixed` the engine takes only whole batches: the last one is filled up with its first example, and what that
    adds is cut off again.
    """
    import numpy as np

    total = len(next(iter(inputs.values())))
    parts: dict[str, list[NDArray[Any]]] = {}
    for start in range(0, total, batch_size):
        piece = {name: values[start : start + batch_size] for name, values in inputs.items()}
        count = len(next(iter(piece.values())))
        if fixed and count < batch_size:
            piece = {k: np.concatenate([v, np.repeat(v[:1], batch_size - count, axis=0)]) for k, v in piece.items()}
        for name, values in native.answer(session, piece, batch_size).items():
            parts.setdefault(name, []).append(values[:count])
    return {name: _joined(name, pieces) for name, pieces in parts.items()}


def run_test(
    session: Session, subject: Subject, batch_size: int, count: int | None = None
) -> tuple[dict[str, NDArray[Any]], Arrays]:
    """Outputs for the first `count` test examples (None: all of them), and these.

    Where the size of an axis differs between batches, examples are taken batch by batch, and of these only the fields
    that are no inputs are returned. An engine with a fixed batch gets batches of that size.
    """
    fixed = session.inputs[0].shape[0]
    size, inputs = fixed or batch_size, subject.examples.inputs
    if not subject.free_axes:
        whole = subject.test_arrays(count)
        return run_all(session, {name: whole[name] for name in inputs}, size, fixed=fixed is not None), whole
    outputs: dict[str, list[NDArray[Any]]] = {}
    fields: dict[str, list[NDArray[Any]]] = {}
    for batch in batches_of_test(subject, size, count):
        given = {name: batch[name] for name in inputs}
        for name, values in run_all(session, given, size, fixed=fixed is not None).items():
            outputs.setdefault(name, []).append(values)
        for name in [name for name in batch if name not in inputs]:
            fields.setdefault(name, []).append(batch[name])
    return (
        {name: _joined(name, pieces) for name, pieces in outputs.items()},
        {name: _joined(name, pieces) for name, pieces in fields.items()},
    )


def batches_of_test(subject: Subject, batch_size: int, count: int | None = None) -> Iterator[Arrays]:
    """The first `count` test examples (None: all of them) in batches, each with the sizes that the data give it."""
    import torch

    test = subject.examples.split("test")
    for rows in torch.arange(len(test) if count is None else min(count, len(test))).split(batch_size):  # type: ignore[no-untyped-call]
        yield {name: values.numpy() for name, values in test.take(rows).items()}


def _joined(name: str, pieces: Sequence[NDArray[Any]]) -> NDArray[Any]:
    import numpy as np

    shapes = {piece.shape[1:] for piece in pieces}
    if len(shapes) > 1:
        raise ModelError(
            f"{name!r} has the shapes {', '.join(map(str, sorted(shapes)))} an example in different batches: metrics "
            "need one; pad all examples to one length"
        )
    return np.concatenate(pieces)
