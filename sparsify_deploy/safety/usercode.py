"""Runs a user's own Python file, found by its path, and turns what goes wrong into one line. Free of torch.

The file is executed anew each time, so that what it makes depends on its text and the random state alone. Its
folder is importable while it runs, and what it imported from there is forgotten afterwards: two files in two
folders may each have their own `layers.py`. A sibling imported later, inside `forward` say, is not found.

A file with relative imports and an `__init__.py` beside it is executed as part of its package, which gets a name of its
own. The packages it lies in run before it, as they do for any import.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

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
    if (packages := _packages(path)) and _imports_relatively(source, path):
        return _load_in(packages, path, source, name)
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


def _packages(path: Path) -> list[Path]:
    """The folders that are the packages of a file, the outermost first; none for a package's own `__init__.py`."""
    found: list[Path] = []
    folder = _real(path).parent
    while path.name != "__init__.py" and (folder / "__init__.py").is_file() and "." not in folder.name:
        found.insert(0, folder)
        folder = folder.parent
    return found


def _imports_relatively(source: bytes, path: Path) -> bool:
    try:
        tree = ast.parse(source, str(path))
    except (SyntaxError, ValueError, RecursionError):  # executing it says so
        return False
    return any(isinstance(node, ast.ImportFrom) and node.level > 0 for node in ast.walk(tree))


class _Bytes(SourceFileLoader):
    """Executes the bytes that were read and judged, and no others that the file may hold by then."""

    def __init__(self, name: str, path: Path, source: bytes) -> None:
        super().__init__(name, str(path))
        self._source = source

    def get_code(self, fullname: str) -> CodeType:
        """Not by way of the bytecode cache."""
        code: CodeType = compile(self._source, self.path, "exec", dont_inherit=True)
        return code


class _Finder:
    """Finds one module by its full name: whichever of its package imports it gets the same one."""

    def __init__(self, name: str, path: Path, source: bytes) -> None:
        self._name, self._path, self._source = name, path, source

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Its spec; None for any other."""
        if name != self._name:
            return None
        loader = _Bytes(name, self._path, self._source)
        return importlib.util.spec_from_file_location(name, self._path, loader=loader)


def _load_in(packages: Sequence[Path], path: Path, source: bytes, root: str) -> ModuleType:
    """The file as a module of its packages, of which the outermost is called `root`; all are executed anew."""
    for name in [key for key in sys.modules if key == root or key.startswith(f"{root}.")]:
        del sys.modules[name]
    spec = importlib.util.spec_from_file_location(
        root, packages[0] / "__init__.py", submodule_search_locations=[str(packages[0])]
    )
    assert spec is not None
    assert spec.loader is not None
    name = ".".join([root, *(folder.name for folder in packages[1:]), path.stem])
    finder = _Finder(name, path, source)
    watch.executes(str(path))
    sys.meta_path.insert(0, finder)
    sys.modules[root] = package = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(package)
        return importlib.import_module(name)
    except BaseException:
        for key in [key for key in sys.modules if key == root or key.startswith(f"{root}.")]:
            del sys.modules[key]
        raise
    finally:
        sys.meta_path.remove(finder)


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
    if isinstance(exc, ImportError) and "no known parent package" in message:
        message += ": put an empty __init__.py beside the file, or import without the dot"
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
