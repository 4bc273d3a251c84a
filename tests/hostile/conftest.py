"""A fork server, so that a crash of native code is seen and its file known, and mutations of files by a seed."""

from __future__ import annotations

import json
import os
import random
import resource
import select
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

MOST_CPU_S = 30
LONGEST_WAIT_S = 120.0
MOST_RSS_KIB = 2 << 20
_SPARE_BYTES = 6 << 30


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: `fine`, `refused` in one line, or else `bug`, `memory`, `killed`, `hung`."""

    name: str
    kind: str
    text: str = ""
    cpu_s: float = 0.0
    rss_kib: int = 0

    @property
    def good(self) -> bool:
        """Whether it is what a file of any content may lead to."""
        return self.kind in ("fine", "refused") and self.cpu_s <= MOST_CPU_S and self.rss_kib <= MOST_RSS_KIB


Trial = tuple[str, Callable[[], object]]


@pytest.fixture(scope="session")
def forked() -> Callable[[Sequence[Trial]], list[Outcome]]:
    """Runs trials in a child; where that dies, the trial it was at is `killed` and another child goes on behind it."""

    def run(trials: Sequence[Trial]) -> list[Outcome]:
        found: list[Outcome] = []
        while len(found) < len(trials):
            found += _one_child(trials[len(found) :])
        return found

    return run


def _one_child(trials: Sequence[Trial]) -> list[Outcome]:
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        _serve(trials, writer)
    os.close(writer)
    found, rest = [], b""
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while True:
            if not select.select([pipe], [], [], LONGEST_WAIT_S)[0]:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return [*found, Outcome(trials[len(found)][0], "hung")]
            block = pipe.read(1 << 16)
            rest += block or b""
            *lines, rest = rest.split(b"\n")
            found += [Outcome(**json.loads(line)) for line in lines]
            if not block:
                break
    _, status = os.waitpid(child, 0)
    if len(found) < len(trials):
        cause = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {status >> 8}"
        found.append(Outcome(trials[len(found)][0], "killed", cause))
    return found


def _serve(trials: Sequence[Trial], writer: int) -> None:
    """The child: each trial in turn, a line of JSON for each that ends."""
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + _SPARE_BYTES  # what runs away meets MemoryError, not the machine's end
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        warnings.simplefilter("ignore")
        for name, trial in trials:
            used = _cpu_s()
            soft = int(used) + MOST_CPU_S + 1
            resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))
            kind, text = _judged(trial)
            rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            line = json.dumps({"name": name, "kind": kind, "text": text, "cpu_s": _cpu_s() - used, "rss_kib": rss})
            os.write(writer, line.encode() + b"\n")
    finally:
        os._exit(0)


def _judged(trial: Callable[[], object]) -> tuple[str, str]:
    from sparsify_deploy.errors import SparsifyError

    try:
        trial()
    except SparsifyError as error:
        text = "\n".join(error.lines)
        return ("refused" if len(error.lines) == 1 and text.strip() else "bug"), text[:2000]
    except MemoryError:
        return "memory", traceback.format_exc()[-3000:]
    except BaseException:  # noqa: BLE001 a bug's own report
        return "bug", traceback.format_exc()[-3000:]
    return "fine", ""


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


# -- mutations -----------------------------------------------------------------------------------------------------

_NUMBERS = (
    b"\x00" * 4,
    b"\xff" * 4,
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\x00\x00\x00\x80",
    b"\xff" * 8,
    b"\x80" * 9,
)
_WORDS: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 2**31, 2**63, 10**400, 1e308, -0.5, "", "a", "x" * 5000, "../x", "/etc/passwd", "a/b"),
    *("\x00", "\x1b[31m", "\ud800", "é🙂", "</script>", [], {}, [[]], [None], [-1, 0], {"a": 1}, [[1e999]], "1" * 5000),
)


@pytest.fixture(scope="session")
def mutated() -> Callable[[bytes, int], bytes]:
    """`mutated(content, seed)`: other bytes at some places."""
    return _mutated


@pytest.fixture(scope="session")
def mutated_json() -> Callable[[bytes, int], bytes]:
    """`mutated_json(content, seed)`: other values at some places of a JSON text, or other bytes."""

    def make(content: bytes, seed: int) -> bytes:
        chance = random.Random(seed)
        if chance.random() < 0.2:
            return _mutated(content, seed)
        tree = json.loads(content)
        for _ in range(chance.choice((1, 1, 2, 4))):
            tree = _other(chance, tree)
        if chance.random() < 0.03:
            return b"[" * 100_000
        return json.dumps(tree).encode()

    return make


def _mutated(content: bytes, seed: int) -> bytes:
    chance = random.Random(seed)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        content = _one_change(chance, content)
    return content


def _one_change(chance: random.Random, content: bytes) -> bytes:
    kind = chance.randrange(9)
    # headers and footers are where formats keep what they rely on
    span = len(content) if chance.random() < 0.5 else min(len(content), 512)
    at = chance.randrange(span + 1) if chance.random() < 0.7 else len(content) - chance.randrange(span + 1)
    if kind == 0 and content:
        at = min(at, len(content) - 1)
        return content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :]
    if kind == 1 and content:
        return content[:at] + chance.randbytes(1) + content[at + 1 :]
    if kind == 2:
        return content[:at]
    if kind == 3:
        return content[:at] + content[at + chance.randrange(1, 64) :]
    if kind == 4:
        number = chance.choice(_NUMBERS)
        return content[:at] + number + content[at + len(number) :]
    if kind == 5:
        return content[:at] + chance.randbytes(chance.randrange(1, 40)) + content[at:]
    if kind == 6:
        size = chance.randrange(1, 64)
        return content[:at] + bytes(size) + content[at + size :]
    if kind == 7:
        end = min(len(content), at + chance.randrange(1, 200))
        return content[:end] + content[at:end] + content[end:]
    start = chance.randrange(len(content) + 1)
    return content[:at] + content[start : start + 64] + content[at + 64 :]


def _other(chance: random.Random, tree: Any) -> Any:
    """`tree` with something else at one place."""
    if isinstance(tree, dict) and tree and chance.random() < 0.85:
        key = chance.choice(list(tree))
        kind = chance.random()
        if kind < 0.1:
            return {k: v for k, v in tree.items() if k != key}
        if kind < 0.2:
            return {**tree, str(chance.choice(_WORDS))[:3000]: tree[key]}
        return {**tree, key: _other(chance, tree[key])}
    if isinstance(tree, list) and tree and chance.random() < 0.85:
        at = chance.randrange(len(tree))
        return [*tree[:at], _other(chance, tree[at]), *tree[at + (chance.random() < 0.9) :]]
    deep: Any = chance.choice(_WORDS)
    for _ in range(chance.choice((0, 0, 0, 0, 1, 200))):
        deep = [deep]
    return deep


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that hostile code would make, in a folder that nothing else writes to."""
    folder = tmp_path / "canary"
    folder.mkdir()
    yield folder / "hatched"
    assert not any(folder.iterdir()), "code of a hostile file ran"
