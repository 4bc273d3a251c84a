"""Names of layers, classes, files, metrics and models are others' text: nothing takes them for markup or commands."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsify_deploy import console
from sparsify_deploy.reports import (
    EngineRow,
    Gate,
    LayerChain,
    LayerReport,
    LayerVerdict,
    ModelReport,
    Prediction,
    Row,
    RunReport,
    Shipped,
    StepRow,
    to_json,
)
from sparsify_deploy.types import IOTensor

NAMES = {
    "rich markup": "[red]x[/red][link=http://e]y[/link]",
    "an escape sequence": "\x1b[2J\x1b[31mred\x1b]0;title\x07",
    "one of eight bits": "\x9b31mred",
    "a script": "</script><script>alert(1)</script>",
    "an image": '"><img src=x onerror=alert(1)>',
    "a style": "</style></title></svg><style>*{display:none}</style>",
    "a comment": "--><!-- <![CDATA[ ]]>",
    "a cell": "a | b || c \\| d",
    "a row": "a\n| forged | row |\n",
    "a heading": "\n# Verdict: ship it\n",
    "a link": "[here](javascript:alert(1)) ![x](http://e/x.png) <http://e> [a]: http://e",
    "code": "```\ncode\n``` `x`",
    "emphasis": "**bold** __init__ _x_ ~~gone~~",
    "HTML in Markdown": "<details><summary>x</summary> &lt; &#60;",
    "a template": "{{ 7 * 7 }}{% include '/etc/passwd' %}{# x #}",
    "quotes and braces": '"} output { name: "evil" \'',
    "a comment of pbtxt": '# x\nname: "evil"',
    "backslashes": '\\"\\n\\x1b\\',
    "a carriage return": "good\rSparsify: bad",
    "from right to left": "\u202egnp.exe\u2066x\u2069",
    "invisible": "a\u200e\ufeff\u2028b\u2029\U000e0041",
    "half a character": "\udc80\ud800",
    "a NUL": "a\x00b\x7f",
    "very long": "n" * 5000,
    "a shell": "$(touch x) `id` ; rm -rf / & %s %n",
    "an emoji": "caf\xe9 \u6f22\u5b57 \U0001f642",
}
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069\ufeff\ud800-\udfff]"
)


def report(name: str) -> RunReport:
    """A report in which all that others may name is called `name`."""
    layer = LayerReport(
        name=name,
        weight=name,
        op=name,
        shape=(8, 8),
        groups=1,
        precision="INT8",
        int8_in=True,
        int8_out=False,
        weights=64,
        zeros=32,
        pattern_possible=True,
        pattern_held=True,
        usable=True,
        rule_of_thumb=True,
        reason=name,
        bytes_stored=64,
        bytes_compressed=40,
    )
    chained = LayerVerdict(
        layer=name,
        weight=name,
        op=name,
        shape=(8, 8),
        groups=1,
        precision="INT8",
        weights=64,
        int8_in=True,
        int8_out=False,
        zeros=32,
        blocks=16,
        violations=0,
        pattern_held=True,
        shape_rule=True,
        eligible=None,
        picked=None,
        kernel=name,
        dense_ms=None,
        sparse_ms=None,
        reason=name,
        advice=name,
    )
    model = ModelReport(
        metrics={name: 0.5},
        examples=10,
        sparsity_asked=None,
        precision="INT8",
        layers=(layer,),
        onnx_bytes=100,
        latency=(),
        runtime=None,
    )
    return RunReport(
        recipe=name,
        created="2026-01-01T00:00:00+00:00",
        machine={"cpu": name, "packages": {name: name}},
        metric=name,
        direction="higher",
        rows=(Row(name, "dense/train.report", model), Row(name, "sparse/quantize.report", model)),
        engines=(EngineRow("sparse", name, name, 10, name, {name: 0.5}, name, None),),
        benchmarks=(),
        gates=(Gate(name, 0.5, 0.4, False, name),),
        notes=(name, f"a note on {name}"),
        verdict=f"Verdict: {name}",
        steps=(StepRow(name, "ran", 1.0, "f" * 64, name),),
        chains=(LayerChain(name, name, "2:4", (chained,), notes=(name,)),),
        shipped=Shipped(name, name, (name,), 0.5, name, name),
        predictions=(Prediction(name, 1, 1.1, 1.2, name),),
        metrics={name: "higher"},
    )


class Elements(HTMLParser):
    """The elements, attributes and comments of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[str, ...]]] = []
        self.told: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(key for key, _ in attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.found.append((f"/{tag}", ()))

    def handle_comment(self, data: str) -> None:
        self.told.append(data)

    def unknown_decl(self, data: str) -> None:
        self.told.append(data)


def elements(text: str) -> Elements:
    parser = Elements()
    parser.feed(text)
    parser.close()
    return parser


def shape_of(found: list[tuple[str, tuple[str, ...]]]) -> list[tuple[str, tuple[str, ...]]]:
    """Elements without `class`, which goes by the length of a text."""
    return [(tag, tuple(key for key in keys if key != "class")) for tag, keys in found]


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_the_page_has_the_elements_it_has_with_a_plain_name(name: str) -> None:
    from sparsify_deploy.reporting.page import page

    plain, made = elements(page(report("plain"), "d" * 64)), page(report(name), "d" * 64)
    hostile = elements(made)
    assert shape_of(hostile.found) == shape_of(plain.found)
    assert hostile.told == plain.told
    assert "script" not in {tag for tag, _ in hostile.found}
    assert not {key for _, keys in hostile.found for key in keys if key.startswith("on")}
    assert not UNSEEN.search(made)
    made.encode()


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_the_markdown_has_the_lines_it_has_with_a_plain_name(name: str) -> None:
    from sparsify_deploy.reporting.markdown import markdown

    plain, made = markdown(report("plain")), markdown(report(name))
    assert not UNSEEN.search(made)
    made.encode()
    lines, expected = made.split("\n"), plain.split("\n")
    assert len(lines) == len(expected)
    for line, other in zip(lines, expected, strict=True):
        assert columns(line) == columns(other)
        assert re.match(r"#* ?|- |\| ?", line).group() == re.match(r"#* ?|- |\| ?", other).group()
    assert not re.search(r"(?<!\\)[<>`]", made)  # no element, no code
    assert not re.search(r"(?<!\\)\][(\[:]", made)  # no link


def columns(line: str) -> int:
    return len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) if line.startswith("|") else 0


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_json_comes_back_as_it_was(name: str, capsys) -> None:
    console.run_report(report(name), as_json=True)
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert not UNSEEN.search(printed)
    assert json.loads(printed) == json.loads(json.dumps(to_json(report(name))))


