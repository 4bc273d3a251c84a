"""What every hostile case shares: a payload that would leave a canary, and how a case ends."""

from __future__ import annotations

import io
import os
import pickle
import signal
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from sparsify_deploy.errors import SparsifyError

LONGEST_WAIT_S = 60.0


class Payload:
    """Pickled, it makes a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.canary),)


@dataclass(frozen=True)
class Ended:
    """The exit code and what stood on stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """What is wrong; where the log is stands below it."""
        return [line for line in self.err.splitlines() if not line.startswith("sparsify-deploy: log: ")]


@dataclass(frozen=True)
class Scene:
    """The folder of an attack, which is the working directory; `outside` lies beside it and is nobody's to touch."""

    folder: Path
    outside: Path
    canary: Path
    cli: Callable[..., Ended]
    refused: Callable[..., Ended]

    @property
    def pickled(self) -> bytes:
        """A pickle that would leave the canary."""
        return pickle.dumps({"weight": Payload(self.canary)}, protocol=2)

    def torch_zip(self, pickled: bytes, name: str = "evil/data.pkl", **others: bytes) -> bytes:
        """An archive as torch.save writes it, around a pickle."""
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(name, pickled)
            archive.writestr("evil/version", "3\n")
            archive.writestr("evil/byteorder", "little")
            for other, content in others.items():
                archive.writestr(other, content)
        return file.getvalue()

    def write(self, name: str, content: bytes | str) -> Path:
        """A file of the scene."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def recipe(self, **sections: str) -> Path:
        """A recipe of few lines, with other sections."""
        plain = {
            "model": "{source: builtin, params: {name: resnet8, width: 16, in_channels: 1}}",
            "data": "{source: digits}",
            "task": "{}",
        }
        text = "version: 1\n" + "".join(f"{k}: {v}\n" for k, v in {**plain, **sections}.items())
        return self.write("r.yaml", text)


class StillWaiting(BaseException):
    """No Exception, so that nothing takes it for the file's fault."""


@contextmanager
def _no_longer(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise StillWaiting

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def scene(tmp_path: Path, canary: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """A place for an attack. Afterwards nothing was written outside it."""
    from sparsify_deploy.__main__ import main

    folder, outside = tmp_path / "scene", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (outside / "secret").write_text("secret", encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "state"))

    def cli(*arguments: object) -> Ended:
        capsys.readouterr()
        with _no_longer(LONGEST_WAIT_S):
            code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return Ended(code, printed.out, printed.err)

    def refused(read: Callable[..., object], *arguments: object) -> Ended:
        """What a reader says, as the command line would say it."""
        try:
            with _no_longer(LONGEST_WAIT_S):
                read(*arguments)
        except SparsifyError as error:
            return Ended(error.exit_code, "", "\n".join(error.lines))
        return Ended(0, "", "")

    yield Scene(folder, outside, canary, cli, refused)
    assert {path.name for path in outside.iterdir()} == {"secret"}
    assert (outside / "secret").read_text(encoding="utf-8") == "secret"
