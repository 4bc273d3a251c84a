"""The recipe reference, from the JSON schema that editors use and the `Params` of every menu entry."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from generate.text import linked, table
from sparsify_deploy import menu, recipe_source
from sparsify_deploy.recipe import MENU_SECTIONS

Schema = Mapping[str, Any]

_OVERRIDE = "Override"
_SECTION_OF = {section.__name__: menu_and_key for section, menu_and_key in MENU_SECTIONS.items()}
_NO_DESCRIPTION = "-"


def top() -> str:
    """The fields that stand at the top of a recipe and are no section."""
    schema = recipe_source.schema()
    plain = {name: part for name, part in schema["properties"].items() if _named(part) is None}
    return _fields({**schema, "properties": plain}, {})


def sections() -> str:
    """Every section, its fields, and the parameters of every entry that it may name."""
    schema = recipe_source.schema()
    definitions, done = schema["$defs"], dict[str, str]()
    found: list[str] = []
    for name, part in schema["properties"].items():
        if (section := _named(part)) is not None:
            listed = part.get("type") == "array"
            found += _section(name, section, definitions, done, "a list of these" if listed else "")
    return "\n\n".join(found)


def _section(path: str, name: str, definitions: Schema, done: dict[str, str], note: str = "") -> Iterator[str]:
    """The text of the definition `name`, which a recipe has at `path`, and of those inside it."""
    done[name] = path
    schema = definitions[name]
    yield f"{'#' * (2 + path.count('.'))} `{path}` {{#{_anchor(path)}}}"
    yield linked(schema.get("description", "")) + (f" In a recipe: {note}." if note else "")
    inner = {
        f"{path}.{field}": found
        for field, part in schema["properties"].items()
        if (found := _named(part)) is not None and found not in done
    }
    done.update({found: place for place, found in inner.items()})
    base = name.removesuffix(_OVERRIDE)
    if name != base and base in done:
        fields = ", ".join(f"`{field}`" for field in schema["properties"])
        yield (
            f"The fields of [`{done[base]}`](#{_anchor(done[base])}), each of them optional: {fields}. What is left "
            "out stays as it is there."
        )
    else:
        yield _fields(schema, done)
    if name in _SECTION_OF:
        yield from _entries(path, *_SECTION_OF[name], definitions, done)
    for place, found in inner.items():
        yield from _section(place, found, definitions, done)


def _entries(path: str, which: str, key: str, definitions: Schema, done: dict[str, str]) -> Iterator[str]:
    """What each entry of a menu takes as `params`, or links to that where an earlier section has told."""
    first = done.setdefault(f"menu {which}", path)
    if first != path:
        links = (f"[`{entry}`](#{_anchor(f'{first}.{entry}')})" for entry in menu.names(which))
        yield f"What each `{key}` takes as `params` stands under `{first}`: {', '.join(links)}."
        return
    for entry in menu.names(which):
        schema = definitions[f"{which}.{entry}"]
        yield f"### `{path}: {{{key}: {entry}}}` {{#{_anchor(f'{path}.{entry}')}}}"
        yield linked(menu.summary(which, entry))
        inner = {part.rpartition(".")[2]: part for part in definitions if part.startswith(f"{which}.{entry}.")}
        yield _fields(schema, {}) if schema["properties"] else "No `params`."
        for title, part in inner.items():
            yield f"A `{title}`: {definitions[part].get('description', '')}"
            yield _fields(definitions[part], {})


def _fields(schema: Schema, done: Mapping[str, str]) -> str:
    required = schema.get("required", ())
    rows = [
        (
            f"`{name}`",
            _type(part, done),
            "required" if name in required else _default(part),
            linked(part.get("description", _NO_DESCRIPTION)),
        )
        for name, part in schema["properties"].items()
    ]
    return table(("field", "value", "default", "what it does"), rows)


def _default(part: Schema) -> str:
    if "default" not in part or _named(part) is not None:
        return "-"
    value = part["default"]
    return "none" if value is None else f"`{json.dumps(value)}`"


def _named(part: Schema) -> str | None:
    """The definition that a field holds, alone, as an alternative or in a list."""
    if "$ref" in part:
        return str(part["$ref"]).rpartition("/")[2]
    for other in (*part.get("anyOf", ()), *([part["items"]] if isinstance(part.get("items"), dict) else [])):
        if (found := _named(other)) is not None:
            return found
    return None


def _type(part: Schema, done: Mapping[str, str]) -> str:  # noqa: PLR0911 - one return a kind
    """A field's kind of value in words."""
    if "$ref" in part:
        name = str(part["$ref"]).rpartition("/")[2]
        place = done.get(name)
        return f"as [`{place}`](#{_anchor(place)})" if place else f"a `{name.rpartition('.')[2]}`"
    if "anyOf" in part or "oneOf" in part:
        kinds = [other for other in part.get("anyOf", part.get("oneOf")) if other.get("type") != "null"]
        words = list(dict.fromkeys(_type(other, done) for other in kinds))
        return _either(words)
    if "const" in part:
        return f"`{json.dumps(part['const'])}`"
    if "enum" in part:
        return _either([f"`{value}`" for value in part["enum"]])
    kind = part.get("type")
    if kind == "array":
        return _array(part, done)
    if kind == "object":
        inner = part.get("additionalProperties")
        return f"mapping from name to {_type(inner, done)}" if isinstance(inner, dict) else "mapping"
    simple = {"integer": "whole number", "number": "number", "boolean": "`true` or `false`", "string": "text"}
    text = "path" if part.get("format") == "path" else simple.get(str(kind), str(kind or "anything"))
    return text + _bounds(part)


def _array(part: Schema, done: Mapping[str, str]) -> str:
    if "prefixItems" in part:
        return "list of " + " and ".join(_type(item, done) for item in part["prefixItems"])
    least = f", at least {part['minItems']}" if part.get("minItems") else ""
    return f"list of {_type(part.get('items', {}), done)}{least}"


def _bounds(part: Schema) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [f"{sign} {_number(part[key])}" for key, sign in signs.items() if key in part]
    if "pattern" in part:
        found.append(f"matching `{part['pattern']}`")
    return f", {' and '.join(found)}" if found else ""


def _number(value: float) -> str:
    return f"{value:g}" if abs(value) < 1e6 else f"{value:,.0f}"


def _either(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _anchor(path: str) -> str:
    return path.replace(".", "-").replace("_", "-").lower()
