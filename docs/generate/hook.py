"""What mkdocs calls: the README becomes the first page, and `<!-- generate: NAME -->` becomes what NAME gives."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

DOCS = Path(__file__).resolve().parents[1]
README = DOCS.parent / "README.md"

if str(DOCS) not in sys.path:  # mkdocs loads this file by its path
    sys.path.insert(0, str(DOCS))

from generate import codes, commands, methods, recipe  # noqa: E402 - found by the line above

PARTS: Mapping[str, Callable[[], str]] = {
    "recipe fields": recipe.top,
    "recipe sections": recipe.sections,
    "commands": commands.reference,
    "criteria": lambda: methods.entries("criteria"),
    "methods": lambda: methods.entries("methods"),
    "costs": methods.costs,
    "model sources": lambda: methods.overview("models"),
    "data sources": lambda: methods.overview("datasets"),
    "tasks": lambda: methods.overview("tasks"),
    "runtimes": lambda: methods.overview("runtimes"),
    "menu folders": methods.folders,
    "exit codes": codes.table,
}

_MARKER = re.compile(r"^<!-- generate: (.*?) -->$", re.MULTILINE)


def filled(markdown: str) -> str:
    """The text of a page with its generated parts in place; KeyError on a name that nothing gives."""
    return _MARKER.sub(lambda found: PARTS[found[1]](), markdown)


def on_files(files: Files, *, config: MkDocsConfig, **_: Any) -> Files:
    """Add the README as `index.md`."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "index.md", abs_src_path=str(README)))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """The page with its generated parts; the README's links into docs/ lead to their neighbours here."""
    return markdown.replace("](docs/", "](") if page.file.src_uri == "index.md" else filled(markdown)
