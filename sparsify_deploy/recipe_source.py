"""From a recipe's text to a `Recipe`, every mistake reported together with its line and column.

`load` judges a recipe without torch, numpy, a GPU or the data. `schema` writes the same rules down as a JSON schema
for editors.
"""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import ValidationError

from sparsify_deploy import menu
from sparsify_deploy.errors import RecipeError, UsageError
from sparsify_deploy.params import GivenHere
from sparsify_deploy.params import Params as Settings
from sparsify_deploy.recipe import MENU_SECTIONS, SCHEMA_VERSION, Recipe
from sparsify_deploy.recipe_checks import mistakes
from sparsify_deploy.recipe_yaml import MAX_BYTES, Leaf, Listing, Mistake, Node, Place, Section, describe, read, short
from sparsify_deploy.safety import regular
from sparsify_deploy.types import Json

Path_: TypeAlias = "tuple[str | int, ...]"
"""Field names and list indices from the top of a recipe."""


def load(path: Path, sets: Sequence[str] = ()) -> Recipe:
    """Read a recipe, with `--set` values such as `train.method=static` on top; its `name` is filled in.

    Raises `RecipeError` with every mistake found, sorted by place, and `UsageError` where the file cannot be read.
    """
    text, found = _text(path)
    tree, more = read(text, path.name) if not found else (None, [])
    found += more
    if tree is None or not isinstance(tree, Section):
        if not found:
            place = tree.place if tree is not None else Place(path.name, 1, 1)
            what = describe(tree) if tree is not None else "nothing"
            found.append(Mistake(place, f"a recipe is a mapping that starts with version: 1, found {what}"))
        raise RecipeError([str(m) for m in found])
    for order, item in enumerate(sets, 1):
        tree, wrong = _with_set(tree, item, order)
        found += wrong
    recipe, wrong = _judge(tree, path.absolute().parent)
    found += wrong
    if recipe is None or found:
        unique = dict.fromkeys(str(m) for m in sorted(found, key=lambda m: m.place.sort_key))
        raise RecipeError(list(unique))
    return recipe.model_copy(update={"name": recipe.name or name_from(path)})


