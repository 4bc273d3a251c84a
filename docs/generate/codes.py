"""The exit codes, from the tree of errors."""

from __future__ import annotations

from collections.abc import Iterator

from generate import text
from sparsify_deploy.errors import SparsifyError

_OTHERS = {0: "Done.", 1: "A bug of this program; `sparsify-deploy --traceback ...` shows where."}


def table_rows() -> list[tuple[int, str, str]]:
    """Code, names of the errors that end with it, and what they mean."""
    found: dict[int, list[type[SparsifyError]]] = {}
    for error in _tree(SparsifyError):
        found.setdefault(error.exit_code, []).append(error)
    rows = [(code, "", text) for code, text in _OTHERS.items()]
    for code, errors in sorted(found.items()):
        if code not in _OTHERS:
            meaning = " ".join((error.__doc__ or "").partition("\n")[0] for error in errors)
            rows.append((code, ", ".join(f"`{error.__name__}`" for error in errors), meaning))
    return rows


def table() -> str:
    """All exit codes."""
    return text.table(
        ("code", "errors", "meaning"), [(str(code), names or "-", text) for code, names, text in table_rows()]
    )


def _tree(error: type[SparsifyError]) -> Iterator[type[SparsifyError]]:
    yield error
    for inner in error.__subclasses__():
        if inner.__module__ == SparsifyError.__module__:
            yield from _tree(inner)
