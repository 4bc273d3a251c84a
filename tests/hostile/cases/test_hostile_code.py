"""Code of the user's runs where they say so, and then the code that they were shown; engines likewise."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import zipfile
from pathlib import Path

import pytest

from sparsify_deploy.artifacts.fingerprint import file_digest
from sparsify_deploy.errors import DataError, SparsifyError
from sparsify_deploy.runtimes import _metadata, _signature
from sparsify_deploy.safety import usercode
from sparsify_deploy.types import Silent
from sparsify_deploy.workspace import open_run

MARK = "import os; os.mkdir({canary!r})\n"
OWN = {
    "model": {"model": "{source: file, params: {path: own.py}}"},
    "data": {"data": "{source: file, params: {path: own.py}}"},
    "task": {"task": "{name: file, params: {path: own.py}}"},
    "checkpoint": {"model": "{source: builtin, params: {name: resnet8, in_channels: 1}, checkpoint: own.pt}"},
    "teacher": {
        "nm": "{fine_tune: {steps: 2}}",
        "training": "{steps: 2}",
        "distillation": "{teacher: own.pt, phases: [fine_tune]}",
    },
}
VERBS = {
    "validate": ["validate", "r.yaml"],
    "validate --set": ["validate", "r.yaml", "--set", "task.params.path=own.py", "--set", "task.name=file"],
    "plan": ["plan", "r.yaml"],
    "status": ["status", "r.yaml"],
    "explain": ["explain", "r.yaml"],
    "run": ["run", "r.yaml"],
    "sensitivity": ["sensitivity", "r.yaml"],
    "report": ["report", "runs/r"],
    "inspect": ["inspect", "own.py"],
    "inspect of a checkpoint": ["inspect", "own.pt"],
    "bench": ["bench", "own.py"],
    "build": ["build", "own.py"],
    "predict": ["predict", ".", "own.py"],
    "verify": ["verify", "."],
    "clean": ["clean", "."],
    "list": ["list"],
    "init": ["init", "--model", "file:own.py", "--data", "digits", "-o", "new.yaml"],
    "init with a checkpoint": ["init", "--model", "builtin:resnet8", "--data", "digits", "--checkpoint", "own.pt"],
}


def put_code(scene) -> None:
    """A Python file and a checkpoint that each leave the canary, and files that an import might find by mistake."""
    mark = MARK.format(canary=str(scene.canary))
    scene.write("own.py", mark + "model = data = task = 3\n")
    scene.write("own.pt", scene.torch_zip(scene.pickled))
    for name in ("torch", "numpy", "onnx", "onnxruntime", "openvino", "yaml", "conftest", "sitecustomize", "typer"):
        scene.write(f"{name}.py", mark)


@pytest.mark.parametrize("section", OWN)
@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_runs_it_unasked(verb: str, section: str, scene) -> None:
    put_code(scene)
    scene.recipe(**OWN[section])
    ended = scene.cli(*VERBS[verb])
    assert "internal error" not in ended.err
    assert not scene.canary.exists()


class Swapping(Silent):
    """Replaces a file as soon as its sha256 was shown."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path, self.content, self.said = path, content, ""

    def say(self, message: str) -> None:
        if message.startswith("trusted: ") and not self.said:
            self.said = message
            self.path.write_bytes(self.content)


@pytest.mark.parametrize("section", ["model", "data", "task", "checkpoint"])
def test_what_runs_is_what_was_shown_and_not_what_took_its_place(section: str, scene) -> None:
    scene.write("own.py", "model = data = task = 3\n")
    scene.write("own.pt", scene.torch_zip(b"cos\ngetcwd\n(tR."))
    path = Path("own.pt" if section == "checkpoint" else "own.py")
    shown = file_digest(path)
    evil = MARK.format(canary=str(scene.canary)).encode() + b"model = data = task = 3\n"
    swapping = Swapping(path, scene.torch_zip(scene.pickled) if section == "checkpoint" else evil)
    opened = open_run(scene.recipe(**OWN[section]), trust_code=True)
    with pytest.raises(SparsifyError, match=f"has changed since its sha256 {shown} was trusted") as caught:
        opened.run(swapping, device="cpu", checkpoint_every_s=30.0)
    assert f"(sha256 {shown})" in swapping.said
    assert len(caught.value.lines) == 1


