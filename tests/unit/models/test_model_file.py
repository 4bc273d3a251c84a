"""A user's own network by path: what is found, what is refused, and with which line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsify_deploy.errors import ModelError
from sparsify_deploy.models import file

NET = """
from torch import nn

def model(width: int = 4):
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))

class Net(nn.Module):
    def __init__(self, width=5):
        super().__init__()
        self.fc = nn.Linear(3, width)
    def forward(self, x):
        return self.fc(x)

ready = nn.Linear(3, 2)
number = 7
"""


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str, name: str = "net.py") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def build(path: Path, name: str = "model", **arguments: object) -> nn.Module:
    return file.build(file.Params.model_validate({"path": path, "object": name, "arguments": arguments}))


def failure(path: Path, name: str = "model", **arguments: object) -> str:
    with pytest.raises(ModelError) as caught:
        build(path, name, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 5
    return message


def test_function_class_and_instance(write) -> None:
    path = write(NET)
    assert build(path)[0].out_features == 4
    assert build(path, width=9)[0].out_features == 9
    assert build(path, "Net", width=6).fc.out_features == 6
    assert isinstance(build(path, "ready"), nn.Linear)


@pytest.mark.parametrize("name", ["model", "Net", "ready"])
def test_weights_follow_the_seed_and_are_never_shared(write, name: str) -> None:
    path = write(NET)
    torch.manual_seed(1)
    first = build(path, name)
    other = build(path, name)
    torch.manual_seed(1)
    again = build(path, name)
    pairs = zip(first.parameters(), other.parameters(), again.parameters(), strict=True)
    for a, b, c in pairs:
        assert torch.equal(a, c)
        assert not torch.equal(a, b)
        assert a.data_ptr() != c.data_ptr()


def test_siblings_are_importable_separate_and_forgotten(write, tmp_path: Path) -> None:
    search = list(sys.path)
    for folder, width in (("a", 3), ("b", 8)):
        net = (
            "from pieces.sizes import WIDTH\nfrom torch import nn\n"
            "def model():\n    import late\n    return nn.Linear(late.K, WIDTH)\n"
        )
        write(net, f"{folder}/net.py")
        write("", f"{folder}/pieces/__init__.py")
        write(f"WIDTH = {width}\n", f"{folder}/pieces/sizes.py")
        write(f"K = {width + 1}\n", f"{folder}/late.py")
    assert (build(tmp_path / "a/net.py").in_features, build(tmp_path / "a/net.py").out_features) == (4, 3)
    assert (build(tmp_path / "b/net.py").in_features, build(tmp_path / "b/net.py").out_features) == (9, 8)
    assert sys.path == search
    assert not {"pieces", "pieces.sizes", "late", "net"} & set(sys.modules)


def test_a_rewritten_file_of_equal_length_is_read_again(write) -> None:
    text = "from torch import nn\nmodel = nn.Linear(3, 2)\n"
    assert build(write(text)).out_features == 2
    assert build(write(text.replace("2)", "4)"))).out_features == 4


def test_annotations_of_the_file_are_its_own_business(write) -> None:
    path = write(
        "from dataclasses import dataclass\nfrom torch import nn\n@dataclass\nclass S:\n    width: int = 2\n"
        "assert S.__annotations__['width'] is int\n"
        "def model():\n    return nn.Linear(1, S().width)\n"
    )
    assert build(path).out_features == 2


def test_an_unknown_name_gets_a_suggestion(write) -> None:
    path = write(NET)
    assert failure(path, "modle") == f"{path}: nothing in it is called 'modle'; did you mean 'model'?"
    assert failure(path, "xyz").endswith("; one of model, Net, ready, number")
    assert failure(write("import os\n"), "model").endswith("'model'; it defines no names")


def test_what_is_no_module_is_named(write) -> None:
    path = write(NET + "\ndef shape():\n    return (3, 4)\n")
    assert failure(path, "shape") == f"{path}: shape gives tuple, expected a torch.nn.Module"
    assert failure(path, "number") == f"{path}: number gives int, expected a torch.nn.Module"
    assert failure(path, "ready", width=3).endswith("arguments have no effect: remove them")


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("x = 1\n\nraise ValueError('two\\nlines')\n", 3, "ValueError: two lines"),
        ("import torch\ndef model():\n    return torch.nn.Linear(-1, 2)\n", 3, "RuntimeError: "),
        (
            "def model():\n    return inner()\ndef inner():\n    return 1 / 0\n",
            4,
            "ZeroDivisionError: division by zero",
        ),
        ("def model(:\n", 1, "SyntaxError: "),
        ("import sys\nsys.exit(3)\n", 2, "SystemExit: 3"),
        ("import no_such_package_anywhere\n", 1, "ModuleNotFoundError: No module named 'no_such_package_anywhere'"),
        ("def model():\n    assert False\n", 2, "AssertionError"),
    ],
)
def test_a_failure_names_the_users_line(write, text: str, line: int, says: str) -> None:
    path = write(text)
    search, modules = list(sys.path), set(sys.modules)
    message = failure(path)
    assert message.startswith(f"{path}:{line}: {says}")
    assert sys.path == search
    assert not {m for m in set(sys.modules) - modules if "sparsify_deploy_user" in m and "def model" not in text}


def test_a_failure_in_a_sibling_names_the_sibling(write) -> None:
    path = write("import broken\n")
    sibling = write("\n\nraise KeyError('k')\n", "broken.py")
    assert failure(path) == f"{sibling}:3: KeyError: 'k'"
    sibling = write("x = = 2\n", "broken.py")
    assert failure(path).startswith(f"{sibling}:1: SyntaxError")
    assert "broken" not in sys.modules


def test_wrong_arguments_name_the_file(write) -> None:
    path = write(NET)
    message = failure(path, wdith=3)
    assert message == (
        f"{path}:4: model(width: int = 4) cannot be called with the arguments given (wdith): got an unexpected keyword "
        "argument 'wdith'; change params.arguments or the signature"
    )
    path = write("\ndef model(width, *, depth):\n    pass\n")
    assert f"{path}:2: model(width, *, depth)" in failure(path, width=3)
    assert "missing a required argument: 'depth'" in failure(path, width=3)


def test_files_that_are_none(write, tmp_path: Path) -> None:
    assert failure(tmp_path / "absent.py") == f"{tmp_path / 'absent.py'}: no such file"
    (tmp_path / "folder.py").mkdir()
    assert "cannot be read: Is a directory" in failure(tmp_path / "folder.py")
    assert failure(write("{}", "net.ipynb")).endswith("expected a Python file, .py")


def test_the_interrupt_key_is_not_a_model_error(write) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(write("raise KeyboardInterrupt\n"))


def test_the_path_starts_at_the_recipe_and_is_the_only_file() -> None:
    params = file.Params.model_validate({"path": "net.py"}, context={"folder": "/recipes"})
    assert file.files(params) == {"path": Path("/recipes/net.py")}
