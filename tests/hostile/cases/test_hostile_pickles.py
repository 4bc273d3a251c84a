"""A pickle runs code when it is read. Wherever one may hide, it is refused in one line and nothing runs."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("torchvision")  # transformers does not load without it


def checkpoint(name: str):
    """A case: a file of that name as model.checkpoint, read by `run`."""

    def act(scene, content: bytes):
        scene.write(name, content)
        model = f"{{source: builtin, params: {{name: resnet8, in_channels: 1}}, checkpoint: {name}}}"
        return scene.cli("run", scene.recipe(model=model), "--quiet")

    return act


def weights(name: str):
    """A case: the reader of checkpoints itself, past the question whether code is to be trusted."""

    def act(scene, content: bytes):
        from torch import nn

        from sparsify_deploy.models._checkpoint import load_checkpoint

        return scene.refused(load_checkpoint, nn.Linear(2, 2), scene.write(name, content))

    return act


def teacher(scene, content: bytes):
    scene.write("teacher.pt", content)
    more = {
        "nm": "{fine_tune: {steps: 2}}",
        "training": "{steps: 2}",
        "distillation": "{teacher: teacher.pt, phases: [fine_tune]}",
    }
    return scene.cli("run", scene.recipe(**more), "--quiet")


def data_npz(scene, content: bytes):
    path = scene.write("d.npz", content)
    return scene.cli("plan", scene.recipe(data=f"{{source: npz, params: {{path: {path}}}}}"))


def npy(scene, content: bytes):
    from sparsify_deploy import predict

    return scene.refused(predict._arrays, scene.write("one.npy", content))


def inputs(scene, content: bytes):
    from sparsify_deploy.reporting import compare

    return scene.refused(compare.read_inputs, scene.write("inputs.npz", content))


def step_checkpoint(scene, content: bytes):
    from sparsify_deploy.artifacts import seal
    from sparsify_deploy.artifacts.hashing import bytes_digest
    from sparsify_deploy.training import checkpoint as steps

    sealed = seal.line(bytes_digest(content, "blake3")) + content
    return scene.refused(steps.read, scene.write("train.checkpoint", sealed))


def mask(scene, content: bytes):
    from sparsify_deploy.sparsity.mask import Mask

    return scene.refused(Mask.load, scene.write("mask.safetensors", content))


def transformers_folder(name: str):
    """A case: weights of that name in a folder of transformers."""

    def act(scene, content: bytes):
        from sparsify_deploy.models import transformers as source

        config = {"model_type": "bert", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
        sizes = {"intermediate_size": 8, "vocab_size": 12, "max_position_embeddings": 16}
        scene.write("hf/config.json", json.dumps({**config, **sizes}))
        scene.write(f"hf/{name}", content)
        if name.endswith(".index.json"):
            scene.write("hf/part.bin", scene.torch_zip(scene.pickled))
        return scene.refused(source.build, source.Params(path=scene.folder / "hf"))

    return act


def parquet(scene, content: bytes):
    from sparsify_deploy.datasets import parquet as source

    scene.write("data/train-0.parquet", content)
    given = {"path": scene.folder / "data", "test_fraction": 0.5, "size": 8}
    return scene.refused(source.open, source.Params.model_validate(given))


def arrow(scene, content: bytes):
    from sparsify_deploy.datasets import huggingface as source

    given = {"path": scene.write("train.arrow", content), "test_fraction": 0.5, "input": "x"}
    return scene.refused(source.open, source.Params.model_validate(given))


def raw(scene) -> bytes:
    return scene.pickled


def zipped(scene) -> bytes:
    return scene.torch_zip(scene.pickled)


def nested(scene) -> bytes:
    """Harmless in front, the payload in a second pickle of the archive."""
    return scene.torch_zip(pickle.dumps({}, protocol=2), **{"evil/inner/data.pkl": scene.pickled})


def headed_zip(scene) -> bytes:
    """A pickle with an archive behind it: a zip for those who look from the end, a pickle for torch."""
    return scene.pickled + scene.torch_zip(pickle.dumps({}, protocol=2))


def legacy(scene) -> bytes:
    """The older format: a number, a version, a note on the machine, the objects, the keys of the storages."""
    parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    return b"".join(pickle.dumps(part, protocol=2) for part in parts) + scene.pickled + pickle.dumps([], protocol=2)


def tar(scene) -> bytes:
    """The oldest format, a tar: one member leaves the folder, one is a link, one a pickle."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("storages", "tensors", "pickle", f"../{scene.outside.name}/written"):
            info = tarfile.TarInfo(name)
            info.size = len(scene.pickled)
            archive.addfile(info, io.BytesIO(scene.pickled))
        link = tarfile.TarInfo("storages/link")
        link.type, link.linkname = tarfile.SYMTYPE, str(scene.outside)
        archive.addfile(link)
    return file.getvalue()