def name_from(path: Path) -> str:
    """The name of a recipe that gives none: its file's, in letters that a folder name may have."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("._-") or "recipe"


def _text(path: Path) -> tuple[str, list[Mistake]]:
    try:
        content = regular.read(path, MAX_BYTES + 1)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"recipe {path} cannot be read ({reason}): give the path of a YAML file") from error
    if len(content) > MAX_BYTES:
        return "", [Mistake(Place(path.name, 1, 1), f"larger than {MAX_BYTES >> 20} MiB: a recipe holds settings only")]
    try:
        return content.decode("utf-8-sig"), []
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("utf-8-sig", "replace")
        place = Place(path.name, before.count("\n") + 1, len(before) - before.rfind("\n"))
        return "", [Mistake(place, f"byte 0x{content[error.start]:02X} is not UTF-8: save the file as UTF-8")]


# -- --set ---------------------------------------------------------------------------------------------------------


def _with_set(tree: Section, item: str, order: int) -> tuple[Section, list[Mistake]]:
    place = Place(f"--set {short(item, 80)}", 0, 0, order)
    dotted, equals, text = item.partition("=")
    pieces = dotted.strip().split(".")
    if not equals or not all(pieces):
        return tree, [Mistake(place, "expected a.b=value, such as train.method=static")]
    value, found = read(text, "", whole=place)
    if found:
        return tree, found
    if isinstance(value, Section) and not value.flow:
        return tree, [Mistake(place, "a mapping on the command line is written {a: 1}; quote the value if it is text")]
    try:
        changed = _put(tree, pieces, _given_here(value or Leaf(place, None)), place, ())
    except _CannotPut as stop:
        return tree, [stop.mistake]
    assert isinstance(changed, Section)
    return changed, []


def with_set(values: Mapping[str, Json], item: str) -> dict[str, Json]:
    """`values` with one `--set` on top, put as `load` puts it. Raises `UsageError`."""
    place = Place("", 0, 0)
    tree = _tree(values, place)
    assert isinstance(tree, Section)
    changed, found = _with_set(tree, item, 1)
    if found:
        raise UsageError(*map(str, found))
    made: dict[str, Json] = _plain(changed)
    return made


def _tree(value: Json, place: Place) -> Node:
    if isinstance(value, Mapping):
        return Section(place, {k: _tree(v, place) for k, v in value.items()}, dict.fromkeys(value, place), flow=True)
    if isinstance(value, (list, tuple)):
        return Listing(place, tuple(_tree(each, place) for each in value))
    return Leaf(place, value)


class _CannotPut(Exception):
    def __init__(self, mistake: Mistake) -> None:
        super().__init__(str(mistake))
        self.mistake = mistake


def _put(node: Node | None, pieces: Sequence[str], value: Node, place: Place, above: Path_) -> Node:
    if not pieces:
        return value
    piece, rest = pieces[0], pieces[1:]
    if node is None or (isinstance(node, Leaf) and node.value is None):
        node = Section(place, {}, {})
    if isinstance(node, Leaf):
        raise _CannotPut(Mistake(place, f"is {describe(node)} and has no fields: set it as a whole", above))
    if isinstance(node, Section):
        inner = _put(node.entries.get(piece), rest, value, place, (*above, piece))
        keys = {**node.keys, piece: place if not rest else node.keys.get(piece, place)}
        return replace(node, entries={**node.entries, piece: inner}, keys=keys)
    if not piece.isdecimal() or int(piece) >= len(node.items):
        last = f"; the last index is {len(node.items) - 1}" if node.items else " and is empty"
        raise _CannotPut(Mistake(place, f"has no item {piece}: it is a list, counted from 0{last}", above))
    index = int(piece)
    items = list(node.items)
    items[index] = _put(items[index], rest, value, place, (*above, index))
    return replace(node, items=tuple(items))


def _given_here(node: Node) -> Node:
    if isinstance(node, Section):
        return replace(node, entries={k: _given_here(v) for k, v in node.entries.items()})
    if isinstance(node, Listing):
        return replace(node, items=tuple(map(_given_here, node.items)))
    return replace(node, value=GivenHere(node.value)) if isinstance(node.value, str) else node


# -- validation ----------------------------------------------------------------------------------------------------


def _judge(tree: Section, folder: Path) -> tuple[Recipe | None, list[Mistake]]:
    context = {"folder": folder}
    try:
        recipe = Recipe.model_validate(_plain(tree), context=context)
    except ValidationError as error:
        found = _translated(error, tree)
        return None, found + _cross_checks_despite(found, tree, context)
    return recipe, [Mistake(_place(tree, path), text, path) for path, text in mistakes(recipe)]


def _cross_checks_despite(found: Sequence[Mistake], tree: Section, context: Mapping[str, Any]) -> list[Mistake]:
    """Cross checks of a recipe with mistakes: what is wrong is left out, and what that could touch is not judged."""
    if any(len(m.path) < 2 for m in found):
        return []
    remaining: Node = tree
    for m in found:
        remaining = _without(remaining, m.path)
    try:
        recipe = Recipe.model_validate(_plain(remaining), context=context)
    except ValidationError:
        return []
    return [
        Mistake(_place(tree, path), text, path)
        for path, text in mistakes(recipe)
        if not any(m.path[: len(path)] == path or path[: len(m.path)] == m.path for m in found)
    ]


def _without(node: Node, path: Path_) -> Node:
    head, rest = path[0], path[1:]
    if isinstance(node, Section) and head in node.entries:
        kept = {k: v for k, v in node.entries.items() if k != head}
        if rest:
            kept[str(head)] = _without(node.entries[str(head)], rest)
        return replace(node, entries=kept)
    if isinstance(node, Listing) and isinstance(head, int) and head < len(node.items) and rest:
        items = list(node.items)
        items[head] = _without(items[head], rest)
        return replace(node, items=tuple(items))
    return node


def _plain(node: Node) -> Any:
    if isinstance(node, Section):
        return {k: _plain(v) for k, v in node.entries.items()}
    if isinstance(node, Listing):
        return [_plain(v) for v in node.items]
    return node.value


def _walk(tree: Node, path: Path_) -> list[tuple[Node, Place]]:
    """The nodes along `path` as far as they exist, each with its key's place; the top comes first."""
    along = [(tree, tree.place)]
    node = tree
    for piece in path:
        if isinstance(node, Section) and piece in node.entries:
            place, node = node.keys[str(piece)], node.entries[str(piece)]
        elif isinstance(node, Listing) and isinstance(piece, int) and piece < len(node.items):
            node = node.items[piece]
            place = node.place
        else:
            break
        along.append((node, place))
    return along


def _place(tree: Node, path: Path_) -> Place:
    """Of a scalar or flow value that exists, its own place; else the place of the nearest key above."""
    node, key = _walk(tree, path)[-1]
    exists = len(_walk(tree, path)) == len(path) + 1
    return node.place if exists and isinstance(node, Leaf) and node.value is not None else key


