"""A file is data: whatever is in it, it is read or refused in one line, and no process dies of it."""

from __future__ import annotations

import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest


def trials(kinds, mutated, mutated_json, folder: Path, first: int, count: int):
    """`count` mutations, as many of each kind, the same for one `first`."""
    names = list(kinds)
    for seed in range(first, first + count):
        kind = kinds[names[seed % len(names)]]
        mutate = kind.mutate or (mutated_json if kind.is_json else mutated)
        yield f"{kind.name} {seed}", partial(_read, kind, mutate, folder, seed)


def _read(kind, mutate, folder: Path, seed: int) -> None:
    source = kind.seeds[seed // 7 % len(kind.seeds)]
    path = folder / f"{seed}" / kind.name
    path.parent.mkdir(parents=True)
    path.write_bytes(kind.sealed(mutate(source, seed)))
    kind.read(path)


def judged(found) -> None:
    bad = [outcome for outcome in found if not outcome.good]
    shown = "\n\n".join(f"{o.name}: {o.kind}, {o.cpu_s:.1f} s, {o.rss_kib >> 10} MiB\n{o.text}" for o in bad[:8])
    assert not bad, f"{len(bad)} of {len(found)}:\n{shown}"


def test_the_good_files_are_read(kinds, forked, tmp_path: Path) -> None:
    def whole(kind, source: bytes, number: int) -> None:
        path = tmp_path / f"{number}" / kind.name
        path.parent.mkdir()
        path.write_bytes(kind.sealed(source))
        kind.read(path)

    every = [(kind, source) for kind in kinds.values() for source in kind.seeds]
    given = [(kind.name, partial(whole, kind, source, i)) for i, (kind, source) in enumerate(every)]
    refused = {outcome.name: outcome.text for outcome in forked(given) if outcome.kind != "fine"}
    assert set(refused) == {"mask.safetensors"}, refused  # which wants truth values: read, and it says so


def test_a_few_hundred_mutated_files(kinds, forked, mutated, mutated_json, tmp_path: Path) -> None:
    found = forked(list(trials(kinds, mutated, mutated_json, tmp_path, 0, 360)))
    judged(found)
    kinds_of = Counter(outcome.kind for outcome in found)
    assert min(kinds_of["fine"], kinds_of["refused"]) > 40  # the mutations are neither all fatal nor without effect


@pytest.mark.slow
def test_thousands_of_mutated_files(kinds, forked, mutated, mutated_json, tmp_path: Path) -> None:
    found = forked(list(trials(kinds, mutated, mutated_json, tmp_path, 10_000, 4_800)))
    ended = dict(Counter(outcome.kind for outcome in found))
    sys.stderr.write(
        f"{len(found)} files: {ended}, {sum(o.cpu_s for o in found):.1f} s of CPU time, at most "
        f"{max(o.cpu_s for o in found):.2f} s for one, at most {max(o.rss_kib for o in found) >> 10} MiB\n"
    )
    judged(found)
