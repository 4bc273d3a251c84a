"""The pages of the documentation as code: each page is one session in a folder of its own, block after block.

A comment on the line above a block says how it is taken, `<!-- test: WORDS -->`:

    file NAME            the block is written to NAME in the page's folder
    section              YAML: top-level sections, put over a minimal recipe
    shortened            columns of the output may have other widths, for the page leaves some out
    measured             likewise, and figures, with what is claimed from them, may be others
    output               text: what the Python block before it printed
    not run: REASON      left out here; the reason is listed by the tests

YAML without one is a whole recipe. A `console` block holds commands after `$ ` and what each prints, where a line `...`
stands for any lines and `...` in a line for any text. Anywhere on a page:

    <!-- test: starts from PAGE -->     the folder begins as the other page left it
    <!-- test: in a checkout -->        the folder begins with a copy of the package, which its commands run
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
MINIMAL = """\
version: 1
model: {source: builtin, params: {name: resnet8, in_channels: 1}}
data: {source: digits}
training: {epochs: 1}
nm: {fine_tune: {}}
quantize: {qat: {}}
deploy: [{runtime: openvino}]
"""

_FENCE = re.compile(r"^```(.*)$")
_MARK = re.compile(r"^<!-- test: (.*) -->$")
_FIGURE = re.compile(r"\d+(?:\.\d+)?(?:e[+-]\d+)?")


@dataclass(frozen=True)
class Block:
    """One fenced block: the page's name, the line of its fence, and the words of the comment above it."""

    page: str
    line: int
    language: str
    words: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass
class Session:
    """What came of the blocks of a page, run in `folder`."""

    folder: Path
    failures: list[str] = field(default_factory=list)
    ran: int = 0
    names: dict[str, object] = field(default_factory=lambda: {"__name__": "__main__"})
    printed: str = ""


def blocks_of(page: str, text: str) -> list[Block]:
    """All fenced blocks of a page."""
    found: list[Block] = []
    language: str | None = None
    start, words, above = 0, "", ""
    inside: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        fence = _FENCE.match(line)
        if language is None and fence:
            mark = _MARK.match(above)
            language, start, words, inside = fence[1].strip(), number, mark[1] if mark else "", []
        elif language is not None and fence:
            found.append(Block(page, start, language, words, "".join(f"{part}\n" for part in inside)))
            language = None
        elif language is not None:
            inside.append(line)
        above = line
    assert language is None, f"{page}:{start}: a block without an end"
    return found


def page_words(text: str) -> list[str]:
    """The words of comments that stand above no block."""
    lines = text.splitlines()
    pairs = zip(lines, [*lines[1:], ""], strict=True)
    return [mark[1] for line, after in pairs if (mark := _MARK.match(line)) and not _FENCE.match(after)]


def written_pages() -> dict[str, str]:
    """The pages as they lie in the folder, by name."""
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}


@pytest.fixture(scope="session")
def hook() -> ModuleType:
    """What mkdocs loads."""
    spec = importlib.util.spec_from_file_location("docs_hook", DOCS / "generate" / "hook.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def sessions(tmp_path_factory: pytest.TempPathFactory, torchvision: ModuleType) -> Callable[[str], Session]:
    """Run a page once, after the page it starts from; torchvision is loaded for what timm needs of it."""
    done: dict[str, Session] = {}

    def session(page: str) -> Session:
        if page not in done:
            done[page] = _run(page, tmp_path_factory.mktemp(page.partition(".")[0]), session)
        return done[page]

    return session


def _run(page: str, folder: Path, others: Callable[[str], Session]) -> Session:
    text = written_pages()[page]
    found, checkout = Session(folder), False
    for words in page_words(text):
        if words.startswith("starts from "):
            earlier = others(words.removeprefix("starts from "))
            if earlier.failures:
                found.failures.append(f"{page}: starts from a page that failed")
            shutil.copytree(earlier.folder, folder, dirs_exist_ok=True)
        elif words == "in a checkout":
            checkout = True
            unwanted = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / "sparsify_deploy", folder / "sparsify_deploy", ignore=unwanted)
        else:
            found.failures.append(f"{page}: unknown words {words!r}")
    for block in blocks_of(page, text):
        if block.words.startswith("not run: "):
            continue
        try:
            with _inside(folder):
                _one(block, found, checkout)
            found.ran += 1
        except (Exception, SystemExit) as error:  # noqa: BLE001 - all of a page is reported together
            found.failures.append(f"{block.place}: {type(error).__name__}: {error}")
    return found


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Work in `folder`, as in a fresh shell: no colours, one thread, what is imported from it forgotten."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "80")
        patch.setenv("NO_COLOR", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(sys, "path", [*sys.path])
        yield


def _one(block: Block, session: Session, checkout: bool) -> None:
    """Run one block; Python blocks of a page share their names."""
    kind, _, rest = block.words.partition(" ")
    if kind == "file":
        path = session.folder / rest
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text, encoding="utf-8")
        if block.language == "yaml":
            _validate(path)
    elif block.language == "yaml":
        path = session.folder / f".block-{block.line}.yaml"
        path.write_text(_over_minimal(block.text) if kind == "section" else block.text, encoding="utf-8")
        _validate(path)
    elif block.language == "python":
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(block.text, block.place, "exec"), session.names)
        session.printed = out.getvalue()
    elif block.language in {"console", "bash"}:
        for command, expected in _commands(block):
            got = _call(command, checkout)
            if block.language == "console":
                _compare(expected, got, kind, command)
    elif kind == "output":
        _compare(block.text.splitlines(), session.printed, kind, "the Python block above")
    else:
        raise AssertionError(f"a block of {block.language or 'no language'} without a word on how it is tested")


