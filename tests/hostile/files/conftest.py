"""One good file of every kind that the package reads, and what reads it there."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

RANDOM = np.random.default_rng(0)


@dataclass(frozen=True)
class Kind:
    """`seeds` are good files, `name` is what a mutation of one is called, `read` takes its path as a verb does.

    `mutate` is a way of its own, for formats in which other bytes seldom come far. `sealed` gives a mutation the
    checksum that goes with it, so that the reader behind the checksum is reached.
    """

    name: str
    seeds: tuple[bytes, ...]
    read: Callable[[Path], object]
    is_json: bool = False
    mutate: Callable[[bytes, int], bytes] | None = None
    sealed: Callable[[bytes], bytes] = bytes


def npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def npz(compressed: bool) -> bytes:
    file = io.BytesIO()
    images = RANDOM.integers(0, 256, (12, 6, 6), dtype=np.uint8)
    labels = np.arange(12) % 3
    arrays = {"x_train": images, "y_train": labels, "x_test": images[:6], "y_test": labels[:6]}
    (np.savez_compressed if compressed else np.savez)(file, **arrays)
    return file.getvalue()


def onnx_files() -> tuple[bytes, ...]:
    """A float network, and a quantised one with an If."""
    weight = RANDOM.standard_normal((8, 4, 1, 1)).astype(np.float32)
    float_nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv", kernel_shape=[1, 1]),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["y"], name="flat"),
    ]
    branch = helper.make_graph(
        [helper.make_node("Identity", ["y"], ["b"])], "b", [], [helper.make_tensor_value_info("b", 1, ["n", 8, 5, 5])]
    )
    quantised = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["wq", "ws", "wz"], ["wd"], axis=0),
        helper.make_node("Conv", ["xd", "wd"], ["c"], name="conv"),
        helper.make_node("Relu", ["c"], ["y"], name="relu"),
        helper.make_node("If", ["t"], ["o"], then_branch=branch, else_branch=branch),
    ]
    constants = {
        "s": np.float32(0.1),
        "z": np.int8(0),
        "wq": (weight * 20).astype(np.int8),
        "t": np.array(True),
        "ws": np.full(8, 0.05, np.float32),
        "wz": np.zeros(8, np.int8),
    }
    files = []
    for nodes, held, output in (
        (float_nodes, {"w": weight}, ("y", ["batch", 8])),
        (quantised, constants, ("o", ["batch", 8, 5, 5])),
    ):
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4, 5, 5])],
            [helper.make_tensor_value_info(output[0], TensorProto.FLOAT, output[1])],
            [numpy_helper.from_array(np.asarray(values), name) for name, values in held.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        files.append(model.SerializeToString())
    return tuple(files)


def images() -> tuple[bytes, ...]:
    from PIL import Image

    files = []
    picture = Image.fromarray(RANDOM.integers(0, 256, (20, 24, 3), dtype=np.uint8))
    for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "TGA", "JPEG2000"):
        file = io.BytesIO()
        picture.save(file, name)
        files.append(file.getvalue())
    return tuple(files)


def parquet(column: str) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet as pq

    count = 20
    if column == "image":
        values = pa.array([{"bytes": content, "path": None} for content in [images()[0]] * count])
    else:
        values = pa.array([f"good film {i}" for i in range(count)])
    info = {"info": {"features": {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}}}
    table = pa.table({column: values, "label": pa.array([i % 2 for i in range(count)])})
    table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    file = io.BytesIO()
    pq.write_table(table, file, compression="snappy" if column == "image" else "none")
    return file.getvalue()


def arrow() -> bytes:
    import pyarrow as pa
    from pyarrow import ipc

    file = io.BytesIO()
    floats = pa.array(RANDOM.standard_normal((20, 4)).tolist(), pa.list_(pa.float32()))
    table = pa.table({"x": floats, "label": pa.array([i % 2 for i in range(20)])})
    with ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


def torch_files() -> dict[str, bytes]:
    import torch
    from safetensors.torch import save

    state = torch.nn.Linear(6, 3).state_dict()
    made = {"safetensors": save(state)}
    for name, new in (("zip", True), ("legacy", False)):
        file = io.BytesIO()
        torch.save({"state_dict": state}, file, _use_new_zipfile_serialization=new)
        made[name] = file.getvalue()
    return made


def sealed_checkpoint(payload: bytes) -> bytes:
    from sparsify_deploy.artifacts import seal
    from sparsify_deploy.artifacts.hashing import bytes_digest

    return seal.line(bytes_digest(payload, "blake3")) + payload


def chance_of(seed: int, among: Sequence[str]) -> str:
    return random.Random(seed).choice(among)


def in_zip(content: bytes, change: Callable[[bytes], bytes], name: str) -> bytes:
    """The archive `content` with one member changed behind its checksum, so that what reads the member is reached."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
        for info in old.infolist():
            inner = old.read(info)
            new.writestr(info.filename, change(inner) if info.filename.endswith(name) else inner)
    return file.getvalue()


