"""Around every call into a native library that may crash, hang or run out of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sparsify_deploy.process import memory, watch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparsify_deploy.types import Arrays, Session


@contextmanager
def call(what: str, batch_size: int = 0) -> Iterator[Callable[[], None]]:
    """Inside, `what` (the subject of a sentence, as in "OpenVINO compiling model.xml") is under way.

    The supervisor names it where it crashes and stops it after its time limit; an error that means spent memory
    becomes `OutOfResources`, whatever class the library has for it. Yields a function that starts the time anew.
    """
    with memory.explained(), watch.limited(what, batch_size) as renew:
        yield renew


def answer(session: Session, inputs: Arrays, batch_size: int = 0) -> dict[str, NDArray[Any]]:
    """What an opened engine answers to one batch."""
    with call(f"running a batch in {type(session).__name__.removesuffix('Session')}", batch_size):
        session.bind(inputs)
        session.execute()
        return session.fetch()
