"""A recipe is data: whatever is in it, it is valid or every mistake has its line and column."""

from __future__ import annotations

import random
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sparsify_deploy.__main__ import main
from sparsify_deploy.errors import RecipeError
from sparsify_deploy.recipe_source import load

MESSAGE = re.compile(r"r\.yaml:[1-9][0-9]*:[1-9][0-9]*: [^\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]{5,700}")
LONGEST_CPU_S = 5.0
ALL_CPU_S = 180.0


class TooLong(BaseException):
    """No Exception, so that nothing takes it for a mistake of the recipe."""


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Stops what takes more CPU time than that."""

    def stop(number: int, frame: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def judge(path: Path, number: int) -> bool:
    """Whether a recipe is valid; fails where it is neither that nor a list of mistakes."""
    try:
        with bounded(LONGEST_CPU_S):
            load(path)
    except RecipeError as error:
        found = error.lines
    except BaseException as error:
        raise AssertionError(f"recipe {number} of the fuzzer ends in {error!r}") from error
    else:
        return True
    assert found, number
    for line in found:
        assert MESSAGE.fullmatch(line), (number, line)
    return False


def judge_all(fuzzed, tmp_path: Path, first: int, count: int) -> int:
    """How many of the recipes are valid."""
    path = tmp_path / "r.yaml"
    valid = 0
    for number, content in enumerate(fuzzed(first, count), first):
        path.write_bytes(content)
        valid += judge(path, number)
    return valid


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def test_a_thousand_recipes_are_valid_or_every_mistake_has_its_place(fuzzed, tmp_path: Path) -> None:
    valid = judge_all(fuzzed, tmp_path, 0, 1000)
    assert 20 < valid < 500  # the mutations are neither all fatal nor without effect


@pytest.mark.slow
def test_ten_thousand_recipes_within_three_minutes(fuzzed, tmp_path: Path) -> None:
    began = cpu_s()
    valid = judge_all(fuzzed, tmp_path, 0, 10_000)
    took = cpu_s() - began
    sys.stderr.write(f"10,000 recipes: {valid} valid, {took:.1f} s of CPU time\n")
    assert took <= ALL_CPU_S


def test_the_verb_ends_with_0_or_2_and_a_line_a_mistake(fuzzed, tmp_path: Path, capsys) -> None:
    path = tmp_path / "r.yaml"
    for content in fuzzed(20_000, 60):
        path.write_bytes(content)
        code = main(["validate", str(path)])
        printed = capsys.readouterr()
        assert (code == 0) == (printed.err == "")
        assert (code == 0) == printed.out.endswith(": valid\n")
        assert code in (0, 2)
        for line in printed.err.removesuffix("\n").split("\n") if code else ():
            assert MESSAGE.fullmatch(line.removeprefix("sparsify-deploy: ")), line


def test_so_it_does_in_a_process_of_its_own(fuzzed, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    for content in fuzzed(30_000, 4):
        path.write_bytes(content)
        done = subprocess.run(
            [sys.executable, "-m", "sparsify_deploy", "validate", str(path)],
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert done.returncode in (0, 2)
        assert b"Traceback" not in done.stderr
        assert bool(done.returncode) == bool(done.stderr)


PIECES = (
    *("train", "method", "model", "params", "deploy", "0", "1", "99", "-1", "", " ", "a" * 500, "é", "\x1b[31m", "nm"),
    *("training", "epochs", "seed", "version", "name", "gates", "max_drop", "data", "path", "\n", "\ud800", "=", "[0]"),
)
TEXTS = (
    *(
        "",
        "static",
        "rigl",
        "1",
        "-1",
        "1e999",
        ".nan",
        "[1, 2]",
        "[",
        "{a: 1}",
        "{a: 1",
        "a: b",
        "*x",
        "&x 1",
        "!!t 1",
    ),
    *("'", '"', "null", "true", "x" * 10_000, "[" * 100, "é🙂"),
    *("\x00", "\x1b[2J", "\n", "a\nb: c", "--- 1", "\ud800"),
    *("~nobody-here/x", "a" * 5000, "../x", "/dev/zero", "1" * 5000, '"\\x00"', "{a: &x [*x]}", "\t", "# c"),
)


def test_what_is_set_on_the_command_line_is_data_too(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes((Path(__file__).resolve().parents[3] / "recipes" / "digits.yaml").read_bytes())
    place = re.compile(r"(--set [^\n]{0,200}|r\.yaml:\d+:\d+): [^\x00-\x1f\x7f-\x9f\ud800-\udfff]{5,700}")
    for number in range(150):
        chance = random.Random(number)
        pieces = ".".join(chance.choice(PIECES) for _ in range(chance.randrange(1, 5)))
        sets = [f"{pieces}{chance.choice('== =.')}{chance.choice(TEXTS)}" for _ in range(chance.randrange(1, 3))]
        try:
            with bounded(LONGEST_CPU_S):
                load(path, sets)
        except RecipeError as error:
            for line in error.lines:
                assert place.fullmatch(line), (number, line)