def csv_text() -> bytes:
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(["text", "label"])
    writer.writerows([f'a good, "film" {i}', i % 2] for i in range(20))
    return file.getvalue().encode()


def other_graph(content: bytes, seed: int) -> bytes:
    """An ONNX file with other names, shapes, types and attributes, or a circle."""
    chance = random.Random(seed)
    model = onnx.load_from_string(content)
    graph, numbers = model.graph, (0, -1, 1, 2, 7, 2**31, 2**62, -(2**62))
    for _ in range(chance.choice((1, 1, 2, 4))):
        node, tensor = chance.choice(graph.node), chance.choice(graph.initializer)
        names = [*(t.name for t in graph.initializer), *(n for each in graph.node for n in each.output), "", "none"]
        match chance.randrange(13):
            case 0:
                tensor.dims[:] = [chance.choice(numbers) for _ in range(chance.randrange(6))]
            case 1:
                tensor.data_type = chance.randrange(30)
            case 2:
                node.op_type = chance.choice(
                    ("Gemm", "MatMul", "Transpose", "Cast", "Loop", "DequantizeLinear", "Evil")
                )
            case 3:
                node.input[:] = [chance.choice(names) for _ in range(chance.randrange(5))]
            case 4:
                node.output[:] = [chance.choice(names) for _ in range(chance.randrange(3))]
            case 5:
                node.domain = chance.choice(("com.microsoft", "evil", "ai.onnx.ml", "\x1b[31m"))
            case 6:
                del node.attribute[:]
            case 7:
                values = (chance.choice(numbers), [chance.choice(numbers)] * 3, "text", 1e30, tensor, [])
                name = chance.choice(("axis", "perm", "block_size", "kernel_shape", "to", "group", "value", "evil"))
                value = chance.choice(values)
                node.attribute.append(helper.make_attribute(name, value, attr_type=None if value != [] else 7))
            case 8:
                graph.input[0].type.tensor_type.elem_type = chance.randrange(40)
            case 9:
                shape = graph.input[0].type.tensor_type.shape
                shape.dim.add().dim_value = chance.choice(numbers)
            case 10:
                graph.node.append(chance.choice(graph.node))
            case 11:
                tensor.raw_data = chance.randbytes(chance.randrange(40))
            case _:
                tensor.name = chance.choice(("x", "\n| a </script>", tensor.name))
    return model.SerializeToString()