def torchscript(scene) -> bytes:
    others = {"evil/constants.pkl": scene.pickled, "evil/code/__torch__.py": b"import os\n"}
    return scene.torch_zip(scene.pickled, **others)


def by_opcode(text: bytes):
    """A pickle written by hand, for ways to a call that pickle.dumps does not take."""

    def make(scene) -> bytes:
        return scene.torch_zip(text.replace(b"CANARY", str(scene.canary).encode()))

    return make


def objects(scene) -> np.ndarray:
    class Payload:
        def __reduce__(self):
            import os

            return os.mkdir, (str(scene.canary),)

    return np.array([Payload()], dtype=object)


def object_npy(scene) -> bytes:
    file = io.BytesIO()
    np.save(file, objects(scene), allow_pickle=True)
    return file.getvalue()


def object_npz(scene) -> bytes:
    file = io.BytesIO()
    values = {name: objects(scene) for name in ("x_train", "y_train", "x_test", "y_test")}
    np.savez(file, allow_pickle=True, **values)
    return file.getvalue()


def code_in_header(scene) -> bytes:
    """A header of .npy is a Python expression; this one calls."""
    text = f"{{'descr': __import__('os').mkdir({str(scene.canary)!r}), 'fortran_order': False, 'shape': (1,), }}\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + bytes(8)


