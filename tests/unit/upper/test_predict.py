"""Raw examples through a deployed folder: images, texts and arrays, without torch, and one line for what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsify_deploy import console, deploy, predict
from sparsify_deploy.__main__ import main
from sparsify_deploy.artifacts import durable
from sparsify_deploy.artifacts.fingerprint import file_digest
from sparsify_deploy.errors import CorruptArtifact, DataError, MissingExtra, RuntimeUnavailable, UsageError
from sparsify_deploy.preprocessing.spec import ArrayInput, ArraySpec, ImageSpec, Spec, TextSpec
from sparsify_deploy.reporting import package

pytest.importorskip("onnxruntime")
Image = pytest.importorskip("PIL.Image")

CLASSES = ("ant", "bee", "cat", "dog", "eel")
RANDOM = np.random.default_rng(0)
WEIGHTS = RANDOM.standard_normal((48, 5)).astype(np.float32) / 4
IMAGES = ImageSpec("RGB", 4, "stretch", (100.0, 110.0, 120.0), (50.0, 60.0, 70.0), classes=CLASSES)
ARRAYS = ArraySpec((ArrayInput("input", "uint8", (4, 4, 3), "HWC", (100.0,), (50.0,)),), "pixels 4x4", CLASSES)
TEXTS = TextSpec(8, inputs=("input_ids", "attention_mask"), classes=("calm", "loud"))
WORDS = {"[PAD]": 0, "[UNK]": 1, "hush": 2, "now": 3, "bang": 4, "boom": 5}
Make = Callable[..., Path]


def save(
    path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: Mapping[str, np.ndarray]
) -> None:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(*each) for each in inputs],
        [helper.make_tensor_value_info(*each) for each in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())


def image_net(path: Path, batch: str | int = "N") -> None:
    """Logits (N, 5) of pixels (N, 3, 4, 4)."""
    nodes = [helper.make_node("Flatten", ["input"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["output"])]
    floats = TensorProto.FLOAT
    save(path, nodes, [("input", floats, [batch, 3, 4, 4])], [("output", floats, [batch, 5])], {"w": WEIGHTS})


def text_net(path: Path) -> None:
    """Logits (N, 2): the sum of what each token that is not padding says."""
    says = np.array([[9, 9], [0, 0], [2, 0], [0, 0], [0, 1], [0, 3]], dtype=np.float32)
    nodes = [
        helper.make_node("Gather", ["says", "input_ids"], ["tokens"]),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["wide"]),
        helper.make_node("Mul", ["tokens", "wide"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "middle"], ["logits"], keepdims=0),
    ]
    inputs = [(name, TensorProto.INT64, ["N", "T"]) for name in ("input_ids", "attention_mask")]
    constants = {"says": says, "last": np.array([2]), "middle": np.array([1])}
    save(path, nodes, inputs, [("logits", TensorProto.FLOAT, ["N", 2])], constants)


@pytest.fixture
def packed(tmp_path: Path) -> Make:
    """Writes a deployed folder around a network; `None` for a spec leaves preprocessing to the user."""

    def make(spec: Spec | None = IMAGES, net: Callable[[Path], None] = image_net, task: str = "classification") -> Path:
        source, folder = tmp_path / "net.onnx", tmp_path / "deploy"
        folder.mkdir()
        net(source)
        deploy.build(source, "onnxruntime", folder / "model.onnx", ())
        if spec is not None:
            (folder / "preprocessing.json").write_text(spec.to_text(), encoding="utf-8")
        if isinstance(spec, TextSpec):
            tokenizers = pytest.importorskip("tokenizers")
            tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="[UNK]"))
            tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
            tokenizer.save(str(folder / "tokenizer.json"))
        seal(
            folder, model="dense FP32", runtime="onnxruntime", engine="model.onnx", task={"name": task, "output": None}
        )
        return folder

    return make


def seal(folder: Path, **note: Any) -> None:
    """Write the note of a folder, with the hashes of what is there."""
    path = folder / "deploy.json"
    known = durable.read_json(path) if path.exists() else {"format": package.FORMAT}
    hashes = {p.name: file_digest(p) for p in folder.iterdir() if p != path}
    durable.write_json(path, {**known, "sha256": hashes, **note})


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Two images of 4 x 4, so that nothing is resized."""
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path in paths:
        Image.fromarray(RANDOM.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(path)
    return paths


def expected(path: Path) -> np.ndarray:
    """The classes' probabilities, computed here."""
    pixels = np.asarray(Image.open(path)).transpose(2, 0, 1).astype(np.float64)
    shift, divisor = (np.array(v)[:, None, None] for v in (IMAGES.shift, IMAGES.divisor))
    logits = ((pixels - shift) / divisor).reshape(-1) @ WEIGHTS.astype(np.float64)
    return np.exp(logits) / np.exp(logits).sum()


@pytest.mark.parametrize("batch", ["N", 1, 3])
def test_images_get_their_likeliest_classes(packed: Make, pictures: list[Path], batch: str | int) -> None:
    folder = packed(net=lambda path: image_net(path, batch))
    found = predict.predict(folder, pictures, (), top=3)
    assert (found.model, found.runtime) == ("dense FP32", "onnxruntime")
    assert [answer.example for answer in found.answers] == list(map(str, pictures))
    for path, answer in zip(pictures, found.answers, strict=True):
        wanted = expected(path)
        assert answer.guesses is not None
        order = np.argsort(-wanted)[:3]
        assert [guess.index for guess in answer.guesses] == order.tolist()
        assert [guess.name for guess in answer.guesses] == [CLASSES[i] for i in order]
        assert [guess.probability for guess in answer.guesses] == pytest.approx(wanted[order], rel=1e-4)


def test_arrays_and_a_named_array_say_the_same(packed: Make, pictures: list[Path], tmp_path: Path) -> None:
    pixels = np.asarray(Image.open(pictures[0]))
    np.save(tmp_path / "a.npy", pixels)
    np.savez(tmp_path / "a.npz", input=pixels)
    found = predict.predict(packed(ARRAYS), [tmp_path / "a.npy", tmp_path / "a.npz"], ())
    assert found.answers[0].guesses == found.answers[1].guesses
    assert found.answers[0].guesses is not None
    assert len(found.answers[0].guesses) == 5


def test_texts_come_by_option_and_by_line(packed: Make, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("bang boom\n\nhush now hush\n", encoding="utf-8")
    found = predict.predict(packed(TEXTS, text_net), [tmp_path / "a.txt"], ["hush now"], top=1)
    assert [answer.example for answer in found.answers] == [
        "hush now",
        f"{tmp_path / 'a.txt'}:1: bang boom",
        f"{tmp_path / 'a.txt'}:3: hush now hush",
    ]
    first = [answer.guesses[0] for answer in found.answers if answer.guesses]
    assert [guess.name for guess in first] == ["calm", "loud", "calm"]
    assert [guess.probability for guess in first] == pytest.approx([1 / (1 + np.exp(-x)) for x in (2, 4, 4)])


def test_the_two_texts_of_a_pair_have_a_tab_between_them() -> None:
    spec = TextSpec(8, pair=True)
    assert list(predict.raw_examples(spec, (), ["a b\tc"])) == [("a b c", ("a b", "c"))]
    with pytest.raises(DataError, match="--text: this model takes pairs of texts: put a tab between the two"):
        predict.raw_examples(spec, (), ["a b"])


def test_a_model_that_is_no_classifier_gives_its_values(packed: Make, pictures: list[Path]) -> None:
    found = predict.predict(packed(task="regression"), pictures[:1], ())
    (answer,) = found.answers
    assert answer.guesses is None
    assert answer.outputs is not None
    assert np.asarray(answer.outputs["output"]).shape == (5,)
    assert predict.table(found).columns == ("example", "output", "values")


def test_it_needs_no_torch_and_prints_a_table_or_json(packed: Make, pictures: list[Path]) -> None:
    folder = packed()
    blocked = "import sys; sys.modules.update(torch=None, modelopt=None, transformers=None); "
    code = f"{blocked}from sparsify_deploy.__main__ import main; sys.exit(main(sys.argv[1:]))"
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}

    def call(*arguments: str) -> str:
        command = [sys.executable, "-c", code, "predict", str(folder), *map(str, pictures), *arguments]
        done = subprocess.run(command, check=False, env=environ, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    found = json.loads(call("--json", "--top", "2"))
    wanted = expected(pictures[1])
    assert [len(answer["guesses"]) for answer in found["answers"]] == [2, 2]
    assert found["answers"][1]["guesses"][0]["probability"] == pytest.approx(wanted.max(), rel=1e-4)
    lines = call("--top", "1").splitlines()
    assert lines[0] == f"{folder}: dense FP32 in onnxruntime"
    assert lines[1].split() == ["example", "class", "index", "probability"]
    best = int(wanted.argmax())
    assert lines[4].split() == [str(pictures[1]), CLASSES[best], str(best), f"{wanted.max():.4f}"]


def test_a_folder_that_is_no_package_is_told_apart(packed: Make, pictures: list[Path], tmp_path: Path) -> None:
    folder = packed()
    for given, says in (
        (tmp_path / "nowhere", "no such folder; name the folder deploy/"),
        (folder / "model.onnx", "is a file; name the folder deploy/"),
        (pictures[0].parent, f"holds no deployed model .no deploy.json.: did you mean {folder}"),
        (tmp_path / "empty", "holds no deployed model"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(DataError, match=says):
            predict.predict(given, pictures, ())


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("", CorruptArtifact, "cannot be read"),
        ("[]", CorruptArtifact, "cannot be read"),
        ('{"format": 1}', DataError, "format 1, this program reads 3: run the recipe again"),
        ('{"format": 2}', CorruptArtifact, "does not list what a deployed model has"),
    ],
)
def test_a_damaged_note_is_named(packed: Make, text: str, error: type[Exception], says: str) -> None:
    folder = packed()
    (folder / "deploy.json").write_text(text)
    with pytest.raises(error, match=says):
        package.read(folder)


def test_names_in_a_note_stay_in_the_folder(packed: Make) -> None:
    folder = packed()
    note = durable.read_json(folder / "deploy.json")
    note["sha256"]["../net.onnx"] = file_digest(folder.parent / "net.onnx")
    durable.write_json(folder / "deploy.json", {**note, "engine": "../net.onnx"})
    with pytest.raises(CorruptArtifact, match="does not list what a deployed model has"):
        package.read(folder)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.json", "preprocessing.json"])
def test_a_file_that_is_another_is_named(packed: Make, pictures: list[Path], name: str) -> None:
    folder = packed()
    (folder / name).write_bytes((folder / name).read_bytes() + b"\n")
    with pytest.raises(CorruptArtifact, match=f"{name}: its bytes are not the ones deploy.json lists"):
        predict.predict(folder, pictures, ())
    (folder / name).unlink()
    with pytest.raises(CorruptArtifact, match=f"{name}: is gone"):
        predict.predict(folder, pictures, ())


def test_an_engine_that_differs_from_its_own_record_is_refused(
    packed: Make, pictures: list[Path], tmp_path: Path
) -> None:
    folder = packed()
    image_net(folder / "model.onnx", 2)
    seal(folder)
    with pytest.raises(CorruptArtifact, match=r"its bytes are not the ones model\.onnx\.json lists"):
        predict.predict(folder, pictures, ())


def test_a_package_without_preprocessing_says_so(packed: Make, pictures: list[Path]) -> None:
    with pytest.raises(DataError, match=r"because the data set did not: open model\.onnx with onnxruntime and feed it"):
        predict.predict(packed(None), pictures, ())


def test_a_runtime_that_cannot_run_here_is_named(
    packed: Make, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsify_deploy.runtimes import onnxruntime

    monkeypatch.setattr(onnxruntime, "cannot_run_reason", lambda: "no such device here")
    with pytest.raises(RuntimeUnavailable, match="its engine is one of onnxruntime: no such device here"):
        predict.predict(packed(), pictures, ())


def test_without_pillow_the_extra_is_named(packed: Make, pictures: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtra, match=r"decoding images needs Pillow.*sparsify-deploy\[predict\]"):
        predict.predict(packed(), pictures, ())


def test_one_bad_picture_does_not_cost_the_answers_of_the_others(
    packed: Make, pictures: list[Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    folder = packed()
    with pytest.raises(DataError, match=r"bad\.png"):
        predict.predict(folder, [bad, *pictures], ())
    found = predict.predict(folder, [pictures[0], bad, *pictures[1:]], (), keep_going=True)
    assert [answer.example for answer in found.answers] == [str(path) for path in pictures]
    with pytest.raises(DataError, match=r"bad\.png: the image cannot be decoded"):
        found.check()
    predict.predict(folder, pictures, (), keep_going=True).check()
    with pytest.raises(DataError, match=r"bad\.png"):
        predict.predict(folder, [bad], (), keep_going=True)


def test_the_command_line_answers_what_it_can_and_ends_by_the_code_of_the_rest(
    packed: Make, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    assert main(["predict", str(packed()), str(tmp_path / "bad.png"), str(pictures[0]), "--json"]) == 5
    said = capsys.readouterr()
    assert [answer["example"] for answer in json.loads(said.out)["answers"]] == [str(pictures[0])]
    assert "bad.png: the image cannot be decoded" in said.err


def test_what_an_image_model_does_not_take(packed: Make, pictures: list[Path], tmp_path: Path) -> None:
    folder = packed()
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "a.txt").write_text("words")
    np.save(tmp_path / "a.npy", np.zeros(3))
    for files, says in (
        ([tmp_path / "cut.jpg"], r"cut\.jpg: the image cannot be decoded"),
        ([*pictures, tmp_path / "none.png"], r"none\.png: no such file"),
        ([tmp_path], "is a folder: name the files in it"),
        ([tmp_path / "a.txt"], r"a\.txt: this model takes image files"),
        ([tmp_path / "a.npy"], r"a\.npy: this model takes image files"),
    ):
        with pytest.raises(DataError, match=says):
            predict.predict(folder, files, ())
    with pytest.raises(UsageError, match="--text: this model takes image files"):
        predict.predict(folder, pictures, ["a cat"])
    with pytest.raises(UsageError, match="nothing to predict: this model takes image files"):
        predict.predict(folder, (), ())


def test_what_a_text_model_does_not_take(packed: Make, pictures: list[Path], tmp_path: Path) -> None:
    folder = packed(TEXTS, text_net)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bytes.txt").write_bytes(b"caf\xe9")
    for path, says in (
        (pictures[0], "this model takes texts: --text, or .txt files"),
        (tmp_path / "empty.txt", "holds no text"),
        (tmp_path / "bytes.txt", r"is no text in UTF-8 \(byte 3\)"),
    ):
        with pytest.raises(DataError, match=says):
            predict.predict(folder, [path], ())
    (folder / "tokenizer.json").write_text("{}")
    seal(folder)
    with pytest.raises(DataError, match=r"tokenizer\.json: is no tokenizer"):
        predict.predict(folder, (), ["hush"])


def test_what_an_array_model_does_not_take(packed: Make, pictures: list[Path], tmp_path: Path) -> None:
    folder = packed(ARRAYS)
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "floats.npy", np.zeros((4, 4, 3)))
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    for path, says in (
        (pictures[0], r"this model takes \.npy files, each pixels 4x4"),
        (tmp_path / "objects.npy", "is no array of numbers"),
        (tmp_path / "cut.npz", "is no array of numbers, or is damaged"),
        (tmp_path / "floats.npy", r"floats\.npy: input holds float64, this model takes bytes"),
    ):
        with pytest.raises(DataError, match=says):
            predict.predict(folder, [path], ())


def test_the_command_line_ends_in_one_line_and_the_errors_own_code(
    packed: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(packed()), "none.png"]) == 5
    assert capsys.readouterr().err == "sparsify-deploy: none.png: no such file\n"
    assert main(["predict", "nowhere", "none.png"]) == 5
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_logits_that_are_none_are_refused() -> None:
    for logits in (np.zeros((2, 2)), np.array([1.0, np.inf])):
        with pytest.raises(DataError, match="it is no classifier's answer"):
            predict.likeliest(logits, (), 5)
    (first, second, *_) = predict.likeliest(np.array([1000.0, 1000.0, -1000.0]), ("a", "b"), 5)
    assert (first.index, first.name, first.probability, second.probability) == (0, "", 0.5, 0.5)


def test_many_values_of_an_output_are_cut_in_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    answer = predict.Answer("x", None, {"y": [[1.23456789, 2.0]], "z": list(range(9))})
    console.predicted(predict.Predicted(Path("p"), "m", "r", (answer,)), as_json=False)
    text = capsys.readouterr().out
    assert "[[1.23457, 2]]" in text
    assert "[0, 1, 2, 3, 4, 5, 6, 7, ...]" in text
