"""Small files that claim to be huge: refused before they are unpacked, in one line and with little memory."""

from __future__ import annotations

import io
import json
import os
import resource
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

LITTLE_KIB = 300 << 10
"""What a case may add to the peak of memory."""


def npy_header(shape: tuple[int, ...], dtype: str = "<f4") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def bomb_npz(scene) -> Path:
    """70 MiB of zeros in 300 KiB."""
    path = scene.folder / "d.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in ("x_train",):
            with archive.open(f"{name}.npy", "w") as member:
                member.write(npy_header((70, 1024, 1024), "|u1"))
                for _ in range(70):
                    member.write(bytes(1 << 20))
        for name, count in (("y_train", 70), ("x_test", 7), ("y_test", 7)):
            archive.writestr(f"{name}.npy", npy_header((count,), "|u1") + bytes(count))
    return path


def claiming_npz(scene) -> Path:
    """Headers that claim more than follows."""
    path = scene.folder / "d.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("x_train", "y_train", "x_test", "y_test"):
            archive.writestr(f"{name}.npy", npy_header((10**6, 10**6)) + bytes(64))
    return path


def lying_npz(scene) -> Path:
    """A member whose directory entry says 1 TB."""
    path = claiming_npz(scene)
    content = bytearray(path.read_bytes())
    at = content.find(b"PK\x01\x02")
    content[at + 24 : at + 28] = struct.pack("<I", 0xFFFFFFF0)
    path.write_bytes(content)
    return path


def read_npz(scene, path: Path):
    from sparsify_deploy.datasets import npz

    return scene.refused(npz.open, npz.Params(path=path))


def inputs(scene, path: Path):
    from sparsify_deploy.reporting.compare import read_inputs

    return scene.refused(read_inputs, path)


def npy(scene, path: Path):
    from sparsify_deploy.predict import _arrays

    return scene.refused(_arrays, path)


def weights(scene, path: Path):
    from torch import nn

    from sparsify_deploy.models._checkpoint import load_checkpoint
    from sparsify_deploy.models._pickled import objects_in

    assert objects_in(path) == ()
    return scene.refused(load_checkpoint, nn.Linear(2, 2), path)


def picture(scene, path: Path):
    from sparsify_deploy.preprocessing.images import Decoder

    return scene.refused(Decoder("RGB", 32, "crop"), path.read_bytes(), str(path))


def huge_npy(shape: tuple[int, ...], dtype: str = "<f4"):
    return lambda scene: scene.write("one.npy", npy_header(shape, dtype) + bytes(64))


def deflated_pt(member: str):
    """A torch archive with a member that was compressed, which torch.save never does."""

    def make(scene) -> Path:
        path = scene.folder / "w.pt"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.writestr("evil/version", "3\n")
            with archive.open(member, "w") as stream:
                for _ in range(20):
                    stream.write(bytes(1 << 20))
        return path

    return make


def overlapping_pt(scene) -> Path:
    """Many members that are the same bytes of the archive."""
    path = scene.folder / "w.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("evil/data/0", bytes(1 << 20))
        (first,) = archive.infolist()
        for i in range(1, 3000):
            copy = zipfile.ZipInfo(f"evil/data/{i}")
            for field in ("header_offset", "compress_size", "file_size", "CRC", "compress_type"):
                setattr(copy, field, getattr(first, field))
            archive.filelist.append(copy)
            archive.NameToInfo[copy.filename] = copy
    return path


def itself_pt(scene) -> Path:
    """A mapping that holds itself under the key where state dicts are looked for."""
    import torch

    found: dict[str, object] = {}
    found["state_dict"] = found
    torch.save(found, scene.folder / "w.pt")
    return scene.folder / "w.pt"


def stretched_pt(scene) -> Path:
    """One value that says it is a million million, of the right names."""
    import torch

    state = {"weight": torch.zeros(1).expand(10**6, 10**6), "bias": torch.zeros(2)}
    torch.save(state, scene.folder / "w.pt")
    return scene.folder / "w.pt"


