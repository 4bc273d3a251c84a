"""What a user's file raises is one line with the place in it, whatever class of exception it is."""

from __future__ import annotations

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


def test_an_interrupt_is_none_of_the_users(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        usercode.make(path, "build", {}, ready=int, error=DataError)
