"""What the documentation says is what the program does: its blocks run, its tables are the program's, its links lead
somewhere."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sparsify_deploy import menu
from sparsify_deploy.params import Params as Section
from sparsify_deploy.recipe import NotGiven
from sparsify_deploy.training.settings import OptimizerOverride, ScheduleOverride, TrainingOverride

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
LEFT_OUT = [
    (f"{name}:{number}", mark[1])
    for name, text in PAGES.items()
    for number, line in enumerate(text.splitlines(), 1)
    if (mark := re.match(r"<!-- test: not run: (.*) -->$", line))
]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_a_page_runs(page: str, sessions: Callable[[str], Any]) -> None:
    session = sessions(page)
    assert not session.failures, "\n\n".join(session.failures)
    assert session.ran == len(re.findall(r"^```", PAGES[page], re.MULTILINE)) // 2 - sum(
        place.startswith(f"{page}:") for place, _ in LEFT_OUT
    )


@pytest.mark.parametrize(("place", "reason"), LEFT_OUT, ids=[place for place, _ in LEFT_OUT])
def test_a_block_that_is_left_out_says_why(place: str, reason: str) -> None:
    assert len(reason.split()) > 2
    pytest.skip(f"{place}: {reason}")


# -- the generated parts -------------------------------------------------------------------------------------------


def test_every_generated_part_is_on_a_page(hook: ModuleType) -> None:
    used = re.findall(r"<!-- generate: (.*?) -->", "\n".join(PAGES.values()))
    assert sorted(used) == sorted(hook.PARTS)


def test_every_field_stands_under_its_section_with_default_and_description(complete_pages: Mapping[str, str]) -> None:
    from sparsify_deploy.recipe import Recipe

    tables = reference(complete_pages["recipe.md"])
    pending: list[tuple[str, type[BaseModel]]] = [("at-the-top", Recipe)]
    known: set[type[BaseModel]] = set()
    for place, model in pending:
        known.add(model)
        for name, field in model.model_fields.items():
            inner = section_in(field.annotation)
            if model is Recipe and inner is not None:
                pending.append((name, inner))
                continue
            value, default, what = tables[place][name]
            given = field.description or ("the entry's own parameters" if name == "params" else "-")
            assert plain(what) == plain(given), f"{place}.{name}"
            if inner is None:
                assert default == shown(field), f"{place}.{name}"
                assert value
            elif inner not in known and not issubclass(inner, NotGiven | OVERRIDES):
                pending.append((f"{place}-{name.replace('_', '-')}", inner))
    assert len(known) > 15


@pytest.mark.parametrize(("which", "name"), [(which, name) for which in menu.MENUS for name in menu.names(which)])
def test_every_entry_has_its_params_in_the_reference(which: str, name: str, complete_pages: Mapping[str, str]) -> None:
    place = f"{SECTIONS[which]}-{name.replace('_', '-')}"
    found = reference(complete_pages["recipe.md"])[place]
    fields = menu.entry(which, name).Params.model_fields
    assert set(found) >= set(fields)
    for field, info in fields.items():
        _, default, what = found[field]
        assert (default, plain(what)) == (shown(info), plain(info.description or "-")), field


def test_an_override_names_every_field_that_it_may_change(complete_pages: Mapping[str, str]) -> None:
    text = complete_pages["recipe.md"]
    for override in OVERRIDES.__args__:
        fields = ", ".join(f"`{name}`" for name in override.model_fields)
        assert f"each of them optional: {fields}." in text, override.__name__


SECTIONS = {
    "models": "model",
    "datasets": "data",
    "tasks": "task",
    "criteria": "init",
    "methods": "train",
    "runtimes": "deploy",
}
OVERRIDES = TrainingOverride | OptimizerOverride | ScheduleOverride


def reference(text: str) -> dict[str, dict[str, tuple[str, str, str]]]:
    """Of each heading's first table: the rows by field, as value, default and description."""
    found: dict[str, dict[str, tuple[str, str, str]]] = {}
    for part in re.split(r"^#+ ", text, flags=re.MULTILINE)[1:]:
        heading = part.partition("\n")[0]
        anchor = re.search(r"\{#(\S+)\}$", heading)
        place = anchor[1] if anchor else heading.lower().replace(" ", "-")
        rows = re.findall(r"^\| `(\w+)` \| (.*) \| (`.*`|none|required|-) \| (.*) \|$", part, re.MULTILINE)
        found[place] = {name: (value, default, what) for name, value, default, what in reversed(rows)}
    return found