def _validate(path: Path) -> None:
    from sparsify_deploy.recipe_source import load

    load(path)


def _over_minimal(text: str) -> str:
    """The minimal recipe with these top-level sections in place of its own."""
    given = [line.partition(":")[0] for line in text.splitlines() if line[:1].isalpha()]
    kept = [line for line in MINIMAL.splitlines() if line.partition(":")[0] not in given]
    return "".join(f"{line}\n" for line in kept) + text


def _commands(block: Block) -> Iterator[tuple[str, list[str]]]:
    """Each command with the lines that it is said to print; a backslash continues a command."""
    lines = block.text.splitlines()
    if block.language == "bash":
        for line in block.text.replace("\\\n", " ").splitlines():
            if line.strip() and not line.startswith("#"):
                yield line, []
        return
    assert lines[:1], "an empty block"
    assert lines[0].startswith("$ "), f"the first line is no command: {lines[0]}"
    command: str | None = None
    expected: list[str] = []
    while lines:
        line = lines.pop(0)
        if line.startswith("$ "):
            if command is not None:
                yield command, expected
            command, expected = line[2:], []
            while command.endswith("\\"):
                command = command[:-1] + lines.pop(0)
        else:
            expected.append(line)
    assert command is not None
    yield command, expected


def _call(command: str, checkout: bool) -> str:
    """Run a command and return what it printed; AssertionError where it fails and the page does not ask for its code.

    The program itself is called in this process, which has torch already; all else goes to a shell.
    """
    bare, asks, _ = command.partition("; echo $?")
    words = shlex.split(bare, comments=True)
    ours = words[0] == "sparsify-deploy" and not set(words) & {"|", ">", "<", "&&"}
    if ours and not checkout:
        code, printed = _in_process(words[1:])
    else:
        argv = [sys.executable, "-m", "sparsify_deploy", *words[1:]] if ours else ["bash", "-c", bare]
        path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        if checkout:
            path["PYTHONPATH"] = os.getcwd()
        done = subprocess.run(
            argv, env={**os.environ, **path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
            check=False,
        )  # fmt: skip
        code, printed = done.returncode, done.stdout
    if asks:
        return f"{printed}{code}\n"
    assert code == 0, f"`{command}` ended with {code}:\n{printed[-3000:]}"
    return printed


def _in_process(arguments: list[str]) -> tuple[int, str]:
    from sparsify_deploy.__main__ import main

    both = io.StringIO()
    with contextlib.redirect_stdout(both), contextlib.redirect_stderr(both):
        code = main(arguments)
    return code, both.getvalue()


def _compare(expected: list[str], got: str, kind: str, command: str) -> None:
    """AssertionError where the output is another one than the page shows."""
    plain = {"measured": _unfigured, "shortened": _narrow}.get(kind, str.rstrip)
    lines = [plain(line) for line in expected]
    while lines and not lines[-1]:
        lines.pop()
    text = "".join(f"{plain(line)}\n" for line in got.rstrip("\n").splitlines())
    pattern = "".join(
        r"(?:.*\n)*?" if line == "..." else ".*".join(re.escape(part.rstrip()) for part in line.split("...")) + r"\n"
        for line in lines
    )
    if not re.fullmatch(pattern, text):
        page = "\n".join(lines)
        raise AssertionError(f"`{command}` printed something else:\n{text[:6000]}--- the page, read alike\n{page}")


def _narrow(line: str) -> str:
    """A line without the width of its columns."""
    return re.sub(r" {2,}", "  ", re.sub(r"-{2,}", "--", line)).rstrip()


def _unfigured(line: str) -> str:
    """A line without its figures, the width of its columns, and the claims that rest on figures."""
    return _narrow(_FIGURE.sub("N", re.sub(r"\b(within the noise|faster|slower)\b", "CLAIM", line)))


NamedPages = Mapping[str, str]


@pytest.fixture(scope="session")
def complete_pages(hook: ModuleType) -> NamedPages:
    """The pages with their generated parts."""
    return {name: hook.filled(text) for name, text in written_pages().items()}
