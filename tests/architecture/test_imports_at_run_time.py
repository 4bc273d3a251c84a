"""What is loaded when: menus on a bare Python, and the light verbs without the heavy libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsify_deploy import menu

ROOT = Path(__file__).resolve().parents[2]

BARE = """
import importlib, json, sys
for name in ("torch", "numpy", "onnx", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "cuda", "modelopt",
             "sklearn", "pyarrow", "PIL", "scipy", "safetensors", "torchvision", "timm", "transformers"):
    sys.modules[name] = None
from sparsify_deploy import menu
print(json.dumps([
    [kind, name, module.VERSION, sorted(module.Params.model_fields), bool(menu.summary(kind, name))]
    for kind in menu.MENUS for name in menu.names(kind) for module in [menu.entry(kind, name)]
]))
"""

VERB = """
import json, sys
from sparsify_deploy.__main__ import main
sys.argv = ["sparsify-deploy", *sys.argv[1:]]
try:
    code = main()
except SystemExit as stop:
    code = stop.code
assert not code, f"exit code {code}"
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def child(source: str, *arguments: str) -> list[object]:
    """Run `source` in a fresh interpreter; what its last line says."""
    done = subprocess.run(
        [sys.executable, "-c", source, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(answer, list)
    return answer


def test_every_menu_entry_loads_on_a_bare_python() -> None:
    loaded = child(BARE)
    assert [(kind, name) for kind, name, *_ in loaded] == [(k, n) for k in menu.MENUS for n in menu.names(k)]  # type: ignore[misc]
    for kind, name, version, fields, summary in loaded:  # type: ignore[misc]
        assert isinstance(version, int), (kind, name)
        assert version >= 1, (kind, name)
        assert isinstance(fields, list), (kind, name)
        assert summary, f"{kind}/{name} has no one-sentence docstring for `list`"


@pytest.mark.parametrize("kind", menu.MENUS)
def test_no_menu_is_empty(kind: str) -> None:
    assert menu.names(kind)


@pytest.mark.parametrize(
    ("arguments", "forbidden"),
    [
        pytest.param(["--help"], {"pydantic", "ruamel", "numpy", "torch", "onnx"}, id="--help"),
        pytest.param(["--version"], {"pydantic", "ruamel", "numpy", "torch", "onnx"}, id="--version"),
        pytest.param(["version"], {"torch", "numpy"}, id="version"),
        pytest.param(["list"], {"torch", "numpy"}, id="list"),
        pytest.param(["validate", "recipes/digits.yaml"], {"torch", "numpy"}, id="validate"),
    ],
)
def test_light_verbs_do_not_load_heavy_libraries(arguments: list[str], forbidden: set[str]) -> None:
    assert forbidden & set(child(VERB, *arguments)) == set()