def other_header(content: bytes, seed: int) -> bytes:
    """A .safetensors file with other values in its header."""
    chance = random.Random(seed)
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = chance.choice(list(header))
    numbers = (0, -1, 1, 8, 2**31, 2**62, 2**64, 1.5, None, "x")
    match chance.randrange(6):
        case 0:
            header[name]["shape"] = [chance.choice(numbers) for _ in range(chance.randrange(4))]
        case 1:
            header[name]["data_offsets"] = [chance.choice(numbers) for _ in range(chance.choice((1, 2, 2, 2, 3)))]
        case 2:
            header[name]["dtype"] = chance.choice(("BOOL", "U8", "F64", "I64", "F8_E4M3", "BF16", "C64", "evil"))
        case 3:
            header[chance.choice(("__metadata__", "\x1b[31m", "", "module.weight"))] = header[name]
        case 4:
            del header[name]
        case _:
            header[name] = {**header[name], "dtype": "F16", "shape": [2**31, 2**31], "data_offsets": [0, 2**62]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


@pytest.fixture(scope="session")
def kinds(mutated, make_tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Kind]:
    """Every kind of file by name."""
    folder = tmp_path_factory.mktemp("good")
    tokenizer = make_tokenizer(folder / "tokenizer")
    state = torch_files()
    found = [*_arrays(mutated), *_models(state), *_data(tokenizer), *_notes(folder)]
    return {kind.name: kind for kind in found}


def _arrays(mutated: Callable[[bytes, int], bytes]) -> list[Kind]:
    from sparsify_deploy import predict
    from sparsify_deploy.datasets import npz as npz_source
    from sparsify_deploy.reporting import compare

    def other_member(content: bytes, seed: int) -> bytes:
        return in_zip(content, lambda inner: mutated(inner, seed), chance_of(seed, ("x_train.npy", "y_test.npy")))

    def read_data(path: Path) -> None:
        npz_source.open(npz_source.Params(path=path))

    plain = npy(RANDOM.standard_normal((3, 4)).astype(np.float32))
    return [
        Kind("d.npz", (npz(True), npz(False)), read_data),
        Kind("e.npz", (npz(True), npz(False)), read_data, mutate=other_member),
        Kind("inputs.npz", (npz(True), npz(False)), compare.read_inputs),
        Kind("one.npy", (plain, npy(np.arange(5)), npy(np.array("text"))), predict._arrays),
    ]


def _models(state: Mapping[str, bytes]) -> list[Kind]:
    from torch import nn

    from sparsify_deploy.graph import file
    from sparsify_deploy.graph.layers import weight_layers
    from sparsify_deploy.models._checkpoint import load_checkpoint
    from sparsify_deploy.models._external_data import locations
    from sparsify_deploy.models._pickled import objects_in
    from sparsify_deploy.reporting.layer_verdict import file_part
    from sparsify_deploy.sparsity.mask import Mask
    from sparsify_deploy.stages.subject import load_tensors
    from sparsify_deploy.training import checkpoint

    def graph(path: Path) -> None:
        locations(path)
        model = file.load(path)
        file.inputs(model), file.outputs(model), file.operators(model)
        file_part(weight_layers(model), 2, 4)

    def weights(path: Path) -> None:
        objects_in(path)
        load_checkpoint(nn.Linear(6, 3), path)

    def tensors(path: Path) -> None:
        load_tensors(path)
        Mask.load(path)

    archive = state["zip"]
    pickled = zipfile.ZipFile(io.BytesIO(archive))
    name = next(each for each in pickled.namelist() if each.endswith("data.pkl"))
    inside = pickled.read(name)
    return [
        Kind("m.onnx", onnx_files(), graph),
        Kind("n.onnx", onnx_files(), graph, mutate=other_graph),
        Kind("w.safetensors", (state["safetensors"],), weights),
        Kind("v.safetensors", (state["safetensors"],), weights, mutate=other_header),
        Kind("mask.safetensors", (state["safetensors"],), tensors),
        Kind("w.pt", (archive, state["legacy"]), weights),
        Kind("w.pth", (inside,), weights, sealed=lambda content: in_zip(archive, lambda _: content, "data.pkl")),
        Kind("step.ckpt", (archive,), checkpoint.read, sealed=sealed_checkpoint),
        Kind("plain.ckpt", (sealed_checkpoint(archive),), checkpoint.read),
    ]


def _data(tokenizer: Path) -> list[Kind]:
    from sparsify_deploy.datasets import huggingface, text
    from sparsify_deploy.datasets import parquet as parquet_source
    from sparsify_deploy.preprocessing.images import Decoder
    from sparsify_deploy.preprocessing.spec import TextSpec
    from sparsify_deploy.preprocessing.text import Encoder, padding

    def in_parquet(path: Path) -> None:
        given = {"path": path.parent, "train": path.name, "test_fraction": 0.2, "size": 8}
        parquet_source.open(parquet_source.Params.model_validate(given))

    def of_text(path: Path) -> None:
        given = {"path": path, "tokenizer": tokenizer, "test_fraction": 0.2}
        text.open(text.Params.model_validate(given))

    def in_arrow(path: Path) -> None:
        given = {"path": path, "test_fraction": 0.2, "input": "x"}
        huggingface.open(huggingface.Params.model_validate(given))

    def tokens(path: Path) -> None:
        path.with_name("tokenizer_config.json").write_text('{"pad_token": "[PAD]"}', encoding="utf-8")
        padding(path.parent)
        Encoder.open(path, TextSpec(max_length=16))(["a good film", "very bad plot \U0001f642 " * 20])

    def picture(path: Path) -> None:
        for decoder in (Decoder("RGB", 16, "crop"), Decoder("L", None)):
            decoder(path.read_bytes(), str(path))

    lines = b"\n".join(json.dumps({"text": f"film {i}", "label": "ab"[i % 2]}).encode() for i in range(20))
    made = (tokenizer / "tokenizer.json").read_bytes()
    return [
        Kind("picture", images(), picture),
        Kind("train-images.parquet", (parquet("image"),), in_parquet),
        Kind("texts.parquet", (parquet("text"),), of_text),
        Kind("texts.csv", (csv_text(),), of_text),
        Kind("texts.jsonl", (lines,), of_text),
        Kind("train.arrow", (arrow(),), in_arrow),
        Kind("tokenizer.json", (made,), tokens, is_json=True),
    ]


def _notes(folder: Path) -> list[Kind]:
    from sparsify_deploy.artifacts.digests import DigestCache
    from sparsify_deploy.artifacts.store import ArtifactStore
    from sparsify_deploy.prediction import gpus
    from sparsify_deploy.preprocessing import spec
    from sparsify_deploy.preprocessing.prepare import opened
    from sparsify_deploy.reporting import package
    from sparsify_deploy.runtimes import _metadata
    from sparsify_deploy.types import IOTensor

    parts: dict[str, Any] = {"stage": "train", "settings": {"seed": 0}}
    made = ArtifactStore(folder / "store")
    with made.lock():
        (made.begin("train", parts) / "w").write_bytes(b"weights")
        manifest = made.commit("train", parts, {"weights": "w"}, {"loss": 1.0}, 1.0).folder / "manifest.json"

    def committed(path: Path) -> None:
        store = ArtifactStore(path.parent / "store")
        home = store.folder / manifest.parent.name
        home.mkdir(parents=True, exist_ok=True)
        (home / "w").write_bytes(b"weights")
        (home / "manifest.json").write_bytes(path.read_bytes())
        if (found := store.find("train", parts)) is not None:
            store.check(found, "weights")

    def unfinished(path: Path) -> None:
        store = ArtifactStore(path.parent / "unfinished")
        partial = store.begin("train", parts)
        (partial / "w").write_bytes(b"weights")
        (partial / "manifest.json").write_bytes(path.read_bytes())
        with store.lock():
            store.find("train", parts)

    def recorded(path: Path) -> None:
        engine = path.with_name("net.engine")
        engine.write_bytes(b"\0engine")
        _metadata.check(engine, trust=False)
        _metadata.typical_shapes(engine, (IOTensor("x", (None, None), "int64"),), 4)

    def deployed(path: Path) -> None:
        (path.parent / "net.engine").write_bytes(b"\0engine")
        (path.parent / "net.engine.json").write_bytes(record)
        package.read(path.parent)

    def prepared(path: Path) -> None:
        found = spec.read(path)
        example = {"image": png, "array": np.zeros((3, 4), np.float32), "text": "a text"}[found.kind]
        opened(found, path.parent)([example], ["example"])

    png = images()[0]
    engine = hashlib.sha256(b"\0engine").hexdigest()
    sizes = {"axis_sizes": {"x": {"1": [1, 8, 16]}}, "architecture": "sm86"}
    record = json.dumps(
        {
            "format": 1,
            "runtime": "tensorrt",
            "version": "10.3.0",
            "params": {},
            "options": {},
            "files": {"net.engine": engine},
            "onnx_sha256": "0" * 64,
            "facts": sizes,
            "runs_here": True,
        }
    ).encode()
    note = {
        "format": 2,
        "model": "INT8",
        "runtime": "tensorrt",
        "engine": "net.engine",
        "task": {"name": "classification", "output": None},
        "sha256": {"net.engine": engine, "net.engine.json": hashlib.sha256(record).hexdigest()},
    }
    image = spec.ImageSpec("RGB", 8, "crop", (0.0,), (255.0,), classes=("a", "b"))
    array = spec.ArraySpec((spec.ArrayInput("x", "float32", (3, None), "any", (1.0,), (2.0,)),), example="a row")
    digests = {str(folder / "f"): {"stamp": [[1, 2, 3, 4]], "sha256": "0" * 64, "blake3": f"blake3:{'0' * 64}"}}
    specs = (image.to_text().encode(), array.to_text().encode())
    return [
        Kind("manifest.json", (manifest.read_bytes(),), committed, is_json=True),
        Kind("unfinished.json", (manifest.read_bytes(),), unfinished, is_json=True),
        Kind("net.engine.json", (record,), recorded, is_json=True),
        Kind("deploy.json", (json.dumps(note).encode(),), deployed, is_json=True),
        Kind("preprocessing.json", specs, prepared, is_json=True),
        Kind("gpus.json", (gpus._BUNDLED.read_bytes(),), gpus.load, is_json=True),
        Kind("digests.json", (json.dumps(digests).encode(),), lambda p: DigestCache(p).digest(p), is_json=True),
    ]
