"""Runs a user's own Python file, found by its path, and turns what goes wrong into one line. Free of torch.

The file is executed anew each time, so that what it makes depends on its text and the random state alone. Its
folder is importable while it runs, and what it imported from there is forgotten afterwards: two files in two
folders may each have their own `layers.py`. A sibling imported later, inside `forward` say, is not found.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

from sparsify_deploy.errors import DataError, SparsifyError, is_out_of_memory
from sparsify_deploy.process import watch

_PACKAGE = Path(__file__).resolve().parents[1]
_LONGEST_MESSAGE = 300

_approved: dict[Path, str] = {}
"""sha256 of the files that a user was shown before they trusted them: what is executed is that, or nothing."""


def approve(path: Path, sha256: str) -> None:
    """Note which bytes of a file the user trusts; `check_approved` refuses others."""
    _approved[_real(path)] = sha256


def approved(path: Path) -> str | None:
    """The sha256 of the bytes that the user trusts, None where they were not asked."""
    return _approved.get(_real(path))


def check_approved(path: Path, content: bytes, error: type[DataError]) -> None:
    """Raises `error` where `content`, about to be executed, is not what the user was shown of the file."""
    expected = approved(path)
    if expected is not None and hashlib.sha256(content).hexdigest() != expected:
        raise error(f"{path}: has changed since its sha256 {expected} was trusted: look at it again, then start again")


def make(
    path: Path,
    name: str,
    arguments: Mapping[str, object],
    *,
    ready: type | tuple[type, ...],
    error: type[DataError],
) -> object:
    """What `name` of the Python file `path` stands for: the result of calling it with `arguments`, or itself.

    A function or class is called. An instance of `ready`, and what cannot be called, is returned as it is.
    Raises `error`, one line that begins with the user's file and, where one failed, line.
    """
    with running(path, error):
        module = _load(path, error)
        if not hasattr(module, name):
            raise error(f"{path}: nothing in it is called {name!r}{_hint(name, module)}")
        found = getattr(module, name)
        if callable(found) and not isinstance(found, ready):
            _check_arguments(path, name, found, arguments, error)
            return found(**arguments)
        if arguments:
            raise error(f"{path}: {name} is no function or class, so arguments have no effect: remove them")
        return found


@contextmanager
def running(path: Path, error: type[DataError]) -> Iterator[None]:
    """Inside, the folder of `path` is importable and the user's exceptions become `error`; `sys.path` is restored."""
    folder = _real(path).parent
    search, known = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        with calling(path, error):
            yield
    finally:
        sys.path[:] = search
        _forget_siblings(folder, known)


@contextmanager
def calling(path: Path, error: type[DataError]) -> Iterator[None]:
    """Inside, what code of the file `path` that is loaded raises becomes `error`, one line with the user's line."""
    try:
        yield
    except (SparsifyError, KeyboardInterrupt):
        raise
    except BaseException as exc:
        if is_out_of_memory(exc):
            raise
        raise error(one_line(path, exc)) from exc


def place(path: Path, found: object) -> str:
    """`file:line` where a function, method or class of the file `path` begins; the file alone for anything else."""
    function = inspect.unwrap(getattr(found, "__func__", found))  # type: ignore[arg-type]
    if isinstance(function, type):
        function = vars(function).get("__init__")
    code = getattr(function, "__code__", None)
    return f"{path}:{code.co_firstlineno}" if code is not None and code.co_filename == str(path) else str(path)


def _check_arguments(
    path: Path, name: str, found: Callable[..., object], arguments: Mapping[str, object], error: type[DataError]
) -> None:
    try:
        signature = inspect.signature(found)
    except (ValueError, TypeError):  # some classes written in C tell none
        return
    try:
        signature.bind(**arguments)
    except TypeError as exc:
        given = ", ".join(arguments) or "none"
        raise error(
            f"{place(path, found)}: {name}{signature} cannot be called with the arguments given ({given}): {exc}; "
            "change params.arguments or the signature"
        ) from exc


def _load(path: Path, error: type[DataError]) -> ModuleType:
    if path.suffix != ".py":
        raise error(f"{path}: expected a Python file, .py")
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # reading a pipe might never end
            raise error(f"{path}: is no file")
        source = path.read_bytes()
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except OSError as exc:
        raise error(f"{path}: cannot be read: {exc.strerror}") from exc
    check_approved(path, source, error)
    name = "_sparsify_deploy_user_" + hashlib.sha256(str(_real(path)).encode()).hexdigest()[:16]
    spec = importlib.util.spec_from_file_location(name, path, loader=SourceFileLoader(name, str(path)))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    watch.executes(str(path))
    sys.modules[name] = module  # dataclasses and inspect look a class's module up by its name
    try:
        # Not through the loader: its bytecode cache goes by size and whole seconds and can be stale.
        exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)  # noqa: S102
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _forget_siblings(folder: Path, known: set[str]) -> None:
    """Drop the newly imported modules that were found in `folder` itself, and their submodules."""
    siblings = set()
    for name in set(sys.modules) - known:
        if "." not in name and folder in _found_in(sys.modules[name]):
            siblings.add(name)
    for name in set(sys.modules) - known:
        if name.partition(".")[0] in siblings:
            del sys.modules[name]


def _found_in(module: ModuleType) -> set[Path]:
    """The folders a top-level module was found in; empty for built-in ones and for a file loaded by its path."""
    if module.__name__.startswith("_sparsify_deploy_user_"):
        return set()
    packages = getattr(module, "__path__", None)
    if packages is not None:
        return {Path(p).resolve().parent for p in packages}
    file = getattr(module, "__file__", None)
    return {Path(file).resolve().parent} if file else set()


def _hint(name: str, module: ModuleType) -> str:
    own = [
        key
        for key, value in vars(module).items()
        if not key.startswith("_")
        and not isinstance(value, ModuleType)
        and (getattr(value, "__module__", None) == module.__name__ or not isinstance(value, type))
    ]
    close = difflib.get_close_matches(name, own, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; one of {', '.join(own)}" if own else "; it defines no names"


def one_line(path: Path, exc: BaseException) -> str:
    """`file:line: Type: message`, the line being the deepest one in the user's own folder."""
    message = exc.msg if isinstance(exc, SyntaxError) and exc.filename else str(exc)
    text = " ".join(message.split())
    if len(text) > _LONGEST_MESSAGE:
        text = text[:_LONGEST_MESSAGE] + "..."
    what = f"{type(exc).__name__}: {text}" if text else type(exc).__name__
    return f"{line_of(path, exc)}: {what}"


def line_of(path: Path, exc: BaseException) -> str:
    """`file:line` of the deepest line in the user's own folder that an exception came through, else `path`."""
    folder = _real(path).parent
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(exc.__traceback__)]
    if isinstance(exc, SyntaxError) and exc.filename:
        places.append((exc.filename, exc.lineno))
    own = [f"{file}:{line}" for file, line in places if _is_own(Path(file), folder)]
    return own[-1] if own else str(path)


def _real(path: Path) -> Path:
    """Without links; of a loop of links the path itself, for reading it says what is wrong."""
    return Path(os.path.realpath(path))


def _is_own(file: Path, folder: Path) -> bool:
    file = _real(file)
    return folder in file.parents and _PACKAGE not in file.parents and "site-packages" not in file.parts