def _translated(error: ValidationError, tree: Section) -> list[Mistake]:
    """Pydantic's findings as ours; those of a union's branches, which name one place, become one."""
    texts: dict[Path_, list[str]] = {}
    places: dict[Path_, Place] = {}
    findings = error.errors(include_url=False)
    for finding in findings:
        path = tuple(finding["loc"])
        if finding["type"] == "too_short" and any(other["loc"][:-1] == finding["loc"] for other in findings):
            continue  # pydantic does not count the items it refused
        along = _walk(tree, path)
        node = along[-1][0]
        if isinstance(node, Leaf) and finding["type"] != "missing":
            path = path[: len(along) - 1]  # what follows a scalar names a branch of a union
        exists = len(along) == len(path) + 1
        if finding["type"] == "extra_forbidden":
            text = f"unknown key{menu.did_you_mean(str(path[-1]), _fields(tree, path[:-1]))}"
            places[path] = along[-1][1]
        else:
            text = _message(finding, node if exists else None)
            places[path] = _place(tree, path)
        texts.setdefault(path, []).append(text)
    return [Mistake(places[path], " or ".join(dict.fromkeys(several)), path) for path, several in texts.items()]


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "path_type": "a path",
    "none_required": "nothing",
    "finite_number": "a finite number",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "a number below {lt}",
    "less_than_equal": "at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "string_pattern_mismatch": "text that matches {pattern}",
    "too_short": "at least {min_length} items",
    "too_long": "at most {max_length} items",
    "string_too_short": "at least {min_length} letters",
    "string_too_long": "at most {max_length} letters",
}


def _message(finding: Mapping[str, Any], node: Node | None) -> str:
    kind, context = finding["type"], finding.get("ctx", {})
    if kind == "missing":
        return "is required: add it"
    if kind == "literal_error":
        options = [part.strip("'") for part in re.findall(r"'[^']*'|[^\s,]+", context["expected"]) if part != "or"]
        text = f"expected {', '.join(options)}" if len(options) == 1 else f"expected one of {', '.join(options)}"
        if isinstance(node, Leaf) and isinstance(node.value, str) and "; did" in menu.did_you_mean(node.value, options):
            return f"{text}, found {describe(node)}{menu.did_you_mean(node.value, options)}"
    elif kind == "is_instance_of" and context.get("class") == "Path":
        text = "expected a path"
    elif kind in _EXPECTED:
        bounds = {k: f"{v:g}" if isinstance(v, float) else v for k, v in context.items()}
        text = f"expected {_EXPECTED[kind].format(**bounds)}"
    else:
        text = str(finding["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
        return text[:1].lower() + text[1:] if text[1:2].islower() else text
    return f"{text}, found {describe(node)}" if node is not None else text


def _fields(tree: Node, path: Path_) -> Iterable[str]:
    """The field names of the section at `path`; those of a menu section's `params` are its entry's."""
    model: type[Settings] | None = Recipe
    for depth, piece in enumerate(path):
        if model is None:
            return ()
        if model in MENU_SECTIONS and piece == "params":
            which, key = MENU_SECTIONS[model]
            section = _plain(_walk(tree, path[:depth])[-1][0])
            chosen = section.get(key, model.model_fields[key].default) if isinstance(section, dict) else None
            model = menu.entry(which, chosen).Params if chosen in menu.names(which) else None
        elif not isinstance(piece, int):
            info = model.model_fields.get(piece)
            model = _model_in(info.annotation) if info else None
    return tuple(model.model_fields) if model is not None else ()


def _model_in(annotation: Any) -> type[Settings] | None:
    """The model in `X`, `X | None` or `tuple[X, ...]`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, Settings) else None
    return next(filter(None, map(_model_in, typing.get_args(annotation))), None)


# -- JSON schema ---------------------------------------------------------------------------------------------------

SCHEMA_FILE = Path(__file__).with_name("recipe.schema.json")


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe; in a menu section the schema of `params` follows from the entry's name."""
    found = Recipe.model_json_schema()
    definitions = found["$defs"]
    definitions.pop("NotGiven", None)
    for section, (which, key) in MENU_SECTIONS.items():
        part = definitions[section.__name__]
        part["properties"][key]["enum"] = list(menu.names(which))
        description = part["properties"]["params"].get("description", "the entry's own parameters")
        part["properties"]["params"] = {"type": "object", "description": description}
        part["allOf"] = [
            _params_schema(which, name, key, definitions, default=section.model_fields[key].default)
            for name in menu.names(which)
        ]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"sparsify-deploy/recipe/{SCHEMA_VERSION}",
        **found,
        "title": "sparsify-deploy recipe",
    }


def write_schema(path: Path = SCHEMA_FILE) -> None:
    """Write `schema()` where editors find it; `make schema` does this."""
    path.write_text(json.dumps(schema(), indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _params_schema(which: str, name: str, key: str, definitions: dict[str, Any], *, default: object) -> dict[str, Any]:
    params = menu.entry(which, name).Params
    prefix = f"{which}.{name}"
    own = params.model_json_schema(ref_template=f"#/$defs/{prefix}.{{model}}")
    definitions.update({f"{prefix}.{inner}": part for inner, part in own.pop("$defs", {}).items()})
    definitions[prefix] = own
    then: dict[str, Any] = {"properties": {"params": {"$ref": f"#/$defs/{prefix}"}}}
    if own.get("required"):
        then["required"] = ["params"]
    named = {} if name == default else {"required": [key]}  # without a name the default entry is meant
    return {"if": {"properties": {key: {"const": name}}, **named}, "then": then}