def section_in(annotation: Any) -> type[BaseModel] | None:
    """The section in `X`, `X | None` or `tuple[X, ...]`; what stands for an entry's params is none."""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation if issubclass(annotation, BaseModel) and annotation is not Section else None
    return next((inner for part in typing.get_args(annotation) if (inner := section_in(part))), None)


def shown(field: FieldInfo) -> str:
    """A default as the reference prints it."""
    if field.is_required():
        return "required"
    if field.annotation is not None and str(field.annotation).find("Params") >= 0:
        return "-"
    value = field.get_default(call_default_factory=True)
    return "none" if value is None else f"`{json.dumps(value, default=str)}`"


def test_help_on_the_page_is_what_the_program_prints(
    complete_pages: Mapping[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sparsify_deploy.__main__ import main

    monkeypatch.setenv("COLUMNS", "80")
    text = complete_pages["commands.md"]
    for verb in verbs():
        assert main([verb, "--help"]) == 0
        printed = capsys.readouterr().out.rstrip()
        assert f"```text\n$ sparsify-deploy {verb} --help\n{printed}\n```" in text, verb


def test_every_docstring_of_a_method_is_on_its_page(complete_pages: Mapping[str, str]) -> None:
    text = plain(complete_pages["methods.md"])
    for which in ("criteria", "methods"):
        for name in menu.names(which):
            source = (ROOT / "sparsify_deploy" / menu.MENUS[which] / f"{name}.py").read_text(encoding="utf-8")
            assert plain(ast.get_docstring(ast.parse(source)) or "") in text, name


def test_the_exit_codes_are_those_of_the_readme(complete_pages: Mapping[str, str]) -> None:
    def codes(text: str) -> list[str]:
        return re.findall(r"^\| (\d+) \|", text, re.MULTILINE)

    readme = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Exit codes")[2].partition("\n## ")[0]
    assert codes(complete_pages["exit-codes.md"]) == codes(readme)


# -- what the pages must speak of ----------------------------------------------------------------------------------


def test_every_verb_is_used_on_a_written_page() -> None:
    written = "\n".join(PAGES.values())
    unused = [verb for verb in verbs() if not re.search(rf"`{verb}\b|sparsify-deploy {verb}\b", written)]
    assert unused in ([], ["version"])


@pytest.mark.parametrize("which", menu.MENUS)
def test_every_entry_of_a_menu_is_on_a_page_besides_the_reference(
    which: str, complete_pages: Mapping[str, str]
) -> None:
    others = "\n".join(text for name, text in complete_pages.items() if name != "recipe.md")
    assert [name for name in menu.names(which) if f"`{name}`" not in others] == []


def test_every_section_of_a_recipe_is_used_on_a_written_page() -> None:
    from sparsify_deploy.recipe import Recipe

    written = "\n".join(PAGES.values())
    assert [name for name in Recipe.model_fields if not re.search(rf"\b{name}\b", written)] == []


def test_every_reason_and_advice_for_a_layer_is_explained() -> None:
    source = ast.parse((ROOT / "sparsify_deploy" / "reporting" / "layer_verdict.py").read_text(encoding="utf-8"))
    judging = {"_judged", "_obstacles", "_unobstructed", "_float_output", "_outside"}
    text = plain(PAGES["verdict.md"])
    for function in ast.walk(source):
        if isinstance(function, ast.FunctionDef) and function.name in judging:
            missing = [words for words in phrases(function) if words not in text]
            assert missing == [], function.name


def phrases(function: ast.FunctionDef) -> Iterator[str]:
    """Texts of two words and more in a function, without its docstring."""
    for statement in function.body[1:] if ast.get_docstring(function) else function.body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                words = plain(node.value.strip(" :;,(){}"))
                if len(words.split()) > 1:
                    yield words


def test_every_test_that_the_page_on_reliability_names_is_there() -> None:
    named = re.findall(r"`(test_[\w*]+\.py)`", PAGES["reliability.md"])
    assert len(named) > 10
    assert [name for name in named if not list((ROOT / "tests").rglob(name))] == []
    folders = re.findall(r"`(tests/[\w/]+)`", PAGES["reliability.md"])
    assert [folder for folder in folders if not (ROOT / folder).is_dir()] == []


def test_every_column_of_the_layer_table_is_explained() -> None:
    from sparsify_deploy.reporting.layer_tables import layer_table
    from sparsify_deploy.reporting.layer_verdict import Known, chain

    columns = {"dense / sparse ms", *layer_table(chain("a model", (), Known(runtime="tensorrt"))).columns}
    rows = re.findall(r"^\| ([^|]*?) \|", PAGES["verdict.md"], re.MULTILINE)
    explained = {name.strip() for row in rows for name in row.split(",")}
    assert columns <= explained


def plain(text: str) -> str:
    """Text without Markdown's signs and links, its white space as single spaces."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return " ".join(re.sub(r"[`\\|]", " ", text).split())


def verbs() -> list[str]:
    import typer

    from sparsify_deploy.cli import app

    return list(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


# -- the site ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built pages; mkdocs ends with an error on any warning, a link or anchor that leads nowhere among them."""
    pytest.importorskip("material", reason="comes with the extra [docs]")
    folder = tmp_path_factory.mktemp("site")
    # Without --quiet, which keeps warnings from being counted.
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Fetched(HTMLParser):
    """What a browser fetches for a page, and every id in it."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if (found := given.get("id")) is not None:
            self.ids.add(found)
        if tag in {"link", "script", "img", "iframe"}:
            self.urls += [url for name in ("src", "href") if (url := given.get(name)) is not None]


def read(path: Path) -> Fetched:
    found = Fetched()
    found.feed(path.read_text(encoding="utf-8"))
    return found


def test_the_site_has_every_page_and_fetches_nothing(site: Path) -> None:
    pages = {path.stem: read(path) for path in site.glob("*.html") if path.name != "404.html"}
    assert set(pages) == {name.removesuffix(".md") for name in (*PAGES, "index.md")}
    away = {name: [url for url in page.urls if re.match(r"(https?:)?//", url)] for name, page in pages.items()}
    assert {name: urls for name, urls in away.items() if urls} == {}
    imported = re.compile(r"(?:@import\s+|url\()['\"]?(?:https?:)?//")
    assert [path.name for path in site.rglob("*.css") if imported.search(path.read_text(encoding="utf-8"))] == []


def test_the_generators_are_not_published(site: Path) -> None:
    assert [path for path in site.rglob("*.py*") if path.is_file()] == []
    assert not (site / "generate").exists()


def test_the_readme_may_link_to_the_pages(hook: ModuleType) -> None:
    class Index:
        class file:
            src_uri = "index.md"

    assert (
        hook.on_page_markdown("[a](docs/nm.md), [b](https://x/docs/)", page=Index) == "[a](nm.md), [b](https://x/docs/)"
    )


def test_headings_of_the_reference_are_places_to_link_to(site: Path) -> None:
    assert {"model-builtin", "nm", "training-optimizer", "deploy-tensorrt-rtx"} <= read(site / "recipe.html").ids
