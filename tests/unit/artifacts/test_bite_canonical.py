"""Every field of a stage's settings is in its canonical form, whatever its value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import BaseModel

from sparsify_deploy.artifacts.fingerprint import canonical, digest


@dataclass(frozen=True)
class Settings:
    first: Any
    middle: Any = None
    last: Any = 1.0


class Model(BaseModel):
    first: Any
    middle: Any = None
    last: Any = 1.0


EMPTY = (None, False, 0, 0.0, "", [], {})


@pytest.mark.parametrize("kind", [Settings, Model])
@pytest.mark.parametrize("value", EMPTY, ids=repr)
@pytest.mark.parametrize("field", ["first", "middle", "last"])
def test_a_field_without_much_in_it_is_there_all_the_same(kind, field, value):
    given = {"first": 1, field: value}
    expected = {"first": 1, "middle": None, "last": 1.0} | given
    found = canonical(kind(**given))
    assert found == expected
    assert type(found[field]) is type(value)


@pytest.mark.parametrize("kind", [Settings, Model])
@pytest.mark.parametrize("field", ["first", "middle", "last"])
def test_no_two_empty_values_are_alike(kind, field):
    prints = {digest({"settings": kind(**{"first": 1, field: value})}) for value in EMPTY}
    assert len(prints) == len(EMPTY)


def test_a_default_written_out_is_the_same_as_one_left_out():
    for kind in (Settings, Model):
        assert digest({"settings": kind(first=1)}) == digest({"settings": kind(first=1, middle=None, last=1.0)})