def odd_pt(kind: str):
    """Tensors that are no plain ones."""

    def make(scene) -> Path:
        import torch

        made = {
            "sparse": lambda: torch.zeros(2, 2).to_sparse(),
            "meta": lambda: torch.zeros(2, 2, device="meta"),
            "quantised": lambda: torch.quantize_per_tensor(torch.zeros(2, 2), 1.0, 0, torch.qint8),
        }[kind]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quantised tensors are on their way out of torch
            made = made()
        torch.save({"weight": made, "bias": torch.zeros(2)}, scene.folder / "w.pt")
        return scene.folder / "w.pt"

    return make


def safetensors(size: int, header: bytes):
    return lambda scene: scene.write("w.safetensors", struct.pack("<Q", size) + header)


HUGE_TENSOR = json.dumps({"weight": {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 2**62]}}).encode()


def png(width: int, height: int, **chunks: bytes):
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    def make(scene) -> Path:
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        others = b"".join(chunk(kind.encode(), body) for kind, body in chunks.items())
        pixels = chunk(b"IDAT", zlib.compress(bytes(1 << 16)))
        return scene.write("a.png", b"\x89PNG\r\n\x1a\n" + header + others + pixels + chunk(b"IEND", b""))

    return make


def gif(scene) -> Path:
    """A canvas of 4 GiB for a picture of 8 x 8."""
    head = b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0x80, 0, 0) + bytes(6)
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 8, 8, 0) + b"\x02\x02\x84\x51\x00"
    return scene.write("a.gif", head + frame + b"\x3b")


def of_pillow(name: str, size: tuple[int, int], at: int, number: bytes):
    """A small image in a format of Pillow's, its size overwritten."""

    def make(scene) -> Path:
        from PIL import Image

        file = io.BytesIO()
        Image.new("RGB", size).save(file, name)
        content = bytearray(file.getvalue())
        content[at : at + len(number)] = number
        return scene.write(f"a.{name.lower()}", bytes(content))

    return make


def postscript(scene) -> Path:
    """Pillow would hand it to Ghostscript, which executes it."""
    text = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n({scene.canary}) (w) file closefile\nshowpage\n"
    return scene.write("a.png", text)


TEXT_BOMB = b"key\x00\x00" + zlib.compress(bytes(80 << 20), 1)

