"""Entries of one menu do not know one another; what they share is in files that start with an underscore."""

from __future__ import annotations

import pytest

from sparsify_deploy import menu

grimp = pytest.importorskip("grimp", reason="comes with import-linter")


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("sparsify_deploy", exclude_type_checking_imports=True, cache_dir=None)


@pytest.mark.parametrize("kind", menu.MENUS)
def test_entries_are_independent(graph: grimp.ImportGraph, kind: str) -> None:
    folder = f"sparsify_deploy.{menu.MENUS[kind].replace('/', '.')}"
    entries = {f"{folder}.{name}" for name in menu.names(kind)}
    assert entries <= graph.modules
    known = {entry: (graph.find_upstream_modules(entry) & entries) - {entry} for entry in entries}
    assert {entry: others for entry, others in known.items() if others} == {}


@pytest.mark.parametrize("kind", menu.MENUS)
def test_shared_files_do_not_know_the_entries(graph: grimp.ImportGraph, kind: str) -> None:
    folder = f"sparsify_deploy.{menu.MENUS[kind].replace('/', '.')}"
    entries = {f"{folder}.{name}" for name in menu.names(kind)}
    shared = graph.find_children(folder) - entries
    known = {module: graph.find_upstream_modules(module) & entries for module in shared}
    assert {module: found for module, found in known.items() if found} == {}
