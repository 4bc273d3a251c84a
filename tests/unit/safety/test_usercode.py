"""What a user's file raises is one line with the place in it, whatever class of exception it is."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from sparsify_deploy.errors import DataError
from sparsify_deploy.safety import usercode


@pytest.mark.parametrize("error", ["GeneratorExit", "SystemExit(0)", "BaseException('why')", "ValueError('why')"])
@pytest.mark.parametrize("inside", [True, False])
def test_every_exception_of_a_users_file_is_a_line(tmp_path: Path, error: str, inside: bool) -> None:
    path = tmp_path / "net.py"
    path.write_text(f"def build():\n    raise {error}\n" if inside else f"\nraise {error}\n")
    with pytest.raises(DataError, match=rf"net\.py:2: {error.partition('(')[0]}"):
        usercode.make(path, "build", {}, ready=int, error=DataError)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "outer" / "__init__.py").write_text("from .inner.net import Net\n")
    (tmp_path / "outer" / "base.py").write_text("class Base(int):\n    pass\n")
    (inner / "__init__.py").write_text("")
    (inner / "layers.py").write_text("VALUE = 1\n")
    (inner / "net.py").write_text(
        "from ..base import Base\nfrom .layers import VALUE\n\nclass Net(Base):\n"
        "    def __new__(cls):\n        return super().__new__(cls, VALUE)\n"
    )
    return inner


def test_a_file_with_relative_imports_runs_in_its_package(package: Path) -> None:
    search, finders = list(sys.path), list(sys.meta_path)
    first = usercode.make(package / "net.py", "Net", {}, ready=(), error=DataError)
    assert first == 1
    (package / "layers.py").write_text("VALUE = 20\n")
    second = usercode.make(package / "net.py", "Net", {}, ready=(), error=DataError)
    assert second == 20
    assert type(first) is not type(second)
    assert sys.modules[type(second).__module__].Net is type(second)
    assert (search, finders) == (sys.path, sys.meta_path)
    assert "outer" not in sys.modules


def test_what_a_package_imports_is_what_was_approved(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = (package / "net.py").read_bytes()
    monkeypatch.setattr(usercode, "_approved", {})
    usercode.approve(package / "net.py", hashlib.sha256(content).hexdigest())
    # the package's own __init__ changes the file before it imports it: what was read and judged is executed
    (package / "__init__.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('net.py').write_text('raise SystemError')\n"
    )
    assert usercode.make(package / "net.py", "Net", {}, ready=(), error=DataError) == 1
    with pytest.raises(DataError, match="has changed since its sha256"):
        usercode.make(package / "net.py", "Net", {}, ready=(), error=DataError)


def test_what_fails_in_a_package_leaves_nothing_and_is_named(package: Path) -> None:
    (package / "layers.py").write_text("\n1 / 0\n")
    known = {*sys.modules}
    with pytest.raises(DataError, match=r"layers\.py:2: ZeroDivisionError"):
        usercode.make(package / "net.py", "Net", {}, ready=(), error=DataError)
    assert not [name for name in {*sys.modules} - known if name.startswith("_sparsify_deploy_user_")]


def test_without_a_package_the_dot_is_explained(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("from .layers import VALUE\n")
    with pytest.raises(DataError, match=r"net\.py:1: ImportError: .*put an empty __init__.py beside the file"):
        usercode.make(tmp_path / "net.py", "Net", {}, ready=(), error=DataError)


def test_a_file_of_a_package_without_relative_imports_runs_alone(package: Path) -> None:
    (package / "net.py").write_text("VALUE = __name__\n")
    (package / "__init__.py").write_text("raise SystemError\n")
    assert "." not in str(usercode.make(package / "net.py", "VALUE", {}, ready=str, error=DataError))


def test_an_interrupt_is_none_of_the_users(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        usercode.make(path, "build", {}, ready=int, error=DataError)