def test_a_file_that_stays_as_shown_runs(scene) -> None:
    ran = scene.folder / "ran"
    scene.write("own.py", MARK.format(canary=str(ran)) + "model = data = task = 3\n")
    path = scene.recipe(**OWN["model"])
    ended = scene.cli("run", path, "--trust-code", "--quiet")
    assert ended.code == 5
    assert ran.is_dir()


def test_a_digest_that_is_remembered_is_not_taken_for_the_bytes(scene) -> None:
    """The store remembers digests by size and times; what is shown before code runs is hashed anew."""
    scene.write("own.py", "model = 3\n")
    path = scene.recipe(**OWN["model"])
    opened = open_run(path)
    digests = opened.store.digests
    opened.store.folder.mkdir(parents=True)
    known = digests.hash(Path("own.py").resolve())
    digests.digest = lambda path: known  # type: ignore[method-assign]
    scene.write("own.py", "model = 4\n")
    (line,) = opened.code_lines()
    assert f"(sha256 {file_digest(Path('own.py'))})" in line


def test_only_what_was_approved_is_bound_to_its_bytes(scene) -> None:
    path = scene.write("own.py", "model = 3\n")
    usercode.check_approved(path, b"anything", DataError)
    usercode.approve(path, hashlib.sha256(b"model = 3\n").hexdigest())
    usercode.check_approved(path, b"model = 3\n", DataError)
    link = scene.folder / "link.py"
    link.symlink_to(path)
    with pytest.raises(DataError, match="has changed since"):
        usercode.check_approved(link, b"model = 4\n", DataError)


# -- engines -------------------------------------------------------------------------------------------------------


def forged(scene, suffix: str, made_by: str, **changes: object) -> Path:
    """An engine with a record that fits it, both from somebody else."""
    engine = scene.write(f"net{suffix}", b"\0code for a GPU")
    record = {
        "format": 1,
        "runtime": made_by,
        "version": "10.3.0",
        "params": {"version_compatible": True},
        "facts": {},
        "files": {engine.name: file_digest(engine)},
        "onnx_sha256": "0" * 64,
        "options": {},
        **changes,
    }
    scene.write(f"net{suffix}.json", json.dumps(record))
    return engine


TRT = [(".engine", "tensorrt"), (".rtx.engine", "tensorrt_rtx")]


@pytest.mark.parametrize(("suffix", "runtime"), TRT)
@pytest.mark.parametrize("signature", [None, "", "0" * 64, 3, ["0" * 64]], ids=repr)
def test_an_engine_with_a_record_of_a_stranger_is_not_opened(suffix, runtime, signature, scene, monkeypatch) -> None:
    monkeypatch.setattr("sparsify_deploy.runtimes._trt.probe_reason", lambda flavour: pytest.fail("it was looked at"))
    changes = {} if signature is None else {_signature.FIELD: signature}
    _signature.signed({})  # there is a key
    engine = forged(scene, suffix, runtime, **changes)
    for verb in (["bench", engine], ["inspect", engine, "--profile"]):
        ended = scene.cli(*verb)
        assert (ended.code, len(ended.lines)) == (2, 1), ended
        assert "was not built here by you" in ended.err
        assert "--trust-engine" in ended.err


def test_a_deployed_engine_of_a_stranger_is_not_opened(scene) -> None:
    engine = forged(scene, ".engine", "tensorrt", params={})
    spec = {"format": 1, "kind": "array", "inputs": [{"name": "x", "dtype": "float32", "shape": [2]}]}
    scene.write("preprocessing.json", json.dumps(spec))
    names = (engine.name, f"{engine.name}.json", "preprocessing.json")
    note = {
        "format": 2,
        "model": "m",
        "runtime": "tensorrt",
        "engine": engine.name,
        "task": {"name": "regression"},
        "sha256": {name: file_digest(scene.folder / name) for name in names},
    }
    scene.write("deploy.json", json.dumps(note))
    scene.write("x.npy", b"")
    ended = scene.cli("predict", ".", "x.npy")
    assert (ended.code, len(ended.lines)) == (2, 1), ended
    assert "was not built here by you" in ended.err


@pytest.mark.parametrize(("suffix", "runtime"), TRT)
def test_what_the_user_built_is_theirs(suffix: str, runtime: str, scene) -> None:
    engine = forged(scene, suffix, runtime)
    path = _metadata.metadata_path(engine)
    record = json.loads(path.read_bytes())
    path.write_text(json.dumps(_signature.signed(record)), encoding="utf-8")
    _metadata.check_own(engine, trust=False)
    changed = {**json.loads(path.read_bytes()), "params": {}}
    path.write_text(json.dumps(changed), encoding="utf-8")
    assert scene.refused(lambda: _metadata.check_own(engine, trust=False)).code == 2
    assert scene.refused(lambda: _metadata.check_own(engine, trust=True)).code == 0


def test_a_key_is_the_users_own_and_made_once(scene) -> None:
    record = _signature.signed({"a": 1.5, "b": [1, None, "\u202e"]})
    assert _signature.is_own(json.loads(json.dumps(record)))
    place = scene.folder / "state" / "sparsify-deploy" / "engines.key"
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    assert os.listdir(place.parent) == ["engines.key"]
    assert _signature.signed({"a": 1.5, "b": [1, None, "\u202e"]}) == record
    place.write_bytes(bytes(32))
    assert not _signature.is_own(record)
    place.write_bytes(b"short")
    assert _signature.FIELD not in _signature.signed({"a": 1})
    place.unlink()
    os.mkfifo(place)
    assert _signature.FIELD not in _signature.signed({"a": 1})
    assert not _signature.is_own(record)


@pytest.mark.parametrize(
    ("changes", "code"),
    [({"files": {"net.engine": "0" * 64}}, 9), ({"runtime": "openvino"}, 9), ({"files": {}}, 9), ({"params": 3}, 9)],
    ids=repr,
)
def test_a_record_that_does_not_fit_is_never_excused(changes: dict[str, object], code: int, scene) -> None:
    engine = forged(scene, ".engine", "tensorrt", **changes)
    for flag in ([], ["--trust-engine"]):
        ended = scene.cli("bench", engine, *flag)
        assert (ended.code, len(ended.lines)) == (code, 1), ended


def test_an_engine_without_a_record_is_not_opened(scene) -> None:
    for name in ("net.engine", "net.rtx.engine"):
        ended = scene.cli("bench", scene.write(name, b"\0code"))
        assert (ended.code, len(ended.lines)) == (2, 1), ended
        assert "--trust-engine" in ended.err


def test_an_ir_with_entities_is_not_read(scene) -> None:
    bomb = '<?xml version="1.0"?><!DOCTYPE net [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><net>&b;</net>'
    scene.write("m.bin", b"")
    for text in (bomb, '<!DOCTYPE net SYSTEM "file:///etc/passwd"><net/>'):
        ended = scene.cli("inspect", scene.write("m.xml", text), "--trust-engine")
        assert (ended.code, len(ended.lines)) == (5, 1), ended
        assert "document type" in ended.err


def test_a_zip_in_the_place_of_a_python_file_is_no_module(scene) -> None:
    with zipfile.ZipFile(scene.folder / "own.py", "w") as archive:
        archive.writestr("__main__.py", MARK.format(canary=str(scene.canary)))
    ended = scene.cli("run", scene.recipe(**OWN["model"]), "--trust-code", "--quiet")
    assert (ended.code, len(ended.lines)) == (5, 1), ended