@pytest.mark.parametrize("tty", [False, True], ids=["pipe", "terminal"])
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_the_console_shows_what_a_terminal_would_obey(name: str, tty: bool, capsys, monkeypatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr("sys.stdout.isatty", lambda: tty, raising=False)
    console.run_report(report(name), as_json=False)
    console.error(f"{name}: is wrong")
    with console.progress(quiet=False, verbose=True) as progress:
        progress.say(f"trusted: {name}")
        progress.update(name, 1, 2, name)
    printed = capsys.readouterr()
    assert not UNSEEN.search(printed.out + printed.err)
    assert len(printed.err.splitlines()) == 2 if not tty else printed.err
    assert "forged | row |\n" not in printed.out
    if name.startswith("[red]") and not tty:
        assert name in printed.out  # brackets are text


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_terminal_that_knows_ascii_alone_gets_that(name: str, monkeypatch) -> None:
    import io

    file = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(file, encoding="ascii", write_through=True))
    console.out(name)
    assert not UNSEEN.search(file.getvalue().decode("ascii"))


def hostile_onnx(path: Path, name: str) -> None:
    """A file whose node, weight, input and output are called `name`."""
    text = name.encode("utf-8", "replace").decode()
    made = helper.make_graph(
        [helper.make_node("Gemm", [f"x{text}", f"w{text}"], [f"y{text}"], name=text)],
        text,
        [helper.make_tensor_value_info(f"x{text}", TensorProto.FLOAT, ["n", 8])],
        [helper.make_tensor_value_info(f"y{text}", TensorProto.FLOAT, ["n", 8])],
        [numpy_helper.from_array(np.ones((8, 8), np.float32), f"w{text}")],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_inspect_of_a_file_with_such_names(name: str, scene) -> None:
    hostile_onnx(scene.folder / "m.onnx", name)
    ended = scene.cli("inspect", "m.onnx")
    assert ended.code == 0, ended
    assert not UNSEEN.search(ended.out)
    plain = scene.folder / "p.onnx"
    hostile_onnx(plain, "plain")
    assert ended.out.count("\n") == scene.cli("inspect", plain).out.count("\n")


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_the_configuration_for_triton_is_what_its_own_parser_reads(name: str, tmp_path: Path) -> None:
    from sparsify_deploy.reporting import triton

    text = name.encode("utf-8", "replace").decode()
    engine = tmp_path / "model.onnx"
    engine.write_bytes(b"engine")
    model = triton.Model(
        engine=engine,
        files={"model.onnx": engine},
        runtime="onnxruntime",
        version="1.30.0",
        params={},
        inputs=(IOTensor(text, (None, 8), "float32"),),
        outputs=(IOTensor(text, (None, 2), "float32"),),
        largest_batch=4,
        why=name,
        labels=(name, "b"),
    )
    folder = triton.write(tmp_path / "repository", triton.model_name(name, "onnxruntime"), model, made_from="made")
    assert folder.parent == tmp_path / "repository"
    written = (folder / "config.pbtxt").read_text(encoding="utf-8")
    assert not UNSEEN.search(written)
    labels = (folder / "labels.txt").read_text(encoding="utf-8")
    assert labels.count("\n") == 2
    assert not UNSEEN.search(labels)
    text_format = pytest.importorskip("google.protobuf.text_format")
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    read = text_format.Parse(written, schema.ModelConfig())
    assert [tensor.name for tensor in read.input] == [text]
    assert [tensor.name for tensor in read.output] == [text]
    assert read.max_batch_size == 4


@pytest.mark.parametrize("name", [name for name in NAMES.values() if "\x00" not in name and len(name) < 200], ids=ascii)
def test_class_folders_and_files_with_such_names(name: str, scene) -> None:
    """What names files of a data set reaches messages, and there it is one line."""
    from PIL import Image

    from sparsify_deploy.datasets import folder as source

    name = name.replace("/", "_").encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
    for split in ("train", "test"):
        for label in ("plain", name):
            place = scene.folder / "data" / split / label
            place.mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(place / "0.png")
    params = source.Params(path=scene.folder / "data", size=8, normalize="data")
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        assert "is not UTF-8: rename the folder" in scene.refused(source.open, params).err
        return
    assert name in source.open(params).classes
    (scene.folder / "data" / "train" / name / f"{name[:60]}.png").write_bytes(b"no image")
    data = f"{{source: folder, params: {{path: {scene.folder}/data, size: 8}}}}"
    model = "{source: builtin, params: {name: resnet8, in_channels: 3, classes: 2}}"
    ended = scene.cli("plan", scene.recipe(model=model, data=data))
    assert (ended.code, len(ended.lines)) == (5, 1), ended
    assert not UNSEEN.search(ended.err)


@pytest.mark.parametrize("name", [name for name in NAMES.values() if "\x00" not in name and len(name) < 200], ids=ascii)
def test_a_recipe_file_of_such_a_name(name: str, scene) -> None:
    name = name.replace("/", "_").encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
    path = scene.folder / f"{name}.yaml"
    path.write_text("version: 2\n", encoding="utf-8")
    ended = scene.cli("validate", path)
    assert (ended.code, len(ended.lines)) == (2, 2), ended
    assert not UNSEEN.search(ended.err)


def test_the_report_is_escaped_where_it_is_written(tmp_path: Path) -> None:
    """The files of a run directory, not the functions behind them alone."""
    from sparsify_deploy.summary import _write_reports

    _write_reports(tmp_path, dataclasses.replace(report(NAMES["a script"]), created="2026"))
    for file in ("report.md", "report.html"):
        assert "<script>" not in (tmp_path / file).read_text(encoding="utf-8")