CASES = {
    "zip bomb as data": (bomb_npz, read_npz, "would be inflated to"),
    "zip bomb as --inputs": (bomb_npz, inputs, "would be inflated to"),
    "headers of .npz that claim more": (claiming_npz, read_npz, "more than the file holds"),
    "a directory of .npz that lies": (lying_npz, read_npz, ""),
    "a header of .npy that claims more": (huge_npy((10**6, 10**6)), npy, "more than the file holds"),
    "a header of .npy below zero": (huge_npy((-1, -4)), npy, "more than the file holds"),
    "a header of .npy with huge texts": (huge_npy((1,), "<U500000000"), npy, "more than the file holds"),
    "a header of .npy of nothing": (huge_npy((10**15,), "|V0"), npy, "neither numbers nor texts"),
    "a header of .npy of 70 axes": (huge_npy((1,) * 70), npy, ""),
    "compressed tensors": (deflated_pt("evil/data/0"), weights, "would be unpacked to"),
    "a compressed pickle": (deflated_pt("evil/data.pkl"), weights, "would be unpacked to"),
    "members that overlap": (overlapping_pt, weights, "would be unpacked to"),
    "a state dict that holds itself": (itself_pt, weights, "state_dict"),
    "a tensor stretched from one value": (stretched_pt, weights, "of another shape"),
    "a sparse tensor": (odd_pt("sparse"), weights, "expected plain tensors"),
    "a tensor on no device": (odd_pt("meta"), weights, "expected plain tensors"),
    "a quantised tensor": (odd_pt("quantised"), weights, "expected plain tensors"),
    "a header of 2**63 bytes": (safetensors(2**63, b"{}"), weights, "not a readable safetensors"),
    "a header beyond the file": (safetensors(2**30, b"{}"), weights, "not a readable safetensors"),
    "a tensor beyond the file": (safetensors(len(HUGE_TENSOR), HUGE_TENSOR), weights, "not a readable safetensors"),
    "deep JSON in a header": (safetensors(100_000, b"[" * 100_000), weights, "not a readable safetensors"),
    "PNG of 100,000 x 100,000": (png(100_000, 100_000), picture, "cannot be decoded"),
    "PNG of 8,400 x 8,400": (png(8_400, 8_400), picture, "more than 67,108,864"),
    "PNG of 12,000 x 12,000": (png(12_000, 12_000), picture, "cannot be decoded"),
    "PNG of one line": (png(60_000_000, 1), picture, ""),
    "PNG with a text bomb": (png(8, 8, zTXt=TEXT_BOMB), picture, "cannot be decoded"),
    "PNG with a profile bomb": (png(8, 8, iCCP=TEXT_BOMB), picture, "cannot be decoded"),
    "GIF of 65,535 x 65,535": (gif, picture, "cannot be decoded"),
    "JPEG of 65,535 x 65,535": (of_pillow("JPEG", (8, 8), 163, b"\xff\xff\xff\xff"), picture, "cannot be decoded"),
    "BMP of 2**31 x 2**31": (of_pillow("BMP", (8, 8), 18, b"\xff\xff\xff\x7f" * 2), picture, "cannot be decoded"),
    "TGA of 65,535 x 65,535": (of_pillow("TGA", (8, 8), 12, b"\xff" * 4), picture, "cannot be decoded"),
    "PostScript": (postscript, picture, "cannot identify image file"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_bomb_does_not_go_off(name: str, scene) -> None:
    make, read, says = CASES[name]
    path = make(scene)
    before = peak_kib()
    ended = read(scene, path)
    assert (ended.code, len(ended.lines)) == (5, 1), ended
    assert says in ended.err
    assert peak_kib() - before < LITTLE_KIB


def peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_a_gif_of_many_frames_is_its_first(scene) -> None:
    from PIL import Image

    frames = [Image.fromarray(np.full((8, 8), i % 256, np.uint8)) for i in range(2000)]
    frames[0].save(scene.folder / "a.gif", save_all=True, append_images=frames[1:])
    assert picture(scene, scene.folder / "a.gif").code == 0


@pytest.mark.parametrize("kind", ["image", "text"])
def test_rows_that_do_not_fit_into_memory_are_refused_before_they_are_read(kind, scene, make_tokenizer, monkeypatch):
    """A page of Parquet may stand for any number of rows; here the machine is made small instead."""
    import pyarrow as pa
    from pyarrow import parquet as pq

    from sparsify_deploy.datasets import parquet, text

    rows = pa.array(["good film"] * 200_000) if kind == "text" else pa.array([b"x"] * 200_000)
    pq.write_table(pa.table({kind: rows, "label": pa.array([0, 1] * 100_000)}), scene.folder / "train-0.parquet")
    assert (scene.folder / "train-0.parquet").stat().st_size < 20_000
    monkeypatch.setattr(os, "sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 500)
    given = {"path": scene.folder, "test_fraction": 0.2}
    if kind == "text":
        tokenizer = make_tokenizer(scene.folder / "tokenizer")
        params = text.Params.model_validate({**given, "tokenizer": tokenizer})
        ended = scene.refused(text.open, params)
    else:
        ended = scene.refused(parquet.open, parquet.Params.model_validate({**given, "size": 8}))
    assert ended.code == 5
    assert "200,000 rows" in ended.err


def test_alike_arrays_that_are_no_bomb_are_read(scene) -> None:
    """Compressible is not hostile: labels and masks are."""
    from sparsify_deploy.datasets import npz

    values = {"x_train": np.zeros((60, 64, 64), np.uint8), "y_train": np.arange(60) % 2}
    np.savez_compressed(scene.folder / "d.npz", **values, x_test=values["x_train"], y_test=values["y_train"])
    assert read_npz(scene, scene.folder / "d.npz").code == 0
    assert len(npz.open(npz.Params(path=scene.folder / "d.npz")).split("train")) == 60


YAML = {
    "alias bomb": "a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\n"
    + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "alias bomb of mappings": "a: &a {x: 1, y: 2}\n"
    + "".join(
        f"{b}: &{b} {{x: *{a}, y: *{a}}}\n" for a, b in zip("abcdefghijklmnopqrst", "bcdefghijklmnopqrstu", strict=True)
    ),
    "merge bomb": "a: &a {x: 1}\n" + "".join(f"m{i}: {{<<: [{', '.join(['*a'] * 50)}]}}\n" for i in range(500)),
    "an alias of itself": "version: 1\nmodel: &m {params: *m}\n",
    "a tag of Python": "version: 1\nmodel: !!python/object/apply:os.mkdir [CANARY]\n",
    "a tag of Python's names": "version: 1\nseed: !!python/name:os.mkdir\n",
    "a tag of a module": "version: 1\nseed: !!python/module:os\n",
    "a tag of an object": "version: 1\nmodel: !!python/object:os.mkdir {path: CANARY}\n",
    "a tag by its whole name": "version: 1\nmodel: !<tag:yaml.org,2002:python/object/apply:os.mkdir> [CANARY]\n",
    "a tag by a handle": "%TAG !p! tag:yaml.org,2002:python/\n---\nmodel: !p!object/apply:os.mkdir [CANARY]\n",
    "deep lists": "version: " + "[" * 5000 + "]" * 5000 + "\n",
    "deep mappings": "version: " + "{a: " * 5000 + "1" + "}" * 5000 + "\n",
    "a long line": "version: 1\nname: " + "x" * 900_000 + "\n",
    "a long key": "k" * 900_000 + ": 1\n",
    "many keys": "".join(f"k{i}: 1\n" for i in range(21_000)),
    "many lists": "version: [" + "1," * 400_000 + "]\n",
    "open quotes": 'version: "' + "x\n" * 100_000,
    "a number of a million digits": "version: " + "9" * 1_000_000 + "\n",
    "question marks": "? " * 300_000 + "\n",
    "dashes": "- " * 300_000 + "\n",
    "anchors": "".join(f"k{i}: &a{i} 1\n" for i in range(30_000)),
    "more than a MiB": "# " + "x" * (1 << 20) + "\nversion: 1\n",
}


@pytest.mark.parametrize("name", YAML)
def test_a_recipe_is_no_bomb_and_no_program(name: str, scene) -> None:
    path = scene.write("r.yaml", YAML[name].replace("CANARY", str(scene.canary)))
    before, used = peak_kib(), resource.getrusage(resource.RUSAGE_SELF).ru_utime
    ended = scene.cli("validate", path)
    assert ended.code == 2
    assert all(line.startswith("sparsify-deploy: r.yaml:") and len(line) < 800 for line in ended.lines), ended.err[:900]
    assert peak_kib() - before < LITTLE_KIB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - used < 10


def test_a_tokenizer_that_ends_its_thread_is_one_line(scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A panic of Rust is no Exception, so that only who asks for it gets it."""
    import tokenizers

    from sparsify_deploy.preprocessing.spec import TextSpec
    from sparsify_deploy.preprocessing.text import Encoder

    class PanicException(BaseException):
        pass

    def ends(path: str) -> None:
        raise PanicException("called `Option::unwrap()` on a `None` value")

    monkeypatch.setattr(tokenizers.Tokenizer, "from_file", ends)
    ended = scene.refused(Encoder.open, scene.write("tokenizer.json", "{}"), TextSpec(max_length=8))
    assert (ended.code, len(ended.lines)) == (5, 1)
    assert "is no tokenizer, or is damaged" in ended.err


def test_a_user_who_stops_it_is_not_a_damaged_tokenizer(scene, monkeypatch: pytest.MonkeyPatch) -> None:
    import tokenizers

    from sparsify_deploy.preprocessing.spec import TextSpec
    from sparsify_deploy.preprocessing.text import Encoder

    def stopped(path: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizers.Tokenizer, "from_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        Encoder.open(scene.write("tokenizer.json", "{}"), TextSpec(max_length=8))