def pickled_extension(make_file):
    """Arrow's extension types of old were pickles in the metadata of a field."""

    def make(scene) -> bytes:
        import pyarrow as pa

        field = pa.field("x", pa.list_(pa.float32())).with_metadata(
            {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": scene.pickled}
        )
        schema = pa.schema([field, pa.field("image", pa.binary()), pa.field("label", pa.int64())])
        table = pa.table([pa.array([[1.0]] * 4, pa.list_(pa.float32())), pa.array([b"x"] * 4), [0, 1, 0, 1]], schema)
        return make_file(table)

    return make


def as_parquet(table) -> bytes:
    from pyarrow import parquet as pq

    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def as_arrow(table) -> bytes:
    from pyarrow import ipc

    file = io.BytesIO()
    with ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


def index(scene) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": {"classifier.weight": "part.bin"}}).encode()


INST = b"(S'CANARY'\nios\nmkdir\n."
OBJ = b"(cos\nmkdir\nS'CANARY'\no."
BUILTINS = b'c__builtin__\neval\n(S\'__import__("os").mkdir("CANARY")\'\ntR.'
COPYREG = b"ccopyreg\n__newobj__\n(cos\nmkdir\nS'CANARY'\ntR."
NESTED_GETATTR = b"c__builtin__\ngetattr\n(cos\nmkdir\nS'__call__'\ntR(S'CANARY'\ntR."
TORCH_LOAD = b"ctorch.serialization\nload\n(S'other.pt'\ntR."
TORCH_HUB = b"ctorch.hub\nload\n(S'evil/evil'\nS'evil'\ntR."

TRUST, DAMAGED, DATA, CORRUPT = (2, "--trust-code"), (5, ""), (5, ""), (9, "")
CASES = {
    "zip as checkpoint": (zipped, checkpoint("w.pt"), TRUST),
    "zip named .pth": (zipped, checkpoint("w.pth"), TRUST),
    "zip named .bin": (zipped, checkpoint("w.bin"), TRUST),
    "zip named .ckpt": (zipped, checkpoint("w.ckpt"), TRUST),
    "raw pickle": (raw, checkpoint("w.pt"), TRUST),
    "raw pickle named .tar": (raw, checkpoint("w.tar"), TRUST),
    "legacy format": (legacy, checkpoint("w.pt"), TRUST),
    "pickle in front of a zip": (headed_zip, checkpoint("w.pt"), TRUST),
    "a second pickle in the zip": (nested, checkpoint("w.pt"), TRUST),
    "the teacher of a distillation": (zipped, teacher, TRUST),
    "zip, read": (zipped, weights("w.pt"), (5, "could run code")),
    "raw pickle, read": (raw, weights("w.pt"), (5, "could run code")),
    "legacy format, read": (legacy, weights("w.pt"), (5, "could run code")),
    "pickle in front of a zip, read": (headed_zip, weights("w.pt"), (5, "could run code")),
    "a second pickle in the zip, read": (nested, weights("w.pt"), (5, "does not fit")),
    "tar with members that leave": (tar, weights("w.tar"), DAMAGED),
    "TorchScript": (torchscript, weights("w.pt"), (5, "TorchScript")),
    "INST": (by_opcode(INST), weights("w.pt"), DAMAGED),
    "OBJ": (by_opcode(OBJ), weights("w.pt"), DAMAGED),
    "eval": (by_opcode(BUILTINS), weights("w.pt"), (5, "could run code")),
    "copyreg": (by_opcode(COPYREG), weights("w.pt"), (5, "could run code")),
    "getattr": (by_opcode(NESTED_GETATTR), weights("w.pt"), (5, "could run code")),
    "torch.load inside": (by_opcode(TORCH_LOAD), weights("w.pt"), (5, "could run code")),
    "torch.hub inside": (by_opcode(TORCH_HUB), weights("w.pt"), (5, "could run code")),
    "joblib: zlib": (lambda scene: zlib.compress(scene.pickled), weights("w.pt"), DAMAGED),
    "joblib: gzip": (lambda scene: gzip.compress(scene.pickled), weights("w.bin"), DAMAGED),
    "joblib: bz2": (lambda scene: bz2.compress(scene.pickled), weights("w.ckpt"), DAMAGED),
    "pickle named .safetensors": (raw, weights("w.safetensors"), (5, "not a readable safetensors")),
    "torch zip named .safetensors": (zipped, weights("w.safetensors"), (5, "not a readable safetensors")),
    "pickle named .pkl": (raw, weights("w.pkl"), (5, "cannot tell the format")),
    "object array .npz": (object_npz, data_npz, (5, "holds Python objects")),
    "pickle named .npz": (raw, data_npz, DATA),
    "object array .npy": (object_npy, npy, (5, "holds Python objects")),
    "pickle named .npy": (raw, npy, DATA),
    "code in a header of .npy": (code_in_header, npy, DATA),
    "object array as --inputs": (object_npz, inputs, DATA),
    "pickle as --inputs": (raw, inputs, DATA),
    "our step checkpoint, checksum right": (zipped, step_checkpoint, CORRUPT),
    "our step checkpoint, legacy pickle": (legacy, step_checkpoint, CORRUPT),
    "our mask": (raw, mask, DATA),
    "pytorch_model.bin": (zipped, transformers_folder("pytorch_model.bin"), (5, "could run code")),
    "pytorch_model.bin, raw": (raw, transformers_folder("pytorch_model.bin"), DATA),
    "model.safetensors": (raw, transformers_folder("model.safetensors"), DATA),
    "a shard by an index": (index, transformers_folder("model.safetensors.index.json"), DATA),
    "extension type in Parquet": (pickled_extension(as_parquet), parquet, DATA),
    "extension type in Arrow": (pickled_extension(as_arrow), arrow, (0, "")),
}


@pytest.mark.parametrize("name", CASES)
def test_a_pickle_is_never_run(name: str, scene) -> None:
    make, act, (code, says) = CASES[name]
    ended = act(scene, make(scene))
    assert (ended.code, len(ended.lines)) == (code, 1 if code else 0), ended
    assert says in ended.err
    assert not scene.canary.exists()


def test_the_payload_works(scene) -> None:
    """Or the cases above would prove nothing."""
    pickle.loads(scene.pickled)
    assert scene.canary.is_dir()
    scene.canary.rmdir()


def test_what_was_not_shown_is_not_unpickled(scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """--trust-code is for the files it names: a checkpoint in which no objects were seen is read as data."""
    from sparsify_deploy.models import _pickled

    scene.write("own.py", "task = 3\n")
    scene.write("w.pt", zipped(scene))
    monkeypatch.setattr(_pickled, "objects_in", lambda path: ())
    model = "{source: builtin, params: {name: resnet8, in_channels: 1}, checkpoint: w.pt}"
    path = scene.recipe(model=model, task="{}")
    ended = scene.cli("run", path, "--trust-code", "--quiet")
    assert ended.code == 5
    assert "could run code" in ended.err


def test_code_in_a_folder_of_a_data_set_does_not_run(scene) -> None:
    """As data sets with a script of their own once did."""
    mark = f"import os; os.mkdir({str(scene.canary)!r})\n"
    for name in ("data.py", "dataset.py", "__init__.py", "setup.py", "conftest.py", "sitecustomize.py"):
        scene.write(f"data/{name}", mark)
    from sparsify_deploy.datasets import huggingface

    given = {"path": scene.folder / "data", "test_fraction": 0.5}
    ended = scene.refused(huggingface.open, huggingface.Params.model_validate(given))
    assert ended.code == 5
    assert len(ended.lines) == 1


AUTO = {
    "auto_map of a known type": {"model_type": "bert"},
    "auto_map of an unknown type": {"model_type": "evil"},
    "without a type": {},
}


@pytest.mark.parametrize("name", AUTO)
def test_code_beside_a_config_does_not_run(name: str, scene) -> None:
    from safetensors.numpy import save

    from sparsify_deploy.models import transformers as source

    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    own = {
        "auto_map": {
            "AutoConfig": "evil.Config",
            "AutoModelForSequenceClassification": "evil.Model",
            "AutoModel": "evil.Model",
        },
        "trust_remote_code": True,
        "_attn_implementation": "evil/kernel",
        "custom_pipelines": {"evil": {"impl": "evil.Pipe"}},
    }
    config = {**AUTO[name], **sizes, "vocab_size": 12, "max_position_embeddings": 16, **own}
    scene.write("hf/config.json", json.dumps(config))
    scene.write("hf/evil.py", f"import os; os.mkdir({str(scene.canary)!r})\nclass Config: ...\nclass Model: ...\n")
    scene.write("hf/model.safetensors", save({"w": np.zeros(2, np.float32)}))
    ended = scene.refused(source.build, source.Params(path=scene.folder / "hf", pretrained=False))
    assert ended.code in (0, 5), ended
    assert len(ended.lines) == bool(ended.code)


def test_an_adapter_does_not_lead_to_another_network(scene) -> None:
    from sparsify_deploy.models import transformers as source

    scene.write("hf/config.json", json.dumps({"model_type": "bert"}))
    scene.write("hf/adapter_config.json", json.dumps({"base_model_name_or_path": "evil/network"}))
    scene.write("hf/model.safetensors", b"")
    ended = scene.refused(source.build, source.Params(path=scene.folder / "hf"))
    assert ended.code == 5
    assert "holds an adapter" in ended.err


def test_the_zip_of_a_checkpoint_is_what_torch_takes_it_for(scene) -> None:
    """The names of objects are looked for in what torch would unpickle."""
    from sparsify_deploy.models._pickled import objects_in

    for make in (zipped, raw, legacy, headed_zip, nested):
        assert objects_in(scene.write("w.pt", make(scene))) == ("posix.mkdir",), make.__name__
    assert zipfile.is_zipfile(io.BytesIO(headed_zip(scene)))
    assert Path("w.pt").is_file()
