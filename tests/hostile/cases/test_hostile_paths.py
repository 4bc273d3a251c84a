"""Names that lead out of a folder, and what is no file in a file's place: refused, nothing written, nobody waits."""

from __future__ import annotations

import io
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper


def graph(scene, **external: str) -> Path:
    """An ONNX file whose one weight lies in another file."""
    weight = numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "w.bin", **external}.items():
        weight.external_data.add(key=key, value=value)
    made = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [weight],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return scene.write("m.onnx", model.SerializeToString())


def located(location: str) -> Callable:
    def make(scene) -> None:
        scene.write("w.bin", np.ones(16, np.float32).tobytes())
        (scene.outside / "w.bin").write_bytes(np.ones(16, np.float32).tobytes())
        graph(scene, location=location.replace("OUTSIDE", str(scene.outside)))

    return make


def linked(hard: bool) -> Callable:
    def make(scene) -> None:
        (scene.outside / "w.bin").write_bytes(np.ones(16, np.float32).tobytes())
        link = os.link if hard else os.symlink
        link(scene.outside / "w.bin", scene.folder / "w.bin")
        graph(scene)

    return make


def placed(**external: str) -> Callable:
    def make(scene) -> None:
        scene.write("w.bin", np.ones(16, np.float32).tobytes())
        graph(scene, **external)

    return make


def shared_bytes(scene) -> None:
    """Hundreds of tensors that are the same file, whole."""
    scene.write("w.bin", bytes(1 << 16))
    path = graph(scene)
    model = onnx.load_from_string(path.read_bytes())
    for i in range(500):
        model.graph.initializer.add().CopyFrom(model.graph.initializer[0])
        model.graph.initializer[-1].name = f"w{i}"
    path.write_bytes(model.SerializeToString())


def in_a_function(scene) -> None:
    """External data in a function of the model, where initializers are not."""
    scene.write("w.bin", np.ones(16, np.float32).tobytes())
    path = graph(scene)
    model = onnx.load_from_string(path.read_bytes())
    tensor = TensorProto()
    tensor.CopyFrom(model.graph.initializer[0])
    tensor.external_data[0].value = f"../{scene.outside.name}/secret"
    function = model.functions.add(name="f", domain="evil")
    function.node.append(helper.make_node("Constant", [], ["c"], value=tensor))
    path.write_bytes(model.SerializeToString())


EXTERNAL = {
    "an absolute path": (located("OUTSIDE/w.bin"), "lie outside the file's folder"),
    "..": (located("../outside/w.bin"), "lie outside the file's folder"),
    ".. in the middle": (located("a/../../outside/w.bin"), "lie outside the file's folder"),
    "a symbolic link": (linked(hard=False), "lie outside the file's folder"),
    "a hard link": (linked(hard=True), ""),
    "no name": (located(""), "lie outside the file's folder"),
    "the folder": (located("."), ""),
    "a name that is gone": (located("gone.bin"), "is missing"),
    "a file of the kernel": (located("/dev/zero"), "lie outside the file's folder"),
    "a NUL": (located("w.bin\0x"), ""),
    "a name of 5,000 letters": (located("w" * 5000), ""),
    "an offset beyond the file": (placed(offset="1000000"), ""),
    "a length beyond the file": (placed(length="1000000"), ""),
    "a length of 2**70": (placed(length=str(2**70)), ""),
    "an offset below zero": (placed(offset="-8"), ""),
    "a length below zero": (placed(length="-1"), ""),
    "a length that is no number": (placed(length="many"), ""),
    "fewer bytes than its shape": (placed(length="8"), "its shape needs"),
    "bytes that all tensors share": (shared_bytes, "its tensors claim"),
    "in a function": (in_a_function, "lie outside the file's folder"),
}


@pytest.mark.parametrize("name", EXTERNAL)
def test_external_data_stay_in_their_folder(name: str, scene) -> None:
    make, says = EXTERNAL[name]
    make(scene)
    for arguments in (["inspect", "m.onnx"], ["build", "m.onnx", "--runtime", "onnxruntime", "--quiet"]):
        ended = scene.cli(*arguments)
        assert (ended.code, len(ended.lines)) == (5, 1), (arguments, ended)
        assert says in ended.err
    (scene.outside / "w.bin").unlink(missing_ok=True)
    assert not list(scene.folder.glob("*.onnxruntime*"))


# -- names in files of ours, and of Hugging Face -----------------------------------------------------------------------


