"""Rules about the text of the package that no import contract sees."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "sparsify_deploy"
MODULES = sorted(PACKAGE.rglob("*.py"))
PRINTING = re.compile(r"print|(typer|click)\.s?echo|sys\.(__)?std(out|err)(__)?\.(buffer\.)?write(lines)?")

COMPUTED = "a computed name"
DOORS = {
    "blake3": ("artifacts/hashing.py",),
    COMPUTED: (
        "checkup/doctor.py",
        "datasets/_zoo.py",
        "menu.py",
        "models/_zoo.py",
        "runtimes/_",
        "safety/usercode.py",
    ),
    "click": (),  # what typer uses is its own copy, whose exceptions are other classes
    "cuda": ("runtimes/_",),
    "datasets": (),  # through datasets/_zoo.py
    "modelopt": ("quantization/",),
    "onnx": ("graph/",),
    "onnxruntime": ("runtimes/onnxruntime.py",),
    "openvino": ("runtimes/openvino.py",),
    "pynvml": ("artifacts/environment.py",),
    "rich": ("console.py",),
    "ruamel": ("recipe_yaml.py",),
    "tensorrt": ("runtimes/",),
    "tensorrt_rtx": ("runtimes/",),
    "timm": (),  # through models/_zoo.py
    "torch.onnx": ("export/",),
    "tokenizers": ("preprocessing/text.py",),
    "torchvision": ("training/vision.py",),  # networks and data through models/_zoo.py and datasets/_zoo.py
    "transformers": (),  # through models/_zoo.py
    "typer": ("cli.py",),
}
"""Package to the only places that import it."""


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a chain of attributes, "" of anything else."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def imported(tree: ast.AST) -> Iterator[str]:
    """Every absolute dotted name that the module imports, `from a import b` as both `a` and `a.b`.

    `import_module("a.b")` counts as well: import-linter does not see it.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func).endswith("import_module") and node.args:
            name = node.args[0]
            yield name.value if isinstance(name, ast.Constant) else COMPUTED


def printing(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and PRINTING.fullmatch(dotted(node.func)):
            yield f"line {node.lineno}: {dotted(node.func)}()"


def under(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def torch_onnx(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted(node) == "torch.onnx":
            yield f"line {node.lineno}: torch.onnx"


def form(tree: ast.Module) -> Iterator[str]:
    if not ast.get_docstring(tree):
        yield "has no docstring"
    imports = set(imported(tree))
    if imports and "__future__.annotations" not in imports:
        yield "has no `from __future__ import annotations`"


@pytest.mark.parametrize(
    ("rule", "exempt"),
    [
        pytest.param(printing, "console.py", id="only the console prints"),
        pytest.param(torch_onnx, "export/", id="torch.onnx has one door"),
        pytest.param(form, None, id="every module says what it is and defers annotations"),
    ],
)
def test_rule(rule: Callable[[ast.Module], Iterator[str]], exempt: str | None) -> None:
    modules = [p for p in MODULES if exempt is None or not relative(p).startswith(exempt)]
    found = {relative(p): list(rule(ast.parse(p.read_text(encoding="utf-8")))) for p in modules}
    assert {path: what for path, what in found.items() if what} == {}


@pytest.mark.parametrize(
    ("rule", "source", "expected"),
    [
        (printing, "print(1)", 1),
        (printing, "import sys\nsys.stdout.write('x')", 1),
        (printing, "logger.print(1)\nself.print(2)\npprint(3)", 0),
        (torch_onnx, "import torch\ntorch.onnx.export()", 1),
        (torch_onnx, "import torch\nimport onnx", 0),
        (form, "import os", 2),
        (form, "'doc'\nfrom __future__ import annotations\nimport os", 0),
    ],
)
def test_the_rules_see_what_they_forbid(
    rule: Callable[[ast.Module], Iterator[str]], source: str, expected: int
) -> None:
    assert len(list(rule(ast.parse(source)))) == expected


@pytest.mark.parametrize("package", DOORS)
def test_a_package_has_one_door(package: str) -> None:
    importers = {
        relative(path)
        for path in MODULES
        if any(under(name, package) for name in imported(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert {path for path in importers if not path.startswith(DOORS[package])} == set()


def test_imports_of_every_form_are_seen() -> None:
    source = """
import a.b
def f():
    from c import d
    importlib.import_module("e.f")
    import_module(g)
    from .h import i
"""
    assert list(imported(ast.parse(source))) == ["a.b", "c", "c.d", "e.f", COMPUTED]


def committed_text() -> list[Path]:
    folders = ["sparsify_deploy", "tests", "benchmarks", "recipes", "constraints", "docs", ".ci"]
    files = [
        p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts
    ]
    return sorted([*files, *(p for p in ROOT.iterdir() if p.is_file())])


def test_no_file_names_the_machine_it_was_written_on_or_leaves_work_for_later() -> None:
    words = re.compile(r"(?<![\w./])/(?:work|root|home)/|\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    found: list[str] = []
    for path in committed_text():
        if path == Path(__file__).resolve() or path.suffix in {
            ".onnx",
            ".npz",
            ".parquet",
            ".safetensors",
            ".png",
            ".xz",
        }:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if words.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []
