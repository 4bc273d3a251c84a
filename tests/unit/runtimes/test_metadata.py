"""The record beside an engine: what is trusted, what is corrupt, what is no engine at all."""

from __future__ import annotations

import pytest

from sparsify_deploy.artifacts import durable
from sparsify_deploy.artifacts.fingerprint import file_digest
from sparsify_deploy.errors import CorruptArtifact, DataError, UsageError
from sparsify_deploy.runtimes import _metadata, openvino, tensorrt
from sparsify_deploy.types import BuildNotes

IR = '<?xml version="1.0"?><net name="tiny" version="11"><layers/></net>'


@pytest.fixture
def engine(tmp_path):
    path = tmp_path / "net.engine"
    path.write_bytes(b"ptrt\0\1\2\3" * 100)
    notes = BuildNotes("tensorrt", "10.9", ("net.engine",), 1.5, {"sparse": True}, True, facts={"layers_parsed": 3})
    _metadata.write_metadata(path, notes, "ab" * 32, tensorrt.Params())
    return path


def test_the_record_says_where_an_engine_comes_from(engine):
    record = _metadata.check(engine, trust=False)
    assert record == durable.read_json(engine.parent / "net.engine.json")
    assert record["runtime"] == "tensorrt"
    assert record["version"] == "10.9"
    assert record["options"] == {"sparse": True}
    assert record["onnx_sha256"] == "ab" * 32
    assert record["files"] == {"net.engine": file_digest(engine)}
    assert record["built"].endswith("+00:00")
    assert "cpu" in record["environment"]
    assert tensorrt.Params.model_validate(record["params"], strict=False) == tensorrt.Params()


def test_a_changed_engine_is_corrupt_even_when_trusted(engine):
    engine.write_bytes(engine.read_bytes()[:-1] + b"x")
    for trust in (False, True):
        with pytest.raises(CorruptArtifact, match=r"not the ones net\.engine\.json lists"):
            _metadata.check(engine, trust=trust)


def test_no_record_needs_the_flag(engine):
    _metadata.metadata_path(engine).unlink()
    with pytest.raises(UsageError, match="--trust-engine"):
        _metadata.check(engine, trust=False)
    assert _metadata.check(engine, trust=True) is None


def test_a_record_of_another_engine_is_corrupt(engine):
    other = engine.with_name("other.engine")
    other.write_bytes(engine.read_bytes())
    _metadata.metadata_path(engine).rename(_metadata.metadata_path(other))
    with pytest.raises(CorruptArtifact, match="another engine"):
        _metadata.check(other, trust=False)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 3, "runtime": "tensorrt"}', "\x00"])
def test_a_broken_record_is_corrupt(engine, text):
    _metadata.metadata_path(engine).write_text(text)
    with pytest.raises(CorruptArtifact):
        _metadata.check(engine, trust=False)


def test_every_file_of_an_engine_is_verified(tmp_path):
    path, weights = tmp_path / "net.xml", tmp_path / "net.bin"
    path.write_text(IR)
    weights.write_bytes(b"weights")
    notes = BuildNotes("openvino", "2026", ("net.xml", "net.bin"), 0.1, {}, True)
    _metadata.write_metadata(path, notes, "0" * 64, openvino.Params())
    assert _metadata.check(path, trust=False)["runtime"] == "openvino"
    weights.write_bytes(b"other weights")
    with pytest.raises(CorruptArtifact, match=r"net\.bin"):
        _metadata.check(path, trust=False)


def test_a_name_in_a_record_cannot_leave_the_folder(engine):
    path = _metadata.metadata_path(engine)
    record = durable.read_json(path)
    record["files"]["../outside"] = "0" * 64
    durable.write_json(path, record)
    with pytest.raises(CorruptArtifact, match=r"outside.*not a record|not a record of an engine .*outside"):
        _metadata.check(engine, trust=False)


@pytest.mark.parametrize(
    ("name", "runtime"),
    [
        ("a.engine", "tensorrt"),
        ("a.rtx.engine", "tensorrt_rtx"),
        ("a.b.onnx", "onnxruntime"),
        ("a.xml", "openvino"),
    ],
)
def test_the_suffix_names_the_runtime(tmp_path, name, runtime):
    assert _metadata.runtime_of(tmp_path / name) == runtime


def test_an_unknown_suffix_lists_the_known_ones(tmp_path):
    with pytest.raises(DataError, match=r"\.engine \(tensorrt\), .*\.rtx\.engine \(tensorrt_rtx\), \.xml \(openvino\)"):
        _metadata.runtime_of(tmp_path / "a.pt")


BOMB = '<!DOCTYPE net [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><net>&b;</net>'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.engine", b"", "the file is empty"),
        ("a.rtx.engine", b"", "the file is empty"),
        ("a.engine", b"hello, I am text\n", "plain text"),
        ("a.onnx", b"", "empty"),
        ("a.onnx", b"\x00\x01 junk", "no ONNX"),
        ("a.xml", b"", "the file is empty"),
        ("a.xml", b"\x00\xff\x01", "not well-formed XML"),
        ("a.xml", b"<net><layers>", "not well-formed XML"),
        ("a.xml", b"<html></html>", "root element is <html>"),
        ("a.xml", BOMB.encode(), "document type declaration"),
        ("a.xml", IR.encode(), r"its weights a\.bin are not beside it"),
    ],
)
def test_junk_is_a_data_error_without_any_runtime(tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr("sparsify_deploy.runtimes._packages.installed", lambda module: False)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        _metadata.check(tmp_path / name, trust=True)
    assert caught.value.exit_code == 5
    assert "\n" not in str(caught.value)


def test_a_missing_engine_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        _metadata.check(tmp_path / "a.engine", trust=True)