def deployed(**changes: object) -> Callable:
    def act(scene):
        note = {
            "format": 2,
            "model": "m",
            "runtime": "openvino",
            "engine": "net.xml",
            "task": {"name": "classification"},
            "sha256": {"net.xml": "0" * 64},
            **changes,
        }
        scene.write("deploy/deploy.json", json.dumps(note))
        return scene.cli("predict", "deploy", "x.png")

    return act


def recorded(name: str) -> Callable:
    def act(scene):
        from sparsify_deploy.artifacts.fingerprint import file_digest

        engine = scene.write("net.engine", b"\0engine")
        files = {"net.engine": file_digest(engine), name: file_digest(scene.outside / "secret")}
        scene.write("net.engine.json", json.dumps({"format": 1, "runtime": "tensorrt", "params": {}, "files": files}))
        return scene.cli("inspect", "net.engine")

    return act


def tokenizer_of(name: str) -> Callable:
    def act(scene):
        from sparsify_deploy.preprocessing import spec

        text = json.dumps({"format": 1, "kind": "text", "max_length": 8, "tokenizer": name})
        return scene.refused(spec.read, scene.write("preprocessing.json", text))

    return act


def committed(name: str) -> Callable:
    """A manifest in a run directory that names a file elsewhere."""

    def act(scene):
        from sparsify_deploy.artifacts.fingerprint import file_digest
        from sparsify_deploy.artifacts.store import ArtifactStore

        store = ArtifactStore(scene.folder / "store")
        parts = {"stage": "train"}
        with store.lock():
            (store.begin("train", parts) / "w").write_bytes(b"weights")
            record = store.commit("train", parts, {"weights": "w"}, {}, 1.0)
        entry = {"file": name, "digest": file_digest(scene.outside / "secret", "blake3"), "bytes": 6}
        manifest = {
            "stage": "train",
            "fingerprint": record.fingerprint,
            "parts": parts,
            "measured": {},
            "seconds": 1.0,
            "created": record.created,
            "outputs": {"weights": entry},
        }
        (record.folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        return scene.refused(ArtifactStore(scene.folder / "store").find, "train", parts)

    return act


def saved(split: str = "train", filename: str = "data.arrow") -> Callable:
    """A folder as save_to_disk of `datasets` leaves it, with names of its own."""

    def act(scene):
        from sparsify_deploy.datasets import huggingface

        scene.write("data/dataset_dict.json", json.dumps({"splits": [split]}))
        state = {"_data_files": [{"filename": filename.replace("OUTSIDE", str(scene.outside))}], "_fingerprint": "f"}
        more = {"_split": None, "_format_type": None, "_format_kwargs": {}, "_format_columns": None}
        scene.write("data/train/state.json", json.dumps({**state, **more, "_output_all_columns": False}))
        scene.write("data/train/dataset_info.json", "{}")
        given = {"path": scene.folder / "data", "test_fraction": 0.5}
        return scene.refused(huggingface.open, huggingface.Params.model_validate(given))

    return act


def image_elsewhere(scene):
    """A row of Parquet that names a file in the place of an image's bytes."""
    import pyarrow as pa
    from pyarrow import parquet as pq

    from sparsify_deploy.datasets import parquet

    images = [{"bytes": None, "path": str(scene.outside / "secret")}] * 4
    pq.write_table(pa.table({"image": pa.array(images), "label": [0, 1, 0, 1]}), scene.folder / "train-0.parquet")
    given = {"path": scene.folder, "test_fraction": 0.5, "size": 8}
    return scene.refused(parquet.open, parquet.Params.model_validate(given))


def recipe(**sections: str) -> Callable:
    def act(scene):
        given = {name: text.replace("OUTSIDE", str(scene.outside)) for name, text in sections.items()}
        return scene.cli("validate", scene.recipe(**given))

    return act


NAMES = {
    "deploy.json: ..": (deployed(sha256={"net.xml": "0" * 64, "../outside/secret": "0" * 64}), 9),
    "deploy.json: an absolute path": (deployed(sha256={"net.xml": "0" * 64, "/etc/passwd": "0" * 64}), 9),
    "deploy.json: the folder above": (deployed(sha256={"net.xml": "0" * 64, "..": "0" * 64}), 9),
    "deploy.json: an engine elsewhere": (deployed(engine="../outside/secret"), 9),
    "deploy.json: an engine not listed": (deployed(engine="other.xml"), 9),
    "deploy.json: a name of 300 letters": (deployed(sha256={"net.xml": "0" * 64, "n" * 300: "0" * 64}), 9),
    "engine's record: ..": (recorded("../outside/secret"), 9),
    "engine's record: an absolute path": (recorded("/etc/passwd"), 9),
    "engine's record: the folder": (recorded("."), 9),
    "engine's record: a name of 300 letters": (recorded("n" * 300), 9),
    "preprocessing.json: ..": (tokenizer_of("../outside/secret"), 5),
    "preprocessing.json: an absolute path": (tokenizer_of("/etc/passwd"), 5),
    "preprocessing.json: the folder above": (tokenizer_of(".."), 5),
    "manifest: ..": (committed("../../../outside/secret"), 9),
    "manifest: an absolute path": (committed("/etc/passwd"), 9),
    "manifest: nothing": (committed(""), 9),
    "save_to_disk: a file elsewhere": (saved(filename="../../../outside/secret"), 5),
    "save_to_disk: an absolute path": (saved(filename="OUTSIDE/secret"), 5),
    "save_to_disk: an address": (saved(filename="http::x"), 5),
    "save_to_disk: a split elsewhere": (saved(split="../../outside"), 5),
    "save_to_disk: a split by an address": (saved(split="x::http://127.0.0.1:1/y"), 5),
    "Parquet: an image elsewhere": (image_elsewhere, 5),
    "recipe: a name with a slash": (recipe(name="../../outside/run"), 2),
    "recipe: a name of a folder above": (recipe(name=".."), 2),
    "recipe: a pattern that leaves": (recipe(data="{source: parquet, params: {path: ., train: '../*'}}"), 2),
    "recipe: an absolute pattern": (recipe(data="{source: parquet, params: {path: ., train: /etc/*}}"), 2),
    "recipe: a NUL in a path": (recipe(data='{source: npz, params: {path: "a\\0b"}}'), 2),
    "recipe: nobody's home": (recipe(data="{source: npz, params: {path: ~nobody-is-here/x}}"), 2),
    "recipe: a name of 5,000 letters": (recipe(data="{source: npz, params: {path: %s}}" % ("x" * 5000)), 2),
    "recipe: half a character": (recipe(data='{source: npz, params: {path: "a\\ud800b"}}'), 2),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_does_not_lead_out_of_its_folder(name: str, scene) -> None:
    act, code = NAMES[name]
    ended = act(scene)
    assert (ended.code, len(ended.lines)) == (code, 1), ended
    assert ("which is no file of it" in ended.err) == name.startswith("save_to_disk")
    assert "secret" not in ended.err.replace("outside/secret", "")


@pytest.mark.parametrize("what", ["file", "folder", "loop", "device", "pipe"])
def test_links_in_a_folder_of_images_are_read_as_images_or_not_at_all(what: str, scene) -> None:
    from PIL import Image

    from sparsify_deploy.datasets import folder as source

    for split in ("train", "test"):
        for label in ("a", "b"):
            place = scene.folder / "data" / split / label
            place.mkdir(parents=True)
            Image.new("RGB", (8, 8), (len(label), 0, 0)).save(place / "0.png")
    link = scene.folder / "data" / "train" / "a" / "1.png"
    if what == "pipe":
        os.mkfifo(link)
    else:
        targets = {"file": scene.outside / "secret", "folder": scene.outside, "loop": link, "device": "/dev/zero"}
        link.symlink_to(targets[what])
    ended = scene.refused(source.open, source.Params(path=scene.folder / "data", size=8, normalize="data"))
    assert ended.code == (5 if what == "file" else 0), ended
    assert what != "file" or "1.png: the image cannot be decoded" in ended.err


# -- what is no file -----------------------------------------------------------------------------------------------


def pipe(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def nowhere(path: Path) -> None:
    path.symlink_to("gone")


def bound(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path.name)
    os.chdir(before)


def read_weights(scene, path: Path):
    from torch import nn

    from sparsify_deploy.models._checkpoint import load_checkpoint
    from sparsify_deploy.models._pickled import objects_in

    objects_in(path)
    return scene.refused(load_checkpoint, nn.Linear(2, 2), path)


def own_code(scene, path: Path):
    from sparsify_deploy.models import file

    return scene.refused(file.build, file.Params(path=path))


def with_inputs(scene, path: Path):
    from sparsify_deploy.reporting.compare import read_inputs

    return scene.refused(read_inputs, path)


def data(scene, source: str, path: Path):
    tokenizer = ", tokenizer: ." if source == "text" else ""
    params = f"{{source: {source}, params: {{path: {path}, test_fraction: 0.2{tokenizer}}}}}"
    return scene.cli("plan", scene.recipe(data=params))


def preprocessing(scene, path: Path):
    from sparsify_deploy.preprocessing import spec

    return scene.refused(spec.read, path)


def tokenizer(scene, path: Path):
    from sparsify_deploy.preprocessing.spec import TextSpec
    from sparsify_deploy.preprocessing.text import Encoder

    return scene.refused(Encoder.open, path, TextSpec(max_length=8))


def manifest(scene, path: Path):
    from sparsify_deploy.artifacts.store import _record

    return scene.refused(_record, path.parent)


def example(scene, path: Path):
    from sparsify_deploy.predict import raw_examples
    from sparsify_deploy.preprocessing.spec import ArrayInput, ArraySpec

    spec = ArraySpec((ArrayInput("x", "float32", (2,)),))
    return scene.refused(lambda: list(raw_examples(spec, [path], [])))


PLACES = {
    "recipe": ("r.yaml", lambda scene, path: scene.cli("validate", path)),
    "recipe of a plan": ("r.yaml", lambda scene, path: scene.cli("plan", path)),
    "checkpoint": ("w.pt", read_weights),
    "safetensors": ("w.safetensors", read_weights),
    "own code": ("own.py", own_code),
    "ONNX": ("m.onnx", lambda scene, path: scene.cli("inspect", path)),
    "ONNX to build": ("m.onnx", lambda scene, path: scene.cli("build", path)),
    "engine": ("m.xml", lambda scene, path: scene.cli("inspect", path)),
    "inputs": ("i.npz", with_inputs),
    "data": ("d.npz", lambda scene, path: data(scene, "npz", path)),
    "texts": ("train.csv", lambda scene, path: data(scene, "text", path)),
    "arrow": ("train.arrow", lambda scene, path: data(scene, "huggingface", path)),
    "preprocessing": ("preprocessing.json", preprocessing),
    "tokenizer": ("tok/tokenizer.json", tokenizer),
    "GPUs": ("g.json", lambda scene, path: scene.cli("plan", scene.recipe(), "--gpu", path)),
    "report": ("run/report.json", lambda scene, path: scene.cli("report", path.parent)),
    "deploy.json": ("deploy/deploy.json", lambda scene, path: scene.cli("predict", path.parent, "x.png")),
    "manifest": ("store/s/manifest.json", manifest),
    "example": ("x.npy", example),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("put", [pipe, folder, device, loop, nowhere, bound], ids=lambda put: put.__name__)
def test_what_is_no_file_is_refused_and_not_waited_for(put: Callable[[Path], None], place: str, scene) -> None:
    name, read = PLACES[place]
    path = scene.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    put(path)
    ended = read(scene, path)
    assert ended.code in (2, 3, 5, 9), ended
    assert len(ended.lines) == 1, ended
    assert "internal error" not in ended.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_what_may_not_be_read_is_one_line(scene) -> None:
    for name, read in PLACES.values():
        path = scene.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(b"x")
        path.chmod(0)
        ended = read(scene, path)
        assert ended.code, name
        assert len(ended.lines) == 1, ended
        assert "internal error" not in ended.err


@pytest.mark.parametrize(("verb", "more"), [("validate", []), ("inspect", []), ("report", []), ("predict", ["x.png"])])
@pytest.mark.parametrize("name", ["n" * 300, "n/" * 2500, "a\nb", "\x1b[31mred", "\udcff"], ids=ascii)
def test_any_name_on_the_command_line_is_one_line(verb: str, more: list[str], name: str, scene) -> None:
    ended = scene.cli(verb, name, *more)
    assert ended.code in (2, 5), ended
    assert len(ended.lines) == 1
    assert "internal error" not in ended.err
    assert ended.err.isascii() or ended.err.removesuffix("\n").isprintable()


def test_a_recipe_of_a_gigabyte_of_nothing(scene) -> None:
    path = scene.folder / "r.yaml"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    ended = scene.cli("validate", path)
    assert (ended.code, len(ended.lines)) == (2, 1)
    assert "larger than 1 MiB" in ended.err


def test_an_onnx_file_beyond_what_protobuf_holds_is_not_read(scene) -> None:
    path = scene.folder / "m.onnx"
    with path.open("wb") as file:
        file.truncate(3 << 30)
    ended = scene.cli("inspect", path)
    assert (ended.code, len(ended.lines)) == (5, 1)
    assert "more than ONNX files can have" in ended.err


def test_images_are_read_up_to_a_size(scene) -> None:
    """Bytes of a picture come into memory whole."""
    from PIL import Image

    from sparsify_deploy.preprocessing.images import Decoder

    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    assert scene.refused(Decoder("RGB", 8), file.getvalue() + bytes(1 << 20), "a.png").code == 0
