"""The JSON schema for editors: frozen in a committed file, and saying the same as the models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsify_deploy import menu
from sparsify_deploy.recipe import MENU_SECTIONS
from sparsify_deploy.recipe_source import SCHEMA_FILE, schema, write_schema


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for inner in value.values():
            yield from _references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _references(inner)


def test_the_committed_schema_is_the_current_one() -> None:
    committed = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    assert committed == schema(), "the recipe schema changed: raise SCHEMA_VERSION if old recipes break; `make schema`"


def test_writing_it_gives_the_committed_bytes(tmp_path: Path) -> None:
    write_schema(tmp_path / "schema.json")
    assert (tmp_path / "schema.json").read_bytes() == SCHEMA_FILE.read_bytes()


def test_every_reference_leads_somewhere() -> None:
    found = schema()
    references = set(_references(found))
    assert {r.removeprefix("#/$defs/") for r in references} <= set(found["$defs"])
    assert len(references) > 20


def test_each_menu_entry_brings_the_schema_of_its_own_params() -> None:
    definitions = schema()["$defs"]
    for section, (which, key) in MENU_SECTIONS.items():
        part = definitions[section.__name__]
        assert part["properties"][key]["enum"] == list(menu.names(which))
        rules = {rule["if"]["properties"][key]["const"]: rule for rule in part["allOf"]}
        assert sorted(rules) == list(menu.names(which))
        for name, rule in rules.items():
            assert rule["then"]["properties"]["params"] == {"$ref": f"#/$defs/{which}.{name}"}
            own = definitions[f"{which}.{name}"]
            assert set(own.get("properties", {})) == set(menu.entry(which, name).Params.model_fields)
            assert own["additionalProperties"] is False
            default = section.model_fields[key].default
            assert rule["if"].get("required") == (None if name == default else [key])
            assert rule["then"].get("required") == (["params"] if own.get("required") else None)


def test_every_setting_says_what_it_is() -> None:
    """But a section, which its own text describes, and an override, whose fields are those of what it overrides."""
    found = schema()
    for name, part in {"the recipe": found, **found["$defs"]}.items():
        for key, setting in part.get("properties", {}).items():
            is_section = next(_references(setting), None) is not None
            assert "Override" in name or is_section or setting.get("description"), f"{name}.{key} has no description"
